"""Test images computed in integers, identical on every machine."""

from __future__ import annotations

import numpy as np
from PIL import Image


def scene(width: int, height: int) -> Image.Image:
    """Return gradients, a checkerboard, a disc and flat areas; red narrow, blue clipped."""
    rows, columns = np.indices((height, width))
    red = 40 + (columns * 150) // width + rows % 7
    green = (rows * columns // 11) % 256
    blue = np.clip((rows * 400) // height - 60, 0, 255)
    checker = (rows // 8 + columns // 8) % 2 * 90
    disc = (rows - height // 3) ** 2 + (columns - width // 2) ** 2 < (height // 4) ** 2
    pixels = np.stack([red, (green + checker) // 2, blue], axis=-1)
    pixels[disc] = (200, 30, 60)
    pixels[: height // 10] = (90, 120, 20)
    return Image.fromarray(pixels.astype(np.uint8))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an image of independent random pixels."""
    words = np.random.Philox(key=seed, counter=0).random_raw(3 * width * height)
    return Image.fromarray((words >> np.uint64(56)).astype(np.uint8).reshape(height, width, 3))
