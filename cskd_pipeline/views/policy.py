"""The augmentation policy: all parameters that determine a view's pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from cskd_pipeline.errors import RecipeError, UsageError
from cskd_pipeline.runtime import schemas

if TYPE_CHECKING:
    import numpy as np

    from cskd_pipeline.views.draw import ViewParams

Range = tuple[float, float]
RGB = tuple[float, float, float]

# ``version`` names the code that draws and renders: changing a field's meaning needs a new one.
#
# A note on deit-v1: the transparent colour (tRNS) of a PNG of 2, 4 or 16 bits per channel becomes
# white; in caches of format version 1 another colour or none did. All other views are unchanged.
VERSIONS = ("deit-v1",)
_LIMITS = {
    **dict.fromkeys(("flip", "randaugment_prob", "erase", "mix", "cutmix_switch"), (0, 1)),
    **dict.fromkeys(("randaugment_std", "mixup_alpha", "cutmix_alpha"), (0, math.inf)),
    "randaugment_magnitude": (0, 10),
    "randaugment_ops": (0, math.inf),
    "size": (8, math.inf),
    "window": (2, math.inf),
    "repeats": (1, math.inf),
}
"""Limits of the fields that are a single number."""


@dataclass(frozen=True)
class ViewPolicy:
    """DeiT's training augmentation (arXiv 2012.12877, table 9), unchanged in the CSKD paper.

    ``version`` names the code that draws and renders; the other fields are its parameters. Lengths
    are in pixels; areas and probabilities are fractions. ``mean`` and ``std``, in [0, 1] units, are
    for erasing and the fill colour only: networks normalise with their own.
    """

    version: str = "deit-v1"
    size: int = 224
    crop_area: Range = (0.08, 1.0)
    crop_ratio: Range = (3 / 4, 4 / 3)
    flip: float = 0.5
    randaugment_ops: int = 2
    randaugment_prob: float = 0.5
    randaugment_magnitude: float = 9.0
    randaugment_std: float = 0.5
    erase: float = 0.25
    erase_area: Range = (0.02, 1 / 3)
    erase_ratio: Range = (0.3, 1 / 0.3)
    mean: RGB = (0.485, 0.456, 0.406)
    std: RGB = (0.229, 0.224, 0.225)
    mix: float = 1.0  # probability that a pair is mixed
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    cutmix_switch: float = 0.5  # probability of CutMix if both are enabled
    window: int = 64  # consecutive samples of a tar shard among which partners are drawn
    repeats: int = 3  # views that share a matching, so that repeated augmentation decodes once

    def __post_init__(self) -> None:
        for field in fields(self):  # JSON and TOML have lists
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(float(v) for v in value))
        problems = list(self._problems())
        if problems:
            raise RecipeError(
                "the view policy is invalid", where="[views]", found="; ".join(problems)
            )

    def _problems(self) -> Iterator[str]:
        known = (*VERSIONS, *REGISTERED)
        if self.version not in known:
            yield (
                f"version {self.version!r} is unknown (known: {', '.join(known)}); "
                "cskd_pipeline.register_policy adds one"
            )
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if not math.isfinite(value):
                yield f"{name} = {value} is not finite"
            elif value < least:
                yield f"{name} = {value} is below {least}"
            elif value > most:
                yield f"{name} = {value} is above {most}"
        for name in ("crop_area", "erase_area", "crop_ratio", "erase_ratio"):
            low, high = getattr(self, name)
            top = 1.0 if name.endswith("area") else math.inf
            if not 0.0 < low <= high <= top:
                yield f"{name} = [{low}, {high}] is not a range within (0, {top}]"
        if self.mix > 0.0 and self.mixup_alpha == 0.0 and self.cutmix_alpha == 0.0:
            yield "mix > 0 needs mixup_alpha or cutmix_alpha above 0"
        if any(s <= 0.0 for s in self.std):
            yield f"std = {list(self.std)} is not positive"

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.to_json(), REGISTERED.get(self.version))

    @property
    def mixes(self) -> bool:
        """Return whether a view may contain a partner's pixels."""
        return self.mix > 0.0

    def to_json(self) -> dict[str, object]:
        """Return the policy as a JSON object, in field order."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, document: dict[str, object]) -> ViewPolicy:
        """Return the policy of a JSON object from :meth:`to_json`.

        Raises:
            RecipeError: an unknown field, or a value out of range.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(document) - known)
        if unknown:
            raise RecipeError(
                "unknown view policy fields", where="[views]", found=", ".join(unknown)
            )
        return cls(**document)  # type: ignore[arg-type]  # values are checked in __post_init__

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the canonical JSON: equal digests mean equal views."""
        return schemas.sha256(self.to_json())

    def difference(self, other: ViewPolicy) -> list[str]:
        """List the fields that differ, one line each: ``name: ours and theirs``."""
        mine, theirs = self.to_json(), other.to_json()
        return [f"{k}: {mine[k]} and {theirs[k]}" for k in mine if mine[k] != theirs[k]]


class PolicyCode(NamedTuple):
    """The two functions of a version: seed to parameters, and image to pixels."""

    draw: Callable[[int, ViewPolicy, int, int], ViewParams]
    render: Callable[[np.ndarray, ViewParams, ViewPolicy], np.ndarray]


REGISTERED: dict[str, PolicyCode] = {}
"""Versions registered by users; ``deit-v1`` is the code of ``draw`` and ``apply``."""


def register_policy(
    version: str,
    draw: Callable[[int, ViewPolicy, int, int], ViewParams],
    render: Callable[[np.ndarray, ViewParams, ViewPolicy], np.ndarray],
) -> None:
    """Register a user's functions for the views of ``ViewPolicy(version=...)`` in this process.

    A cache records the version and the policy's fields, which the functions may interpret freely.
    Register the same functions before opening it; every view's digest is compared. Changed
    functions need a new version. Erasing and mixing are as in ``deit-v1``. Loader processes receive
    the functions by pickling, so they must be defined at the top level of a module.

    Args:
        draw: ``(seed, policy, width, height)`` of the upright image -> ``ViewParams``; a pure
            function, with ``cskd_pipeline.views.bits.BitStream(seed)`` as its source of randomness.
        render: ``(image, params, policy)`` with an image (H, W, 3) uint8 -> view
            (policy.size, policy.size, 3) uint8; a pure function.

    Raises:
        UsageError: the version is built in, or not 1 to 100 printable characters.
    """
    if version in VERSIONS or not (version.isprintable() and 0 < len(version) <= 100):
        raise UsageError(
            "a view policy cannot be registered under this version",
            found=version,
            expected=f"1 to 100 printable characters, and not {', '.join(VERSIONS)}",
        )
    REGISTERED[version] = PolicyCode(draw, render)


def _unpickle(document: dict[str, object], code: PolicyCode | None) -> ViewPolicy:
    """Restore a policy in another process, and register its user-defined version if necessary."""
    version = str(document["version"])
    if code is not None and version not in REGISTERED:  # this process's own registration wins
        register_policy(version, *code)
    return ViewPolicy.from_json(document)
