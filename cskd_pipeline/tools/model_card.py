"""The model card of an exported student: how it was trained, and how to compute its logits.

Names come from the student's author and are escaped in Markdown.
"""

import json
from collections.abc import Sequence

from torch import nn

from cskd_pipeline.models.checkpoint import StudentHeader
from cskd_pipeline.models.student import Student
from cskd_pipeline.tools import markdown

METHODS = {
    "none": "labels only",
    "deit": "labels and a CNN's global logits (DeiT distillation)",
    "cskd": "labels and a CNN's logits at every image location (CSKD, arXiv:2307.08500)",
}


def model_card(
    student: Student, header: StudentHeader, formats: Sequence[str], *, each_head: bool
) -> str:
    """Return the README with the Hub's front matter, which states no license."""
    distilled = [] if header.method == "none" else ["knowledge-distillation", header.method]
    fields = {
        "library_name": "timm" if "timm" in formats else "onnx",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", *formats, *distilled],
    }
    return markdown.render(
        "model_card.md",
        front_matter=markdown.front_matter(fields),
        header=header,
        method=METHODS.get(header.method, header.method),
        facts=_facts(header),
        formats=formats,
        own_code=logits_code(student, header),
        distilled=student.has_distillation_token,
        heads=", ".join(header.heads),
        each_head=each_head,
        preprocessing=student.preprocessing,
    )


def logits_code(student: Student, header: StudentHeader) -> str | None:
    """Return Python code that computes ``logits`` from a timm ``model`` and normalised ``images``.

    None if timm's own forward, which averages the class and distillation heads, gives the same.
    """
    if header.heads == (("cls", "dist") if student.has_distillation_token else ("cls",)):
        return None
    if header.heads == ("cls",):
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
        f"patches = {_pooling_code(patches, student, header)}",
        f"dense = model.{dense_head}(patches)",
    ]
    names = ("cls", "dist", "dense") if student.has_distillation_token else ("cls", "dense")
    return "\n".join([*lines, f"logits = ({' + '.join(names)}) / {len(names)}"])


def _pooling_code(patches: str, student: Student, header: StudentHeader) -> str:
    """Return code for the mean over the dense head's training grid, which may weight patches."""
    assert header.grid is not None
    assert student.token_grid is not None
    if all(t % g == 0 for t, g in zip(student.token_grid, header.grid, strict=True)):
        return f"{patches}.mean(dim=1)"
    maps = f"{patches}.transpose(1, 2).unflatten(2, {student.token_grid})"
    return f"torch.nn.functional.adaptive_avg_pool2d({maps}, {header.grid}).mean(dim=(2, 3))"


def _facts(header: StudentHeader) -> list[tuple[str, object]]:
    top1 = None if header.top1 is None else f"{header.top1:.2f} % on the run's validation images"
    return [
        ("architecture", header.model),
        ("arguments", json.dumps(header.kwargs) if header.kwargs else None),
        ("trained on", header.dataset),
        ("method", header.method),
        ("teacher", header.teacher),
        ("top-1", top1),
        ("weights", f"{header.weights}, after epoch {header.epoch}"),
        ("output", f"mean of {', '.join(header.heads)}"),
        ("recipe, SHA-256", header.recipe_sha256),
        ("teacher cache, SHA-256 of its contents", header.cache_sha256),
        ("initial weights, SHA-256", header.init_sha256),
        ("accepted class differences", "; ".join(header.accepted_classes) or None),
    ]
