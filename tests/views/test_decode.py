"""Any file becomes upright RGB, or is refused with one clear error."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from cskd_pipeline.errors import ImageError
from cskd_pipeline.views import decode as decode_module
from cskd_pipeline.views.decode import decode
from tests.views.factories import scene

IMAGE = scene(48, 32)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """Write a PNG by the format's specification, for variants that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def decoded(data: bytes) -> list[list[int]]:
    image = decode(data, "here")
    assert (image.dtype, image.shape[2]) == (np.uint8, 3)
    assert image.flags.c_contiguous
    return image.reshape(-1, 3).tolist()


def refusal(data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode(data, "shard.tar: key7")
    assert "shard.tar: key7" in str(caught.value)
    assert caught.value.action
    return caught.value


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_files_give_their_pixels(kind: str) -> None:
    data = saved(IMAGE, kind, lossless=True)
    assert decode(data, "").tobytes() == IMAGE.tobytes()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_gives_pillows_own_pixels(options: dict) -> None:
    data = saved(IMAGE, "JPEG", **options)
    assert decode(data, "").tobytes() == Image.open(io.BytesIO(data)).tobytes()


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 8), (33, 250), (401, 300)])
def test_a_jpeg_decoded_without_pillow_has_pillows_pixels(
    size: tuple[int, int], progressive: bool, subsampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"progressive": progressive, "subsampling": subsampling, "quality": 75}
    data = saved(scene(*size), "JPEG", restart_marker_blocks=3, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    monkeypatch.setattr(Image.Image, "transpose", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)  # Pillow reads the header only
    found = decode(data, "")
    assert np.array_equal(found, expected)
    assert found.flags.writeable


def test_a_jpeg_with_a_flaw_that_pillow_forgives_has_pillows_pixels() -> None:
    """A flipped bit after the headers: libjpeg warns and continues."""
    intact = saved(scene(64, 48), "JPEG", quality=90)
    start, forgiven = intact.index(b"\xff\xda") + 20, 0
    for offset in range(start, len(intact) - 2, 7):
        data = bytearray(intact)
        data[offset] ^= 0x10
        try:
            image = Image.open(io.BytesIO(bytes(data)))
            image.load()
        except OSError:
            refusal(bytes(data))
            continue
        forgiven += 1
        assert np.array_equal(decode(bytes(data), ""), np.asarray(image.convert("RGB")))
    assert forgiven > 10


def test_a_png_named_jpeg_is_decoded_by_its_content() -> None:
    data = saved(IMAGE, "PNG")
    assert decode(data, "n02105855_2933.JPEG").tobytes() == IMAGE.tobytes()


def test_grey_becomes_three_equal_channels() -> None:
    grey = IMAGE.convert("L")
    for kind in ("PNG", "JPEG"):
        pixels = np.asarray(decode(saved(grey, kind), ""))
        assert np.array_equal(pixels[..., 0], pixels[..., 1])
        assert np.array_equal(pixels[..., 0], pixels[..., 2])
    assert np.array_equal(np.asarray(decode(saved(grey, "PNG"), ""))[..., 0], np.asarray(grey))
    assert decoded(png(8, 1, 1, 0, b"\0\xaa")) == [[255] * 3, [0] * 3] * 4


def test_cmyk_becomes_rgb_as_pillow_converts_it() -> None:
    data = saved(IMAGE.convert("CMYK"), "JPEG", quality=100, subsampling=0)
    found = np.asarray(decode(data, "")).astype(int)
    assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(found - np.asarray(IMAGE)).mean() < 3  # not inverted


def test_a_palette_gives_its_colours() -> None:
    palette = chunk(b"PLTE", bytes([10, 20, 30, 200, 100, 50]))
    assert decoded(png(2, 1, 8, 3, b"\0\0\1", palette)) == [[10, 20, 30], [200, 100, 50]]


def test_16_bit_channels_keep_their_upper_half() -> None:
    values = (0, 255, 256, 0x8000, 0xFEFF, 0xFFFF)
    row = b"\0" + struct.pack(">6H", *values)
    assert decoded(png(6, 1, 16, 0, row)) == [[value >> 8] * 3 for value in values]
    assert decoded(png(2, 1, 16, 2, row)) == [[0, 0, 1], [0x80, 0xFE, 0xFF]]


TRANSPARENT_RED = Image.new("RGBA", (1, 1), (200, 0, 0, 0))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (saved(TRANSPARENT_RED, "PNG"), [[255, 255, 255]]),
        (saved(Image.new("RGBA", (1, 1), (200, 0, 0, 255)), "PNG"), [[200, 0, 0]]),
        (saved(Image.new("RGBA", (1, 1), (200, 0, 0, 51)), "PNG"), [[244, 204, 204]]),
        (saved(Image.new("LA", (1, 1), (100, 51)), "PNG"), [[224] * 3]),
        (saved(TRANSPARENT_RED, "WEBP", lossless=True, exact=True), [[255, 255, 255]]),
        (png(2, 1, 8, 0, b"\0\5\6", chunk(b"tRNS", b"\0\5")), [[255] * 3, [6] * 3]),
        (
            png(2, 1, 8, 2, b"\0\5\5\5\6\6\6", chunk(b"tRNS", b"\0\5\0\5\0\5")),
            [[255] * 3, [6] * 3],
        ),
        (
            png(2, 1, 8, 3, b"\0\0\1", chunk(b"PLTE", bytes(range(6))) + chunk(b"tRNS", b"\0")),
            [[255] * 3, [3, 4, 5]],
        ),
        (png(1, 1, 16, 4, b"\0" + struct.pack(">HH", 0x6400, 0x33FF)), [[224] * 3]),
    ],
    ids=["clear", "opaque", "a fifth", "LA", "webp", "grey", "rgb", "palette", "LA 16 bit"],
)
def test_transparency_shows_white(data: bytes, expected: list[list[int]]) -> None:
    assert decoded(data) == expected


