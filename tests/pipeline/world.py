"""A small world for pipeline tests: real image files, shards, a CNN with fixed weights."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from cskd_pipeline.cli import main
from cskd_pipeline.config.reading import load_recipe
from cskd_pipeline.config.sections import DumpRecipe, TrainRecipe
from tests.cache.factories import tree

CLASSES = ("disc", "square", "bars", "cross")
SIZE = 32

# Every part of the policy is in use, and windows do not divide the shards.
VIEWS = [
    f"views.size={SIZE}",
    "views.crop_area=[0.4, 1.0]",
    "views.erase=0.5",
    "views.window=8",
    "views.repeats=2",
]
TEACHER = "resnet10t"
TEACHER_KWARGS = "{output_stride=8, channels=[8, 12, 16, 24]}"  # a 4x4 grid at 32 px
STUDENT = "deit_tiny_distilled_patch16_224"
STUDENT_KWARGS = (
    f"{{img_size={SIZE}, patch_size=4, embed_dim=32, depth=2, num_heads=2}}"  # 8x8 tokens
)


def draw_images(folder: Path, per_class: int, seed: int) -> None:
    """Write ``folder/<class>/<n>.jpg|png``: a shape at a random position on noise."""
    rng = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            width, height = (int(n) for n in rng.integers(36, 64, 2))
            ground = rng.integers(0, 90, 3) + rng.integers(0, 30, (height, width, 1))
            image = Image.fromarray(ground.astype(np.uint8))
            ink = tuple(int(c) for c in rng.integers(120, 256, 3))
            side = int(rng.integers(14, 26))
            x, y = (int(rng.integers(0, n - side)) for n in (width, height))
            _shape(ImageDraw.Draw(image), name, x, y, side, ink)
            suffix = "png" if number % 5 == 0 else "jpg"
            image.save(folder / name / f"{number:03d}.{suffix}")


def _shape(
    draw: ImageDraw.ImageDraw, name: str, x: int, y: int, side: int, ink: tuple[int, ...]
) -> None:
    end = (x + side, y + side)
    if name == "disc":
        draw.ellipse(((x, y), end), fill=ink)
    elif name == "square":
        draw.rectangle(((x, y), end), fill=ink)
    elif name == "bars":
        for step in range(0, side, 6):
            draw.rectangle(((x, y + step), (x + side, y + step + 2)), fill=ink)
    else:
        draw.line(((x, y), end), fill=ink, width=4)
        draw.line(((x + side, y), (x, y + side)), fill=ink, width=4)


def cli(*arguments: object) -> int:
    """Run a command in this process; return its exit code."""
    return main([str(a) for a in arguments])


def as_flags(sets: list[str]) -> list[str]:
    return [word for assignment in sets for word in ("--set", assignment)]


def dump_sets(encodings: str = '["dense", "envelope"]', views: int = 4) -> list[str]:
    return [
        *VIEWS,
        f"teacher.kwargs={TEACHER_KWARGS}",
        f"cache.encodings={encodings}",
        f"cache.views={views}",
        "cache.view_block=2",
        "dump.batch_size=16",
    ]


def dump_recipe(
    shards: Path | str,
    cache: Path,
    sets: list[str] | None = None,
    *,
    views: int = 4,
    encodings: str = '["dense", "envelope"]',
) -> DumpRecipe:
    flags: dict[str, Any] = {
        "data.shards": str(shards),
        "cache.path": str(cache),
        "teacher.name": TEACHER,
        "teacher.weights": "random",
        "dump.workers": 0,
        "dump.device": "cpu",
    }
    return load_recipe(DumpRecipe, None, [*dump_sets(encodings, views), *(sets or [])], flags)


def train_sets(kwargs: str = STUDENT_KWARGS) -> list[str]:
    return [
        f"student.kwargs={kwargs}",
        "batch.repeats=2",
        "schedule.warmup_epochs=1",
        "optim.lr=0.05",
        "run.ema=0.9",
        "run.log_every=1",
    ]


def train_recipe(
    shards: Path,
    cache: Path | None,
    out: Path,
    method: str = "cskd",
    sets: list[str] | None = None,
    *,
    epochs: int = 4,
    batch_size: int = 16,
    student: str = STUDENT,
    kwargs: str = STUDENT_KWARGS,
) -> TrainRecipe:
    flags: dict[str, Any] = {
        "data.shards": str(shards),
        "data.cache": None if cache is None else str(cache),
        "student.name": student,
        "distill.method": method,
        "schedule.epochs": epochs,
        "batch.batch_size": batch_size,
        "run.out": str(out),
        "run.workers": 0,
        "run.device": "cpu",
    }
    return load_recipe(TrainRecipe, None, [*train_sets(kwargs), *(sets or [])], flags)


SOFT = ["distill.global_kind=soft", "distill.spatial_kind=soft"]


def last_json(text: str) -> dict[str, Any]:
    parsed = json.loads(text)
    assert isinstance(parsed, dict)
    return parsed


def cache_files(cache: Path) -> dict[str, bytes]:
    """Return every file of a cache except the manifest, which has a timestamp."""
    return {name: data for name, data in tree(cache).items() if name != "zarr.json"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
