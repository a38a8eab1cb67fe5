"""The model card of an exported student: what it is, how it was trained, how to get its logits.

Names in it are the text of whoever made the student: in Markdown they stay text.
"""

import json
from collections.abc import Sequence

from torch import nn

from cskd_pipeline.models.checkpoint import StudentHeader
from cskd_pipeline.models.student import Student
from cskd_pipeline.tools import markdown

METHODS = {
    "none": "labels alone",
    "deit": "labels and a CNN's global logits (DeiT's distillation)",
    "cskd": "labels and a CNN's logits at every location of the image (CSKD, arXiv 2307.08500)",
}


def model_card(
    student: Student, card: StudentHeader, formats: Sequence[str], *, each_head: bool
) -> str:
    """Return the README, with the front matter that the hub reads. It claims no license."""
    distilled = [] if card.method == "none" else ["knowledge-distillation", card.method]
    fields = {
        "library_name": "timm" if "timm" in formats else "onnx",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", *formats, *distilled],
    }
    return markdown.render(
        "model_card.md",
        front_matter=markdown.front_matter(fields),
        card=card,
        method=METHODS.get(card.method, card.method),
        facts=_facts(card),
        formats=formats,
        own_code=own_logits(student, card),
        distilled=student.has_distillation_token,
        heads=", ".join(card.heads),
        each_head=each_head,
        shown=student.preprocessing,
    )


def own_logits(student: Student, card: StudentHeader) -> str | None:
    """Return Python that makes ``logits`` of a timm ``model`` and normalised ``images``.

    None where timm's own forward gives the same: it averages the class and distillation heads.
    """
    if card.heads == (("cls", "dist") if student.has_distillation_token else ("cls",)):
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


def _pooled(patches: str, student: Student, card: StudentHeader) -> str:
    """Return the mean over the grid that the dense head was trained on, which may weigh patches."""
    assert card.grid is not None
    assert student.token_grid is not None
    if all(t % g == 0 for t, g in zip(student.token_grid, card.grid, strict=True)):
        return f"{patches}.mean(dim=1)"
    maps = f"{patches}.transpose(1, 2).unflatten(2, {student.token_grid})"
    return f"torch.nn.functional.adaptive_avg_pool2d({maps}, {card.grid}).mean(dim=(2, 3))"


def _facts(card: StudentHeader) -> list[tuple[str, object]]:
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
