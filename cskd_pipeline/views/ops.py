"""RandAugment's operations: Pillow's pixel operations on uint8, the same on every machine.

Look-up tables and histograms are integers. Blending (color, contrast, brightness, sharpness),
shearing and shifting are floating point in Pillow, cut down to uint8; a last bit decides where the
true value is an integer, and Pillow's builds for ARM fuse multiply and add where those for x86 do
not: with arbitrary arguments that changed one view in 400. With arguments that are multiples of
1/4096 every intermediate value is exact, so there is no last bit to differ in (a test compares
with integer arithmetic). A rotation's sine and cosine are never such values, nor does a true value
then fall on an integer by more than chance.
"""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageOps

Colour = tuple[int, int, int]


def apply_op(image: Image.Image, op: str, argument: float, fill: Colour) -> Image.Image:
    """``image`` after one operation of :data:`cskd_pipeline.views.draw.OPS`.

    Args:
        argument: see :func:`cskd_pipeline.views.draw.argument`.
        fill: where a geometric operation uncovers what is outside the image.
    """
    if op in _COLOUR:
        return _COLOUR[op](image, argument)
    if op == "rotate":
        return image.rotate(argument, resample=Image.Resampling.BICUBIC, fillcolor=fill)
    width, height = image.size
    matrix = {
        "shear_x": (1.0, argument, 0.0, 0.0, 1.0, 0.0),
        "shear_y": (1.0, 0.0, 0.0, argument, 1.0, 0.0),
        "translate_x": (1.0, 0.0, argument * width, 0.0, 1.0, 0.0),
        "translate_y": (1.0, 0.0, 0.0, 0.0, 1.0, argument * height),
    }[op]
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BICUBIC,
        fillcolor=fill,
    )


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    """Keep the upper ``bits`` bits; 0 gives black, which Pillow 13 no longer takes."""
    mask = 256 - (1 << (8 - int(bits)))
    return image.point([value & mask for value in range(256)] * 3)


def _solarize_add(image: Image.Image, added: float) -> Image.Image:
    table = [min(255, value + int(added)) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


_COLOUR: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "auto_contrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
    "posterize": _posterize,
    "solarize": lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    "solarize_add": _solarize_add,
    "color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
}
