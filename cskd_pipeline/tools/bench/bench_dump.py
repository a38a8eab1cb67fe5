"""``bench dump``: what of the teacher's speed is left in a dump, and which side is its limit.

In turn: the dump as it is (loader processes, device, encoding, writing, a unit at a time, into a
temporary cache); the bare teacher on views that lie normalised on the device; the loader processes
alone; and in this process, on one core, the loader's work for units of ten views and for ten units
of one. Rates begin when queues are full. :func:`variants` runs the teacher in other ways, and
counts the labels that change.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
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
from cskd_pipeline.tools.bench.sampled_dump import SampledDump
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
    """
    few = SampledDump.of(recipe, *open_stage_one(recipe), images)
    teacher, resident, views = few.teacher, resident_views(few), few.dataset.samples * BLOCK
    size, workers = recipe.dump.batch_size, few.loading.workers

    def load(block: int, loading: Loading) -> Generator[int]:
        yield from map(len, few.batches(BLOCK, block=block, loading=loading))

    works: dict[str, Callable[[], Generator[int]]] = {
        "dump": lambda: few.dump(BLOCK),
        "teacher": lambda: _run_teacher(teacher, resident, views),
        "loader": lambda: load(BLOCK, Loading(size, workers)),
        f"block_{BLOCK}": lambda: load(BLOCK, Loading(size)),
        "block_1": lambda: load(1, Loading(size)),
    }

    def rate(side: str, _: int) -> float:
        threads = timing.one_thread() if side.startswith("block") else nullcontext()
        with threads, closing(works[side]()) as counts:  # whatever ends it
            return timing.SteadyRate.of(counts, views).rate

    rates = timing.take_turns(works, rate, rounds, "dumping")
    per_second = {side: timing.spread(found) for side, found in rates.items()}
    loader, bare = (per_second[side]["median"] for side in ("loader", "teacher"))
    return {
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
        "variants": variants(few, resident, rounds, compile=compile) if with_variants else {},
    }


def _run_teacher(teacher: Teacher, resident: Sequence[Tensor], views: int) -> Generator[int]:
    for number in range(-(-views // len(resident[0]))):
        logits = teacher.unchecked(resident[number % len(resident)])
        timing.wait_for(teacher.device)
        yield len(logits.global_)


def variants(
    few: SampledDump, resident: Sequence[Tensor], rounds: int, *, compile: bool
) -> dict[str, Any]:
    """Run the bare teacher with other settings, in turn.

    Returns:
        By setting: ``views_per_second``, ``ratio`` to plain float32, and the shares of hard
        labels, over all locations and five values of r, and of global labels that are not
        float32's.
    """
    settings = ["float32", "channels_last", "bfloat16", "bfloat16 channels_last"]
    if resident[0].device.type == "cuda":
        settings += ["float16", "float16 channels_last"]
    if compile:
        settings += ["compile", "bfloat16 compile"]
    teachers = {setting: _with(few, setting) for setting in settings}
    logits: dict[str, list[Logits]] = {}

    def respond(setting: str, _: int) -> None:
        logits[setting] = [teachers[setting].unchecked(views) for views in resident]
        timing.wait_for(teachers[setting].device)

    seconds = timing.time_turns(settings, respond, rounds, "running the teacher")
    views = sum(map(len, resident))
    report = {}
    for setting, times in seconds.items():
        spatial, global_ = _changed(logits["float32"], logits[setting])
        report[setting] = {
            "views_per_second": timing.rates(times, views),
            "ratio": timing.ratio(times, seconds["float32"]),
            "hard_labels_changed": spatial,
            "global_labels_changed": global_,
        }
    return report


def _with(few: SampledDump, setting: str) -> Teacher:
    """Load the same teacher in plain float32, but for the words of ``setting``."""
    recipe, words = few.recipe, setting.split()
    precision: Any = next((word for word in words if "float" in word), "float32")
    loop: dict[str, Any] = {name: name in words for name in ("channels_last", "compile")}
    changed = replace(
        recipe,
        teacher=replace(recipe.teacher, precision=precision),
        dump=replace(recipe.dump, **loop),
    )
    return open_teacher(changed, few.dataset.num_classes, few.teacher.device)


def _changed(expected: Sequence[Logits], found: Sequence[Logits]) -> tuple[float, float]:
    """Return the shares of hard labels, and of global labels, that differ."""
    both = list(zip(expected, found, strict=True))
    spatial = count_differences(
        (hard_labels(*one, r), hard_labels(*other, r)) for one, other in both for r in RATIOS
    )
    global_ = count_differences(
        (hard_global_labels(one.global_), hard_global_labels(other.global_)) for one, other in both
    )
    return spatial["differ"] / spatial["compared"], global_["differ"] / global_["compared"]


def count_differences(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, int]:
    """Return how many values of equal tensors were ``compared``, and how many ``differ``."""
    compared = differ = 0
    for one, other in pairs:
        compared, differ = compared + one.numel(), differ + int((one != other).sum())
    return {"compared": compared, "differ": differ}


def resident_views(few: SampledDump) -> list[Tensor]:
    """Return some full batches of real views, normalised, on the teacher's device."""
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
    rates, ratios, goals = (report[key] for key in ("views_per_second", "ratio", "goal"))
    sides = {  # and the ratio that a side is compared by
        "dump": ("dump", "dump_to_teacher"),
        "teacher": ("bare teacher", None),
        "loader": (f"loader, {report['workers']} processes", None),
        f"block_{BLOCK}": (f"loader, one core, {BLOCK} views a block", "blocks"),
        "block_1": ("loader, one core, 1 view a block", None),
    }
    yield Table(
        f"{report['teacher']} on {report['device']}, {report['precision']}, {report['size']} px, "
        f"{report['images']} images in {BLOCK} views, {report['rounds']} rounds",
        timing.comparison_columns("views/s"),
        [
            timing.comparison_row(label, rates[side], ratios.get(ratio), goals.get(ratio))
            for side, (label, ratio) in sides.items()
        ],
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


def figures(report: Mapping[str, Any]) -> Iterator[timing.Figure]:
    """Yield the dump against the bare teacher, and which side is its limit."""
    about = f"{report['teacher']}, {report['precision']}, {report['workers']} loader processes"
    for what, ratio in (
        (f"{about}: dump / bare teacher", "dump_to_teacher"),
        (f"loader, one core: {BLOCK} views a block / 1 view", "blocks"),
    ):
        goal = report["goal"][ratio]
        yield timing.Figure.of_ratio(what, report["ratio"][ratio], at_least=goal)
    names = {"dump": "dump", "teacher": "bare teacher", "loader": "loader"}
    rates = {label: report["views_per_second"][name]["median"] for name, label in names.items()}
    each = ", ".join(f"{label} {rate:,.0f}" for label, rate in rates.items())
    yield timing.Figure(f"{about}: views a second", f"{each}; the limit is the {report['limit']}")
