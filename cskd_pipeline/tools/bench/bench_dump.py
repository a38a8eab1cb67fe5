"""``bench dump``: what of the teacher's speed is left in a dump, and which side is its limit.

In turn: the dump as it is (loader processes, device, encoding, writing, a unit at a time, into a
temporary cache); the bare teacher on views that lie normalised on the device; the loader processes
alone; and in this process, on one core, the loader's work for units of ten views and for ten units
of one. Rates begin when queues are full. :func:`variants` asks the teacher in other ways, and
counts the labels that change.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from cskd_pipeline.config import DumpRecipe
from cskd_pipeline.data.assemble import normalise
from cskd_pipeline.data.full_batches import TeacherViews, full_batches
from cskd_pipeline.data.index import Dataset, sample
from cskd_pipeline.data.left_out import LeftOuts
from cskd_pipeline.data.unit_views import Loading, unit_batches
from cskd_pipeline.distill.ckf import hard_global_labels, hard_labels
from cskd_pipeline.errors import DataError
from cskd_pipeline.models.teacher import Logits, Teacher
from cskd_pipeline.pipeline.dump import loading_for, open_stage_one, teacher_info, usable
from cskd_pipeline.pipeline.write_cache import write_cache
from cskd_pipeline.runtime.distributed import ALONE
from cskd_pipeline.runtime.progress import silence
from cskd_pipeline.tools.bench.timing import (
    Clock,
    SteadyRate,
    comparison_columns,
    comparison_row,
    device_name,
    one_thread,
    ratio,
    seconds_of,
    spread,
    take_turns,
    wait_for,
)
from cskd_pipeline.tools.tables import Printed, Table

BLOCK = 10
DUMP_GOAL, BLOCK_GOAL = 0.95, 1.4
RATIOS = (1.0, 0.75, 0.5, 0.25, 0.0)  # r at which variants' labels are compared
_RESIDENT = 4  # batches that the bare teacher is asked about in turn


def bench_dump(
    recipe: DumpRecipe,
    *,
    images: int,
    rounds: int,
    with_variants: bool,
    compile: bool = False,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Dump ``images`` sampled images in ten views, and its parts, ``rounds`` times.

    Args:
        with_variants: also ask the teacher with other settings.
        compile: torch.compile among them.

    Returns:
        ``views_per_second`` of ``dump``, ``teacher``, ``loader`` (the recipe's processes), and on
        one core ``block_10`` and ``block_1``; ``ratio`` of dump to teacher and of block_10 to
        block_1, medians with spread; ``limit``: loader or teacher; ``variants``.

    Raises:
        CskdError: as the dump itself would.
    """
    recipe = replace(recipe, cache=replace(recipe.cache, views=BLOCK, view_block=BLOCK))
    dataset, teacher = open_stage_one(recipe)
    few = sample(dataset, min(images, dataset.samples))
    loading = loading_for(recipe, teacher)
    few = usable(few, recipe.data.corrupt, LeftOuts(None, ALONE), loading.workers)
    resident = _resident(recipe, few, teacher)
    total = few.samples * BLOCK

    def ask(advance: Callable[[int], None]) -> None:
        for number in range(-(-total // len(resident[0]))):
            answer = teacher.unchecked(resident[number % len(resident)])
            wait_for(teacher.device)
            advance(len(answer.global_))

    def load(processes: int, block: int) -> Callable[[Callable[[int], None]], None]:
        def run(advance: Callable[[int], None]) -> None:
            units = [
                (shard, range(first, first + block))
                for shard in range(len(few.shards))
                for first in range(0, BLOCK, block)
            ]
            policy, seed = recipe.views, recipe.cache.root_seed
            own = Loading(recipe.dump.batch_size, processes)
            for batch in unit_batches(few, units, policy, seed, own):
                advance(len(batch))

        return run

    works: dict[str, Callable[[Callable[[int], None]], None]] = {
        "dump": partial(trial_dump, recipe, few, teacher),
        "teacher": ask,
        "loader": load(loading.workers, BLOCK),
        f"block_{BLOCK}": load(0, BLOCK),
        "block_1": load(0, 1),
    }

    def side(name: str) -> Callable[[int], float]:
        def turn(_: int) -> float:
            steady = SteadyRate(total, clock)
            with one_thread() if name.startswith("block") else nullcontext():
                works[name](steady.advance)
            return steady.rate

        return turn

    counted = take_turns({name: side(name) for name in works}, rounds, "dumping")
    per_second = {name: spread(rates) for name, rates in counted.items()}
    loader, bare = (per_second[name]["median"] for name in ("loader", "teacher"))
    report = {
        "teacher": teacher.name,
        "device": device_name(teacher.device),
        "precision": teacher.precision,
        "size": recipe.views.size,
        "batch_size": recipe.dump.batch_size,
        "workers": loading.workers,
        "images": few.samples,
        "views_per_image": BLOCK,
        "encodings": list(recipe.cache.encodings),
        "rounds": rounds,
        "views_per_second": per_second,
        "ratio": {
            "dump_to_teacher": ratio(counted["teacher"], counted["dump"]),
            "blocks": ratio(counted["block_1"], counted[f"block_{BLOCK}"]),
        },
        "goal": {"dump_to_teacher": DUMP_GOAL, "blocks": BLOCK_GOAL},
        "limit": "loader" if loader < bare else "teacher",
        "variants": {},
    }
    if with_variants:
        report["variants"] = variants(recipe, resident, rounds, clock, compile=compile)
    return report


def trial_dump(
    recipe: DumpRecipe, few: Dataset, teacher: Teacher, advance: Callable[[int], None]
) -> None:
    """Dump ``few`` as the stage would, but into a temporary folder."""
    info = teacher_info(teacher, recipe.teacher.kwargs)
    with silence(), tempfile.TemporaryDirectory(prefix="cskd-trial-") as folder:
        cache = replace(recipe.cache, path=str(Path(folder) / "cache"))
        loading = loading_for(recipe, teacher)
        with write_cache(cache, few, info, recipe.views, loading=loading) as out:
            for views in out:
                images = normalise(views.images, teacher.mean, teacher.std)
                out.put(views, *teacher.unchecked(images))
                advance(len(views))


def variants(
    recipe: DumpRecipe,
    resident: Sequence[Tensor],
    rounds: int,
    clock: Clock,
    *,
    compile: bool,
) -> dict[str, Any]:
    """The bare teacher with other settings, in turn.

    Returns:
        By setting: ``views_per_second``, ``ratio`` to plain float32, and the shares of hard
        labels, over all places and five values of r, and of global labels that are not
        float32's.
    """
    settings: dict[str, dict[str, Any]] = {
        "float32": {},
        "channels_last": {"channels_last": True},
        "bfloat16": {"precision": "bfloat16"},
        "bfloat16 channels_last": {"precision": "bfloat16", "channels_last": True},
    }
    if resident[0].device.type == "cuda":
        settings["float16"] = {"precision": "float16"}
        settings["float16 channels_last"] = {"precision": "float16", "channels_last": True}
    if compile:
        settings["compile"] = {"compile": True}
        settings["bfloat16 compile"] = {"precision": "bfloat16", "compile": True}
    teachers = {name: _with(recipe, changes) for name, changes in settings.items()}
    logits: dict[str, list[Logits]] = {}

    def respond(name: str, _: int) -> None:
        logits[name] = [teachers[name].unchecked(views) for views in resident]
        wait_for(teachers[name].device)

    sides = {name: seconds_of(partial(respond, name), clock) for name in teachers}
    seconds = take_turns(sides, rounds, "running the teacher")
    views = sum(map(len, resident))
    report = {}
    for name, times in seconds.items():
        spatial, global_ = _changed(logits["float32"], logits[name])
        report[name] = {
            "views_per_second": spread([views / value for value in times]),
            "ratio": ratio(times, seconds["float32"]),
            "hard_labels_changed": spatial,
            "global_labels_changed": global_,
        }
    return report


def _with(recipe: DumpRecipe, changes: Mapping[str, Any]) -> Teacher:
    """The recipe's teacher in plain float32, but for ``changes``."""
    precision = changes.get("precision", "float32")
    loop = {name: changes.get(name, False) for name in ("channels_last", "compile")}
    asked = replace(
        recipe,
        teacher=replace(recipe.teacher, precision=precision),
        dump=replace(recipe.dump, **loop),
    )
    return open_stage_one(asked)[1]


def _changed(expected: Sequence[Logits], found: Sequence[Logits]) -> tuple[float, float]:
    """Shares of hard labels, and of global labels, that differ."""
    spatial, places, global_, views = 0, 0, 0, 0
    for one, other in zip(expected, found, strict=True):
        for r in RATIOS:
            differs = hard_labels(*one, r) != hard_labels(*other, r)
            spatial, places = spatial + int(differs.sum()), places + differs.numel()
        labels = [hard_global_labels(answer.global_) for answer in (one, other)]
        global_, views = global_ + int((labels[0] != labels[1]).sum()), views + len(labels[0])
    return spatial / places, global_ / views


def _resident(recipe: DumpRecipe, few: Dataset, teacher: Teacher) -> list[Tensor]:
    """Some full batches of real views, normalised, on the teacher's device."""
    size = recipe.dump.batch_size
    units = [(shard, range(BLOCK)) for shard in range(len(few.shards))]
    batches = unit_batches(few, units, recipe.views, recipe.cache.root_seed, Loading(size))
    pieces = (TeacherViews.of(batch, recipe.views, teacher.device) for batch in batches)
    full = [
        normalise(views.images, teacher.mean, teacher.std)
        for views in islice(full_batches(pieces, size), _RESIDENT)
        if len(views) == size
    ]
    if not full:
        raise DataError(
            "too few images for a full batch",
            where=few.name,
            found=f"{few.samples} images in {BLOCK} views",
            expected=f"batches of {size}",
            action="lower --batch-size, or raise --images",
        )
    return full


def printed(report: Mapping[str, Any]) -> Printed:
    """Yield the rates, which side is the limit, and what variants change."""
    rates = report["views_per_second"]
    names = {
        "dump": "dump",
        "teacher": "bare teacher",
        "loader": f"loader, {report['workers']} processes",
        f"block_{BLOCK}": f"loader, one core, {BLOCK} views a block",
        "block_1": "loader, one core, 1 view a block",
    }
    compared = {"dump": "dump_to_teacher", f"block_{BLOCK}": "blocks"}
    ratios, goals = (
        {n: report[key].get(compared.get(n)) for n in names} for key in ("ratio", "goal")
    )
    yield Table(
        f"{report['teacher']} on {report['device']}, {report['precision']}, {report['size']} px, "
        f"{report['images']} images in {BLOCK} views, {report['rounds']} rounds",
        comparison_columns("views/s"),
        [comparison_row(label, rates[n], ratios[n], goals[n]) for n, label in names.items()],
    )
    loader, bare = rates["loader"]["median"], rates["teacher"]["median"]
    yield (
        f"the limit is the {report['limit']}: the loader makes {loader:.4g} views/s in "
        f"{report['workers']} processes, the bare teacher takes {bare:.4g}"
        + ("; on a CPU they share the cores" if report["device"] == "cpu" else "")
    )
    if report["variants"]:
        yield Table(
            "the bare teacher in other ways, and the labels that are not float32's",
            ("", "views/s", "ratio", "hard labels %", "global labels %"),
            [
                (
                    name,
                    row["views_per_second"]["median"],
                    row["ratio"]["median"],
                    100 * row["hard_labels_changed"],
                    100 * row["global_labels_changed"],
                )
                for name, row in report["variants"].items()
            ],
        )
