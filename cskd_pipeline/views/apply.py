"""From an image and parameters to a view's pixels: a crop, timm's RandAugment, erasing, mixing.

Operations have timm's, and so Pillow's, pixels, the same on every machine. Look-up tables and
histograms are integers. Blending (color, contrast, brightness, sharpness), shearing and shifting
take arguments that are multiples of 1/4096, for which integers, or float64 without any rounding,
give the exact value, cut down to uint8; Pillow's floating point gives the same there, and only
there on all of its builds. A rotation's sine and cosine are never such values; they are rounded to
15 digits, and what follows is a fixed order of float64 operations.
"""

import math
import zlib
from collections.abc import Callable

import numpy as np

from cskd_pipeline.errors import UsageError
from cskd_pipeline.views import kernels
from cskd_pipeline.views.bits import NORMAL_UNITS, BitStream
from cskd_pipeline.views.draw import ViewParams
from cskd_pipeline.views.mixing import Mix
from cskd_pipeline.views.policy import REGISTERED, ViewPolicy

Colour = tuple[int, int, int]


def render(image: np.ndarray, params: ViewParams, policy: ViewPolicy) -> np.ndarray:
    """Render a view, before erasing and mixing: uint8 (size, size, 3), contiguous.

    Args:
        image: (H, W, 3) uint8, contiguous, of the size that ``params`` was drawn for.

    Raises:
        UsageError: a registered policy's function returned something else.
    """
    if policy.version in REGISTERED:
        return _own(REGISTERED[policy.version].render(image, params, policy), policy)
    view = kernels.resized(image, params.crop, policy.size, params.flip)
    if params.ops:
        red, green, blue = (round(255 * value) for value in policy.mean)
        for op, argument in params.ops:
            view = apply_op(view, op, argument, (red, green, blue))
    return view


def _own(view: np.ndarray, policy: ViewPolicy) -> np.ndarray:
    expected = (policy.size, policy.size, 3)
    is_array = isinstance(view, np.ndarray)
    if not is_array or view.shape != expected or view.dtype != np.uint8:
        raise UsageError(
            f"the view policy {policy.version} rendered something else than a view",
            found=f"{view.dtype} {view.shape}" if is_array else type(view).__name__,
            expected=f"uint8 {expected}",
            action="correct the function that was given to register_policy",
        )
    return np.ascontiguousarray(view)


def digest(pixels: np.ndarray) -> int:
    """Return the CRC-32 of a view's uint8 pixels, row by row: what a replay must reproduce."""
    return zlib.crc32(pixels.data)


def erase_noise(params: ViewParams) -> np.ndarray:
    """Draw the noise of the erased boxes: int16 standard normals times 256, flat.

    Box after box, row by row, three channels a pixel; empty without boxes.
    """
    count = sum(3 * box.height * box.width for box in params.erase)
    return BitStream(params.noise_seed).normals(count) if count else np.empty(0, np.int16)


# -- RandAugment's operations -------------------------------------------------------------------

_VALUES = np.arange(256)


def apply_op(image: np.ndarray, op: str, argument: float, fill: Colour) -> np.ndarray:
    """Apply one operation of :data:`cskd_pipeline.views.draw.OPS` to ``image``, (S, S, 3) uint8.

    Args:
        argument: see :func:`cskd_pipeline.views.draw.argument`.
        fill: where a geometric operation uncovers what is outside the image.
    """
    if op in _TABLES:
        table = _TABLES[op](image, argument)
        return kernels.recoloured(image, np.ascontiguousarray(np.broadcast_to(table, (3, 256))))
    if op == "color":
        return kernels.saturated(image, round(argument * kernels.BLEND_UNITS))
    if op == "sharpness":
        return kernels.sharpened(image, round(argument * kernels.BLEND_UNITS))
    colour = np.array(fill, np.uint8)
    if op == "rotate":
        return _rotated(image, argument, colour)
    if op.endswith("_y"):
        slid = kernels.slide(kernels.transposed(image), _shifts(image, op, argument), colour)
        return kernels.transposed(slid)
    return kernels.slide(image, _shifts(image, op, argument), colour)


