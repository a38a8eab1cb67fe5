"""``plan dump``: forecast bytes and time of a dump from a small real one.

Three things are timed on the same sampled images: the loader alone; the teacher and each encoding
alone, on preloaded batches; and the complete dump, with loader, teacher and writer. The last
predicts the dump on this machine; the first two show its bottleneck and the effect of more devices
or loader processes.
"""

import logging
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cskd_pipeline.cache.info import describe as describe_cache
from cskd_pipeline.cache.manifest import DatasetManifest, ShardInfo
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.units import count_files
from cskd_pipeline.config.sections import CacheSection, DumpRecipe
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.data.index import Dataset
from cskd_pipeline.distill.encodings import ENCODINGS
from cskd_pipeline.models.teacher import Teacher
from cskd_pipeline.pipeline.dump import open_stage_one, teacher_info
from cskd_pipeline.pipeline.write_cache import cache_manifest
from cskd_pipeline.runtime.console import format_size
from cskd_pipeline.runtime.device import worker_count
from cskd_pipeline.runtime.progress import duration, progress
from cskd_pipeline.tools.bench.responses import Responses, encode, store
from cskd_pipeline.tools.bench.sampled_dump import SampledDump
from cskd_pipeline.tools.bench.timing import SteadyRate
from cskd_pipeline.tools.tables import Printed, Table

log = logging.getLogger(__name__)

IMAGES = 256
COMMON = "seeds_and_digests"
_KEPT_VIEWS = 512  # minimum number of views to encode and store, if available


@dataclass(frozen=True)
class DumpTrial:
    """Measurements of a trial dump, under the report's names."""

    samples: int
    views: int
    workers: int
    loader_views_per_second: float
    teacher_views_per_second: float
    dump_views_per_second: float
    startup_seconds: float
    encode_ms_per_view: dict[str, float]
    bytes_per_view: dict[str, float]

    def device_rate(self, encodings: Sequence[str]) -> float:
        """Return views per second of teacher and these encodings on preloaded batches."""
        encode = sum(self.encode_ms_per_view[name] for name in encodings) / 1e3
        return 1.0 / (1.0 / self.teacher_views_per_second + encode)


def plan_dump(
    recipe: DumpRecipe,
    *,
    views: Sequence[int] = (),
    devices: Sequence[int] = (),
    images: int = IMAGES,
) -> dict[str, Any]:
    """Forecast the dump of ``recipe``, with every encoding.

    Args:
        views: numbers of views to forecast; empty: the recipe's.
        devices: numbers of devices to forecast, each like this machine's.
        images: approximate number of images in the trial; raised for many loader processes.

    Returns:
        ``measured`` (the trial), ``limit`` (``loader`` or ``device``), ``bytes_per_view`` by
        encoding, and ``forecast``: bytes, files, entries of the largest folder, and seconds on this
        machine and on more devices, for every number of views with each encoding alone and with
        the recipe's encodings together.
    """
    dataset, teacher = open_stage_one(recipe)
    trial = try_dump(recipe, dataset, teacher, images)
    baseline, loader = trial.device_rate(recipe.cache.encodings), trial.loader_views_per_second
    limit = "loader" if loader < baseline else "device"
    stored: list[tuple[str, ...]] = [(name,) for name in ENCODINGS]
    if recipe.cache.encodings not in stored:
        stored.append(recipe.cache.encodings)
    rows = []
    for count in views or (recipe.cache.views,):
        total = count * dataset.samples
        block = 0 if count % (recipe.cache.view_block or 1) else recipe.cache.view_block
        cache = replace(recipe.cache, views=count, view_block=block)
        for names in stored:
            device = trial.device_rate(names)
            # Other encodings change only the device's time.
            rate = trial.dump_views_per_second * (device / baseline if limit == "device" else 1.0)
            # On a CPU, loader and teacher share the cores: a device is a complete machine.
            each = rate if teacher.device.type == "cpu" else device
            size = sum(trial.bytes_per_view[n] for n in names)
            rows.append(
                {
                    "views": count,
                    "encodings": list(names),
                    "bytes_per_view": size,
                    "bytes": round(total * (size + trial.bytes_per_view[COMMON])),
                    **_count_files(recipe, replace(cache, encodings=names), dataset, teacher),
                    "seconds": trial.startup_seconds + total / rate,
                    "device_seconds": {str(n): total / (n * each) for n in devices},
                }
            )
    measured = asdict(trial)
    sizes = measured.pop("bytes_per_view")
    return {
        "dataset": {"name": dataset.name, "samples": dataset.samples},
        "teacher": teacher.name,
        "device": str(teacher.device),
        "limit": limit,
        "workers_to_feed_a_device": math.ceil(baseline / (loader / max(1, trial.workers))),
        "measured": measured,
        "bytes_per_view": sizes,
        "forecast": rows,
    }


