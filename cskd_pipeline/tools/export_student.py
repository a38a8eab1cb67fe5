"""``export``: a student as a folder that others load without this package.

In timm's form for the hub; as one ONNX graph, pixels in [0, 1] in and logits out, for any number of
images; and what each is, in a README.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from cskd_pipeline import __version__
from cskd_pipeline.errors import StudentError, require_packages
from cskd_pipeline.models.checkpoint import StudentHeader, load_student, save_student, student_file
from cskd_pipeline.models.student import Student, inference_logits
from cskd_pipeline.runtime.atomic import atomic_folder, require_empty, write_bytes, write_text
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.tools.model_card import model_card

# Of what timm says of an architecture: the rest is about its own weights, their tag and license.
_OF_ANY_WEIGHTS = "architecture", "custom_load", "fixed_input_size", "first_conv", "classifier"
OPSET = 18
MAX_BYTES = 2**31 - 2**20
"""Of a protocol buffer, with room for what is not weights."""


def export_student(
    checkpoint: Path, out: Path, *, formats: Sequence[str] = ("timm",), each_head: bool = False
) -> dict[str, Any]:
    """Write the student of ``checkpoint`` (a file, or a run's folder) into an empty folder.

    Args:
        formats: ``timm``, ``onnx`` or both.
        each_head: whether the ONNX model also gives every head's logits.
    """
    require_empty(out, action="choose another --out")
    if "onnx" in formats:
        problem = "ONNX is written by optional packages"
        require_packages("onnx", "onnxscript", extra="onnx", problem=problem)
    source = student_file(checkpoint)
    student, card = load_student(source, torch.device("cpu"))
    student.eval()
    with atomic_folder(out) as folder, progress(len(formats), "formats", "exporting") as done:
        if "timm" in formats:
            _write_timm(student, card, folder)
            done.advance(1)
        if "onnx" in formats:
            _write_onnx(student, card, folder / "model.onnx", each_head=each_head)
            done.advance(1)
        write_text(folder / "README.md", model_card(student, card, formats, each_head=each_head))
    return {
        "checkpoint": str(source),
        "out": str(out),
        "model": card.model,
        "heads": list(card.heads),
        "top1": card.top1,
        "files": {path.name: path.stat().st_size for path in sorted(out.iterdir())},
    }


def _write_timm(student: Student, card: StudentHeader, folder: Path) -> None:
    """``config.json`` and ``model.safetensors``, as ``timm.create_model("hf-hub:…")`` reads them.

    The tensors' file is written once more, with the card: this package evaluates, fine-tunes and
    exports what it exported, and finds damage.
    """
    model: Any = student.model
    own, shown = model.pretrained_cfg, student.preprocessing
    model.pretrained_cfg = {name: own[name] for name in _OF_ANY_WEIGHTS if name in own} | {
        "num_classes": card.num_classes,
        "input_size": (3, card.size, card.size),
        "crop_pct": shown.crop_pct,
        "crop_mode": "center",
        "interpolation": shown.interpolation,
        "mean": student.mean,
        "std": student.std,
    }
    fixed = {"img_size": card.size} if own.get("fixed_input_size") else {}
    save_for_hf(
        model,
        str(folder),
        model_config={"label_names": list(card.class_names)} if card.class_names else {},
        model_args=dict(card.kwargs) | fixed,
        safe_serialization=True,
    )
    save_student(folder / "model.safetensors", model.state_dict(), card)


class HeadsMean(nn.Module):
    """Map pixels to the mean of the heads that a student was trained for."""

    mean: Tensor
    std: Tensor

    def __init__(self, student: Student, card: StudentHeader, *, each_head: bool) -> None:
        super().__init__()
        self.student, self.heads, self.grid = student, card.heads, card.grid
        self.own = card.heads if each_head else ()
        for name in ("mean", "std"):
            values = torch.tensor(getattr(student, name)).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return logits (B, K) of images (B, 3, S, S) in [0, 1], and each head's by its flag."""
        predicted = self.student((images - self.mean) / self.std, self.grid)
        logits = predicted.logits()
        return (inference_logits(predicted, self.heads), *(logits[name] for name in self.own))


def _write_onnx(student: Student, card: StudentHeader, path: Path, *, each_head: bool) -> None:
    """Write the student's graph, whose metadata says what it takes and gives.

    Args:
        student: in evaluation mode, on the CPU.
        each_head: whether the heads' own logits follow their mean, as ``cls``, ``dist``, ``dense``.
    """
    import onnx

    size = sum(value.numel() * value.element_size() for value in student.state_dict().values())
    if size > MAX_BYTES:
        raise StudentError(
            "the student is too large for one ONNX file",
            where=card.model,
            found=f"{size} bytes of weights",
            expected=f"at most {MAX_BYTES}",
        )
    program = torch.onnx.export(
        HeadsMean(student, card, each_head=each_head).eval(),
        # Two images: torch.export takes a size of one for a constant.
        (torch.zeros(2, 3, card.size, card.size),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits", *(card.heads if each_head else ())],
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    _forget_origins(model)
    model.producer_name, model.producer_version = "cskd-pipeline", __version__
    onnx.helper.set_model_props(model, _about(student, card))
    onnx.checker.check_model(model, full_check=True)
    write_bytes(path, model.SerializeToString())


def _about(student: Student, card: StudentHeader) -> dict[str, str]:
    """Return what a user needs to know, as the model's own metadata."""
    side = card.size
    about = {
        "input": f"float32 (batch, 3, {side}, {side}), RGB in [0, 1]; it is normalised inside",
        "resize": f"shorter side to {student.preprocessing.resized} pixels, "
        f"{student.preprocessing.interpolation}, then the central {side} x {side}",
        "output": f"logits of {card.num_classes} classes, the mean of {', '.join(card.heads)}",
        "model": card.model,
        "method": card.method,
    }
    if card.class_names is not None:
        about["class_names"] = json.dumps(card.class_names)
    return about


def _forget_origins(model: Any) -> None:
    """Remove the stack traces that torch keeps: they name files and folders of this machine."""
    for part in _parts(model):
        for field in ("metadata_props", "doc_string"):
            if any(known.name == field for known in part.DESCRIPTOR.fields):
                part.ClearField(field)


def _parts(message: Any) -> Iterator[Any]:
    """Yield a message and all messages in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if hasattr(value, "add") else (value,):  # repeated, or one
                yield from _parts(inner)
