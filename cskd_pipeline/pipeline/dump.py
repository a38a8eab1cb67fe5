"""Stage one: what the teacher says of every view, written once.

``dump_teacher`` is the whole of it: open the data, load the teacher, make or open the cache, and
for each unit (block of views, tar shard) that is not done yet: views from the loader, logits from
the teacher, encodings on the device, arrays to the cache, its record last. The teacher's batches
are full: one may end a unit and begin the next. What it says of a view does not depend on the
others in the batch, so a killed dump is run again with the same command, goes on with the units
that are left, and equals one that was never stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cskd_pipeline.cache.buffer import UnitBuffer
from cskd_pipeline.cache.info import describe as describe_cache
from cskd_pipeline.cache.layout import choose_view_block
from cskd_pipeline.cache.manifest import (
    CacheManifest,
    DatasetManifest,
    TeacherInfo,
    library_versions,
    utc_now,
)
from cskd_pipeline.cache.summary import size
from cskd_pipeline.cache.writer import CacheWriter, Unit, UnitData
from cskd_pipeline.config import DumpRecipe
from cskd_pipeline.data.assemble import assemble, normalise
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.data.corrupt import without_corrupt
from cskd_pipeline.data.full_batches import TeacherViews, full_batches
from cskd_pipeline.data.index import Dataset, describe, load_dataset, refuse_repeated_keys
from cskd_pipeline.data.left_out import LeftOuts
from cskd_pipeline.data.shards import TarShard
from cskd_pipeline.data.unit_views import unit_batches
from cskd_pipeline.distill.ckf import hard_global_labels
from cskd_pipeline.distill.encodings import ENCODINGS, ResponseShape
from cskd_pipeline.errors import UsageError
from cskd_pipeline.models.checkpoint import has_card, read_card
from cskd_pipeline.models.teacher import Logits, Teacher, load_teacher
from cskd_pipeline.models.weights import is_safetensors
from cskd_pipeline.runtime.classes import Classes, ClassGuard
from cskd_pipeline.runtime.device import pick_device, use_threads, worker_count
from cskd_pipeline.runtime.distributed import ALONE, Ranks, joined
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.runtime.signals import stop_requests
from cskd_pipeline.views.policy import ViewPolicy

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
    """``cskd-pipeline dump-teacher``: make, go on with or extend the cache of ``recipe``.

    Under torchrun every process calls this, and each takes its share of the units.

    Args:
        shard_range, view_range: only the tar shards and views from, up to and not including;
            several processes, on one machine or many, may fill one cache, or caches of their own
            that ``cache merge`` joins.
        accept_versions: go on with a cache that was begun with other library versions.
        accept_classes: go on though the teacher, or the cache, names its classes otherwise.

    Returns:
        The closing summary: views written now and in all, bytes and seconds, views per second, the
        share of the time spent waiting for data, the teacher's top-1 on the labels of the views.

    Raises:
        CskdError: data, teacher or cache cannot be used, or do not belong together.
        KeyboardInterrupt, Requeue: stopped by a signal, between units.
    """
    _require_within(view_range, recipe.cache.views)
    with joined(recipe.dump.rank_timeout) as ranks:
        guard = ClassGuard(accept=accept_classes)
        dataset, teacher = open_stage_one(recipe, ranks, guard)
        left_out = LeftOuts(Path(recipe.cache.path), ranks)
        dataset = usable(recipe, dataset, left_out)
        units: list[Unit] = []
        if ranks.first:
            refuse_repeated_keys(dataset)
            described = describe(dataset)
            manifest = cache_manifest(recipe, described, teacher, view_range)
            writer = CacheWriter.create(
                recipe.cache.path, manifest, accept_versions=accept_versions, guard=guard
            )
            guard.report()
            left_out.write()
            if recipe.cache.views > writer.manifest.views:
                writer.extend(recipe.cache.views)
            ranges = (None if r is None else range(*r) for r in (shard_range, view_range))
            units = writer.todo(*ranges)
        # One list for all: a rank that asks later would find some of it done.
        units = ranks.gather(units)[0]
        if not ranks.first:
            writer = CacheWriter.open(recipe.cache.path)
        summary = _dump(recipe, dataset, teacher, writer, units, ranks)
        return {**summary, "left_out": len(left_out)}


def _dump(
    recipe: DumpRecipe,
    dataset: Dataset,
    teacher: Teacher,
    writer: CacheWriter,
    units: list[Unit],
    ranks: Ranks,
) -> dict[str, Any]:
    """This rank's share of ``units``, and what all have done together."""
    mine = units[ranks.rank :: ranks.world]
    if recipe.teacher.weights == "random":
        log.warning("the teacher's weights are random: this cache is good for trials only")
    started = time.perf_counter()
    with progress(sum(map(writer.size_of, mine)), "views", "dumping") as meter:

        def watched(batches: Iterator[Batch]) -> Iterator[Batch]:
            return ranks.heeding(meter.timed(batches))

        views = write_units(recipe, dataset, teacher, writer, mine, meter.advance, watched=watched)
    views = sum(ranks.gather(views))
    seconds = time.perf_counter() - started
    data_wait = meter.data_wait if views else None
    return _summary(writer, units, views, seconds, data_wait)


