"""``dense-q8``: all logits in eight bits each, for soft losses, at 2/5 of the size of ``dense``.

Softmax ignores a constant added to all classes of a location, and so does CKF: for constants a and
b, ``r * (d + a) + (1 - r) * (g + b)`` is the fused response plus a constant. So each location is
centred on its mean over classes before rounding, and neither mean nor lowest value is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from cskd_pipeline.distill.encodings.base import ArraySpec, Encoding, ResponseShape, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from cskd_pipeline.distill.targets import Targets

SPATIAL = "dense-q8/spatial"
GLOBAL = "dense-q8/global"
STEP = "dense-q8/step"

UNUSED = 255
"""Fill value; codes end at 254."""
_LEVEL = 3
_FINEST = 1 / 8  # smallest step: a KL divergence of 5e-4 nats, and codes that compress well


class DenseQ8(Encoding):
    """Codes (B, K, h, w) and (B, K) uint8 from 0 to 254, and their steps (B, 2) float32.

    ``logit = code * step`` up to a constant per location, with the code counted from the view's
    lowest centred logit. Storing differences along classes, rows or columns would save another 8 %,
    too little for the cost of decoding.
    """

    name = "dense-q8"
    serves = ("soft",)
    exact = False
    temperatures = (0.0, math.inf)

    def arrays(self, shape: ResponseShape) -> tuple[ArraySpec, ...]:
        """Return the codes of spatial and global logits and the steps, in chunks of a few rows."""
        axes, grid = ("class", "row", "column"), tuple(shape)
        arrays = (
            ArraySpec(SPATIAL, "uint8", axes, grid, UNUSED, _LEVEL, file_per_view=True),
            ArraySpec(GLOBAL, "uint8", axes[:1], grid[:1], UNUSED, _LEVEL),
            ArraySpec(STEP, "float32", ("spatial_and_global",), (2,), 0, _LEVEL),
        )
        return tuple(array.read_by_row() for array in arrays)

    def encode(self, spatial: Tensor, global_: Tensor, seeds: np.ndarray) -> dict[str, Tensor]:
        """Round centred logits to steps of (highest - lowest) / 254 per view, at least 1/8."""
        import torch

        codes, step = _round(spatial)
        global_codes, global_step = _round(global_)
        return {SPATIAL: codes, GLOBAL: global_codes, STEP: torch.stack([step, global_step], dim=1)}

    def targets(self, arrays: Mapping[str, Tensor]) -> Targets:
        """Return the rounded logits as float32, up to a constant per location."""
        from cskd_pipeline.distill.targets import LogitTargets

        step = arrays[STEP]
        return LogitTargets(
            arrays[SPATIAL].float() * step[:, 0, None, None, None],
            arrays[GLOBAL].float() * step[:, 1, None],
        )

    def unpack(self, rows: Rows, shape: ResponseShape) -> Rows:
        """Return the rows; refuse steps that are not positive and finite."""
        step = rows[STEP]
        if not (np.isfinite(step) & (step > 0)).all():
            raise ValueError("a step is not positive and finite")
        return rows


def _round(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return uint8 codes of ``logits`` (B, K, ...), of the same shape, and their steps (B,)."""
    values = logits.float()
    values = (values - values.mean(dim=1, keepdim=True)).flatten(1)
    low, high = values.aminmax(dim=1, keepdim=True)
    step = ((high - low) / (UNUSED - 1)).clamp(min=_FINEST)
    codes = ((values - low) / step).round().clamp(max=UNUSED - 1).byte()
    return codes.reshape(logits.shape), step.squeeze(1)
