"""Small caches without a teacher: every value is a pure function of (view, tar shard)."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import lru_cache
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.chunks import encode_file
from cskd_pipeline.cache.digests import Record
from cskd_pipeline.cache.manifest import CacheManifest, DatasetManifest, ShardInfo, TeacherInfo
from cskd_pipeline.cache.store import CacheStore
from cskd_pipeline.cache.units import Unit, UnitData
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.views.policy import ViewPolicy

CLASSES, HEIGHT, WIDTH = 20, 2, 3
COUNTS = (5, 3, 4)
VIEWS, BLOCK = 4, 2


def keys(shard: int, count: int) -> list[str]:
    return [f"train/{shard}-{'é' * (i % 3)}{i}" for i in range(count)]


def dataset(counts: tuple[int, ...] = COUNTS) -> DatasetManifest:
    shards = tuple(
        ShardInfo.of(f"train-{s:04d}.tar", keys(s, n), 10240 * n, f"{s:064x}")
        for s, n in enumerate(counts)
    )
    return DatasetManifest("toy", CLASSES, shards, tuple(f"class {k}" for k in range(CLASSES)))


def teacher(**changes: object) -> TeacherInfo:
    fields: dict[str, object] = {
        "name": "resnet10t",
        "source": "random",
        "weights_sha256": "ab" * 32,
        "num_classes": CLASSES,
        "size": 32,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "grid": (HEIGHT, WIDTH),
        "precision": "float32",
        "kwargs": {},
    }
    return TeacherInfo(**{**fields, **changes})  # type: ignore[arg-type]  # any field, of any type


def manifest(**changes: object) -> CacheManifest:
    fields: dict[str, object] = {
        "dataset": dataset(),
        "teacher": teacher(),
        "policy": ViewPolicy(size=32),
        "root_seed": 7,
        "views": VIEWS,
        "view_block": BLOCK,
        "encodings": ("dense", "envelope"),
        "versions": {"pillow": "12.0.0", "torch": "2.9.0", "timm": "1.0.20", "python": "3.11.7"},
        "created": "2026-01-02T03:04:05Z",
    }
    return CacheManifest(**{**fields, **changes})  # type: ignore[arg-type]  # any field, of any type


def lines(rng: np.random.Generator, count: int, most: int = 10) -> np.ndarray:
    """Return (count, L, 2, h, w) uint16: distinct classes, increasing crossings."""
    out = np.full((count, CLASSES, 2, HEIGHT, WIDTH), 65535, np.uint16)
    for i, row, column in np.ndindex(count, HEIGHT, WIDTH):
        n = int(rng.integers(1, most + 1))
        out[i, :n, 0, row, column] = rng.permutation(CLASSES)[:n]
        out[i, : n - 1, 1, row, column] = np.sort(rng.choice(65535, n - 1, replace=False))
    used = (out != 65535).any(axis=(0, 2, 3, 4)).sum()
    return out[:, :used]


@lru_cache
def responses(view: int, shard: int, count: int) -> dict[str, np.ndarray]:
    """Return the rows of one view of one tar shard, by array name."""
    rng = np.random.default_rng([view, shard])
    return {
        "dense/spatial": rng.normal(size=(count, CLASSES, HEIGHT, WIDTH)).astype(np.float16),
        "dense/global": rng.normal(size=(count, CLASSES)).astype(np.float16),
        "envelope/lines": lines(rng, count),
        "envelope/global_label": rng.integers(0, CLASSES, count).astype(np.uint16),
    }


def padded(parts: list[np.ndarray]) -> np.ndarray:
    """Stack ragged parts, padding with fill."""
    length = max(part.shape[1] for part in parts)
    out = np.full((len(parts), len(parts[0]), length, *parts[0].shape[2:]), 65535, np.uint16)
    for i, part in enumerate(parts):
        out[i, :, : part.shape[1]] = part
    return out


def unit_data(unit: Unit, cache_manifest: CacheManifest) -> UnitData:
    shard, count = unit.shard, cache_manifest.dataset.counts[unit.shard]
    rng = np.random.default_rng([1000 + unit.block, shard])
    per_view = [responses(view, shard, count) for view in unit.views]
    arrays = {
        name: (padded if name == "envelope/lines" else np.stack)([part[name] for part in per_view])
        for name in per_view[0]
        if name.split("/")[0] in cache_manifest.encodings
    }
    shape = (len(unit.views), count)
    return UnitData(
        keys=keys(shard, count),
        labels=(np.arange(count, dtype=np.int32) + shard) % CLASSES,
        image_crc32=np.arange(count, dtype=np.uint32) * 1_000_003 + shard,
        seeds=rng.integers(0, 2**64, shape, np.uint64),
        view_digests=rng.integers(0, 2**32, shape, np.uint32),
        arrays=arrays,
        top1=np.array([[view % count, count] for view in unit.views], np.uint32),
    )


def fill(writer: CacheWriter, units: Iterable[Unit] | None = None) -> None:
    for unit in writer.todo() if units is None else units:
        writer.write_unit(unit, unit_data(unit, writer.manifest))


def make(path: Path, **changes: object) -> CacheWriter:
    """Write a finished cache."""
    writer = CacheWriter.create(path, manifest(**changes))
    fill(writer)
    return writer


def write_all(path: Path, order: int = 0, started: Event | None = None) -> None:
    """Finish the cache in its own order of units, in another process."""
    if started is not None:
        started.set()
    writer = CacheWriter.create(path, manifest())
    units = writer.todo()
    random.Random(order).shuffle(units)
    fill(writer, units)


def rewrite_records(path: Path) -> None:
    """Rewrite every finished unit's record to match its current files, like a forger."""
    store = CacheStore(path)
    array = store.arrays[layout.RECORD]
    for block, shard in np.argwhere(store.done()).tolist():
        keys = [key for _, key in store.recorded_files(block, shard)]
        record = Record.of(store.lineage, keys, [store.folder.sha256(key) for key in keys])
        (path / store.record_key(block, shard)).write_bytes(encode_file(array, record.row()[None]))


def tree(path: Path) -> dict[str, bytes]:
    """Return every file below ``path`` by relative name."""
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }


def data_files(path: Path) -> list[str]:
    return [name for name in tree(path) if not name.endswith("zarr.json")]
