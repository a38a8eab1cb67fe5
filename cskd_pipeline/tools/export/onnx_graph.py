"""A student as one ONNX graph: pixels in [0, 1] in, logits out, for any number of images."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cskd_pipeline import __version__
from cskd_pipeline.errors import StudentError
from cskd_pipeline.models.checkpoint import StudentHeader
from cskd_pipeline.models.student import Student, inference_logits
from cskd_pipeline.runtime.atomic import write_bytes

OPSET = 18
INPUT = "images"
OUTPUT = "logits"
MAX_BYTES = 2**31 - 2**20
"""Of a protocol buffer, with room for what is not weights."""


class HeadsMean(nn.Module):
    """Map pixels to the mean of the heads that a student was trained for."""

    mean: Tensor
    std: Tensor

    def __init__(self, student: Student, card: StudentHeader, *, each_head: bool) -> None:
        super().__init__()
        self.student, self.heads, self.grid = student, card.heads, card.grid
        self.each_head = each_head
        for name in ("mean", "std"):
            values = torch.tensor(getattr(student, name)).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return logits (B, K) of images (B, 3, S, S) in [0, 1], and each head's by its flag."""
        predicted = self.student((images - self.mean) / self.std, self.grid)
        logits = inference_logits(predicted, self.heads)
        if not self.each_head:
            return (logits,)
        own = predicted.logits()
        return (logits, *(own[name] for name in self.heads))


def write_onnx(student: Student, card: StudentHeader, path: Path, *, each_head: bool) -> None:
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
        input_names=[INPUT],
        output_names=[OUTPUT, *(card.heads if each_head else ())],
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
