"""``export``: a student as a folder that others load without this package."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf

from cskd_pipeline.errors import require_packages
from cskd_pipeline.models.checkpoint import StudentHeader, load_student, save_student, student_file
from cskd_pipeline.models.student import Student
from cskd_pipeline.runtime.atomic import atomic_folder, require_empty, write_text
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.tools.export import onnx_graph
from cskd_pipeline.tools.export.model_card import model_card

# Of what timm says of an architecture: the rest is about its own weights, their tag and license.
_OF_ANY_WEIGHTS = "architecture", "custom_load", "fixed_input_size", "first_conv", "classifier"


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
            onnx_graph.write_onnx(student, card, folder / "model.onnx", each_head=each_head)
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
