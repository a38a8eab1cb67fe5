"""The model card of an exported student: what it is, how it was trained, how to get its logits.

Names in it are the text of whoever made the student: in Markdown they stay text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import nn

from cskd_pipeline.models.header import StudentCard
from cskd_pipeline.models.student import Student
from cskd_pipeline.tools.cache_card import table, text

METHODS = {
    "none": "labels alone",
    "deit": "labels and a CNN's global logits (DeiT's distillation)",
    "cskd": "labels and a CNN's logits at every location of the image (CSKD, arXiv 2307.08500)",
}
_LOCATION = "hf-hub:USER/NAME"


def model_card(
    student: Student, card: StudentCard, formats: Sequence[str], *, each_head: bool
) -> str:
    """Return the README, with the front matter that the hub reads."""
    method = METHODS.get(card.method, card.method)
    parts = [
        _front_matter(card, formats),
        f"# {text(card.model)}, trained on {text(card.dataset or 'images')}",
        f"An image classifier of {card.num_classes} classes for images of {card.size} x "
        f"{card.size} pixels, trained with {text(method)}.",
        table(("", ""), [row for row in _rows(card) if row[1] is not None]),
    ]
    if "timm" in formats:
        parts += ["## Use with timm", _fence("python", _with_timm()), *_own_logits(student, card)]
    if "onnx" in formats:
        parts += ["## Use with ONNX Runtime", *_with_onnx(student, card, each_head)]
    parts.append(
        "Trained with cskd-pipeline, which evaluates and fine-tunes it: `cskd-pipeline evaluate "
        "FOLDER --shards SHARDS`, `cskd-pipeline train --init-from FOLDER ...`."
        if "timm" in formats
        else "Trained with cskd-pipeline."
    )
    return "\n\n".join(parts) + "\n"


def own_logits(student: Student, card: StudentCard) -> str | None:
    """Return Python that makes ``logits`` of a timm ``model`` and normalised ``images``.

    None where timm's own forward gives the same: it averages the class and distillation heads.
    """
    if card.heads == timms_heads(student):
        return None
    if card.heads == ("cls",):
        return "logits = model.head(model.forward_features(images)[:, 0])"
    model = student.model
    dense_head, lines = "head", ["tokens = model.forward_features(images)"]
    if student.has_distillation_token:
        dense_head = "head_dist"
        lines += ["cls, dist = model.head(tokens[:, 0]), model.head_dist(tokens[:, 1])"]
    else:
        lines += ["cls = model.forward_head(tokens)"]
    patches = "tokens[:, model.num_prefix_tokens :]"
    if not isinstance(model.fc_norm, nn.Identity):
        patches = f"model.fc_norm({patches})"
    lines += [
        f"patches = {_pooled(patches, student, card)}",
        f"dense = model.{dense_head}(patches)",
    ]
    names = ("cls", "dist", "dense") if student.has_distillation_token else ("cls", "dense")
    return "\n".join([*lines, f"logits = ({' + '.join(names)}) / {len(names)}"])


def timms_heads(student: Student) -> tuple[str, ...]:
    """Return the heads that timm's own forward averages."""
    return ("cls", "dist") if student.has_distillation_token else ("cls",)


def _pooled(patches: str, student: Student, card: StudentCard) -> str:
    """Return the mean over the grid that the dense head was trained on, which may weigh patches."""
    assert card.grid is not None
    assert student.token_grid is not None
    if all(t % g == 0 for t, g in zip(student.token_grid, card.grid, strict=True)):
        return f"{patches}.mean(dim=1)"
    maps = f"{patches}.transpose(1, 2).unflatten(2, {student.token_grid})"
    return f"torch.nn.functional.adaptive_avg_pool2d({maps}, {card.grid}).mean(dim=(2, 3))"


def _own_logits(student: Student, card: StudentCard) -> list[str]:
    distilled = student.has_distillation_token
    code = own_logits(student, card)
    if code is None:
        given = "the mean of its class and distillation heads" if distilled else "its logits"
        return [f"`model(images)` is {given}, as trained."]
    given = "the mean of its class and distillation heads" if distilled else "its class head alone"
    own = "that of its class head: the distillation head was not trained"
    if "dense" in card.heads:
        own = f"the mean of {', '.join(card.heads)}, where `dense` is the head's logits at every "
        own += "patch, averaged"
    return [
        f"`model(images)` is {given}. The output that it was trained for is {own}:",
        _fence("python", code),
    ]


def _rows(card: StudentCard) -> list[tuple[str, object]]:
    measured = None if card.top1 is None else f"{card.top1:.2f} % on the run's validation images"
    return [
        ("architecture", card.model),
        ("arguments", json.dumps(card.kwargs) if card.kwargs else None),
        ("trained on", card.dataset),
        ("method", card.method),
        ("teacher", card.teacher),
        ("top-1", measured),
        ("weights", f"{card.weights}, after epoch {card.epoch}"),
        ("output", f"mean of {', '.join(card.heads)}"),
        ("recipe, SHA-256", card.recipe_sha256),
        ("teacher's cache, SHA-256 of its contents", card.cache_sha256),
        ("started from weights of SHA-256", card.init_sha256),
        ("accepted differences of classes", "; ".join(card.accepted_classes) or None),
    ]


def _front_matter(card: StudentCard, formats: Sequence[str]) -> str:
    """Return YAML; strings as JSON has them, which YAML reads alike. It claims no license."""
    tags = ["image-classification", *formats]
    tags += [] if card.method == "none" else ["knowledge-distillation", card.method]
    fields = {
        "library_name": "timm" if "timm" in formats else "onnx",
        "pipeline_tag": "image-classification",
        "tags": tags,
    }
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _with_timm() -> str:
    return f'''import timm
import torch
from PIL import Image

model = timm.create_model("{_LOCATION}", pretrained=True).eval()  # or "local-dir:FOLDER"
transform = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model))
images = transform(Image.open("image.jpg").convert("RGB")).unsqueeze(0)
with torch.inference_mode():
    logits = model(images)'''


def _with_onnx(student: Student, card: StudentCard, each_head: bool) -> list[str]:
    shown = student.preprocessing
    outputs = f", then the logits of {', '.join(card.heads)}" if each_head else ""
    return [
        f"`model.onnx` takes `images`, float32 (batch, 3, {card.size}, {card.size}), RGB in "
        f"[0, 1], and gives `logits` (batch, {card.num_classes}), the mean of "
        f"{', '.join(card.heads)}{outputs}. The normalisation is inside. Images were evaluated "
        f"with the shorter side resized to {shown.resized} pixels "
        f"({shown.interpolation}), and the centre cut out.",
        _fence(
            "python",
            'session = onnxruntime.InferenceSession("model.onnx")\n'
            'logits = session.run(["logits"], {"images": images})[0]',
        ),
    ]


def _fence(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```"
