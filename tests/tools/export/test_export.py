"""Exported students return the trained logits without this package."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from markdown_it import MarkdownIt
from safetensors.torch import load_file

from cskd_pipeline.data.assemble import normalise
from cskd_pipeline.errors import MissingPackageError, OutputError, WeightsError
from cskd_pipeline.models.checkpoint import StudentHeader, load_student, read_header, save_student
from cskd_pipeline.models.student import Student, create_student, inference_logits
from cskd_pipeline.tools import export_student as exporting
from cskd_pipeline.tools.export_student import export_student
from cskd_pipeline.tools.model_card import logits_code, model_card
from tests.pipeline import world
from tests.processes import server

CPU = torch.device("cpu")
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
DISTILLED = "deit_tiny_distilled_patch16_224"
PLAIN = "vit_tiny_patch16_224"

# Method, model, arguments, heads, grid; 48 px give 6x6 tokens, which 4x4 does not divide.
STUDENTS: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...], tuple[int, int] | None]] = {
    "none": ("none", DISTILLED, TINY, ("cls",), None),
    "none, CNN": ("none", "resnet10t", {"channels": [8, 8, 16, 16]}, ("cls",), None),
    "deit": ("deit", DISTILLED, TINY, ("cls", "dist"), None),
    "cskd": ("cskd", DISTILLED, TINY, ("cls", "dist", "dense"), (4, 4)),
    "cskd, plain": ("cskd", PLAIN, TINY, ("cls", "dense"), (3, 3)),
    "cskd, pooled": ("cskd", PLAIN, TINY | {"global_pool": "avg"}, ("cls", "dense"), (4, 4)),
}


def save(path: Path, kind: str, size: int = 48, **about: Any) -> Path:
    """Save a student of that kind; its weights are large enough to tell the heads apart."""
    method, name, kwargs, heads, grid = STUDENTS[kind]
    torch.manual_seed(0)
    student = create_student(name, num_classes=5, size=size, kwargs=kwargs)
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    card = StudentHeader(
        name, 5, size, heads, method, kwargs, grid, crop_pct=0.8, interpolation="bilinear"
    )
    save_student(path, student.model.state_dict(), replace(card, **about))
    return path


@dataclass(frozen=True)
class Export:
    """An exported folder and its student; ``images`` are in [0, 1]."""

    folder: Path
    student: Student
    card: StudentHeader
    images: torch.Tensor

    def trained_logits(self) -> torch.Tensor:
        """Return the student's logits as ``evaluate`` computes them."""
        return inference_logits(self.heads(), self.card.heads)

    def heads(self) -> Any:
        student = self.student
        with torch.inference_mode():
            return student(normalise(self.images, student.mean, student.std), self.card.grid)


