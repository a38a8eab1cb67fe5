"""Bytes to RGB pixels, the same in both stages whatever the file is."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps

from cskd_pipeline.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP")
"""Tried by content, so a PNG named .JPEG is read. Other decoders are never reached."""
MAX_PIXELS = 100_000_000


def decode(data: bytes, where: object) -> Image.Image:
    """An RGB image, upright.

    Grey, CMYK, palette, 16-bit grey and images with transparency (over white) become RGB; an EXIF
    orientation is applied.

    Args:
        where: the sample, for the error message.

    Raises:
        ImageError: no JPEG, PNG or WebP, damaged or cut short, or more than 100 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong enough raises; EXIF may be odd
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _refuse_bomb(image, where)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ImageError(
            "the image cannot be decoded",
            where=where,
            found=f"{len(data)} bytes: {type(error).__name__}: {error}",
            expected="a whole JPEG, PNG or WebP file",
            action="replace the image, or make the shards without it",
        ) from error


def _refuse_bomb(image: Image.Image, where: object) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            "the image is larger than any honest one",
            where=where,
            found=f"{width}x{height} pixels",
            expected=f"at most {MAX_PIXELS:,} pixels",
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey: conversion alone would clip to white
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