def _require_within(view_range: tuple[int, int] | None, views: int) -> None:
    if view_range is not None and view_range[1] > views:
        raise UsageError(
            "the range of views lies outside the cache",
            found=f"views {view_range[0]}:{view_range[1]}",
            expected=f"a range within 0:{views}",
            action="say by --views how many the whole cache is to have, the same for every part",
        )


def open_stage_one(
    recipe: DumpRecipe,
    ranks: Ranks = ALONE,
    guard: ClassGuard | None = None,
) -> tuple[Dataset, Teacher]:
    """The recipe's data and its teacher, on the recipe's device, with the same classes.

    Args:
        guard: compares the class names of a teacher that ``train`` made; without, they must be the
            same.

    Raises:
        CskdError: one of them cannot be used, or they do not belong together.
    """
    guard = guard or ClassGuard(switch=None)
    device = ranks.device(pick_device(recipe.dump.device))
    use_threads(recipe.dump.threads)
    dataset = load_dataset(
        recipe.data.shards,
        split=recipe.data.split or None,
        num_classes=recipe.data.num_classes or None,
        empty="pass" if recipe.data.corrupt == "skip" else "error",
    )
    weights = Path(recipe.teacher.weights)
    if weights.is_file() and is_safetensors(weights) and has_card(weights):
        dataset = dataset.fitting(_teacher_classes(weights), "the shards", guard)
    guard.report()
    teacher = load_teacher(
        recipe.teacher.name,
        weights=recipe.teacher.weights,
        num_classes=dataset.num_classes,
        size=recipe.views.size,
        kwargs=recipe.teacher.kwargs,
        mean=recipe.teacher.mean,
        std=recipe.teacher.std,
        precision=recipe.teacher.precision,
        seed=recipe.teacher.seed,
        batch_size=recipe.dump.batch_size,
        channels_last=recipe.dump.channels_last,
        compile=recipe.dump.compile,
        device=device,
    )
    _warn_of_a_large_grid(teacher)
    if dataset.num_classes is None:
        dataset = dataset.with_classes(teacher.num_classes)
    return dataset, teacher


def _teacher_classes(weights: Path) -> Classes:
    return replace(read_card(weights).classes(weights), of="the teacher")


def _warn_of_a_large_grid(teacher: Teacher) -> None:
    """A network for small images fed large ones has a grid that costs much and means little."""
    rows, columns = teacher.grid
    if max(rows, columns) > LARGE_GRID:
        stored = 2 * teacher.num_classes * (rows * columns + 1)  # float16
        log.warning(
            f"at {teacher.size} px {teacher.name} answers on a grid of {rows}x{columns} locations, "
            f"{size(stored)} a view uncompressed: if it was trained on smaller images, set "
            "views.size to theirs"
        )


def usable(recipe: DumpRecipe, dataset: Dataset, left_out: LeftOuts) -> Dataset:
    """The data set without images that cannot be decoded, where the recipe says so."""
    if recipe.data.corrupt != "skip":
        record = left_out.path("corrupt.json")
        if record is not None and record.exists():
            raise UsageError(
                "this cache was begun without the images that cannot be decoded",
                where=record,
                found="data.corrupt = error",
                action="go on with it by --set data.corrupt=skip, or begin another cache",
            )
        return dataset
    workers = worker_count(recipe.dump.workers)
    return without_corrupt(dataset, left_out, workers=workers, doing="dumping")


