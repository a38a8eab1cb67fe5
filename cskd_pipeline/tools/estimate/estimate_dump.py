"""``plan dump``: bytes and time of a dump, from a small one made for real in a temporary folder.

Three things are timed on the same sampled images: the loader alone, the teacher and each encoding
alone on batches that are there already, and the whole dump, workers, teacher and writer together.
The last is what a dump on this machine will do; the first two tell what limits it, and what more
devices or loader processes would change.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cskd_pipeline.cache.info import describe as describe_cache
from cskd_pipeline.cache.manifest import CacheManifest
from cskd_pipeline.cache.summary import size
from cskd_pipeline.config import DumpRecipe
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.data.full_batches import logits_of
from cskd_pipeline.data.index import Dataset, describe, sample
from cskd_pipeline.data.left_out import LeftOuts
from cskd_pipeline.data.unit_views import Loading, unit_batches
from cskd_pipeline.distill.encodings import ENCODINGS
from cskd_pipeline.models.teacher import Teacher
from cskd_pipeline.pipeline.dump import loading_for, open_stage_one, teacher_info, usable
from cskd_pipeline.pipeline.write_cache import cache_manifest
from cskd_pipeline.runtime.distributed import ALONE
from cskd_pipeline.runtime.progress import duration, progress
from cskd_pipeline.tools.bench.bench_dump import trial_dump
from cskd_pipeline.tools.bench.bench_encodings import encode, store
from cskd_pipeline.tools.bench.responses import Responses
from cskd_pipeline.tools.bench.timing import SteadyRate
from cskd_pipeline.tools.tables import Printed, Table

IMAGES = 256
COMMON = "seeds_and_digests"
_KEPT_VIEWS = 512  # whose answers are stored in every encoding


@dataclass(frozen=True)
class DumpTrial:
    """What was measured; rates in views per second, encodings in seconds a view."""

    samples: int
    views: int
    workers: int
    loader: float
    teacher: float
    encode: Mapping[str, float]
    together: float
    startup: float
    bytes_per_view: Mapping[str, float]

    def device_rate(self, encodings: Sequence[str]) -> float:
        """Of the teacher and these encodings, with batches that are there already."""
        return 1.0 / (1.0 / self.teacher + sum(self.encode[name] for name in encodings))


def plan_dump(
    recipe: DumpRecipe,
    *,
    views: Sequence[int] = (),
    devices: Sequence[int] = (),
    images: int = IMAGES,
) -> dict[str, Any]:
    """Forecast the dump of ``recipe``, with every encoding.

    Args:
        views: numbers of views to forecast; none: the recipe's.
        devices: numbers of devices like this machine's.
        images: about how many to try it on; more where there are many loader processes.

    Returns:
        ``measured`` (the trial), ``limit`` (``loader`` or ``device``), ``bytes_per_view`` by
        encoding, and ``forecast``: bytes, and seconds here and on more devices, for every number of
        views with each encoding alone and with the recipe's together.

    Raises:
        CskdError: as the dump itself would.
    """
    dataset, teacher = open_stage_one(recipe)
    trial = try_dump(recipe, dataset, teacher, images)
    own = trial.device_rate(recipe.cache.encodings)
    limit = "loader" if trial.loader < own else "device"
    stored: list[tuple[str, ...]] = [(name,) for name in ENCODINGS]
    if recipe.cache.encodings not in stored:
        stored.append(recipe.cache.encodings)
    rows = []
    for count in views or (recipe.cache.views,):
        total = count * dataset.samples
        for names in stored:
            device = trial.device_rate(names)
            # What other encodings change, they change in the device's share of the time.
            here = trial.together * (device / own if limit == "device" else 1.0)
            # On a CPU loader and teacher share the cores: another device is another such machine.
            each = here if teacher.device.type == "cpu" else device
            size = sum(trial.bytes_per_view[n] for n in names)
            rows.append(
                {
                    "views": count,
                    "encodings": list(names),
                    "bytes_per_view": size,
                    "bytes": round(total * (size + trial.bytes_per_view[COMMON])),
                    "seconds": trial.startup + total / here,
                    "device_seconds": {str(n): total / (n * each) for n in devices},
                }
            )
    return {
        "dataset": {"name": dataset.name, "samples": dataset.samples},
        "teacher": teacher.name,
        "device": str(teacher.device),
        "limit": limit,
        "workers_to_feed_a_device": _workers_to_feed(trial, own),
        "measured": {
            "samples": trial.samples,
            "views": trial.views,
            "workers": trial.workers,
            "loader_views_per_second": trial.loader,
            "teacher_views_per_second": trial.teacher,
            "dump_views_per_second": trial.together,
            "startup_seconds": trial.startup,
            "encode_ms_per_view": {name: 1e3 * s for name, s in trial.encode.items()},
        },
        "bytes_per_view": dict(trial.bytes_per_view),
        "forecast": rows,
    }


def printed(report: Mapping[str, Any]) -> Printed:
    """Yield the forecast as a table, what was measured, and what limits it."""
    devices = list(report["forecast"][0]["device_seconds"])
    yield Table(
        f"{report['dataset']['name']}, {report['dataset']['samples']} samples, "
        f"{report['teacher']} on {report['device']}",
        ("views", "encodings", "bytes/view", "size", "here", *(f"on {n} devices" for n in devices)),
        [
            (
                row["views"],
                " + ".join(row["encodings"]),
                round(row["bytes_per_view"]),
                size(row["bytes"]),
                duration(row["seconds"]),
                *(duration(seconds) for seconds in row["device_seconds"].values()),
            )
            for row in report["forecast"]
        ],
    )
    m = report["measured"]
    yield (
        f"measured on {m['views']} views: loader {m['loader_views_per_second']:.4g}/s in "
        f"{m['workers']} processes, teacher {m['teacher_views_per_second']:.4g}/s, "
        f"together {m['dump_views_per_second']:.4g}/s"
    )
    yield f"the limit here is the {report['limit']}; {_advice(report)}"


def try_dump(recipe: DumpRecipe, dataset: Dataset, teacher: Teacher, images: int) -> DumpTrial:
    """Dump about ``images`` sampled images into a temporary folder, and time it and its parts."""
    loading = loading_for(recipe, teacher)
    # Every process needs a few pieces of work before the rate is steady.
    images = min(dataset.samples, max(images, 3 * loading.workers * recipe.views.window))
    few = sample(dataset, images)
    few = usable(few, recipe.data.corrupt, LeftOuts(None, ALONE), loading.workers)
    info = teacher_info(teacher, recipe.teacher.kwargs)
    manifest = cache_manifest(recipe.cache, describe(few), info, recipe.views)
    block = manifest.view_block
    total = few.samples * block
    with progress(2 * total, "views", "trying it out") as meter:
        loader, kept = _load(recipe, few, block, loading, meter.advance)
        seconds, answers = _ask(recipe, teacher, kept, manifest)
        costs, sizes = _encode(answers, teacher, max(dataset.counts), block)
        clock = SteadyRate(total)

        def advance(count: int) -> None:
            clock.advance(count)
            meter.advance(count)

        cache = replace(recipe.cache, views=block, view_block=block)
        trial_dump(replace(recipe, cache=cache), few, teacher, advance)
    return DumpTrial(
        samples=few.samples,
        views=total,
        workers=loading.workers,
        loader=loader,
        teacher=1 / seconds,
        encode=costs,
        together=clock.rate,
        startup=clock.startup,
        bytes_per_view=sizes,
    )


def _load(
    recipe: DumpRecipe, few: Dataset, block: int, loading: Loading, advance: Callable[[int], None]
) -> tuple[float, list[Batch]]:
    """Measure the loader's rate with nobody else at work, and return it with the first batches."""
    kept: list[Batch] = []
    clock = SteadyRate(few.samples * block)
    units = [(shard, range(block)) for shard in range(len(few.shards))]
    for batch in unit_batches(few, units, recipe.views, recipe.cache.root_seed, loading):
        clock.advance(len(batch.index))
        advance(len(batch.index))
        if sum(len(b.index) for b in kept) < _KEPT_VIEWS:
            kept.append(batch)
    return clock.rate, kept


