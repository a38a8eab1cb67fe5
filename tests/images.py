"""Small synthetic images for tests, in every file format found in real data sets."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from webdataset import TarWriter

CLASSES = ("bird", "cat", "dog", "fox", "owl")
Sample = tuple[str, Mapping[str, bytes]]
"""Key, and field -> bytes."""


def random_image(number: int) -> Image.Image:
    """Return RGB image ``number``, 40 to 90 pixels a side, of gradients, shapes and noise."""
    rng = np.random.default_rng([1234, number])
    width, height = (int(n) for n in rng.integers(40, 91, 2))
    rows, columns = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None, :]
    planes = [rng.uniform(0, 160) + rng.uniform(-80, 95) * (rows if i % 2 else columns)
              + rng.uniform(-40, 40) * rows * columns for i in range(3)]  # fmt: skip
    shade = np.stack(np.broadcast_arrays(*planes), axis=-1) + rng.normal(0, 6, (height, width, 1))
    image = Image.fromarray(np.clip(shade, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for shape in rng.permutation(3):
        left, top = int(rng.integers(0, width - 12)), int(rng.integers(0, height - 12))
        box = (left, top, left + int(rng.integers(8, 30)), top + int(rng.integers(8, 30)))
        ink = tuple(int(c) for c in rng.integers(0, 256, 3))
        (draw.ellipse, draw.rectangle, draw.line)[shape](box, fill=ink)
    return image


def encode(number: int) -> tuple[str, bytes]:
    """Return field name and bytes of image ``number``; the format cycles with the number."""
    image = random_image(number)
    file = io.BytesIO()
    kind = number % 10
    if kind == 4:
        image.convert("L").save(file, "JPEG", quality=90)
    elif kind == 5:
        image.convert("CMYK").save(file, "JPEG", quality=90)
    elif kind == 6:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(file, "PNG")
        return "png", file.getvalue()
    elif kind == 7:
        image.quantize(64).save(file, "PNG")
        return "png", file.getvalue()
    elif kind == 8:  # a PNG named JPEG; ImageNet contains one
        image.save(file, "PNG")
        return "jpeg", file.getvalue()
    elif kind == 9:
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate by 90 degrees
        image.save(file, "JPEG", quality=90, exif=exif)
    elif kind == 3:
        image.save(file, "WEBP", quality=80)
        return "webp", file.getvalue()
    else:
        image.save(file, "JPEG", quality=85, subsampling=kind)
    return "jpg", file.getvalue()


def sample(number: int) -> Sample:
    """Return image ``number`` with its label, in JSON and mostly also as text."""
    label = number % len(CLASSES)
    field, data = encode(number)
    fields = {field: data, "json": json.dumps({"label": label}).encode()}
    if number % 3:
        fields["cls"] = str(label).encode()
    return f"{CLASSES[label]}_{number:04d}", fields


def samples(first: int, count: int) -> list[Sample]:
    return [sample(number) for number in range(first, first + count)]


def write_shard(path: Path, content: Iterable[Sample]) -> Path:
    with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for key, fields in content:
            tar.write({"__key__": key, **fields})
    return path


def write_shards(folder: Path, counts: Iterable[int], name: str = "train") -> list[Path]:
    """Write ``folder/train-0000.tar`` … of consecutive images, and ``classes.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    paths, first = [], 0
    for number, count in enumerate(counts):
        paths.append(write_shard(folder / f"{name}-{number:04d}.tar", samples(first, count)))
        first += count
    return paths


def write_image_folder(folder: Path, count: int) -> Path:
    """Write the first ``count`` images as ``folder/<class>/<number>.<suffix>``."""
    for number in range(count):
        key, fields = sample(number)
        field = next(name for name in fields if name not in ("cls", "json"))
        suffix = {"jpg": "JPEG", "jpeg": "jpeg"}.get(field, field)
        path = folder / CLASSES[number % len(CLASSES)] / f"{key.rpartition('_')[2]}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(fields[field])
    return folder
