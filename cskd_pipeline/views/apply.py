"""From an image and parameters to a view's pixels."""

import zlib

import numpy as np

from cskd_pipeline.errors import UsageError
from cskd_pipeline.views.bits import NORMAL_UNITS, BitStream
from cskd_pipeline.views.draw import ViewParams
from cskd_pipeline.views.kernels import resized
from cskd_pipeline.views.mixing import Mix
from cskd_pipeline.views.ops import apply_op
from cskd_pipeline.views.policy import REGISTERED, ViewPolicy


def render(image: np.ndarray, params: ViewParams, policy: ViewPolicy) -> np.ndarray:
    """Render a view, before erasing and mixing: uint8 (size, size, 3), contiguous.

    Args:
        image: (H, W, 3) uint8, contiguous, of the size that ``params`` was drawn for.

    Raises:
        UsageError: a registered policy's function returned something else.
    """
    if policy.version in REGISTERED:
        return _own(REGISTERED[policy.version].render(image, params, policy), policy)
    view = resized(image, params.crop, policy.size, params.flip)
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
