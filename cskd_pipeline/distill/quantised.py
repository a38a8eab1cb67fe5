"""Soft answers in eight bits a logit.

Legend: B samples, K classes, h x w the teacher's grid; ``spatial`` d (B, K, h, w), ``global_`` g
(B, K), float16.

Softmax does not see what is added to all classes of a location, and CKF adds to them alike: for any
constants, ``r * (d + a) + (1 - r) * (g + b)`` is the fused response plus one number. So each
location is centred on its mean over classes before its logits are rounded, and neither means nor
the lowest value need to be kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

UNUSED = 255
"""No code reaches it."""
_FINEST = 1 / 8  # of a logit; rounded to it the divergence is 5e-4 nats, and the codes compress


class Quantised(NamedTuple):
    """d in units of ``step[:, 0]`` and g in units of ``step[:, 1]``, up to a number per location.

    ``spatial`` (B, K, h, w) and ``global_`` (B, K) uint8, 0 to 254; ``step`` (B, 2) float32.
    """

    spatial: Tensor
    global_: Tensor
    step: Tensor


def quantise(spatial: Tensor, global_: Tensor) -> Quantised:
    """Round logits to the finest step, 1/8 or more, in which 255 codes span a view's values."""
    codes, step = _round(spatial)
    global_codes, global_step = _round(global_)
    return Quantised(codes, global_codes, torch.stack([step, global_step], dim=1))


def restore(codes: Quantised) -> tuple[Tensor, Tensor]:
    """(B, K, h, w) and (B, K) float32: d and g, rounded, plus a number per location."""
    spatial = codes.spatial.float() * codes.step[:, 0, None, None, None]
    return spatial, codes.global_.float() * codes.step[:, 1, None]


def _round(logits: Tensor) -> tuple[Tensor, Tensor]:
    values = logits.float()
    values = (values - values.mean(dim=1, keepdim=True)).flatten(1)
    low, high = values.aminmax(dim=1, keepdim=True)
    step = ((high - low) / (UNUSED - 1)).clamp(min=_FINEST)
    codes = ((values - low) / step).round().clamp(max=UNUSED - 1).to(torch.uint8)
    return codes.reshape(logits.shape), step.squeeze(1)
