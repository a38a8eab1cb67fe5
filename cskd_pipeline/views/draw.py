"""From a seed to the parameters of a view, without its pixels."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from cskd_pipeline.errors import UsageError
from cskd_pipeline.views.bits import BitStream
from cskd_pipeline.views.policy import REGISTERED, Range, ViewPolicy

ATTEMPTS = 10  # for a crop or an erase box, as in torchvision and timm
MAX_LEVEL = 10.0  # highest RandAugment magnitude
ARGUMENT_UNITS = 4096
"""Arguments of operations are multiples of 1/4096; see :mod:`cskd_pipeline.views.apply`."""

Op = tuple[str, float]
"""A RandAugment operation and its argument, 0 if it takes none."""


class Box(NamedTuple):
    """The pixels ``[top:top+height, left:left+width]``."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class ViewParams:
    """The random parameters of a view, except its mixing.

    ``crop`` is in pixels of the decoded image, ``erase`` in pixels of the view. ``ops`` are the
    applied RandAugment operations in order. ``noise_seed`` is the seed of the erase noise.
    """

    crop: Box
    flip: bool
    ops: tuple[Op, ...]
    erase: tuple[Box, ...]
    noise_seed: int


def draw(seed: int, policy: ViewPolicy, width: int, height: int) -> ViewParams:
    """Draw a view's parameters from ``seed``, for an image of ``width`` x ``height`` pixels.

    ``deit-v1`` has the distribution of timm's ``RandomResizedCropAndInterpolation``, flip,
    ``rand-m9-mstd0.5-inc1`` and ``RandomErasing`` in pixel mode.

    Raises:
        UsageError: a registered policy's ``draw`` returned something other than ``ViewParams``, or
            erase boxes outside the view.
    """
    if policy.version in REGISTERED:
        return _checked(REGISTERED[policy.version].draw(seed, policy, width, height), policy)
    bits = BitStream(seed)
    crop = _draw_crop(bits, policy, width, height)
    flip = bits.chance(policy.flip)
    ops = _draw_ops(bits, policy)
    erase = _draw_erase(bits, policy)
    return ViewParams(crop, flip, ops, erase, bits.uint64())


def _checked(params: ViewParams, policy: ViewPolicy) -> ViewParams:
    side = policy.size
    if not isinstance(params, ViewParams) or any(
        min(box) < 0 or box.top + box.height > side or box.left + box.width > side
        for box in params.erase
    ):
        raise UsageError(
            f"draw of the view policy {policy.version} did not return valid parameters",
            found=params,
            expected=f"ViewParams with erase boxes within {side} x {side} pixels",
            action="correct the draw function passed to register_policy",
        )
    return params


def _draw_crop(bits: BitStream, policy: ViewPolicy, width: int, height: int) -> Box:
    for _ in range(ATTEMPTS):
        area = bits.uniform(*policy.crop_area) * width * height
        ratio = bits.log_uniform(*policy.crop_ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(bits.below(height - h + 1), bits.below(width - w + 1), h, w)
    return _central_crop(policy.crop_ratio, width, height)


def _central_crop(ratios: Range, width: int, height: int) -> Box:
    """Return the largest central box whose aspect ratio is in range."""
    low, high = ratios
    w, h = width, height
    if width / height < low:
        h = min(height, max(1, round(width / low)))
    elif width / height > high:
        w = min(width, max(1, round(height * high)))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _draw_ops(bits: BitStream, policy: ViewPolicy) -> tuple[Op, ...]:
    ops = []
    for _ in range(policy.randaugment_ops):
        name = OPS[bits.below(len(OPS))]
        applied = bits.chance(policy.randaugment_prob)
        level = policy.randaugment_magnitude + policy.randaugment_std * bits.normal()
        sign = -1.0 if bits.chance(0.5) else 1.0
        if applied:
            ops.append((name, argument(name, min(max(level, 0.0), MAX_LEVEL), sign)))
    return tuple(ops)


OPS = (
    "auto_contrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
"""timm's "increasing" set: a higher level distorts more. The order is part of ``deit-v1``."""


def argument(op: str, level: float, sign: float) -> float:
    """Return an operation's argument at ``level`` in [0, 10], as in timm's increasing set.

    It is the degrees of a rotation, the bits kept by posterize, the threshold of solarize or the
    addend of solarize_add (in [0, 256]), the factor of an enhancement (1 is the identity), the
    shear per pixel, or the translation as a fraction of the side; a multiple of
    1 / :data:`ARGUMENT_UNITS`. ``sign`` is the direction, for operations that have one.
    """
    return round(_argument(op, level / MAX_LEVEL, sign) * ARGUMENT_UNITS) / ARGUMENT_UNITS


def _argument(op: str, share: float, sign: float) -> float:
    match op:
        case "rotate":
            return sign * share * 30.0
        case "posterize":
            return float(4 - int(share * 4))
        case "solarize":
            return float(256 - int(share * 256))
        case "solarize_add":
            return float(int(share * 110))
        case "color" | "contrast" | "brightness" | "sharpness":
            return max(0.1, 1.0 + sign * share * 0.9)
        case "shear_x" | "shear_y":
            return sign * share * 0.3
        case "translate_x" | "translate_y":
            return sign * share * 0.45
    return 0.0


def _draw_erase(bits: BitStream, policy: ViewPolicy) -> tuple[Box, ...]:
    if not bits.chance(policy.erase):
        return ()
    side = policy.size
    for _ in range(ATTEMPTS):
        area = bits.uniform(*policy.erase_area) * side * side
        ratio = bits.log_uniform(*policy.erase_ratio)
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < side and 0 < w < side:
            return (Box(bits.below(side - h + 1), bits.below(side - w + 1), h, w),)
    return ()
