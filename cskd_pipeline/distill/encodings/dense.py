"""``dense``: the float16 logits, for every loss; the reference for all other encodings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from cskd_pipeline.distill.encodings.base import ArraySpec, Encoding, ResponseShape

if TYPE_CHECKING:
    from torch import Tensor

    from cskd_pipeline.distill.targets import Targets

SPATIAL = "dense/spatial"
GLOBAL = "dense/global"

_LEVEL = 1  # the fastest; higher levels save nothing


class Dense(Encoding):
    """The teacher's logits, (B, K, h, w) and (B, K) float16.

    Fill is NaN, which no response contains, so an unwritten row is never mistaken for one.
    """

    name = "dense"
    serves = ("hard", "soft")
    exact = True
    temperatures = (0.0, math.inf)

    def arrays(self, shape: ResponseShape) -> tuple[ArraySpec, ...]:
        """Return spatial and global logits, in chunks of a few rows."""
        axes, grid = ("class", "row", "column"), tuple(shape)
        spatial = ArraySpec(SPATIAL, "float16", axes, grid, math.nan, _LEVEL, file_per_view=True)
        global_ = ArraySpec(GLOBAL, "float16", axes[:1], grid[:1], math.nan, _LEVEL)
        return spatial.read_by_row(), global_.read_by_row()

    def encode(self, spatial: Tensor, global_: Tensor, seeds: np.ndarray) -> dict[str, Tensor]:
        """Return the logits."""
        return {SPATIAL: spatial, GLOBAL: global_}

    def targets(self, arrays: Mapping[str, Tensor]) -> Targets:
        """Return the logits as targets."""
        from cskd_pipeline.distill.targets import LogitTargets

        return LogitTargets(arrays[SPATIAL], arrays[GLOBAL])
