"""A user-defined encoding and view policy, as a user's module registers them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from cskd_pipeline.distill.encodings import ArraySpec, ResponseShape, Rows
from cskd_pipeline.distill.targets import LogitTargets
from cskd_pipeline.views.bits import BitStream
from cskd_pipeline.views.draw import Box, ViewParams
from cskd_pipeline.views.policy import ViewPolicy


class Negated:
    """Logits with inverted signs, so that stored bytes differ from those of ``dense``."""

    name = "own-negated"
    serves: tuple[str, ...] = ("hard", "soft")
    exact = True
    temperatures = (0.0, float("inf"))

    def arrays(self, shape: ResponseShape) -> tuple[ArraySpec, ...]:
        fill, axes = float("nan"), ("class", "row", "column")
        return (
            ArraySpec("own-negated/spatial", "float16", axes, tuple(shape), fill, 1, rows=4),
            ArraySpec("own-negated/global", "float16", axes[:1], shape[:1], fill, 1, rows=4),
        )

    def encode(self, spatial: Tensor, global_: Tensor, seeds: np.ndarray) -> dict[str, Tensor]:
        return {"own-negated/spatial": -spatial, "own-negated/global": -global_}

    def targets(self, arrays: Mapping[str, Tensor]) -> LogitTargets:
        return LogitTargets(-arrays["own-negated/spatial"], -arrays["own-negated/global"])

    def pack(self, rows: Rows) -> Rows:
        return rows

    def unpack(self, rows: Rows, shape: ResponseShape) -> Rows:
        return rows


VERSION = "own-v1"


def draw(seed: int, policy: ViewPolicy, width: int, height: int) -> ViewParams:
    """Draw a random square crop and a flip; erase nothing."""
    bits, side = BitStream(seed), min(width, height)
    box = Box(bits.below(height - side + 1), bits.below(width - side + 1), side, side)
    return ViewParams(box, bits.chance(policy.flip), (), (), bits.uint64())


def render(image: np.ndarray, params: ViewParams, policy: ViewPolicy) -> np.ndarray:
    """Return every n-th pixel of the square, upside down."""
    top, left, side, _ = params.crop
    at = np.arange(policy.size) * side // policy.size
    view = image[top + at[::-1, None], left + (at[::-1] if params.flip else at)]
    return np.ascontiguousarray(view)
