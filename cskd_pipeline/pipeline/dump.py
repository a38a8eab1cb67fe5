"""Stage one: the teacher's logits for every view, written once.

``dump_teacher`` opens shards and teacher, creates or resumes the cache, and runs the teacher on
every missing view. ``put`` encodes the logits and commits them one unit (block of views, tar shard)
at a time, each unit's record last. Batches are full: one may end a unit and begin the next. The
logits of a view do not depend on the others in the batch, so a dump that was stopped resumes with
the same command, and its cache equals one that was never stopped.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cskd_pipeline import open_cache
from cskd_pipeline.cache.info import SIZES
from cskd_pipeline.cache.info import describe as describe_cache
from cskd_pipeline.cache.manifest import TeacherInfo
from cskd_pipeline.cache.omitted import CORRUPT
from cskd_pipeline.config.sections import DumpRecipe
from cskd_pipeline.data.assemble import normalise
from cskd_pipeline.data.corrupt import without_corrupt
from cskd_pipeline.data.index import Dataset, load_dataset
from cskd_pipeline.data.left_out import LeftOuts
from cskd_pipeline.data.unit_views import Loading
from cskd_pipeline.errors import UsageError
from cskd_pipeline.models.checkpoint import has_header, read_header
from cskd_pipeline.models.teacher import Teacher, TeacherSource, load_teacher
from cskd_pipeline.pipeline.unit_writer import UnitWriter
from cskd_pipeline.pipeline.write_cache import WriteOptions, write_cache
from cskd_pipeline.runtime.classes import COMMAND_SWITCH, Classes, ClassGuard
from cskd_pipeline.runtime.device import pick_device, use_threads, worker_count
from cskd_pipeline.runtime.distributed import ALONE, Ranks, join_job
from cskd_pipeline.runtime.signals import stop_requests

log = logging.getLogger(__name__)

LARGE_GRID = 16
"""Locations along a side; a CNN for 224 px has 7."""


def dump_teacher(
    recipe: DumpRecipe,
    *,
    shard_range: tuple[int, int] | None = None,
    view_range: tuple[int, int] | None = None,
    accept_versions: bool = False,
    accept_classes: bool = False,
) -> dict[str, Any]:
    """Create, resume or extend the cache of ``recipe``: ``cskd-pipeline dump-teacher``.

    Under torchrun every process calls this. They meet here and in ``write_cache``, and then only to
    sum up: in between each draws the next undone unit, and stops on the signals that it receives
    itself. Other jobs may be at work in the same cache. All return once everything is done.

    Args:
        shard_range, view_range, accept_versions: see :class:`WriteOptions`.
        accept_classes: continue even if the teacher's or the cache's class names differ.

    Returns:
        The closing summary: views written now and in all, bytes and seconds, views per second, the
        share of all ranks' time spent waiting for data, the teacher's top-1 on the views' labels.

    Raises:
        CskdError: data, teacher or cache cannot be used, or do not belong together.
        KeyboardInterrupt, Requeue: stopped by a signal. On Ctrl-C the current unit is finished
            first, which may take a while. On a scheduler's signal only units already complete are
            written.
    """
    data, cache = recipe.data, recipe.cache
    _require_within(view_range, cache.views)
    patience = recipe.dump.rank_timeout
    with join_job(patience) as ranks:
        guard = ClassGuard(COMMAND_SWITCH, accept=accept_classes)
        dataset, teacher = open_stage_one(recipe, ranks, guard)
        loading = loading_for(recipe, teacher)
        # Corrupt images change the manifest, so they are found first; their list, in left_out, is
        # written once write_cache has checked that the folder is this cache's.
        left_out = LeftOuts(Path(cache.path), ranks)
        dataset = without_corrupt_images(dataset, data.corrupt, left_out, loading.workers)
        writer = write_cache(
            cache,
            replace(dataset, name=data.name or dataset.name),
            teacher_info(teacher, recipe.teacher.kwargs),
            recipe.views,
            loading=loading,
            options=WriteOptions(
                shard_range,
                view_range,
                accept_versions=accept_versions,
                guard=guard,
                ranks=ranks,
                patience=patience,
            ),
        )
        if ranks.first:
            left_out.write()
        if recipe.teacher.weights == "random":
            log.warning("the teacher's weights are random: this cache is good for trials only")
        started = time.perf_counter()
        with stop_requests() as stop:
            with writer:
                for batch in writer.views():  # of undone units: images (n, 3, S, S) on the device
                    images = normalise(batch.images, teacher.mean, teacher.std)
                    # (n, K, h, w) and (n, K) float16; put() checks that they are finite, encodes
                    # and stores them, on CUDA one batch later, so that the device never waits
                    spatial, global_ = teacher.unchecked(images)
                    units_completed = writer.put(batch, spatial, global_)
                    # Ctrl-C waits for the end of a unit; a scheduler gives too little time for it.
                    if stop.requeue or (stop.requested and units_completed):
                        break
            # After the block: an error that leaves it would drop units still to be written.
            if stop.requested and not writer.finished:
                raise KeyboardInterrupt  # stop_requests makes it Requeue on a scheduler's signal
        return {**_summary(writer, ranks, started), "left_out": len(left_out)}


def _require_within(view_range: tuple[int, int] | None, views: int) -> None:
    if view_range is not None and view_range[1] > views:
        raise UsageError(
            "the range of views lies outside the cache",
            found=f"views {view_range[0]}:{view_range[1]}",
            expected=f"a range within 0:{views}",
            action="set --views to the total for the whole cache; "
            "use the same value for every part",
        )


def open_stage_one(
    recipe: DumpRecipe, ranks: Ranks = ALONE, guard: ClassGuard | None = None
) -> tuple[Dataset, Teacher]:
    """Open the recipe's shards, and its teacher on the recipe's device, with the same classes.

    Args:
        guard: decides what happens where the shards' class names are not those of a teacher that
            ``train`` made; None: they are refused.

    Raises:
        CskdError: one of them cannot be used, or they do not belong together.
    """
    guard = guard or ClassGuard()
    data = recipe.data
    device = ranks.device(pick_device(recipe.dump.device))
    use_threads(recipe.dump.threads)
    dataset = load_dataset(
        data.shards,
        split=data.split or None,
        num_classes=data.num_classes or None,
        empty="pass" if data.corrupt == "skip" else "error",
    )
    weights = Path(recipe.teacher.weights)
    if has_header(weights):
        header = read_header(weights)  # of a network that train made
        classes = Classes("the teacher", weights, header.num_classes, header.class_names)
        dataset = dataset.fitting(classes, "the shards", guard)
    guard.report_new()
    teacher = open_teacher(recipe, dataset.num_classes, device)
    if dataset.num_classes is None:
        dataset = dataset.with_classes(teacher.num_classes)
    return dataset, teacher


def open_teacher(recipe: DumpRecipe, num_classes: int | None, device: torch.device) -> Teacher:
    """Load the recipe's teacher for views of its size, and warn of a large grid.

    A network for small images that is fed large ones has one: it costs much and means little.

    Args:
        num_classes: of the data; None: the teacher's own.

    Raises:
        CskdError: the teacher cannot be used, or has another number of classes.
    """
    options = recipe.dump
    teacher = load_teacher(
        TeacherSource(num_classes=num_classes, **vars(recipe.teacher)),  # [teacher]'s keys
        size=recipe.views.size,
        batch_size=options.batch_size,
        channels_last=options.channels_last,
        compile=options.compile,
        device=device,
    )
    rows, columns = teacher.grid
    if max(rows, columns) > LARGE_GRID:
        stored = 2 * teacher.num_classes * (rows * columns + 1)  # float16
        log.warning(
            f"at {teacher.size} px {teacher.name} gives a grid of {rows}x{columns} locations, "
            f"{stored / 1000:,.2f} kB a view uncompressed: if it was trained on smaller images, "
            "set views.size to theirs"
        )
    return teacher


def loading_for(recipe: DumpRecipe, teacher: Teacher) -> Loading:
    """Return the recipe's batch size and loader processes, and the teacher's device."""
    return Loading(recipe.dump.batch_size, worker_count(recipe.dump.workers), teacher.device)


def without_corrupt_images(
    dataset: Dataset, corrupt: str, left_out: LeftOuts, workers: int
) -> Dataset:
    """Leave out the images that cannot be decoded if ``corrupt`` is ``skip``, else none.

    Raises:
        UsageError: ``corrupt`` is ``error``, but the existing cache was started with ``skip``.
        DataError: a tar would have no image left.
    """
    if corrupt == "skip":
        return without_corrupt(dataset, left_out, workers=workers, doing="dumping")
    record = left_out.path(CORRUPT)
    if record is not None and record.exists():
        raise UsageError(
            "this cache was started without the images that cannot be decoded",
            where=record,
            found="data.corrupt = error",
            action="resume it with --set data.corrupt=skip, or start a different cache",
        )
    return dataset


def teacher_info(teacher: Teacher, kwargs: dict[str, Any]) -> TeacherInfo:
    """Return what a cache's manifest states of a teacher; ``kwargs``: of its constructor."""
    return TeacherInfo(
        name=teacher.name,
        source=teacher.source,
        weights_sha256=teacher.weights_sha256,
        num_classes=teacher.num_classes,
        size=teacher.size,
        mean=teacher.mean,
        std=teacher.std,
        grid=teacher.grid,
        precision=teacher.precision,
        kwargs=kwargs,
    )


def _summary(writer: UnitWriter, ranks: Ranks, started: float) -> dict[str, Any]:
    meter = writer.meter
    # Read before waiting for other ranks. All are sums over ranks, the time waited for data too.
    own = [writer.units_written, writer.views_written, meter.waited, meter.seconds]
    units, views, waited, worked = (sum(column) for column in zip(*ranks.gather(own), strict=True))
    seconds = time.perf_counter() - started
    info = describe_cache(open_cache(writer.cache.path))
    return {
        "cache": str(writer.cache.path),
        "units_written": units,
        "views_written": views,
        "seconds": seconds,
        "views_per_second": views / seconds if views else None,
        "data_wait": waited / worked if views else None,
        **{name: info[name] for name in (*SIZES, "teacher_top1")},
    }
