"""From an image and parameters to a view's pixels: crop, timm's RandAugment, erasing, mixing.

Every operation gives the pixels of timm, and so of Pillow, on every machine. Look-up tables and
histograms are integers. Arguments of blending (color, contrast, brightness, sharpness), shearing
and translation are multiples of 1/4096, for which integer or rounding-free float64 arithmetic gives
the exact value, truncated to uint8. At these arguments all builds of Pillow agree with it. The sine
and cosine of a rotation are rounded to 15 digits, followed by float64 operations in a fixed order.
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
    """Render a view before erasing and mixing: (size, size, 3) uint8, contiguous.

    Args:
        image: (H, W, 3) uint8, contiguous, of the size that ``params`` was drawn for.

    Raises:
        UsageError: a registered policy's ``render`` did not return such a view.
    """
    if policy.version in REGISTERED:
        return _checked(REGISTERED[policy.version].render(image, params, policy), policy)
    view = kernels.resized(image, params.crop, policy.size, params.flip)
    if params.ops:
        red, green, blue = (round(255 * value) for value in policy.mean)
        for op, argument in params.ops:
            view = apply_op(view, op, argument, (red, green, blue))
    return view


def _checked(view: np.ndarray, policy: ViewPolicy) -> np.ndarray:
    expected = (policy.size, policy.size, 3)
    is_array = isinstance(view, np.ndarray)
    if not is_array or view.shape != expected or view.dtype != np.uint8:
        raise UsageError(
            f"render of the view policy {policy.version} did not return a view",
            found=f"{view.dtype} {view.shape}" if is_array else type(view).__name__,
            expected=f"uint8 {expected}",
            action="correct the render function passed to register_policy",
        )
    return np.ascontiguousarray(view)


def digest(pixels: np.ndarray) -> int:
    """Return the CRC-32 of a view's uint8 pixels, row by row, which a replay must reproduce."""
    return zlib.crc32(pixels.data)


def erase_noise(params: ViewParams) -> np.ndarray:
    """Draw the noise of all erase boxes: standard normals times 256, int16, flat.

    The order is box by box, row by row, with three channels per pixel; empty without boxes.
    """
    count = sum(3 * box.height * box.width for box in params.erase)
    return BitStream(params.noise_seed).normals(count) if count else np.empty(0, np.int16)


# -- RandAugment's operations -------------------------------------------------------------------

_VALUES = np.arange(256)


def apply_op(image: np.ndarray, op: str, argument: float, fill: Colour) -> np.ndarray:
    """Apply one operation of :data:`cskd_pipeline.views.draw.OPS` to ``image``, (S, S, 3) uint8.

    Args:
        argument: see :func:`cskd_pipeline.views.draw.argument`.
        fill: colour of pixels that a geometric operation takes from outside the image.
    """
    if op in _TABLES:
        table = _TABLES[op](image, argument)
        return kernels.apply_table(image, np.ascontiguousarray(np.broadcast_to(table, (3, 256))))
    if op == "color":
        return kernels.saturated(image, round(argument * kernels.BLEND_UNITS))
    if op == "sharpness":
        return kernels.sharpened(image, round(argument * kernels.BLEND_UNITS))
    colour = np.array(fill, np.uint8)
    if op == "rotate":
        return _rotated(image, argument, colour)
    if op.endswith("_y"):
        shifted = kernels.slide(kernels.transposed(image), _shifts(image, op, argument), colour)
        return kernels.transposed(shifted)
    return kernels.slide(image, _shifts(image, op, argument), colour)


def _shifts(image: np.ndarray, op: str, argument: float) -> np.ndarray:
    """Return the shift of each row (or column), in units of :func:`kernels.slide`.

    It is ``argument`` times the position of the row's centre (shear) or times the side (translate).
    """
    side = len(image)
    if op.startswith("shear"):
        half_pixels = 2 * np.arange(side, dtype=np.int64) + 1
    else:
        half_pixels = np.full(side, 2 * side, np.int64)
    return round(argument * (kernels.SHIFT_UNITS // 2)) * half_pixels


def _rotated(image: np.ndarray, degrees: float, fill: np.ndarray) -> np.ndarray:
    """Rotate counter-clockwise around the centre."""
    if degrees % 360.0 == 0.0:
        return image.copy()
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x = y = len(image) / 2.0
    matrix = (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)
    return kernels.rotated(image, np.array(matrix), fill)


def _auto_contrast(image: np.ndarray, _: float) -> np.ndarray:
    """Return (3, 256) tables that map each channel's darkest value to 0 and brightest to 255."""
    tables = np.tile(_VALUES, (3, 1))
    for channel, counts in enumerate(kernels.histograms(image)):
        values = np.flatnonzero(counts)
        low, high = int(values[0]), int(values[-1])
        if high > low:
            scale = 255.0 / (high - low)
            offset = -low * scale
            tables[channel] = np.clip((_VALUES * scale + offset).astype(np.int64), 0, 255)
    return tables.astype(np.uint8)


def _equalize(image: np.ndarray, _: float) -> np.ndarray:
    """Return (3, 256) tables that equalize each channel's histogram."""
    tables = np.tile(_VALUES, (3, 1))
    for channel, counts in enumerate(kernels.histograms(image)):
        used = counts[counts > 0]
        step = int(used.sum() - used[-1]) // 255
        if len(used) > 1 and step:
            below = np.cumsum(counts) - counts
            tables[channel] = np.minimum((step // 2 + below) // step, 255)
    return tables.astype(np.uint8)


def _blend(grey: int, factor: float) -> np.ndarray:
    """Return the table of ``grey + factor * (value - grey)``."""
    units = round(factor * kernels.BLEND_UNITS)
    blended = (grey * kernels.BLEND_UNITS + units * (_VALUES - grey)) >> 12
    return np.clip(blended, 0, 255).astype(np.uint8)


def _solarize_add(added: float) -> np.ndarray:
    brighter = np.minimum(_VALUES + int(added), 255)
    return np.where(_VALUES < 128, brighter, _VALUES).astype(np.uint8)


_TABLES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": lambda image, _: (255 - _VALUES).astype(np.uint8),
    # keeps the upper bits; none of them gives black
    "posterize": lambda image, bits: (_VALUES & (256 - (1 << (8 - int(bits))))).astype(np.uint8),
    "solarize": lambda image, threshold: np.where(
        int(threshold) > _VALUES, _VALUES, 255 - _VALUES
    ).astype(np.uint8),
    "solarize_add": lambda image, added: _solarize_add(added),
    "contrast": lambda image, factor: _blend(kernels.mean_luma(image), factor),
    "brightness": lambda image, factor: _blend(0, factor),
}


# -- the numpy reference of what a device computes ----------------------------------------------


def to_float(pixels: np.ndarray, params: ViewParams, policy: ViewPolicy) -> np.ndarray:
    """Return the view with its erase boxes, (size, size, 3) float32.

    It is ``pixels / 255``, in [0, 1], and ``mean + std * z`` with normal z inside the boxes.
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
    """Mix a view with its partner, (size, size, 3) float32."""
    if mix.cutmix:
        top, left, height, width = mix.box
        mixed = own.copy()
        inside = slice(top, top + height), slice(left, left + width)
        mixed[inside] = partner[inside]
        return mixed
    lam = np.float32(mix.lam)
    return own * lam + partner * (np.float32(1) - lam)
