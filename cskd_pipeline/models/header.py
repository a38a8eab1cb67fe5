"""The header of a student's file, and the checks of what is in it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from cskd_pipeline.models.student import INTERPOLATIONS, LEAST_CROP_PCT
from cskd_pipeline.runtime.classes import Classes

MAX_ARGUMENT = 65535
"""The largest number among a stranger's model arguments."""


@dataclass(frozen=True)
class StudentCard:
    """The header of a student's file.

    ``kwargs`` are the timm constructor's, ``heads`` those whose mean is the prediction, ``grid``
    the teacher grid (rows, columns) that the dense head was trained on, or None. ``crop_pct`` and
    ``interpolation`` say how images are resized to evaluate it; None: as timm does for the model.
    ``accepted_classes`` has a line for each difference between classes with which the run was made
    all the same, ``recipe_changes`` one for what was changed where it was resumed. The digests are
    SHA-256 in hex: of the recipe's deciding fields, of the contents of the cache (None where it was
    not finished), and of the weights that the run started from.
    """

    model: str
    num_classes: int
    size: int
    heads: tuple[str, ...]
    method: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    weights: str = "last"  # last or ema
    epoch: int = 0
    top1: float | None = None  # percent, on the validation shards of the run
    class_names: tuple[str, ...] | None = None
    accepted_classes: tuple[str, ...] = ()
    dataset: str | None = None
    teacher: str | None = None  # its timm name
    recipe_sha256: str | None = None
    cache_sha256: str | None = None
    init_sha256: str | None = None
    recipe_changes: tuple[str, ...] = ()

    def classes(self, where: object) -> Classes:
        """Return the classes, for a comparison; ``where`` is the student's file."""
        return Classes("the student", where, self.num_classes, self.class_names)


def check_card(card: StudentCard) -> None:
    """Refuse values of the wrong kind among those that decide how a model is made or described.

    Raises:
        ValueError: names the field.
    """
    plain = {"model": str, "method": str, "num_classes": int, "size": int, "kwargs": dict}
    for name, kind in (plain | {"weights": str, "epoch": int}).items():
        if type(getattr(card, name)) is not kind:
            raise ValueError(f"{name} {getattr(card, name)!r}")
    if not all(0 < n <= 65535 for n in (card.num_classes, card.size, *(card.grid or ()))):
        raise ValueError(f"classes, size or grid {card.num_classes}, {card.size}, {card.grid}")
    if not card.heads or not set(card.heads) <= {"cls", "dist", "dense"}:
        raise ValueError(f"heads {card.heads}")
    if card.grid is not None and len(card.grid) != 2:
        raise ValueError(f"grid {card.grid}")
    crop = card.crop_pct
    if crop is not None and not (type(crop) is float and LEAST_CROP_PCT <= crop <= 1.0):
        raise ValueError(f"crop_pct {crop!r}")
    if card.interpolation not in (None, *INTERPOLATIONS):
        raise ValueError(f"interpolation {card.interpolation!r}")
    if card.top1 is not None and not (type(card.top1) is float and math.isfinite(card.top1)):
        raise ValueError(f"top1 {card.top1!r}")
    if not all(type(name) is str for name in (*(card.class_names or ()), *card.accepted_classes)):
        raise ValueError("class_names that are no text")
    if not all(type(line) is str for line in card.recipe_changes):
        raise ValueError("recipe_changes that are no text")
    if card.class_names is not None and len(card.class_names) != card.num_classes:
        raise ValueError(f"{len(card.class_names)} class_names of {card.num_classes} classes")
    for name in ("dataset", "teacher"):
        if type(getattr(card, name)) not in (str, type(None)):
            raise ValueError(f"{name} {getattr(card, name)!r}")
    for name in ("recipe_sha256", "cache_sha256", "init_sha256"):
        if getattr(card, name) is not None:
            check_digest(name, getattr(card, name))
    check_arguments(card.kwargs)


def check_digest(name: str, value: Any) -> None:
    """Refuse what is no SHA-256 in hex.

    Raises:
        ValueError: names the field.
    """
    if type(value) is not str or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{name} {value!r}")


def check_arguments(value: Any) -> None:
    """Refuse numbers and collections with which a constructor could be kept busy for ever.

    Raises:
        ValueError: names the number.
    """
    if isinstance(value, dict | list):
        if len(value) > 1000:
            raise ValueError(f"kwargs with {len(value)} entries in one table or list")
        for item in value.values() if isinstance(value, dict) else value:
            check_arguments(item)
    elif isinstance(value, int | float) and not abs(value) <= MAX_ARGUMENT:
        raise ValueError(f"kwargs with the number {value}")
