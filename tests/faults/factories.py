"""A small cache with every array of the format, and the values a reader returns from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from cskd_pipeline.cache.manifest import DatasetManifest, ShardInfo
from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.cache.units import Unit, UnitData
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.distill.encodings import ENCODINGS
from tests.cache.factories import keys, manifest, teacher

CLASSES = 30  # more than topk keeps, so that it stores a tail
COUNTS = (5, 3)
VIEWS = BLOCK = 2


def write_full_cache(path: Path) -> None:
    """Write a complete cache of two units in every encoding."""
    shards = tuple(
        ShardInfo.of(f"train-{s:04d}.tar", keys(s, n), 10240, f"{s:064x}")
        for s, n in enumerate(COUNTS)
    )
    full = manifest(
        dataset=DatasetManifest("toy", CLASSES, shards),
        teacher=teacher(num_classes=CLASSES),
        encodings=tuple(ENCODINGS),
        views=VIEWS,
        view_block=BLOCK,
    )
    writer = CacheWriter.create(path, full)
    for unit in writer.todo():
        writer.write_unit(unit, unit_data(unit))


def unit_data(unit: Unit) -> UnitData:
    count = COUNTS[unit.shard]
    rng = np.random.default_rng([77, unit.shard])
    spatial = torch.from_numpy(rng.normal(0, 4, (VIEWS * count, CLASSES, 2, 3)).astype(np.float16))
    rows, seeds = {}, np.arange(VIEWS * count, dtype=np.uint64)
    for encoding in ENCODINGS.values():
        rows |= encoding.encode(spatial, spatial.float().mean((2, 3)).half(), seeds)
    return UnitData(
        keys=keys(unit.shard, count),
        labels=rng.integers(0, CLASSES, count, np.int32),
        image_crc32=rng.integers(0, 2**32, count, np.uint32),
        seeds=rng.integers(0, 2**64, (VIEWS, count), np.uint64),
        view_digests=rng.integers(0, 2**32, (VIEWS, count), np.uint32),
        arrays={n: v.numpy().reshape(VIEWS, count, *v.shape[1:]) for n, v in rows.items()},
        top1=np.array([[1, count]] * VIEWS, np.uint32),
    )


def stored_values(reader: Cache, array: str) -> Iterator[object]:
    """Yield everything that ``reader`` returns from one array, as comparable values."""
    for shard, count in enumerate(reader.counts):
        if array == "key":
            yield reader.keys(shard)
        elif array == "label":
            yield reader.labels(shard).tobytes()
        elif array == "image_crc32":
            yield reader.image_crc32(shard).tobytes()
        for view in range(reader.views):
            if array in ("seed", "digest"):  # the first use of a unit reads its record
                yield reader.seeds(view, shard).tobytes()
            elif array == "view_digest":
                yield reader.view_digests(view, shard).tobytes()
            elif array == "top1":
                yield reader.top1_of(view, shard).tobytes()
            elif "/" in array:
                rows = reader.rows(array.split("/")[0], view, shard, range(count))
                yield rows[array].tobytes()
