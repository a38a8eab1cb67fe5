"""``plan dump``: bytes and time of a dump, from a small one made for real.

Three things are timed on the same sampled images: the loader alone, the teacher and each encoding
alone on batches that are there already, and the whole dump, workers, teacher and writer together.
The last is what a dump on this machine will do; the first two tell what limits it, and what more
devices or loader processes would change.
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
_KEPT_VIEWS = 512  # whose logits are stored in every encoding


@dataclass(frozen=True)
class DumpTrial:
    """Hold what was measured, in the report's words."""

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
        """Return the views per second of teacher and these encodings, with batches at hand."""
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
        views: numbers of views to forecast; none: the recipe's.
        devices: numbers of devices like this machine's.
        images: about how many to try it on; more where there are many loader processes.

    Returns:
        ``measured`` (the trial), ``limit`` (``loader`` or ``device``), ``bytes_per_view`` by
        encoding, and ``forecast``: bytes, files and entries of the largest folder, and seconds here
        and on more devices, for every number of views with each encoding alone and with the
        recipe's together.
    """
    dataset, teacher = open_stage_one(recipe)
    trial = try_dump(recipe, dataset, teacher, images)
    own, loader = trial.device_rate(recipe.cache.encodings), trial.loader_views_per_second
    limit = "loader" if loader < own else "device"
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
            # What other encodings change, they change in the device's share of the time.
            here = trial.dump_views_per_second * (device / own if limit == "device" else 1.0)
            # On a CPU loader and teacher share the cores: another device is another such machine.
            each = here if teacher.device.type == "cpu" else device
            size = sum(trial.bytes_per_view[n] for n in names)
            rows.append(
                {
                    "views": count,
                    "encodings": list(names),
                    "bytes_per_view": size,
                    "bytes": round(total * (size + trial.bytes_per_view[COMMON])),
                    **_count_files(recipe, replace(cache, encodings=names), dataset, teacher),
                    "seconds": trial.startup_seconds + total / here,
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
        "workers_to_feed_a_device": math.ceil(own / (loader / max(1, trial.workers))),
        "measured": measured,
        "bytes_per_view": sizes,
        "forecast": rows,
    }


def _count_files(
    recipe: DumpRecipe, cache: CacheSection, dataset: Dataset, teacher: Teacher
) -> dict[str, int]:
    """Count the files of ``cache``; warn if the recipe's are more than the Hub recommends."""
    shards = tuple(ShardInfo(f"{n}", count, 0, "", "", 1) for n, count in enumerate(dataset.counts))
    sizes = DatasetManifest(dataset.name, teacher.num_classes, shards)
    counts = count_files(cache_manifest(cache, sizes, teacher_info(teacher, {}), recipe.views))
    names = " + ".join(cache.encodings)
    if counts.excess is not None and cache.encodings == recipe.cache.encodings:
        advice = "" if cache.view_block == 0 else "; cache.view_block=0 makes as few as it can"
        log.warning(f"{cache.views} views in {names}: {counts}, {counts.excess}{advice}")
    return counts._asdict()


def printed(report: Mapping[str, Any]) -> Printed:
    """Yield the forecast as a table, what was measured, and what limits it."""
    devices = list(report["forecast"][0]["device_seconds"])
    yield Table(
        f"{report['dataset']['name']}, {report['dataset']['samples']} samples, "
        f"{report['teacher']} on {report['device']}",
        (
            *("views", "encodings", "bytes/view", "size", "files", "here"),
            *(f"on {n} devices" for n in devices),
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
        f"measured on {m['views']} views: loader {m['loader_views_per_second']:.4g}/s in "
        f"{m['workers']} processes, teacher {m['teacher_views_per_second']:.4g}/s, "
        f"together {m['dump_views_per_second']:.4g}/s"
    )
    yield f"the limit here is the {report['limit']}; {_advice(report)}"


def try_dump(recipe: DumpRecipe, dataset: Dataset, teacher: Teacher, images: int) -> DumpTrial:
    """Dump about ``images`` sampled images into a temporary folder, and time it and its parts."""
    workers = worker_count(recipe.dump.workers)
    # Every process needs a few pieces of work before the rate is steady.
    images = max(images, 3 * workers * recipe.views.window)
    few = SampledDump.of(recipe, dataset, teacher, images)
    block = few.manifest.view_block
    total = few.dataset.samples * block
    with progress(2 * total, "views", "trying it out") as meter:
        loading = SteadyRate(total)
        kept: list[Batch] = []
        for batch in few.batches(block):
            loading.advance(len(batch))
            meter.advance(len(batch))
            if sum(map(len, kept)) < _KEPT_VIEWS:
                kept.append(batch)
        seconds, responses = _time_teacher(few, kept)
        costs, sizes = _time_encodings(responses, teacher.device, max(dataset.counts))
        whole = SteadyRate(total)
        with closing(few.dump(block)) as counts:
            for count in counts:
                whole.advance(count)
                meter.advance(count)
    return DumpTrial(
        samples=few.dataset.samples,
        views=total,
        workers=workers,
        loader_views_per_second=loading.rate,
        teacher_views_per_second=1 / seconds,
        dump_views_per_second=whole.rate,
        startup_seconds=whole.startup,
        encode_ms_per_view=costs,
        bytes_per_view=sizes,
    )


def _time_teacher(few: SampledDump, batches: Sequence[Batch]) -> tuple[float, Responses]:
    """Return the teacher's seconds a view, with batches that are there already, and its logits."""
    few.logits(batches[0])  # compiles, chooses kernels
    seconds, logits = [], []
    for batch in batches:
        began = time.perf_counter()
        logits.append(few.logits(batch))
        # The model sees a whole batch, however short this one is; a dump's are full.
        seconds.append((time.perf_counter() - began) / few.teacher.batch_size)
    responses = Responses.joined(logits, few.manifest, few.teacher.name)
    return statistics.median(seconds), responses


def _time_encodings(
    responses: Responses, device: torch.device, shard_length: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return every encoding's ms a view, and its bytes a view in shards of such a length."""
    rows, costs = {}, {}
    for name, encoding in responses.encodings().items():
        rows[name], costs[name] = encode(encoding, responses, device)
    with tempfile.TemporaryDirectory(prefix="cskd-plan-") as folder:
        path = Path(folder) / "cache"
        block = responses.manifest.view_block
        store(path, responses, rows, shard_length=shard_length, view_block=block)
        return costs, dict(describe_cache(open_cache(path))["bytes_per_view"])


def _advice(report: Mapping[str, Any]) -> str:
    workers, here = report["workers_to_feed_a_device"], report["measured"]["workers"]
    if report["device"] == "cpu":
        return "loader and teacher share the cores here"
    if report["limit"] == "loader":
        return f"{workers} loader processes on as many cores would feed the device, not {here}"
    return f"{workers} of the {here} loader processes would feed it"
