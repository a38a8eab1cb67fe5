"""``dense``: the logits themselves, float16. Serves every loss; the reference for the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from cskd_pipeline.distill.encodings.base import ArraySpec, ResponseShape, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from cskd_pipeline.distill.targets import Targets

SPATIAL = "dense/spatial"
GLOBAL = "dense/global"

# Logits of 1,000 classes on 7x7 take 91.4 kB of 98.0 in zstd, whatever the level (1 to 9), the
# order of axes and the rows in a chunk (1 to 16): so the fastest level, and chunks so small that a
# random row costs little more than itself (0.3 ms; in chunks of 8 rows 1.2 ms).
_LEVEL = 1
_CHUNK_BYTES = 16 * 1024


class Dense:
    """(B, K, h, w) and (B, K) as the teacher gave them.

    Fill is NaN, which no response holds: a row that was not written cannot be taken for one.
    """

    name = "dense"
    serves: tuple[str, ...] = ("hard", "soft")
    exact = True
    temperatures = (0.0, math.inf)

    def arrays(self, shape: ResponseShape) -> tuple[ArraySpec, ...]:
        """Return spatial and global logits, in chunks of a few rows."""

        def spec(name: str, tail: tuple[int, ...], file_per_view: bool) -> ArraySpec:
            size = 2
            for n in tail:
                size *= n
            axes = ("class", "row", "column")[: len(tail)]
            return ArraySpec(
                name=name,
                dtype="float16",
                axes=axes,
                tail=tail,
                fill=float("nan"),
                level=_LEVEL,
                rows=max(1, _CHUNK_BYTES // size),
                file_per_view=file_per_view,
            )

        return spec(SPATIAL, tuple(shape), True), spec(GLOBAL, (shape.classes,), False)

    def encode(self, spatial: Tensor, global_: Tensor, seeds: np.ndarray) -> dict[str, Tensor]:
        """Return the logits."""
        return {SPATIAL: spatial, GLOBAL: global_}

    def targets(self, arrays: Mapping[str, Tensor]) -> Targets:
        """Return the logits as targets."""
        from cskd_pipeline.distill.targets import LogitTargets

        return LogitTargets(arrays[SPATIAL], arrays[GLOBAL])

    def pack(self, rows: Rows) -> Rows:
        """Return the rows: they are stored as they are."""
        return rows

    def unpack(self, rows: Rows, shape: ResponseShape) -> Rows:
        """Return the rows: any float16 can be."""
        return rows
