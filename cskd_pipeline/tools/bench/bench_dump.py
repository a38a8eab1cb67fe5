"""``bench dump``: what of the teacher's speed is left in a dump, and which side is its limit.

In turn: the dump as it is (loader processes, device, encoding, writing, a unit at a time, into a
temporary cache); the bare teacher on views that lie normalised on the device; the loader processes
alone; and in this process, on one core, the loader's work for units of ten views and for ten units
of one. Rates begin when queues are full. :func:`variants` runs the teacher in other ways, and
counts the labels that change.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor

from cskd_pipeline.config.sections import DumpRecipe
from cskd_pipeline.data.assemble import normalise
from cskd_pipeline.data.full_batches import TeacherViews, full_batches
from cskd_pipeline.data.unit_views import Loading
from cskd_pipeline.distill.ckf import hard_global_labels, hard_labels
from cskd_pipeline.errors import DataError
from cskd_pipeline.models.teacher import Logits, Teacher
from cskd_pipeline.pipeline.dump import open_stage_one, open_teacher
from cskd_pipeline.runtime.device import device_name
from cskd_pipeline.tools.bench import timing
from cskd_pipeline.tools.bench.sampled_dump import Advance, SampledDump
from cskd_pipeline.tools.tables import Printed, Table

BLOCK = 10
DUMP_GOAL, BLOCK_GOAL = 0.95, 1.4
RATIOS = (1.0, 0.75, 0.5, 0.25, 0.0)  # r at which variants' labels are compared
_RESIDENT = 4  # batches that the bare teacher is run on in turn


def bench_dump(
    recipe: DumpRecipe,
    *,
    images: int,
    rounds: int,
    with_variants: bool,
    compile: bool = False,
) -> dict[str, Any]:
    """Dump ``images`` sampled images in ten views, and run the dump's parts, ``rounds`` times.

    Args:
        with_variants: also run the teacher with other settings.
        compile: torch.compile among them.

    Returns:
        ``views_per_second`` of ``dump``, ``teacher``, ``loader`` (the recipe's processes), and on
        one core ``block_10`` and ``block_1``; ``ratio`` of dump to teacher and of block_10 to
        block_1, medians with spread; ``limit``: loader or teacher; ``variants``.

    Raises:
        CskdError: as the dump itself would.
    """
    dataset, teacher = open_stage_one(recipe)
    few = SampledDump.of(recipe, dataset, teacher, min(images, dataset.samples))
    resident = resident_views(few)
    size, workers = recipe.dump.batch_size, few.loading.workers
    works: dict[str, Callable[[Advance], None]] = {
        "dump": partial(few.write, BLOCK),
        "teacher": partial(_run_teacher, teacher, resident, few.dataset.samples * BLOCK),
        "loader": partial(_load, few, BLOCK, Loading(size, workers)),
        f"block_{BLOCK}": partial(_load, few, BLOCK, Loading(size)),
        "block_1": partial(_load, few, 1, Loading(size)),
    }

    def rate(name: str, _: int) -> float:
        steady = timing.SteadyRate(few.dataset.samples * BLOCK)
        with timing.one_thread() if name.startswith("block") else nullcontext():
            works[name](steady.advance)
        return steady.rate

    rates = timing.take_turns({name: partial(rate, name) for name in works}, rounds, "dumping")
    per_second = {name: timing.spread(found) for name, found in rates.items()}
    loader, bare = (per_second[name]["median"] for name in ("loader", "teacher"))
    report = {
        "teacher": teacher.name,
        "device": device_name(teacher.device),
        "precision": teacher.precision,
        "size": recipe.views.size,
        "batch_size": size,
        "workers": workers,
        "images": few.dataset.samples,
        "views_per_image": BLOCK,
        "encodings": list(recipe.cache.encodings),
        "rounds": rounds,
        "views_per_second": per_second,
        "ratio": {
            "dump_to_teacher": timing.ratio(rates["teacher"], rates["dump"]),
            "blocks": timing.ratio(rates["block_1"], rates[f"block_{BLOCK}"]),
        },
        "goal": {"dump_to_teacher": DUMP_GOAL, "blocks": BLOCK_GOAL},
        "limit": "loader" if loader < bare else "teacher",
        "variants": {},
    }
    if with_variants:
        report["variants"] = variants(few, resident, rounds, compile=compile)
    return report


def _run_teacher(
    teacher: Teacher, resident: Sequence[Tensor], views: int, advance: Advance
) -> None:
    for number in range(-(-views // len(resident[0]))):
        logits = teacher.unchecked(resident[number % len(resident)])
        timing.wait_for(teacher.device)
        advance(len(logits.global_))


def _load(few: SampledDump, block: int, loading: Loading, advance: Advance) -> None:
    for batch in few.batches(BLOCK, block=block, loading=loading):
        advance(len(batch))


def variants(
    few: SampledDump, resident: Sequence[Tensor], rounds: int, *, compile: bool
) -> dict[str, Any]:
    """Run the bare teacher with other settings, in turn.

    Returns:
        By setting: ``views_per_second``, ``ratio`` to plain float32, and the shares of hard
        labels, over all locations and five values of r, and of global labels that are not
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
    teachers = {name: _with(few, changes) for name, changes in settings.items()}
    logits: dict[str, list[Logits]] = {}

    def respond(name: str, _: int) -> None:
        logits[name] = [teachers[name].unchecked(views) for views in resident]
        timing.wait_for(teachers[name].device)

    works = {name: partial(respond, name) for name in teachers}
    seconds = timing.time_turns(works, rounds, "running the teacher")
    views = sum(map(len, resident))
    report = {}
    for name, times in seconds.items():
        spatial, global_ = _changed(logits["float32"], logits[name])
        report[name] = {
            "views_per_second": timing.rates(times, views),
            "ratio": timing.ratio(times, seconds["float32"]),
            "hard_labels_changed": spatial,
            "global_labels_changed": global_,
        }
    return report


def _with(few: SampledDump, changes: Mapping[str, Any]) -> Teacher:
    """Load the same teacher in plain float32, but for ``changes``."""
    recipe = few.recipe
    precision = changes.get("precision", "float32")
    loop = {name: changes.get(name, False) for name in ("channels_last", "compile")}
    changed = replace(
        recipe,
        teacher=replace(recipe.teacher, precision=precision),
        dump=replace(recipe.dump, **loop),
    )
    return open_teacher(changed, few.dataset.num_classes, few.teacher.device)


def _changed(expected: Sequence[Logits], found: Sequence[Logits]) -> tuple[float, float]:
    """Return the shares of hard labels, and of global labels, that differ."""
    spatial, locations, global_, views = 0, 0, 0, 0
    for one, other in zip(expected, found, strict=True):
        for r in RATIOS:
            differs = hard_labels(*one, r) != hard_labels(*other, r)
            spatial, locations = spatial + int(differs.sum()), locations + differs.numel()
        labels = [hard_global_labels(logits.global_) for logits in (one, other)]
        global_, views = global_ + int((labels[0] != labels[1]).sum()), views + len(labels[0])
    return spatial / locations, global_ / views


def resident_views(few: SampledDump) -> list[Tensor]:
    """Return some full batches of real views, normalised, on the teacher's device.

    Raises:
        DataError: too few images for one.
    """
    teacher, size = few.teacher, few.recipe.dump.batch_size
    batches = few.batches(BLOCK, loading=Loading(size))
    pieces = (TeacherViews.of(batch, few.recipe.views, teacher.device) for batch in batches)
    full = [
        normalise(views.images, teacher.mean, teacher.std)
        for views in islice(full_batches(pieces, size), _RESIDENT)
        if len(views) == size
    ]
    if not full:
        raise DataError(
            "too few images for a full batch",
            where=few.dataset.name,
            found=f"{few.dataset.samples} images in {BLOCK} views",
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
        timing.comparison_columns("views/s"),
        [timing.comparison_row(label, rates[n], ratios[n], goals[n]) for n, label in names.items()],
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
