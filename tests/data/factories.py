"""Caches of real views of real shards, with random responses instead of a teacher's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cskd_pipeline.cache.manifest import CacheManifest, TeacherInfo, library_versions
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.cache.units import UnitData
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.data.describe import describe
from cskd_pipeline.data.index import Dataset
from cskd_pipeline.data.unit_views import Loading, unit_batches
from cskd_pipeline.views.policy import ViewPolicy

# Uses every part of the policy; the shards' last windows are incomplete.
POLICY = ViewPolicy(size=24, window=6, repeats=2, erase=0.6, crop_area=(0.3, 1.0))
ROOT_SEED = 11
VIEWS, BLOCK = 4, 2
GRID = (2, 3)


def responses(view: int, shard: int, count: int, classes: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([view, shard])
    return {
        "dense/spatial": rng.normal(size=(count, classes, *GRID)).astype(np.float16),
        "dense/global": rng.normal(size=(count, classes)).astype(np.float16),
    }


def make_cache(
    path: Path, dataset: Dataset, *, policy: ViewPolicy = POLICY, **changes: Any
) -> Cache:
    """Write a complete ``dense`` cache of ``dataset``."""
    manifest = describe(dataset)
    classes = manifest.num_classes
    teacher = TeacherInfo(
        name="none",
        source="random",
        weights_sha256="0" * 64,
        num_classes=classes,
        size=policy.size,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        grid=GRID,
        precision="float32",
        kwargs={},
    )
    fields: dict[str, Any] = {
        "dataset": manifest,
        "teacher": teacher,
        "policy": policy,
        "root_seed": ROOT_SEED,
        "views": VIEWS,
        "view_block": BLOCK,
        "encodings": ("dense",),
        "versions": library_versions(),
        "created": "2026-01-02T03:04:05Z",
    }
    writer = CacheWriter.create(path, CacheManifest(**{**fields, **changes}))
    root_seed = writer.manifest.root_seed
    for unit in writer.todo():
        shard, count = unit.shard, len(dataset.shards[unit.shard])
        batches = unit_batches(
            dataset, [(shard, unit.views)], policy, root_seed, Loading(2 * count)
        )
        small = gather_small(batches, unit.views, count)
        rows = [responses(view, shard, count, classes) for view in unit.views]
        writer.write_unit(
            unit,
            UnitData(
                keys=dataset.shards[shard].keys,
                labels=dataset.shards[shard].index.label.astype(np.int32),
                image_crc32=small["image_crc32"][0],
                seeds=small["seed"],
                view_digests=small["view_digest"],
                arrays={name: np.stack([row[name] for row in rows]) for name in rows[0]},
                top1=np.array([[0, count] for _ in unit.views], np.uint32),
            ),
        )
    return open_cache(path)


def gather_small(batches: Any, views: range, count: int) -> dict[str, np.ndarray]:
    """Return ``seed``, ``image_crc32`` and ``view_digest`` of a unit, (views, count) each."""
    found: dict[str, np.ndarray] = {}
    for batch in batches:
        view, _, offset = batch.index.numpy().T
        for name in ("seed", "image_crc32", "view_digest"):
            values = getattr(batch, name).numpy()
            array = found.setdefault(name, np.zeros((len(views), count), values.dtype))
            array[view - views[0], offset] = values[batch.own.numpy()]
    return found


def same(one: Batch, other: Batch) -> bool:
    """Return whether two batches are equal, bit for bit."""
    fields, others = dict(vars(one)), dict(vars(other))
    targets, other_targets = fields.pop("targets"), others.pop("targets")
    fields |= targets
    others |= other_targets
    return list(fields) == list(others) and all(
        torch.equal(value, others[name]) and value.dtype == others[name].dtype
        if isinstance(value, torch.Tensor)
        else value == others[name]
        for name, value in fields.items()
    )
