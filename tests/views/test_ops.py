"""Operations equal timm's and, on the grid of arguments, exact integer arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFilter
from timm.data.auto_augment import NAME_TO_OP

from cskd_pipeline.views.apply import apply_op
from cskd_pipeline.views.draw import ARGUMENT_UNITS, MAX_LEVEL, OPS, argument
from tests.views.factories import noise, scene
from tests.views.test_draw import TIMM_NAMES

FILL = (124, 116, 104)
FLAT = Image.new("RGB", (64, 64), (7, 7, 200))
IMAGES = [scene(224, 224), noise(97, 97), scene(96, 96), FLAT]
LEVELS = (0.0, 0.3, 2.5, 5.0, 7.77, 8.25, 8.998046875, 9.0, 9.41, 9.99, MAX_LEVEL)


def arguments(op: str) -> list[float]:
    """Return the distinct arguments at all levels and 1,024 around the default, with both signs."""
    levels = [*LEVELS, *(8 + i / 512 for i in range(1024))]
    return sorted({argument(op, level, sign) for level in levels for sign in (-1.0, 1.0)})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("number", range(len(IMAGES)))
def test_an_operation_gives_timms_pixels(op: str, number: int) -> None:
    image = IMAGES[number]
    timms = NAME_TO_OP[TIMM_NAMES[op]]
    for value in {argument(op, level, sign) for level in LEVELS for sign in (-1.0, 1.0)}:
        integral = op in ("posterize", "solarize", "solarize_add")
        given = () if op in ("auto_contrast", "equalize", "invert") else (value,)
        expected = timms(
            image,
            *(map(int, given) if integral else given),
            fillcolor=FILL,
            resample=Image.Resampling.BICUBIC,
        )
        found = apply_op(np.asarray(image), op, value, FILL)
        assert found.dtype == np.uint8
        assert np.array_equal(found, np.asarray(expected)), value


def test_rotations_equal_pillows_around_the_default_level() -> None:
    image = noise(48, 48)
    values = arguments("rotate")
    assert len(values) > 80
    for value in values:
        expected = image.rotate(value, resample=Image.Resampling.BICUBIC, fillcolor=FILL)
        found = apply_op(np.asarray(image), "rotate", value, FILL)
        assert np.array_equal(found, np.asarray(expected)), value


def test_posterize_to_no_bits_is_black() -> None:
    """RandAugment draws it; Pillow 13 refuses it."""
    assert argument("posterize", MAX_LEVEL, 1.0) == 0.0
    assert not apply_op(np.asarray(IMAGES[0]), "posterize", 0.0, FILL).any()


def test_an_operation_does_not_change_its_input() -> None:
    image = np.array(noise(32, 32))
    before = image.tobytes()
    for op in OPS:
        apply_op(image, op, argument(op, 9.0, 1.0), FILL)
    assert image.tobytes() == before


# -- exact integer arithmetic: where it agrees with Pillow's floating point at every argument of the
# -- grid, no compiler's rounding can change a pixel ----------------------------------------------


def slide(pixels: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Shift every row to the left, exactly, by its ``shift`` (H,) int64 in units of 2**-13 pixel.

    A cubic (a = -1) of four neighbours with repeated edges, truncated to integers; pixels whose
    centre is outside the image have the fill colour.
    """
    height, width, _ = pixels.shape
    offset, d = shift[:, None] >> 13, (shift[:, None] & 8191)[..., None]
    columns = np.arange(width) + offset
    rows = np.arange(height)[:, None]
    v1, v2, v3, v4 = (
        pixels[rows, np.clip(columns + i, 0, width - 1)].astype(np.int64) for i in (-1, 0, 1, 2)
    )
    cubic = v4 - v3 + v2 - v1
    square = 2 * v1 - 2 * v2 + v3 - v4
    value = (v2 << 39) + d * (((v3 - v1) << 26) + d * ((square << 13) + d * cubic))
    centre = (np.arange(width) << 13) + 4096 + shift[:, None]
    inside = (centre >= 0) & (centre < width << 13)
    return np.where(inside[..., None], np.clip(value >> 39, 0, 255), FILL).astype(np.uint8)


def shifted(image: Image.Image, op: str, value: float) -> np.ndarray:
    pixels = np.asarray(image)
    if op.endswith("y"):
        pixels = pixels.swapaxes(0, 1)
    units, side = round(value * ARGUMENT_UNITS), len(pixels)
    if op.startswith("shear"):
        result = slide(pixels, units * (2 * np.arange(side) + 1))
    else:
        result = slide(pixels, np.full(side, 2 * units * side))
    return result.swapaxes(0, 1) if op.endswith("y") else result


def blended(plain: Callable[[Image.Image], np.ndarray], image: Image.Image, value: float):
    """Return ``plain + value * (image - plain)``, exact, truncated to integers."""
    base, units = plain(image).astype(np.int64), round(value * ARGUMENT_UNITS)
    mixed = base * ARGUMENT_UNITS + units * (np.asarray(image) - base)
    return np.clip(mixed // ARGUMENT_UNITS, 0, 255).astype(np.uint8)


def grey(image: Image.Image) -> np.ndarray:
    """Return the luma (ITU-R 601-2) from 16 fractional bits, in Pillow's integer arithmetic."""
    luma = np.asarray(image).astype(np.int64) @ np.array([19595, 38470, 7471]) + 0x8000 >> 16
    return np.repeat(luma[..., None], 3, axis=2)


def mean_grey(image: Image.Image) -> np.ndarray:
    luma = grey(image)
    total, count = int(luma[..., 0].sum()), luma[..., 0].size
    return np.full_like(luma, (2 * total + count) // (2 * count))


def black(image: Image.Image) -> np.ndarray:
    return np.zeros_like(np.asarray(image))


def smooth(image: Image.Image) -> np.ndarray:
    """Return the 3x3 mean with weight 5 for the centre and 1 for the others; the border stays."""
    pixels = np.asarray(image).astype(np.int64)
    height, width, _ = pixels.shape
    result = pixels.copy()
    total = sum(pixels[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
    result[1:-1, 1:-1] = (2 * (total + 4 * pixels[1:-1, 1:-1]) + 13) // 26
    return result


BLENDED = {"color": grey, "contrast": mean_grey, "brightness": black, "sharpness": smooth}


@pytest.mark.parametrize("op", ["shear_x", "shear_y", "translate_x", "translate_y"])
@pytest.mark.parametrize("image", [noise(64, 64), noise(33, 33, 1)], ids=["64", "33"])
def test_shearing_and_translating_are_exact_around_the_default_level(
    op: str, image: Image.Image
) -> None:
    values = arguments(op)
    assert len(values) > 80
    for value in values:
        found = apply_op(np.asarray(image), op, value, FILL)
        assert np.array_equal(found, shifted(image, op, value)), value


@pytest.mark.parametrize("op", BLENDED)
def test_blending_is_exact_around_the_default_level(op: str) -> None:
    image = noise(64, 64)
    for value in arguments(op):
        found = apply_op(np.asarray(image), op, value, FILL)
        assert np.array_equal(found, blended(BLENDED[op], image, value)), value


def test_pillows_smoothing_equals_integer_arithmetic() -> None:
    """Pillow's floats stay at least 1/26 away from a rounding boundary."""
    for image in IMAGES:
        found = np.asarray(image.filter(ImageFilter.SMOOTH))
        assert np.array_equal(found, smooth(image))
