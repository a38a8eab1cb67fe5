"""``export``: write a student as a folder that loads without this package.

The folder has timm's Hub format, or one ONNX graph from pixels in [0, 1] to logits for any batch
size, or both, and a README.
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

# The other fields of timm's configuration describe its own weights, their tag and license.
_ARCHITECTURE = "architecture", "custom_load", "fixed_input_size", "first_conv", "classifier"
OPSET = 18
MAX_BYTES = 2**31 - 2**20
"""Maximum size of the weights in a protocol buffer, with room for the rest."""


def export_student(
    checkpoint: Path, out: Path, *, formats: Sequence[str] = ("timm",), each_head: bool = False
) -> dict[str, Any]:
    """Export the student of ``checkpoint`` (a file, or a run's folder) to an empty folder.

    Args:
        formats: ``timm``, ``onnx`` or both.
        each_head: whether the ONNX model also outputs each head's logits.
    """
    require_empty(out, action="choose another --out")
    if "onnx" in formats:
        problem = "the ONNX format needs optional packages"
        require_packages("onnx", "onnxscript", extra="onnx", problem=problem)
    source = student_file(checkpoint)
    student, header = load_student(source, torch.device("cpu"))
    student.eval()
    with atomic_folder(out) as folder, progress(len(formats), "formats", "exporting") as meter:
        if "timm" in formats:
            _write_timm(student, header, folder)
            meter.advance()
        if "onnx" in formats:
            _write_onnx(student, header, folder / "model.onnx", each_head=each_head)
            meter.advance()
        write_text(folder / "README.md", model_card(student, header, formats, each_head=each_head))
    return {
        "checkpoint": str(source),
        "out": str(out),
        "model": header.model,
        "heads": list(header.heads),
        "top1": header.top1,
        "files": {path.name: path.stat().st_size for path in sorted(out.iterdir())},
    }


def _write_timm(student: Student, header: StudentHeader, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` for ``timm.create_model("hf-hub:…")``.

    The weights' file is then rewritten with the student's header, so that this package can
    evaluate, fine-tune and export it, and detect damage.
    """
    model: Any = student.model
    own, preprocessing = model.pretrained_cfg, student.preprocessing
    model.pretrained_cfg = {name: own[name] for name in _ARCHITECTURE if name in own} | {
        "num_classes": header.num_classes,
        "input_size": (3, header.size, header.size),
        "crop_pct": preprocessing.crop_pct,
        "crop_mode": "center",
        "interpolation": preprocessing.interpolation,
        "mean": student.mean,
        "std": student.std,
    }
    fixed = {"img_size": header.size} if own.get("fixed_input_size") else {}
    save_for_hf(
        model,
        str(folder),
        model_config={"label_names": list(header.class_names)} if header.class_names else {},
        model_args=dict(header.kwargs) | fixed,
        safe_serialization=True,
    )
    save_student(folder / "model.safetensors", model.state_dict(), header)


class HeadsMean(nn.Module):
    """A model from pixels to the mean of the heads that the student was trained for."""

    mean: Tensor
    std: Tensor

    def __init__(self, student: Student, header: StudentHeader, *, each_head: bool) -> None:
        super().__init__()
        self.student, self.heads, self.grid = student, header.heads, header.grid
        self.own = header.heads if each_head else ()
        for name in ("mean", "std"):
            values = torch.tensor(getattr(student, name)).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return logits (B, K) of images (B, 3, S, S) in [0, 1], and each head's if requested."""
        predicted = self.student((images - self.mean) / self.std, self.grid)
        logits = predicted.logits()
        return (inference_logits(predicted, self.heads), *(logits[name] for name in self.own))


def _write_onnx(student: Student, header: StudentHeader, path: Path, *, each_head: bool) -> None:
    """Write the student's graph, with metadata that describes its input and output.

    Args:
        student: student in evaluation mode, on the CPU.
        each_head: whether to output each head's logits too, as ``cls``, ``dist``, ``dense``.
    """
    import onnx

    size = sum(value.numel() * value.element_size() for value in student.state_dict().values())
    if size > MAX_BYTES:
        raise StudentError(
            "the student is too large for one ONNX file",
            where=header.model,
            found=f"{size} bytes of weights",
            expected=f"at most {MAX_BYTES}",
            action="export it with --format timm",
        )
    program = torch.onnx.export(
        HeadsMean(student, header, each_head=each_head).eval(),
        # Two images: torch.export treats a size of one as a constant.
        (torch.zeros(2, 3, header.size, header.size),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits", *(header.heads if each_head else ())],
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    _remove_stack_traces(model)
    model.producer_name, model.producer_version = "cskd-pipeline", __version__
    onnx.helper.set_model_props(model, _metadata(student, header))
    onnx.checker.check_model(model, full_check=True)
    write_bytes(path, model.SerializeToString())


def _metadata(student: Student, header: StudentHeader) -> dict[str, str]:
    """Return the metadata that a user of the graph needs."""
    side = header.size
    metadata = {
        "input": f"float32 (batch, 3, {side}, {side}), RGB in [0, 1]; normalised by the model",
        "resize": f"shorter side to {student.preprocessing.resized} pixels, "
        f"{student.preprocessing.interpolation}, then the central {side} x {side}",
        "output": f"logits of {header.num_classes} classes, the mean of {', '.join(header.heads)}",
        "model": header.model,
        "method": header.method,
    }
    if header.class_names is not None:
        metadata["class_names"] = json.dumps(header.class_names)
    return metadata


def _remove_stack_traces(model: Any) -> None:
    """Remove the stack traces that torch adds: they contain paths of this machine."""
    for part in _parts(model):
        for field in ("metadata_props", "doc_string"):
            if any(known.name == field for known in part.DESCRIPTOR.fields):
                part.ClearField(field)


def _parts(message: Any) -> Iterator[Any]:
    """Yield a message and all messages nested in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if hasattr(value, "add") else (value,):  # repeated or single
                yield from _parts(inner)
