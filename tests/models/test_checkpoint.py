"""Students' files: what they say of themselves, and that no byte of them changes unnoticed."""

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

from cskd_pipeline.errors import WeightsError
from cskd_pipeline.models.allocation import AllocationLimit, OversizeError
from cskd_pipeline.models.checkpoint import (
    load_student,
    read_card,
    read_student,
    save_student,
    student_file,
)
from cskd_pipeline.models.header import StudentCard
from cskd_pipeline.models.student import Student, create_student

CPU = torch.device("cpu")
CARD = StudentCard(
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


def student_of(card: StudentCard = CARD) -> Student:
    torch.manual_seed(0)
    return create_student(
        card.model, num_classes=card.num_classes, size=card.size, kwargs=card.kwargs
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_student(tmp_path / "best.safetensors", student_of().model.state_dict(), CARD)
    return tmp_path / "best.safetensors"


def header(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["cskd"])


def rewrite(file: Path, **changes: Any) -> None:
    """The same tensors under a card with other entries; None takes one away."""
    card = {k: v for k, v in (header(file) | changes).items() if v is not None}
    save_file(load_file(file), file, metadata={"cskd": json.dumps(card)})


def test_a_student_comes_back_as_it_was_saved(file: Path) -> None:
    student, card = load_student(file, CPU)
    assert card == CARD
    shown = student.preprocessing
    assert (shown.crop_pct, shown.interpolation) == (0.875, "bilinear")
    for name, tensor in student_of().model.state_dict().items():
        assert torch.equal(student.model.state_dict()[name], tensor), name


def test_equal_students_leave_equal_files(file: Path, tmp_path: Path) -> None:
    save_student(tmp_path / "again.safetensors", student_of().model.state_dict(), CARD)
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_a_changed_bit_anywhere_in_the_tensors_is_noticed(file: Path) -> None:
    content = file.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    for place in (start, start + 1000, len(content) - 1):
        spoilt = bytearray(content)
        spoilt[place] ^= 1
        file.write_bytes(spoilt)
        with pytest.raises(WeightsError, match="its tensors are not those that were saved"):
            read_student(file)
    file.write_bytes(content)
    read_student(file)


def test_two_tensors_exchanged_are_noticed(file: Path) -> None:
    state = load_file(file)
    one, other = "blocks.0.norm1.weight", "blocks.0.norm1.bias"
    state[one], state[other] = state[other], state[one]
    save_file(state, file, metadata={"cskd": json.dumps(header(file))})
    with pytest.raises(WeightsError, match="not those that were saved"):
        load_student(file, CPU)


def test_a_header_of_this_format_cannot_do_without_the_digest(file: Path) -> None:
    rewrite(file, sha256=None)
    with pytest.raises(WeightsError, match="does not say"):
        read_card(file)


def test_files_of_format_1_which_had_no_digest_are_read(file: Path) -> None:
    later = ("dataset", "teacher", "recipe_sha256", "cache_sha256", "crop_pct", "interpolation")
    rewrite(file, format=1, sha256=None, init_sha256=None, **dict.fromkeys(later))
    student, card = load_student(file, CPU)
    assert card == replace(CARD, **dict.fromkeys(later))
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
def test_entries_that_are_not_of_their_kind_are_refused(file: Path, change: dict[str, Any]) -> None:
    rewrite(file, **change)
    with pytest.raises(WeightsError, match="does not say which student"):
        read_card(file)


def test_a_model_larger_than_the_files_tensors_is_not_made(file: Path) -> None:
    for kwargs in ({"embed_dim": 4096}, {"depth": 60_000}, {"depth": 60_000, "embed_dim": 2}):
        rewrite(file, kwargs={**CARD.kwargs, **kwargs})
        with pytest.raises(WeightsError, match="larger than its tensors"):
            load_student(file, CPU)


def test_a_limit_refuses_before_memory_is_taken() -> None:
    """Every one of these would be 8 TB; in place and as views nothing is taken."""
    many = 2**40
    for make in (
        lambda: torch.empty(many, dtype=torch.int64),
        lambda: torch.arange(many),
        lambda: torch.linspace(0, 1, many, dtype=torch.float64),
        lambda: torch.zeros(1).repeat(2 * many),
        lambda: torch.stack(torch.meshgrid(*[torch.arange(2**20)] * 2, indexing="ij")),
    ):
        with pytest.raises(OversizeError), AllocationLimit(values=2**22, tensors=100):
            make()
    with AllocationLimit(values=10, tensors=2):
        x = torch.zeros(8)
        for _ in range(20):
            x.add_(1).view(2, 4).t()
    assert float(x.sum()) == 160


def test_a_limit_of_tensors_counts_them() -> None:
    with AllocationLimit(values=10**6, tensors=3):
        for _ in range(3):
            torch.zeros(1)
        with pytest.raises(OversizeError):
            torch.zeros(1)


def test_a_limit_changes_nothing_of_a_model() -> None:
    plain = student_of().model.state_dict()
    with AllocationLimit(values=10**7, tensors=10**4):
        limited = student_of().model.state_dict()
    assert plain.keys() == limited.keys()
    assert all(torch.equal(plain[name], limited[name]) for name in plain)


def test_a_runs_folder_means_its_best_student_else_its_last(file: Path) -> None:
    folder = file.parent
    assert student_file(file) == file
    assert student_file(folder) == file
    file.rename(folder / "last.safetensors")
    assert student_file(folder) == folder / "last.safetensors"
    (folder / "last.safetensors").unlink()
    with pytest.raises(WeightsError, match="holds no student"):
        student_file(folder)