@pytest.fixture(scope="module", params=STUDENTS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    root = tmp_path_factory.mktemp("exported")
    source = save(root / "student.safetensors", request.param)
    export_student(source, root / "out", formats=("timm", "onnx"), each_head=True)
    student, card = load_student(source, CPU)
    student.eval()
    return Export(root / "out", student, card, torch.rand(7, 3, 48, 48))


# timm


def test_timm_loads_the_folder_and_gives_its_models_logits(exported: Export) -> None:
    model = timm.create_model(f"local-dir:{exported.folder}", pretrained=True).eval()
    assert type(model) is type(exported.student.model)
    student = exported.student
    images = normalise(exported.images, student.mean, student.std)
    with torch.inference_mode():
        assert torch.equal(model(images), student.model(images))


def test_timm_prepares_images_as_evaluate_does(exported: Export) -> None:
    model = timm.create_model(f"local-dir:{exported.folder}", pretrained=True)
    data = timm.data.resolve_data_config({}, model=model)
    preprocessing = exported.student.preprocessing
    assert data["input_size"] == (3, preprocessing.size, preprocessing.size)
    assert (data["crop_pct"], data["interpolation"], data["crop_mode"]) == (
        *(0.8, "bilinear", "center"),
    )
    assert (preprocessing.crop_pct, preprocessing.interpolation) == (0.8, "bilinear")
    assert (tuple(data["mean"]), tuple(data["std"])) == (
        exported.student.mean,
        exported.student.std,
    )


def test_the_cards_code_gives_the_trained_logits(exported: Export) -> None:
    """The card's code runs on timm's model, without this package."""
    readme = (exported.folder / "README.md").read_text()
    model = timm.create_model(f"local-dir:{exported.folder}", pretrained=True).eval()
    student = exported.student
    images = normalise(exported.images, student.mean, student.std)
    code = logits_code(student, exported.card)
    timms = ("cls", "dist") if student.has_distillation_token else ("cls",)
    assert (code is None) == (exported.card.heads == timms)
    scope: dict[str, Any] = {"model": model, "images": images, "torch": torch}
    with torch.inference_mode():
        if code is None:
            scope["logits"] = model(images)
        else:
            assert f"```python\n{code}\n```" in readme
            exec(code, scope)
            assert not torch.allclose(model(images), exported.trained_logits(), atol=1e-3)
    torch.testing.assert_close(scope["logits"], exported.trained_logits(), atol=1e-5, rtol=1e-5)


def test_the_cards_usage_example_runs(exported: Export, tmp_path: Path) -> None:
    readme = (exported.folder / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    assert "hf-hub:USER/NAME" in code
    world.draw_images(tmp_path / "p", per_class=1, seed=0)
    code = code.replace("hf-hub:USER/NAME", f"local-dir:{exported.folder}")
    code = code.replace("image.jpg", str(next((tmp_path / "p").rglob("*.png"))))
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["logits"].shape == (1, 5)


def test_the_pretrained_weights_metadata_is_not_copied(exported: Export) -> None:
    config = json.loads((exported.folder / "config.json").read_text())
    text = json.dumps(config)
    for word in ("license", "tag", "origin_url", "hf_hub", "fb_in1k", "test_input_size", '"url"'):
        assert word not in text, word
    assert "label_names" not in config
    readme = (exported.folder / "README.md").read_text()
    assert "license" not in readme


def test_class_names_are_timms_label_names(tmp_path: Path) -> None:
    names = ("a", "b", "<b>c</b>", "d: \x1b[31m", "e")
    save(tmp_path / "s.safetensors", "cskd", class_names=names)
    export_student(tmp_path / "s.safetensors", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["label_names"] == list(names)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == list(names)


def test_an_exported_folder_is_read_as_a_student(exported: Export, tmp_path: Path) -> None:
    """Its header and checksum are kept, so it can be evaluated, fine-tuned and exported."""
    assert read_header(exported.folder / "model.safetensors") == exported.card
    export_student(exported.folder, tmp_path / "again", formats=("timm",))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (exported.folder / name).read_bytes()


# ONNX


def onnx_logits(exported: Export, count: int) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(exported.folder / "model.onnx"))
    names = [output.name for output in session.get_outputs()]
    images = exported.images[:count].numpy()
    return dict(zip(names, session.run(None, {"images": images}), strict=True))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_onnx_runtime_gives_the_students_logits(exported: Export, count: int) -> None:
    logits = onnx_logits(exported, count)["logits"]
    expected = exported.trained_logits()[:count].numpy()
    assert logits.shape == (count, 5)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert (logits.argmax(1) == expected.argmax(1)).all()


def test_each_heads_logits_follow_their_mean(exported: Export) -> None:
    outputs = onnx_logits(exported, 3)
    assert list(outputs) == ["logits", *exported.card.heads]
    for name, logits in exported.heads().logits().items():
        if name in exported.card.heads:
            np.testing.assert_allclose(outputs[name], logits[:3].numpy(), atol=1e-4, rtol=0)
    mean = np.mean([outputs[name] for name in exported.card.heads], axis=0)
    np.testing.assert_allclose(outputs["logits"], mean, atol=1e-5)


def test_the_graph_is_valid_and_describes_its_input_and_output(exported: Export) -> None:
    model = onnx.load(exported.folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    [image] = model.graph.input
    dims = [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim]
    assert (image.name, dims) == ("images", ["batch", 3, 48, 48])
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert "RGB in [0, 1]" in metadata["input"]
    assert ", ".join(exported.card.heads) in metadata["output"]


def test_the_graph_and_the_card_describe_the_evaluation_transform(exported: Export) -> None:
    """They state the size to which timm's own transform resizes."""
    preprocessing = exported.student.preprocessing
    interpolation = preprocessing.interpolation
    transform = timm.data.create_transform(
        (3, 48, 48), crop_pct=preprocessing.crop_pct, interpolation=interpolation
    )
    resize, crop = transform.transforms[:2]
    size = resize.size if isinstance(resize.size, int) else resize.size[0]
    assert tuple(crop.size) == (48, 48)
    assert size > 48
    model = onnx.load(exported.folder / "model.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["resize"] == (
        f"shorter side to {size} pixels, {interpolation}, then the central 48 x 48"
    )
    readme = " ".join((exported.folder / "README.md").read_text().split())
    assert f"resized to {size} pixels ({interpolation})" in readme


def test_the_graph_contains_no_paths_of_the_exporting_machine(exported: Export) -> None:
    data = (exported.folder / "model.onnx").read_bytes()
    for word in (b"site-packages", b"cskd_pipeline/", b".py", os.fsencode(Path.home())):
        assert word not in data, word


def test_heads_are_exported_only_on_request(tmp_path: Path) -> None:
    save(tmp_path / "s.safetensors", "cskd", class_names=tuple("abcde"))
    summary = export_student(tmp_path / "s.safetensors", tmp_path / "out", formats=("onnx",))
    assert set(summary["files"]) == {"model.onnx", "README.md"}
    model = onnx.load(tmp_path / "out/model.onnx")
    assert [output.name for output in model.graph.output] == ["logits"]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["class_names"]) == list("abcde")


def test_onnx_export_without_its_packages_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    save(tmp_path / "s.safetensors", "cskd")
    with pytest.raises(MissingPackageError, match="onnxscript") as caught:
        export_student(tmp_path / "s.safetensors", tmp_path / "out", formats=("timm", "onnx"))
    assert "cskd-pipeline[onnx]" in str(caught.value)
    assert not (tmp_path / "out").exists()
    export_student(tmp_path / "s.safetensors", tmp_path / "out")


# The card


def test_the_card_describes_the_training(tmp_path: Path) -> None:
    about = {"dataset": "imagenet", "teacher": "regnety_160.deit_in1k", "top1": 76.25, "epoch": 300}
    digests = {name: c * 64 for name, c in (("recipe_sha256", "a"), ("cache_sha256", "b"))}
    save(tmp_path / "s.safetensors", "cskd", weights="ema", **about, **digests)
    export_student(tmp_path / "s.safetensors", tmp_path / "out")
    readme = (tmp_path / "out/README.md").read_text()
    head, _, body = readme.removeprefix("---\n").partition("\n---\n")
    front = dict(line.split(": ", 1) for line in head.splitlines())
    assert json.loads(front["library_name"]) == "timm"
    assert json.loads(front["tags"]) == [
        *("image-classification", "timm", "knowledge-distillation", "cskd"),
    ]
    html = MarkdownIt("commonmark").enable("table").render(body)
    for cell in (
        *("regnety_160.deit_in1k", "76.25 % on the run's validation images", "a" * 64, "b" * 64),
        *("ema, after epoch 300", "mean of cls, dist, dense", "imagenet"),
    ):
        assert f"<td>{cell}</td>" in html, cell


def test_the_card_omits_unknown_facts(tmp_path: Path) -> None:
    student, card = load_student(save(tmp_path / "s.safetensors", "none, CNN"), CPU)
    text = model_card(student, card, ("timm",), each_head=False)
    assert "top-1" not in text
    assert "teacher" not in text
    assert "None" not in text


def test_names_with_markup_are_escaped_in_the_card(tmp_path: Path) -> None:
    evil = "<script>x</script> [a](javascript:b) | **c** \x1b[31m\n# d"
    about = {"dataset": evil, "teacher": evil, "class_names": (evil,) * 5}
    student, card = load_student(save(tmp_path / "s.safetensors", "cskd", **about), CPU)
    readme = model_card(student, card, ("timm", "onnx"), each_head=False)
    body = readme.removeprefix("---\n").partition("\n---\n")[2]
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    for tag in ("<script", "<a ", "<strong>c", "\x1b"):
        assert tag not in html, tag
    assert html.count("<h1>") == 1


# The folder


def test_only_an_empty_folder_is_written_to(tmp_path: Path) -> None:
    save(tmp_path / "s.safetensors", "none")
    (tmp_path / "out").mkdir()
    export_student(tmp_path / "s.safetensors", tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(OutputError, match="contains other files"):
        export_student(tmp_path / "s.safetensors", tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "s.safetensors", "none")

    def fail(*args: Any, **kwargs: Any) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(exporting, "model_card", fail)
    with pytest.raises(ZeroDivisionError):
        export_student(tmp_path / "s.safetensors", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_damaged_student_is_not_exported(tmp_path: Path) -> None:
    path = save(tmp_path / "s.safetensors", "none")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="damaged"):
        export_student(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_exports_a_runs_best_student(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "best.safetensors", "cskd", top1=51.5)
    words = ("export", tmp_path, "--out", tmp_path / "out", "--format", "onnx", "--heads", "--json")
    assert world.cli(*words) == 0
    summary = world.last_json(capsys.readouterr().out)
    assert summary["checkpoint"] == str(tmp_path / "best.safetensors")
    assert set(summary["files"]) == {"model.onnx", "README.md"}
    assert summary["top1"] == 51.5
    assert [o.name for o in onnx.load(tmp_path / "out/model.onnx").graph.output] == [
        *("logits", "cls", "dist", "dense"),
    ]


def test_training_from_an_exported_folder_starts_with_its_weights(tmp_path: Path) -> None:
    from cskd_pipeline.pipeline.finetune import read_source

    path = save(tmp_path / "s.safetensors", "cskd")
    export_student(path, tmp_path / "out")
    source = read_source(tmp_path / "out")
    assert source.header is not None
    header = source.header
    assert (header.model, header.size, header.num_classes) == (DISTILLED, 48, 5)
    saved = load_file(path)
    assert source.state.keys() == saved.keys()
    assert all(torch.equal(source.state[name], saved[name]) for name in saved)


def test_onnx_is_imported_only_when_used(tmp_path: Path) -> None:
    code = (
        "import sys\nimport cskd_pipeline.tools.export_student\n"
        "assert not {'onnx', 'onnxscript', 'onnxruntime'} & set(sys.modules)\n"
    )
    result = server().run(log=tmp_path / "log", code=code)
    assert result.code == 0, result.output
