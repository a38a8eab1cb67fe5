"""``topk``: the classes that matter and the tail's mass, for soft losses in about 2 kB a view.

What is kept, and how probabilities come back, is in :mod:`cskd_pipeline.distill.topk_targets`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from cskd_pipeline.distill.encodings.base import ArraySpec, ResponseShape, Rows
from cskd_pipeline.errors import CacheError

if TYPE_CHECKING:
    from torch import Tensor

    from cskd_pipeline.distill.targets import Targets

CLASSES = "topk/classes"
SPATIAL = "topk/spatial"
GLOBAL = "topk/global"
COARSE = "topk/coarse"
TAIL = "topk/tail"
TAIL_GLOBAL = "topk/tail_global"

KEPT = 24
_LEVEL = 8
_MOST_CLASSES = 65535


class TopK:
    """k = min(K, 24) classes of K, for all locations and every r, and what the rest weighs.

    A teacher of at most 24 classes has no tail; its logits are rounded to 1/8 and nothing else is
    lost.
    """

    name = "topk"
    serves: tuple[str, ...] = ("soft",)
    exact = False
    min_temperature = 1.0

    def arrays(self, shape: ResponseShape) -> tuple[ArraySpec, ...]:
        if shape.classes > _MOST_CLASSES:
            raise CacheError(
                "the topk encoding cannot hold so many classes",
                found=f"{shape.classes} classes",
                expected=f"at most {_MOST_CLASSES}",
                action="use the encoding dense or dense-q8",
            )

        def spec(
            name: str, dtype: str, axes: tuple[str, ...], tail: tuple[int, ...], fill: float
        ) -> ArraySpec:
            return ArraySpec(
                name, dtype, axes, tail, fill=fill, level=_LEVEL, tail_chunk=tail
            )  # a chunk is one view of a tar shard

        kept, grid, places = min(KEPT, shape.classes), tuple(shape[1:]), ("row", "column")
        head = (
            spec(CLASSES, "uint16", ("kept",), (kept,), 65535),
            spec(SPATIAL, "uint8", ("kept", *places), (kept, *grid), 255),
            spec(GLOBAL, "uint8", ("kept",), (kept,), 255),
        )
        if kept == shape.classes:
            return head
        nan = float("nan")
        return (
            *head,
            spec(COARSE, "uint8", ("class",), (shape.classes,), 255),
            spec(TAIL, "float16", ("slope_and_masses", *places), (4, *grid), nan),
            spec(TAIL_GLOBAL, "float16", ("masses",), (2,), nan),
        )

    def encode(self, spatial: Tensor, global_: Tensor) -> dict[str, Tensor]:
        from cskd_pipeline.distill.topk_targets import compress

        kept = compress(spatial, global_, min(KEPT, spatial.shape[1]))
        names = (CLASSES, SPATIAL, GLOBAL, COARSE, TAIL, TAIL_GLOBAL)
        return {n: values for n, values in zip(names, kept, strict=True) if values is not None}

    def targets(self, arrays: Mapping[str, Tensor]) -> Targets:
        from cskd_pipeline.distill import topk_targets

        names = (CLASSES, SPATIAL, GLOBAL, COARSE, TAIL, TAIL_GLOBAL)
        return topk_targets.TopKTargets(
            topk_targets.TopKArrays(*(arrays[n] for n in names if n in arrays))
        )

    def pack(self, rows: Rows) -> Rows:
        return rows

    def unpack(self, rows: Rows, shape: ResponseShape) -> Rows:
        classes = rows[CLASSES]
        if classes.size and classes.max() >= shape.classes:
            raise ValueError(f"class {classes.max()} of {shape.classes}")
        for name in (TAIL, TAIL_GLOBAL):
            if name in rows and not np.isfinite(rows[name]).all():
                raise ValueError(f"{name} holds NaN or infinite values")
        return rows