def _shifts(image: np.ndarray, op: str, argument: float) -> np.ndarray:
    """Return the shift of each row (or column), in the units of :func:`kernels.slide`.

    ``argument`` times the position of the row's centre (shear) or the side (translate).
    """
    side = len(image)
    if op.startswith("shear"):
        halves = 2 * np.arange(side, dtype=np.int64) + 1
    else:
        halves = np.full(side, 2 * side, np.int64)
    return round(argument * (kernels.SHIFT_UNITS // 2)) * halves


def _rotated(image: np.ndarray, degrees: float, fill: np.ndarray) -> np.ndarray:
    """Counter-clockwise around the middle."""
    if degrees % 360.0 == 0.0:
        return image.copy()
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x = y = len(image) / 2.0
    matrix = (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)
    return kernels.rotated(image, np.array(matrix), fill)


def _auto_contrast(image: np.ndarray, _: float) -> np.ndarray:
    """Each channel's darkest value to 0 and its brightest to 255."""
    tables = np.tile(_VALUES, (3, 1))
    for channel, counts in enumerate(kernels.histograms(image)):
        found = np.flatnonzero(counts)
        low, high = int(found[0]), int(found[-1])
        if high > low:
            scale = 255.0 / (high - low)
            offset = -low * scale
            tables[channel] = np.clip((_VALUES * scale + offset).astype(np.int64), 0, 255)
    return tables.astype(np.uint8)


def _equalize(image: np.ndarray, _: float) -> np.ndarray:
    """Each channel's values spread so that all are about as frequent."""
    tables = np.tile(_VALUES, (3, 1))
    for channel, counts in enumerate(kernels.histograms(image)):
        found = counts[counts > 0]
        step = int(found.sum() - found[-1]) // 255
        if len(found) > 1 and step:
            below = np.cumsum(counts) - counts
            tables[channel] = np.minimum((step // 2 + below) // step, 255)
    return tables.astype(np.uint8)


def _blended_with(dull: int, factor: float) -> np.ndarray:
    units = round(factor * kernels.BLEND_UNITS)
    mixed = (dull * kernels.BLEND_UNITS + units * (_VALUES - dull)) >> 12
    return np.clip(mixed, 0, 255).astype(np.uint8)


def _solarize_add(added: float) -> np.ndarray:
    brighter = np.minimum(_VALUES + int(added), 255)
    return np.where(_VALUES < 128, brighter, _VALUES).astype(np.uint8)


_TABLES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": lambda image, _: (255 - _VALUES).astype(np.uint8),
    # the upper bits; none gives black
    "posterize": lambda image, bits: (_VALUES & (256 - (1 << (8 - int(bits))))).astype(np.uint8),
    "solarize": lambda image, threshold: np.where(
        int(threshold) > _VALUES, _VALUES, 255 - _VALUES
    ).astype(np.uint8),
    "solarize_add": lambda image, added: _solarize_add(added),
    "contrast": lambda image, factor: _blended_with(kernels.mean_luma(image), factor),
    "brightness": lambda image, factor: _blended_with(0, factor),
}


# -- what a device computes from the above, in numpy: the reference for it ---------------------


def to_float(pixels: np.ndarray, params: ViewParams, policy: ViewPolicy) -> np.ndarray:
    """Return the view with its erased boxes: float32 (size, size, 3), in [0, 1] but for the noise.

    ``pixels / 255``, and ``mean + std * z`` inside the boxes.
    """
    view = pixels.astype(np.float32) / np.float32(255)
    mean, std = np.array(policy.mean, np.float32), np.array(policy.std, np.float32)
    noise = erase_noise(params)
    start = 0
    for top, left, height, width in params.erase:
        count = 3 * height * width
        z = noise[start : start + count].reshape(height, width, 3)
        z = z.astype(np.float32) / np.float32(NORMAL_UNITS)
        view[top : top + height, left : left + width] = mean + std * z
        start += count
    return view


def mix_pixels(own: np.ndarray, partner: np.ndarray, mix: Mix) -> np.ndarray:
    """Mix a view with its partner: float32 (size, size, 3)."""
    if mix.cutmix:
        top, left, height, width = mix.box
        mixed = own.copy()
        inside = slice(top, top + height), slice(left, left + width)
        mixed[inside] = partner[inside]
        return mixed
    lam = np.float32(mix.lam)
    return own * lam + partner * (np.float32(1) - lam)
