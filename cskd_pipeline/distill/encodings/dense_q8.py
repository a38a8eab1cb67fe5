"""``dense-q8``: all logits in eight bits each, for soft losses, at 2/5 of the size of ``dense``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from cskd_pipeline.distill.encodings.base import ArraySpec, ResponseShape, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from cskd_pipeline.distill.targets import Targets

SPATIAL = "dense-q8/spatial"
GLOBAL = "dense-q8/global"
STEP = "dense-q8/step"

UNUSED = 255
_LEVEL = 3
_CHUNK_BYTES = 16 * 1024


class DenseQ8:
    """(B, K, h, w) and (B, K) uint8 codes, and their (B, 2) float32 steps.

    See :func:`cskd_pipeline.distill.quantised.quantise`. Differences along classes, rows or columns
    would save 8 % more; they are not worth their decoding.
    """

    name = "dense-q8"
    serves: tuple[str, ...] = ("soft",)
    exact = False
    min_temperature = 0.0

    def arrays(self, shape: ResponseShape) -> tuple[ArraySpec, ...]:
        def spec(name: str, dtype: str, axes: tuple[str, ...], tail: tuple[int, ...]) -> ArraySpec:
            size = int(np.prod(tail)) * np.dtype(dtype).itemsize
            return ArraySpec(
                name=name,
                dtype=dtype,
                axes=axes,
                tail=tail,
                fill=0 if dtype == "float32" else UNUSED,
                level=_LEVEL,
                rows=max(1, _CHUNK_BYTES // size),
                file_per_view=name == SPATIAL,
            )

        return (
            spec(SPATIAL, "uint8", ("class", "row", "column"), tuple(shape)),
            spec(GLOBAL, "uint8", ("class",), (shape.classes,)),
            spec(STEP, "float32", ("spatial_and_global",), (2,)),
        )

    def encode(self, spatial: Tensor, global_: Tensor) -> dict[str, Tensor]:
        from cskd_pipeline.distill.quantised import quantise

        return dict(zip((SPATIAL, GLOBAL, STEP), quantise(spatial, global_), strict=True))

    def targets(self, arrays: Mapping[str, Tensor]) -> Targets:
        from cskd_pipeline.distill.quantised import Quantised, restore
        from cskd_pipeline.distill.targets import LogitTargets

        return LogitTargets(*restore(Quantised(*(arrays[n] for n in (SPATIAL, GLOBAL, STEP)))))

    def pack(self, rows: Rows) -> Rows:
        return rows

    def unpack(self, rows: Rows, shape: ResponseShape) -> Rows:
        step = rows[STEP]
        if not (np.isfinite(step) & (step > 0)).all():
            raise ValueError("a step that is not a positive number")
        return rows
