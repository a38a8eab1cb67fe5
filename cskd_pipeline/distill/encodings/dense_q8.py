"""``dense-q8``: all logits in eight bits each, for soft losses, at 2/5 of the size of ``dense``.

Softmax does not see what is added to all classes of a location, and CKF adds to them alike: for any
constants, ``r * (d + a) + (1 - r) * (g + b)`` is the fused response plus one number. So each
location is centred on its mean over classes before its logits are rounded, and neither means nor
the lowest value need to be kept.
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
"""No code reaches it."""
_LEVEL = 3
_FINEST = 1 / 8  # of a logit; rounded to it the divergence is 5e-4 nats, and the codes compress


class DenseQ8(Encoding):
    """(B, K, h, w) and (B, K) uint8 codes, 0 to 254, and their (B, 2) float32 steps.

    Codes count steps, of 1/8 or more, up from the lowest of a view's centred logits. Differences
    along classes, rows or columns would save 8 % more; they are not worth their decoding.
    """

    name = "dense-q8"
    serves = ("soft",)
    exact = False
    temperatures = (0.0, math.inf)

    def arrays(self, shape: ResponseShape) -> tuple[ArraySpec, ...]:
        """Return codes of spatial and global logits, and their steps, in chunks of a few rows."""
        axes, grid = ("class", "row", "column"), tuple(shape)
        arrays = (
            ArraySpec(SPATIAL, "uint8", axes, grid, UNUSED, _LEVEL, file_per_view=True),
            ArraySpec(GLOBAL, "uint8", axes[:1], grid[:1], UNUSED, _LEVEL),
            ArraySpec(STEP, "float32", ("spatial_and_global",), (2,), 0, _LEVEL),
        )
        return tuple(array.read_by_row() for array in arrays)

    def encode(self, spatial: Tensor, global_: Tensor, seeds: np.ndarray) -> dict[str, Tensor]:
        """Round logits to the finest step, 1/8 or more, in which 255 codes span a view's values."""
        import torch

        codes, step = _round(spatial)
        global_codes, global_step = _round(global_)
        return {SPATIAL: codes, GLOBAL: global_codes, STEP: torch.stack([step, global_step], dim=1)}

    def targets(self, arrays: Mapping[str, Tensor]) -> Targets:
        """Return float32 logits, rounded, and up to a number per location."""
        from cskd_pipeline.distill.targets import LogitTargets

        step = arrays[STEP]
        return LogitTargets(
            arrays[SPATIAL].float() * step[:, 0, None, None, None],
            arrays[GLOBAL].float() * step[:, 1, None],
        )

    def unpack(self, rows: Rows, shape: ResponseShape) -> Rows:
        """Return the rows, if their steps are positive numbers."""
        step = rows[STEP]
        if not (np.isfinite(step) & (step > 0)).all():
            raise ValueError("a step that is not a positive number")
        return rows


def _round(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes like ``logits`` (B, ...), and their (B,) steps."""
    values = logits.float()
    values = (values - values.mean(dim=1, keepdim=True)).flatten(1)
    low, high = values.aminmax(dim=1, keepdim=True)
    step = ((high - low) / (UNUSED - 1)).clamp(min=_FINEST)
    codes = ((values - low) / step).round().clamp(max=UNUSED - 1).byte()
    return codes.reshape(logits.shape), step.squeeze(1)
