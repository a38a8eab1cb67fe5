"""Stage one: run the teacher once on every view, and store its logits.

``dump_teacher`` opens shards and teacher, creates or resumes the cache, and runs the teacher on
every missing view. ``put`` encodes the logits and commits them one unit (block of views, tar shard)
at a time, each unit's record last. Batches are full, so one may span two units. A view's logits do
not depend on the rest of its batch: an interrupted dump resumes with the same command, and its
cache equals that of an uninterrupted one.
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
"""Locations along a side above which a warning is logged; a CNN at 224 px has 7."""


def dump_teacher(
    recipe: DumpRecipe,
    *,
    shard_range: tuple[int, int] | None = None,
    view_range: tuple[int, int] | None = None,
    accept_versions: bool = False,
    accept_classes: bool = False,
) -> dict[str, Any]:
    """Create, resume or extend the cache of ``recipe``: ``cskd-pipeline dump-teacher``.

    Under torchrun every process calls this. Ranks synchronize here, in ``write_cache`` and for the
    summary; in between each draws unit after unit and reacts to its own signals only. Other jobs
    may write to the same cache. Every process returns once all requested units are done.

    Args:
        shard_range, view_range, accept_versions: see :class:`WriteOptions`.
        accept_classes: continue even if the teacher's or the cache's class names differ.

    Returns:
        The summary: views written by this job and in total, bytes, seconds, views per second, the
        share of all ranks' time spent waiting for data, the teacher's top-1 on the views' labels.

    Raises:
        CskdError: shards, teacher or cache are unusable, or do not match.
        KeyboardInterrupt: Ctrl-C; the current unit was finished first, which may take a while.
        Requeue: a scheduler's signal; only units already complete were written.
    """
    data, cache = recipe.data, recipe.cache
    _require_within(view_range, cache.views)
    patience = recipe.dump.rank_timeout
    with join_job(patience) as ranks:
        guard = ClassGuard(COMMAND_SWITCH, accept=accept_classes)
        dataset, teacher = open_stage_one(recipe, ranks, guard)
        loading = loading_for(recipe, teacher)
        # Corrupt images are found first, since skipping them changes the manifest. Their list is
        # written only after write_cache has verified that the folder is this cache's.
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
            log.warning("the teacher's weights are random: use this cache for trials only")
        started = time.perf_counter()
        with stop_requests() as stop:
            with writer:
                for batch in writer.views():  # images (n, 3, S, S) of undone units, on the device
                    images = normalise(batch.images, teacher.mean, teacher.std)
                    # (n, K, h, w) and (n, K) float16. put() checks that they are finite, encodes
                    # and stores them; on CUDA one batch later, so that the device never waits.
                    spatial, global_ = teacher.unchecked(images)
                    units_completed = writer.put(batch, spatial, global_)
                    # Ctrl-C finishes the unit; a scheduler allows too little time for that.
                    if stop.requeue or (stop.requested and units_completed):
                        break
            # Raised inside the writer's block, this would drop complete units not yet written.
            if stop.requested and not writer.finished:
                raise KeyboardInterrupt  # stop_requests turns a scheduler's signal into Requeue
        return {**_summary(writer, ranks, started), "left_out": len(left_out)}


def _require_within(view_range: tuple[int, int] | None, views: int) -> None:
    if view_range is not None and view_range[1] > views:
        raise UsageError(
            "the view range exceeds the cache",
            found=f"views {view_range[0]}:{view_range[1]}",
            expected=f"a range within 0:{views}",
            action="set --views to the total number of views, the same for every part",
        )


def open_stage_one(
    recipe: DumpRecipe, ranks: Ranks = ALONE, guard: ClassGuard | None = None
) -> tuple[Dataset, Teacher]:
    """Open the recipe's shards, and load its teacher onto the recipe's device.

    Args:
        guard: decides whether a teacher trained by ``train`` may have other class names than the
            shards; None: refuse it.

    Raises:
        CskdError: shards or teacher are unusable, or their classes do not match.
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
        header = read_header(weights)  # of a network trained by train
        classes = Classes("the teacher", weights, header.num_classes, header.class_names)
        dataset = dataset.with_classes_of(classes, "the shards", guard)
    guard.report_new()
    teacher = open_teacher(recipe, dataset.num_classes, device)
    if dataset.num_classes is None:
        dataset = dataset.with_classes(teacher.num_classes)
    return dataset, teacher


def open_teacher(recipe: DumpRecipe, num_classes: int | None, device: torch.device) -> Teacher:
    """Load the recipe's teacher for views of the recipe's size; warn if its grid is large.

    A large grid means that a network for small images is fed large ones, at great cost.

    Args:
        num_classes: number of classes in the data; None: the teacher's own.

    Raises:
        CskdError: the teacher is unusable, or has a different number of classes.
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
            f"at {teacher.size} px {teacher.name} has a grid of {rows}x{columns} locations, "
            f"{stored / 1000:,.2f} kB per view uncompressed: if it was trained on smaller images, "
            "set views.size to their size"
        )
    return teacher


def loading_for(recipe: DumpRecipe, teacher: Teacher) -> Loading:
    """Return the loading options: the recipe's batch size and workers, the teacher's device."""
    return Loading(recipe.dump.batch_size, worker_count(recipe.dump.workers), teacher.device)


def without_corrupt_images(
    dataset: Dataset, corrupt: str, left_out: LeftOuts, workers: int
) -> Dataset:
    """Return the data set without corrupt images if ``corrupt`` is ``skip``, else unchanged.

    Raises:
        UsageError: ``corrupt`` is ``error``, but the existing cache was started with ``skip``.
        DataError: a tar would have no image left.
    """
    if corrupt == "skip":
        return without_corrupt(dataset, left_out, workers=workers, doing="dumping")
    record = left_out.path(CORRUPT)
    if record is not None and record.exists():
        raise UsageError(
            "this cache was started with data.corrupt = skip",
            where=record,
            found="data.corrupt = error",
            action="resume with --set data.corrupt=skip, or choose another --cache",
        )
    return dataset


def teacher_info(teacher: Teacher, kwargs: dict[str, Any]) -> TeacherInfo:
    """Return a manifest's entry for a teacher; ``kwargs`` are its constructor's."""
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
    # Read before gather() waits for the other ranks; then summed over ranks, waiting time too.
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