def cache_manifest(
    recipe: DumpRecipe,
    dataset: DatasetManifest,
    teacher: Teacher,
    view_range: tuple[int, int] | None = None,
) -> CacheManifest:
    """What the finished cache will say of itself.

    Args:
        view_range: the views to be made now; the block that is chosen divides its ends, so that
            equal ranges next to each other agree on it.

    Raises:
        UsageError: views that are no whole number of blocks.
    """
    settings = recipe.cache
    if recipe.data.name:
        dataset = replace(dataset, name=recipe.data.name)
    shape = ResponseShape(teacher.num_classes, *teacher.grid)
    ends = (settings.views, *(view_range or ()))
    block = settings.view_block or choose_view_block(
        math.gcd(*ends), max(dataset.counts), settings.encodings, shape
    )
    if any(end % block for end in ends):
        part = "" if view_range is None else f", of which {view_range[0]}:{view_range[1]} now,"
        raise UsageError(
            "views come in whole blocks",
            where="cache.view_block",
            found=f"{settings.views} views{part} in blocks of {block}",
            expected="a divisor of the number of views, and of where their range begins and ends",
        )
    return CacheManifest(
        dataset=dataset,
        teacher=TeacherInfo(
            name=teacher.name,
            source=teacher.source,
            weights_sha256=teacher.weights_sha256,
            num_classes=teacher.num_classes,
            size=teacher.size,
            mean=teacher.mean,
            std=teacher.std,
            grid=teacher.grid,
            precision=teacher.precision,
            kwargs=recipe.teacher.kwargs,
        ),
        policy=recipe.views,
        root_seed=settings.root_seed,
        views=settings.views,
        view_block=block,
        encodings=settings.encodings,
        versions=library_versions(),
        created=utc_now(),
        license=settings.license,
        notes=settings.notes,
    )


def write_units(
    recipe: DumpRecipe,
    dataset: Dataset,
    teacher: Teacher,
    writer: CacheWriter,
    units: list[Unit],
    advance: Callable[[int], None],
    *,
    watched: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
) -> int:
    """Ask the teacher about every view of ``units`` and commit them one by one.

    Args:
        advance: told after every batch how many views it had.
        watched: passes the loader's batches on, and may look at how long they take.

    Returns:
        How many views were written.

    Raises:
        KeyboardInterrupt, Requeue: stopped by a signal. Ctrl-C waits for the unit in hand, which
            may take long; a scheduler does not, and gets what is computed already written.
    """
    loader = watched(
        unit_batches(
            dataset,
            [(unit.shard, unit.views) for unit in units],
            recipe.views,
            recipe.cache.root_seed,
            batch_size=recipe.dump.batch_size,
            workers=worker_count(recipe.dump.workers),
            pin_memory=teacher.device.type == "cuda",
        )
    )
    pieces = (TeacherViews.of(batch, recipe.views, teacher.device) for batch in loader)
    written = 0
    # One unit is written while the next is computed; two would only hold memory.
    with stop_requests() as stop, ThreadPoolExecutor(1) as pool:
        answers = _answers(full_batches(pieces, recipe.dump.batch_size), teacher, recipe)
        answers = takewhile(lambda _: not stop.requeue, answers)
        pending: Future[bool] | None = None
        for unit, data in _units(units, answers, dataset, teacher, recipe, advance):
            if pending is not None:
                pending.result()
            pending = pool.submit(writer.write_unit, unit, data)
            written += writer.size_of(unit)
            if stop.requested:
                break
        if pending is not None:
            pending.result()
        if stop.requested and written < sum(map(writer.size_of, units)):
            raise KeyboardInterrupt
    return written


Answered = tuple[np.ndarray, dict[str, np.ndarray]]
"""(n, 3) view, shard, offset, and every array's rows."""


def _answers(
    batches: Iterator[TeacherViews], teacher: Teacher, recipe: DumpRecipe
) -> Iterator[Answered]:
    """What is to be stored of every batch; later ones are with the teacher already."""
    ahead, asked = batches_ahead(teacher.device), deque[Asked]()
    for views in batches:
        asked.append(Asked.of(views, teacher))
        if len(asked) > ahead:
            yield asked.popleft().arrays(recipe.cache.encodings)
    while asked:
        yield asked.popleft().arrays(recipe.cache.encodings)


