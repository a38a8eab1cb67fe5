"""File bytes to RGB pixels, identical in both stages for every supported file."""

import io
import warnings
from contextlib import suppress

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from cskd_pipeline.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP")
"""Detected by content, so a PNG named .JPEG is read. No other decoder of Pillow is tried."""
MAX_PIXELS = 100_000_000
_ACTION = (
    "list all such images with cskd-pipeline index SHARDS --out FILE --check-images; replace them, "
    "or dump and train without them: --set data.corrupt=skip"
)


def decode(data: bytes, where: object) -> np.ndarray:
    """Decode an image to upright RGB, (H, W, 3) uint8, contiguous.

    Grey, CMYK, palette, 16-bit grey and transparent images (over white) are converted to RGB, and
    an EXIF orientation is applied. Intact three-channel JPEGs, nearly all images, are decoded by
    simplejpeg; all others go through Pillow, which would give the same pixels.

    Args:
        where: the sample, for the error message.

    Raises:
        ImageError: not a JPEG, PNG or WebP, damaged, truncated, or above 100 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # real damage raises; odd EXIF only warns
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width}x{height} pixels")
            turn = _turn(image)
            if image.format == "JPEG" and image.mode == "RGB" and turn is None:
                pixels = _jpeg(data, image.size)
                if pixels is not None:
                    return pixels
            key = _transparent_colour(image)
            image.load()
            upright = image if turn is None else image.transpose(turn)
            return _to_rgb(upright) if key is None else _without_colour(upright, key)
    except Image.DecompressionBombError as error:  # Pillow raises it too, at a higher limit
        raise ImageError(
            "the image has too many pixels",
            where=where,
            found=str(error),
            expected=f"at most {MAX_PIXELS:,} pixels",
            action=_ACTION,
        ) from error
    except Exception as error:  # Pillow raises many types for damaged files
        unknown = isinstance(error, UnidentifiedImageError)  # its message is a memory address
        reason = "no image" if unknown else f"{type(error).__name__}: {error}"
        raise ImageError(
            "the image cannot be decoded",
            where=where,
            found=f"{len(data)} bytes: {reason}",
            expected="a complete JPEG, PNG or WebP file",
            action=_ACTION,
        ) from error


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that undoes an EXIF orientation; 1 is upright, other values are ignored."""


def _turn(image: Image.Image) -> Image.Transpose | None:
    # Not image.getexif(), which since Pillow 11 also reads XMP: views must not change.
    exif = Image.Exif()
    with suppress(Exception):  # damaged EXIF is ignored
        exif.load(image.info.get("exif", b""))
        return _TURNS.get(exif.get(ExifTags.Base.Orientation, 1))
    return None


def _jpeg(data: bytes, size: tuple[int, int]) -> np.ndarray | None:
    """Decode a flawless JPEG of that width and height; return None if Pillow must decide."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if (width, height) == size:
            return simplejpeg.decode_jpeg(data)
    except ValueError:  # its only error; libjpeg's warnings raise it too
        pass
    return None


_GREY_SCALE = {"L;2": 85, "L;4": 17}
"""Factors by which Pillow scales grey values of 2 and 4 bits, but not the transparent value."""


def _transparent_colour(image: ImageFile.ImageFile) -> int | tuple[int, ...] | None:
    """Return the transparent colour of a PNG without alpha, at the depth of Pillow's pixels.

    The pixels must not be loaded yet. Of 16-bit channels Pillow keeps the upper 8 bits in RGB and
    all bits in grey, but all 16 bits of the transparent colour in both.
    """
    key = image.info.get("transparency")
    if image.mode not in ("L", "RGB", "I", "I;16", "I;16B") or not isinstance(key, int | tuple):
        return None
    packing = str(image.tile[0][3]) if image.tile else ""
    if isinstance(key, int):
        return key * _GREY_SCALE.get(packing, 1)
    return tuple(value >> 8 for value in key) if packing == "RGB;16B" else key


def _without_colour(image: Image.Image, key: int | tuple[int, ...]) -> np.ndarray:
    """Convert to RGB with white in place of the colour ``key``."""
    values = np.asarray(image.convert("I") if image.mode.startswith("I") else image)
    transparent = values == key
    if transparent.ndim == 3:
        transparent = transparent.all(axis=2)
    del image.info["transparency"]
    pixels = _to_rgb(image)
    pixels[transparent] = 255
    return pixels


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey, which convert alone would clip to white
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
