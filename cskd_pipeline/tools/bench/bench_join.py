"""``bench join``: the cost of reading a cache's responses in the loader, and how it scales.

The same batches are loaded with the join (seeds, digests and responses from the cache, images
compared with it) and without a cache, taking turns in this process, on one core. :func:`simulate`
opens caches of ImageNet's shape that consist of their documents and one file per unit's record.
"""

import gc
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.chunks import encode_file
from cskd_pipeline.cache.manifest import CacheManifest, DatasetManifest, ShardInfo, TeacherInfo
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.config.sections import CacheSection, TrainRecipe
from cskd_pipeline.data.plan import EpochPlan, SampleSet
from cskd_pipeline.errors import UsageError
from cskd_pipeline.pipeline.from_recipe import make_loader
from cskd_pipeline.pipeline.training_data import open_training_data
from cskd_pipeline.pipeline.write_cache import cache_manifest
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.tools.bench.timing import rates, ratio, time_turns
from cskd_pipeline.tools.tables import Printed, Table
from cskd_pipeline.views.policy import ViewPolicy

GOAL = 0.99
SHARDS, SAMPLES, CLASSES, GRID = 1024, 1251, 1000, (7, 7)
VIEWS, FEW_VIEWS, VIEW_BLOCK = 300, 30, 10
RANKS, BATCH_SIZE, REPEATS = 64, 1024, 3


def bench_join(recipe: TrainRecipe, *, rounds: int) -> dict[str, Any]:
    """Load the recipe's batches with its cache and without, one update's batches per round.

    Returns:
        Images per second of both sides, and the ratio ``with_join`` / ``without``: medians with
        spread.
    """
    if recipe.distill.method == "none":
        raise UsageError("method none reads no cache", action="use --method cskd or deit")
    recipe = replace(recipe, data=replace(recipe.data, check=0))
    views = open_training_data(recipe).views
    loader = make_loader(recipe, views)
    count = loader.accumulation

    sources = {"with_join": views, "without": views.without_cache()}

    def load(side: str, number: int) -> None:
        for batch in range(number * count, (number + 1) * count):
            sources[side][loader.rows(batch % len(loader))]

    seconds = time_turns(sources, load, rounds, "loading batches")
    images = recipe.batch.batch_size
    return {
        "encoding": views.encoding,
        "rounds": rounds,
        "images_per_round": images,
        "images_per_second": {name: rates(values, images) for name, values in seconds.items()},
        "ratio": ratio(seconds["with_join"], seconds["without"]),
        "goal": GOAL,
    }


def simulate(*, shards: int = SHARDS) -> dict[str, Any]:
    """Open caches of ImageNet's shape with few and with many views, and plan an epoch.

    Returns:
        Per number of views, the seconds to open the cache and the reader's bytes of memory; the
        seconds to plan an epoch and find the first batch of every rank.
    """
    opened: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for views in (FEW_VIEWS, VIEWS):
            path = Path(folder) / f"{views}"
            with progress(None, "files", f"writing an empty cache of {views} views"):
                _write_skeleton(path, shards, views)
            reader, opened[f"{views}_views"] = _open(path)
        samples = SampleSet.of(reader)
        policy, root_seed = reader.manifest.policy, reader.manifest.root_seed
        started = time.perf_counter()
        plan = EpochPlan(
            samples, policy, root_seed, views=VIEWS, repeats=REPEATS, batch_size=BATCH_SIZE, seed=0
        )
        for rank in range(RANKS):
            plan.batch(0, 0, part=rank, parts=RANKS)
        seconds = time.perf_counter() - started
    return {
        "shards": shards,
        "samples": samples.total,
        "opening": opened,
        "ranks": RANKS,
        "plan_seconds": seconds,
    }


def _open(path: Path) -> tuple[Cache, dict[str, float]]:
    tracemalloc.start()
    try:
        open_cache(path)  # one-time imports and compilation do not count
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        reader = open_cache(path)
        gc.collect()
        size = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    started = time.perf_counter()
    open_cache(path)
    seconds = time.perf_counter() - started
    return reader, {"seconds": seconds, "reader_bytes": size}


def _write_skeleton(path: Path, shards: int, views: int) -> None:
    manifest = _manifest(shards, views)
    documents = {layout.GROUP: layout.manifest_document(manifest)}
    documents |= layout.array_documents(manifest)
    array = layout.stored_arrays(manifest)[layout.RECORD]
    size = array.file_shape[1]
    record = encode_file(array, np.ones((1, size), np.uint8))
    units = np.ndindex(manifest.blocks, shards)
    documents |= {array.key(block, shard * size): record for block, shard in units}
    for key, content in documents.items():
        file = path / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def _manifest(shards: int, views: int) -> CacheManifest:
    infos = tuple(
        ShardInfo(f"train-{i:04d}.tar", SAMPLES, 140_000_000, f"{i:064x}", f"{i:064x}", 24)
        for i in range(shards)
    )
    policy = ViewPolicy()
    teacher = TeacherInfo(
        name="simulated",
        source="random",
        weights_sha256="0" * 64,
        num_classes=CLASSES,
        size=policy.size,
        mean=policy.mean,
        std=policy.std,
        grid=GRID,
    )
    cache = CacheSection(encodings=("envelope",), views=views, view_block=VIEW_BLOCK)
    return cache_manifest(cache, DatasetManifest("simulated", CLASSES, infos), teacher, policy)


def printed(report: dict[str, Any]) -> Printed:
    """Yield a table for each part of the report."""
    if "ratio" in report:
        found = report["images_per_second"] | {"ratio": report["ratio"]}
        yield Table(
            f"loader on one core, images/s ({report['encoding']}, {report['rounds']} rounds of "
            f"{report['images_per_round']} images; goal for the ratio: {report['goal']})",
            ("", "median", "lowest", "highest"),
            [(name.replace("_", " "), *values.values()) for name, values in found.items()],
        )
    if "simulation" in report:
        found = report["simulation"]
        yield Table(
            f"a cache of {found['shards']:,} shards, {found['samples']:,} samples",
            ("views", "seconds to open", "bytes in memory"),
            [(name.replace("_", " "), *row.values()) for name, row in found["opening"].items()],
        )
        yield Table(
            "planning an epoch", ("ranks", "seconds"), [(found["ranks"], found["plan_seconds"])]
        )