def _units(
    units: Sequence[Unit],
    answers: Iterator[Answered],
    dataset: Dataset,
    teacher: Teacher,
    recipe: DumpRecipe,
    advance: Callable[[int], None],
) -> Iterator[tuple[Unit, UnitData]]:
    """Each unit once all its answers are there; a batch may end one unit and begin the next."""
    shape = ResponseShape(teacher.num_classes, *teacher.grid)
    specs = [spec for name in recipe.cache.encodings for spec in ENCODINGS[name].arrays(shape)]
    fill = {spec.name: spec.fill for spec in specs}
    index: np.ndarray = np.empty((0, 3), np.int32)
    arrays: dict[str, np.ndarray] = {}
    for unit in units:
        shard = dataset.shards[unit.shard]
        buffer = UnitBuffer(len(unit.views), len(shard), fill)
        left = len(unit.views) * len(shard)
        while left:
            if not len(index):
                answered = next(answers, None)
                if answered is None:  # stopped: the unit is made anew another time
                    return
                index, arrays = answered
                advance(len(index))
            now = index[:left]
            assert (now[:, 1] == unit.shard).all(), (unit, now)
            own = {name: values[: len(now)] for name, values in arrays.items()}
            buffer.put(now[:, 0] - unit.views[0], now[:, 2], own)
            index = index[len(now) :]
            arrays = {name: values[len(now) :] for name, values in arrays.items()}
            left -= len(now)
        yield unit, _unit_data(shard, unit, buffer.arrays)


def _unit_data(shard: TarShard, unit: Unit, arrays: dict[str, np.ndarray]) -> UnitData:
    top1 = np.stack([arrays.pop("correct").sum(1), np.full(len(unit.views), len(shard))], axis=1)
    return UnitData(
        keys=shard.keys,
        labels=shard.index.label.astype(np.int32),
        image_crc32=arrays.pop("image_crc32")[0],
        seeds=arrays.pop("seed"),
        view_digests=arrays.pop("view_digest"),
        arrays=arrays,
        top1=top1.astype(np.uint32),
    )


def batches_ahead(device: torch.device) -> int:
    """How many batches the teacher is at work on while an earlier one is encoded and copied back.

    A CPU does one thing after the other.
    """
    return 1 if device.type == "cuda" else 0


@dataclass(frozen=True)
class Asked:
    """Views that the teacher was asked about, and may still be at work on.

    On CUDA the answer is encoded on a stream of its own, which waits for this answer only: encoding
    reads counts back to the host, and would otherwise wait for the next batch's answer too.

    ``answered`` is when the teacher is done, None on a CPU.
    """

    views: TeacherViews
    teacher: Teacher
    answer: Logits
    answered: torch.cuda.Event | None

    @classmethod
    def of(cls, views: TeacherViews, teacher: Teacher) -> Asked:
        """Start the teacher on views on its device; the host does not wait for it."""
        answer = teacher.unchecked(normalise(views.images, teacher.mean, teacher.std))
        answered = None
        if teacher.device.type == "cuda":
            answered = torch.cuda.Event()
            answered.record(torch.cuda.current_stream(teacher.device))
        return cls(views, teacher, answer, answered)

    def arrays(self, encodings: Sequence[str]) -> Answered:
        """Every array's rows; ``correct``: whether the teacher's class is the label.

        Raises:
            TeacherError: a logit is NaN or infinite, or too large for float16.
        """
        if self.answered is None:
            return self._read(encodings)
        side = _side_stream(self.teacher.device)
        side.wait_event(self.answered)
        with torch.cuda.stream(side):
            for tensor in (*self.answer, self.views.label):
                tensor.record_stream(side)  # not to be given away before this stream is done
            return self._read(encodings)

    def _read(self, encodings: Sequence[str]) -> Answered:
        answer, views = self.teacher.checked(self.answer), self.views
        found = {"correct": hard_global_labels(answer.global_) == views.label}
        for name in encodings:
            found |= ENCODINGS[name].encode(answer.spatial, answer.global_)
        return views.index, {
            **{name: values.cpu().numpy() for name, values in found.items()},
            "seed": views.seed,
            "view_digest": views.view_digest,
            "image_crc32": views.image_crc32,
        }


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def logits_of(teacher: Teacher, batch: Batch, policy: ViewPolicy) -> Logits:
    """What the teacher says of the views of a batch that lies on its device."""
    return teacher.respond(normalise(assemble(batch, policy), teacher.mean, teacher.std))


def _summary(
    writer: CacheWriter,
    units: list[Unit],
    views: int,
    seconds: float,
    data_wait: float | None,
) -> dict[str, Any]:
    info = describe_cache(writer.path)
    return {
        "cache": str(writer.path),
        "units_written": len(units),
        "views_written": views,
        "seconds": seconds,
        "views_per_second": views / seconds if views else None,
        "data_wait": data_wait,
        **{name: info[name] for name in ("views", "samples", "complete", "bytes")},
        "bytes_per_view": info["bytes_per_view"],
        "teacher_top1": info["teacher_top1"],
    }