def _ask(
    recipe: DumpRecipe, teacher: Teacher, batches: list[Batch], manifest: CacheManifest
) -> tuple[float, Responses]:
    """The teacher's seconds a view, with batches that are there already, and its answers."""
    logits_of(teacher, batches[0].to(teacher.device), recipe.views)  # compiles, chooses kernels
    seconds, spatial, global_ = [], [], []
    for batch in batches:
        began = time.perf_counter()
        answer = logits_of(teacher, batch.to(teacher.device), recipe.views)
        spatial.append(answer.spatial.cpu())
        global_.append(answer.global_.cpu())
        # The model sees a whole batch, however short this one is; a dump's are full.
        seconds.append((time.perf_counter() - began) / teacher.batch_size)
    answers = Responses(torch.cat(spatial), torch.cat(global_), manifest, teacher.name)
    return statistics.median(seconds), answers


def _encode(
    answers: Responses, teacher: Teacher, shard_length: int, block: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Every encoding's seconds a view, and bytes a view in shards of such a length."""
    rows, costs = {}, {}
    for name, encoding in ENCODINGS.items():
        rows[name], costs[name] = encode(encoding, answers, teacher.device)
    with tempfile.TemporaryDirectory(prefix="cskd-plan-") as folder:
        path = Path(folder) / "cache"
        store(path, answers, rows, shard_length=shard_length, view_block=block)
        return costs, dict(describe_cache(path)["bytes_per_view"])


def _workers_to_feed(trial: DumpTrial, own: float) -> int:
    """Loader processes that keep one device busy, if each does what one does here."""
    return math.ceil(own / (trial.loader / max(1, trial.workers)))


def _advice(report: Mapping[str, Any]) -> str:
    workers, here = report["workers_to_feed_a_device"], report["measured"]["workers"]
    if report["device"] == "cpu":
        return "loader and teacher share the cores here"
    if report["limit"] == "loader":
        return f"{workers} loader processes on as many cores would feed the device, not {here}"
    return f"{workers} of the {here} loader processes would feed it"