def transparent(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # 0x0203 and 0x0003 share a byte, 0x0203 and 0x02FF the other.
        (
            png(
                3, 1, 16, 0, b"\0" + struct.pack(">3H", 0x0203, 0x0003, 0x02FF), transparent(0x203)
            ),
            [255, 0, 2],
        ),
        (
            png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 0x0500, 0x0005), transparent(5)),
            [5, 255],
        ),
        (png(4, 1, 2, 0, b"\0\x1b", transparent(1)), [0, 255, 170, 255]),
        (png(2, 1, 4, 0, b"\0\x1b", transparent(1)), [255, 187]),
        (
            png(
                2,
                1,
                16,
                2,
                b"\0" + struct.pack(">6H", *[0x0102] * 3, *[0x0203] * 3),
                transparent(*[0x0102] * 3),
            ),
            [255, 2],
        ),
    ],
    ids=["grey 16 bit", "low byte alone", "grey 2 bit", "grey 4 bit", "rgb 16 bit"],
)
def test_the_transparent_colour_is_compared_at_the_depth_of_the_file(
    data: bytes, expected: list[int]
) -> None:
    assert decoded(data) == [[value] * 3 for value in expected]


def test_a_transparent_colour_of_a_rotated_image_becomes_white() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = b"\0" + struct.pack(">2H", 0x0500, 0x0005)
    data = png(2, 1, 16, 0, rows, transparent(5) + chunk(b"eXIf", exif.tobytes()[6:]))
    found = np.asarray(decode(data, ""))
    assert found.shape == (2, 1, 3)
    assert found[:, 0, 0].tolist() == [5, 255]


TURNED = np.arange(6, dtype=np.uint8).reshape(2, 3) * 51  # in every palette
UPRIGHT = {  # the displayed pixels of TURNED by EXIF orientation (Exif 2.32, 4.6.4)
    1: TURNED,
    2: TURNED[:, ::-1],
    3: TURNED[::-1, ::-1],
    4: TURNED[::-1],
    5: TURNED.T,
    6: TURNED[::-1].T,
    7: TURNED[::-1, ::-1].T,
    8: TURNED.T[::-1],
    0: TURNED,
    9: TURNED,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_exif_orientation_is_applied(orientation: int, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(TURNED).convert("RGB").convert(mode)
    for kind in ("PNG", "WEBP") if mode != "P" else ("PNG",):
        found = decode(saved(image, kind, exif=exif, lossless=True), "")
        assert np.array_equal(np.asarray(found)[..., 0], UPRIGHT[orientation])


def test_exif_orientation_of_a_jpeg_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = saved(IMAGE, "JPEG"), saved(IMAGE, "JPEG", exif=exif)
    expected = np.rot90(np.asarray(decode(plain, "")), -1)
    assert np.array_equal(np.asarray(decode(turned, "")), expected)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0JUNKJUNK", b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01", b"Exif\0\0", b"M"]
)
def test_damaged_exif_is_ignored_silently(exif: bytes) -> None:
    data = saved(IMAGE, "JPEG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data, "").tobytes() == decode(saved(IMAGE, "JPEG"), "").tobytes()


@pytest.mark.parametrize("key", ["xmp", "XML:com.adobe.xmp"])
def test_an_orientation_in_xmp_is_ignored(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow 10 ignores it and Pillow 11 does not."""
    image = Image.open(io.BytesIO(saved(IMAGE, "PNG")))
    image.load()
    image.info[key] = '<x tiff:Orientation="6"/>'
    monkeypatch.setattr(decode_module.Image, "open", lambda *_, **__: image)
    assert decode(b"", "").shape == np.asarray(IMAGE).shape


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    data = saved(IMAGE, kind)
    error = refusal(data[: int(len(data) * share)])
    assert error.expected == "a complete JPEG, PNG or WebP file"


def test_a_damaged_png_is_refused() -> None:
    data = bytearray(saved(IMAGE, "PNG"))
    data[len(data) // 2] ^= 0xFF
    refusal(bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 5000,
        b"<svg></svg>",
        saved(IMAGE, "GIF"),
        saved(IMAGE, "TIFF"),
        png(0, 5, 8, 2, b""),
    ],
    ids=["empty", "zeros", "text", "gif", "tiff", "no pixels"],
)
def test_other_files_are_refused(data: bytes) -> None:
    assert f"{len(data)} bytes" in str(refusal(data).found)


def jpeg_header(width: int, height: int) -> bytes:
    data = bytearray(saved(IMAGE, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        png(10_001, 10_000, 8, 2, b""),
        png(60_000, 60_000, 8, 2, b""),
        png(2**31 - 1, 2**31 - 1, 8, 2, b""),
        jpeg_header(65_000, 65_000),
    ],
    ids=["just too large", "large", "absurd", "jpeg"],
)
def test_a_bomb_is_refused_by_its_header_alone(data: bytes) -> None:
    tracemalloc.start()
    error = refusal(data)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert error.problem == "the image has too many pixels"
    assert error.expected == "at most 100,000,000 pixels"


def test_our_limit_does_not_depend_on_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert refusal(png(60_000, 60_000, 8, 2, b"")).found == "60000x60000 pixels"


def test_an_error_keeps_its_cause() -> None:
    assert refusal(b"nothing").__cause__ is not None
