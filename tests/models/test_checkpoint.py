"""Student files: round trip of the header, and detection of any changed byte."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from cskd_pipeline.errors import WeightsError
from cskd_pipeline.models.checkpoint import (
    OversizeError,
    StudentHeader,
    _limit_registered,
    bounded_student,
    load_student,
    read_header,
    read_student,
    save_student,
    student_file,
)
from cskd_pipeline.models.student import Student, create_student
from tests.processes import server

CPU = torch.device("cpu")
CARD = StudentHeader(
    model="deit_tiny_distilled_patch16_224",
    num_classes=3,
    size=16,
    heads=("cls", "dist", "dense"),
    method="cskd",
    kwargs={"patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2},
    grid=(2, 2),
    crop_pct=0.875,
    interpolation="bilinear",
    top1=51.5,
    epoch=4,
    class_names=("a", "b", "c"),
    dataset="digits",
    teacher="resnet10t",
    recipe_sha256="a" * 64,
    cache_sha256="b" * 64,
)


def student_of(header: StudentHeader = CARD) -> Student:
    torch.manual_seed(0)
    return create_student(
        header.model, num_classes=header.num_classes, size=header.size, kwargs=header.kwargs
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_student(tmp_path / "best.safetensors", student_of().model.state_dict(), CARD)
    return tmp_path / "best.safetensors"


def header_of(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["cskd"])


def rewrite(file: Path, **changes: Any) -> None:
    """Rewrite the file with changed header entries; None removes an entry."""
    header = {k: v for k, v in (header_of(file) | changes).items() if v is not None}
    save_file(load_file(file), file, metadata={"cskd": json.dumps(header)})


def test_a_student_survives_the_round_trip(file: Path) -> None:
    student, header = load_student(file, CPU)
    assert replace(header, sha256=None) == CARD
    shown = student.preprocessing
    assert (shown.crop_pct, shown.interpolation) == (0.875, "bilinear")
    for name, tensor in student_of().model.state_dict().items():
        assert torch.equal(student.model.state_dict()[name], tensor), name


def test_equal_students_write_equal_files(file: Path, tmp_path: Path) -> None:
    save_student(tmp_path / "again.safetensors", student_of().model.state_dict(), CARD)
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_a_changed_bit_anywhere_in_the_tensors_is_detected(file: Path) -> None:
    content = file.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    for offset in (start, start + 1000, len(content) - 1):
        damaged = bytearray(content)
        damaged[offset] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(WeightsError, match="its tensors do not match their digest"):
            read_student(file)
    file.write_bytes(content)
    read_student(file)


def test_two_swapped_tensors_are_detected(file: Path) -> None:
    state = load_file(file)
    one, other = "blocks.0.norm1.weight", "blocks.0.norm1.bias"
    state[one], state[other] = state[other], state[one]
    save_file(state, file, metadata={"cskd": json.dumps(header_of(file))})
    with pytest.raises(WeightsError, match="do not match their digest"):
        load_student(file, CPU)


def test_a_header_of_this_format_requires_the_digest(file: Path) -> None:
    rewrite(file, sha256=None)
    with pytest.raises(WeightsError, match="no valid student header"):
        read_header(file)


def test_files_of_format_1_without_digest_are_read(file: Path) -> None:
    later = ("dataset", "teacher", "recipe_sha256", "cache_sha256", "crop_pct", "interpolation")
    rewrite(file, format=1, sha256=None, init_sha256=None, **dict.fromkeys(later))
    student, header = load_student(file, CPU)
    assert header == replace(CARD, **dict.fromkeys(later))
    shown = student.preprocessing
    assert (shown.crop_pct, shown.interpolation) == (0.9, "bicubic")  # timm's for this model


@pytest.mark.parametrize(
    "change",
    [
        {"format": 3},
        {"sha256": "x"},
        {"sha256": 5},
        {"recipe_sha256": "A" * 64},
        {"cache_sha256": ["b"]},
        {"teacher": 5},
        {"dataset": ["x"]},
        {"top1": "91"},
        {"epoch": "4"},
        {"weights": 3},
        {"class_names": ["a", 2, "c"]},
        {"class_names": ["a", "b"]},
        {"accepted_classes": [1]},
        {"kwargs": {"depth": 10**6}},
        {"kwargs": {"depth": -(10**6)}},
        {"kwargs": {"channels": [8, [10**9]]}},
        {"kwargs": {"channels": [1] * 2000}},
    ],
    ids=str,
)
def test_invalid_entries_are_refused(file: Path, change: dict[str, Any]) -> None:
    rewrite(file, **change)
    with pytest.raises(WeightsError, match="no valid student header"):
        read_header(file)


def test_a_model_larger_than_the_files_tensors_is_not_created(file: Path) -> None:
    for kwargs in ({"embed_dim": 4096}, {"depth": 60_000}, {"depth": 60_000, "embed_dim": 2}):
        rewrite(file, kwargs={**CARD.kwargs, **kwargs})
        with pytest.raises(WeightsError, match="larger than its tensors"):
            load_student(file, CPU)


def test_tensors_that_do_not_fit_the_model_are_counted_with_examples(file: Path) -> None:
    rewrite(file, num_classes=4, class_names=None)
    with pytest.raises(WeightsError, match="do not fit the model") as caught:
        load_student(file, CPU)
    assert caught.value.where == file
    assert "of another shape (head.weight" in str(caught.value.found)


def test_a_model_that_is_too_large_allocates_no_memory(file: Path, tmp_path: Path) -> None:
    """Embeddings of 4.3 billion positions would take 137 GB; nothing is allocated for them."""
    rewrite(file, size=65535, kwargs={**CARD.kwargs, "patch_size": 1})
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from cskd_pipeline.errors import WeightsError\n"
        "from cskd_pipeline.models.checkpoint import load_student\n"
        "def peak():\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10\n"
        "before = peak()\n"
        "try:\n"
        "    load_student(Path(sys.argv[1]), torch.device('cpu'))\n"
        "except WeightsError as error:\n"
        "    print(error.problem, '|', peak() - before)\n"
    )
    ended = server().run(file, log=tmp_path / "log", code=code)
    problem, _, mebibytes = ended.output.partition("|")
    assert "larger than its tensors" in problem, ended.output
    assert int(mebibytes) < 100


def test_tensors_and_their_values_are_limited() -> None:
    def layers(sizes: list[int]) -> None:
        with torch.device("meta"):
            for size in sizes:
                nn.Linear(1, size, bias=False)

    with _limit_registered(values=10, tensors=3):
        layers([4, 3, 3])
    for sizes in ([1, 1, 1, 1], [11], [2**40]):
        with pytest.raises(OversizeError), _limit_registered(values=10, tensors=3):
            layers(sizes)
    with pytest.raises(OversizeError), _limit_registered(values=10, tensors=3):
        nn.Module().register_buffer("table", torch.empty(11, device="meta"))
    layers([2**40] * 4)  # not counted outside the context


def test_counting_does_not_change_a_model(file: Path) -> None:
    torch.manual_seed(0)
    counted = bounded_student(CARD, load_file(file), file)
    found, plain = counted.model.state_dict(), student_of().model.state_dict()
    assert plain.keys() == found.keys()
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_a_runs_folder_resolves_to_its_best_or_else_last_student(file: Path) -> None:
    folder = file.parent
    assert student_file(file) == file
    assert student_file(folder) == file
    file.rename(folder / "last.safetensors")
    assert student_file(folder) == folder / "last.safetensors"
    (folder / "last.safetensors").unlink()
    with pytest.raises(WeightsError, match="contains no student"):
        student_file(folder)