def _count_files(
    recipe: DumpRecipe, cache: CacheSection, dataset: Dataset, teacher: Teacher
) -> dict[str, int]:
    """Count the files of ``cache``; warn if the recipe's exceed what the Hub recommends."""
    shards = tuple(ShardInfo(f"{n}", count, 0, "", "", 1) for n, count in enumerate(dataset.counts))
    sizes = DatasetManifest(dataset.name, teacher.num_classes, shards)
    counts = count_files(cache_manifest(cache, sizes, teacher_info(teacher, {}), recipe.views))
    names = " + ".join(cache.encodings)
    if counts.excess is not None and cache.encodings == recipe.cache.encodings:
        advice = "" if cache.view_block == 0 else "; set cache.view_block=0 for the fewest files"
        log.warning(f"{cache.views} views in {names}: {counts}, {counts.excess}{advice}")
    return counts._asdict()


def printed(report: Mapping[str, Any]) -> Printed:
    """Yield the forecast as a table, the measured rates, and the bottleneck."""
    devices = list(report["forecast"][0]["device_seconds"])
    yield Table(
        f"{report['dataset']['name']}, {report['dataset']['samples']} samples, "
        f"{report['teacher']} on {report['device']}",
        (
            *("views", "encodings", "bytes/view", "size", "files", "this machine"),
            *(f"{n} devices" for n in devices),
        ),
        [
            (
                row["views"],
                " + ".join(row["encodings"]),
                round(row["bytes_per_view"]),
                format_size(row["bytes"]),
                f"{row['files']:,}",
                duration(row["seconds"]),
                *(duration(seconds) for seconds in row["device_seconds"].values()),
            )
            for row in report["forecast"]
        ],
    )
    m = report["measured"]
    yield (
        f"measured on {m['views']} views: loader {m['loader_views_per_second']:.4g} views/s with "
        f"{m['workers']} processes, teacher {m['teacher_views_per_second']:.4g} views/s, "
        f"complete dump {m['dump_views_per_second']:.4g} views/s"
    )
    yield f"the {report['limit']} is the bottleneck; {_advice(report)}"


def try_dump(recipe: DumpRecipe, dataset: Dataset, teacher: Teacher, images: int) -> DumpTrial:
    """Dump about ``images`` sampled images to a temporary folder; time the dump and its parts."""
    workers = worker_count(recipe.dump.workers)
    # Each process needs several windows before its rate is steady.
    images = max(images, 3 * workers * recipe.views.window)
    sampled = SampledDump.of(recipe, dataset, teacher, images)
    block = sampled.manifest.view_block
    total = sampled.dataset.samples * block
    with progress(2 * total, "views", "measuring") as meter:
        loading = SteadyRate(total)
        kept: list[Batch] = []
        for batch in sampled.batches(block):
            loading.advance(len(batch))
            meter.advance(len(batch))
            if sum(map(len, kept)) < _KEPT_VIEWS:
                kept.append(batch)
        seconds, responses = _time_teacher(sampled, kept)
        costs, sizes = _time_encodings(responses, teacher.device, max(dataset.counts))
        complete = SteadyRate(total)
        with closing(sampled.dump(block)) as counts:
            for count in counts:
                complete.advance(count)
                meter.advance(count)
    return DumpTrial(
        samples=sampled.dataset.samples,
        views=total,
        workers=workers,
        loader_views_per_second=loading.rate,
        teacher_views_per_second=1 / seconds,
        dump_views_per_second=complete.rate,
        startup_seconds=complete.startup,
        encode_ms_per_view=costs,
        bytes_per_view=sizes,
    )


def _time_teacher(sampled: SampledDump, batches: Sequence[Batch]) -> tuple[float, Responses]:
    """Return the teacher's seconds per view on preloaded batches, and its logits."""
    sampled.logits(batches[0])  # compiles and selects kernels
    seconds, logits = [], []
    for batch in batches:
        started = time.perf_counter()
        logits.append(sampled.logits(batch))
        # A short batch is padded to a full one, so it takes as long; a dump's batches are full.
        seconds.append((time.perf_counter() - started) / sampled.teacher.batch_size)
    responses = Responses.join(logits, sampled.manifest, sampled.teacher.name)
    return statistics.median(seconds), responses


def _time_encodings(
    responses: Responses, device: torch.device, shard_length: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return milliseconds and bytes per view of every encoding, in shards of ``shard_length``."""
    rows, costs = {}, {}
    for name, encoding in responses.encodings().items():
        rows[name], costs[name] = encode(encoding, responses, device)
    with tempfile.TemporaryDirectory(prefix="cskd-plan-") as folder:
        path = Path(folder) / "cache"
        block = responses.manifest.view_block
        store(path, responses, rows, shard_length=shard_length, view_block=block)
        return costs, dict(describe_cache(open_cache(path))["bytes_per_view"])


def _advice(report: Mapping[str, Any]) -> str:
    needed, workers = report["workers_to_feed_a_device"], report["measured"]["workers"]
    if report["device"] == "cpu":
        return "loader and teacher share the CPU cores"
    if report["limit"] == "loader":
        return f"{needed} loader processes on as many cores would feed the device, not {workers}"
    return f"{needed} of the {workers} loader processes would feed it"
