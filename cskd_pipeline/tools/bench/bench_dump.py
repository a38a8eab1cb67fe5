"""``bench dump``: how much of the teacher's speed a dump keeps, and whether it is loader-bound.

Taking turns: the real dump (loader processes, device, encoding, writing, one unit at a time, into
a temporary cache); the bare teacher on normalised views already on the device; the loader processes
alone; and, in this process on one core, the loader's work for units of ten views and for ten units
of one. Rates start once queues are full. :func:`variants` runs the teacher with other settings and
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
RATIOS = (1.0, 0.75, 0.5, 0.25, 0.0)  # values of r at which labels are compared
_RESIDENT = 4  # batches the bare teacher cycles through


def bench_dump(
    recipe: DumpRecipe,
    *,
    images: int,
    rounds: int,
    with_variants: bool,
    compile: bool = False,
) -> dict[str, Any]:
    """Dump ten views of ``images`` sampled images, and run the dump's parts alone, each round.

    Args:
        with_variants: also run the teacher with other settings.
        compile: include torch.compile in the variants.

    Returns:
        ``views_per_second`` of ``dump``, ``teacher``, ``loader`` (the recipe's processes), and on
        one core ``block_10`` and ``block_1``; ``ratio`` of dump to teacher and of block_10 to
        block_1, medians with spread; ``limit``: loader or teacher; ``variants``.
    """
    sampled = SampledDump.of(recipe, *open_stage_one(recipe), images)
    teacher, resident = sampled.teacher, resident_views(sampled)
    views, workers = sampled.dataset.samples * BLOCK, sampled.loading.workers
    size = recipe.dump.batch_size

    def load(block: int, loading: Loading) -> Generator[int]:
        yield from map(len, sampled.batches(BLOCK, block=block, loading=loading))

    sides: dict[str, Callable[[], Generator[int]]] = {
        "dump": lambda: sampled.dump(BLOCK),
        "teacher": lambda: _run_teacher(teacher, resident, views),
        "loader": lambda: load(BLOCK, Loading(size, workers)),
        f"block_{BLOCK}": lambda: load(BLOCK, Loading(size)),
        "block_1": lambda: load(1, Loading(size)),
    }

    def rate(side: str, _: int) -> float:
        threads = timing.one_thread() if side.startswith("block") else nullcontext()
        with threads, closing(sides[side]()) as counts:
            return timing.SteadyRate.of(counts, views).rate

    rates = timing.take_turns(sides, rate, rounds, "dumping")
    per_second = {side: timing.spread(values) for side, values in rates.items()}
    loader, bare = (per_second[side]["median"] for side in ("loader", "teacher"))
    return {
        "teacher": teacher.name,
        "device": device_name(teacher.device),
        "precision": teacher.precision,
        "size": recipe.views.size,
        "batch_size": size,
        "workers": workers,
        "images": sampled.dataset.samples,
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
        "variants": variants(sampled, resident, rounds, compile=compile) if with_variants else {},
    }


def _run_teacher(teacher: Teacher, resident: Sequence[Tensor], views: int) -> Generator[int]:
    for number in range(-(-views // len(resident[0]))):
        logits = teacher.unchecked(resident[number % len(resident)])
        timing.wait_for(teacher.device)
        yield len(logits.global_)


def variants(
    sampled: SampledDump, resident: Sequence[Tensor], rounds: int, *, compile: bool
) -> dict[str, Any]:
    """Run the bare teacher with other settings, taking turns.

    Returns:
        By setting: ``views_per_second``, ``ratio`` to plain float32, and the shares of hard labels
        (over all locations and five values of r) and of global labels that differ from float32's.
    """
    settings = ["float32", "channels_last", "bfloat16", "bfloat16 channels_last"]
    if resident[0].device.type == "cuda":
        settings += ["float16", "float16 channels_last"]
    if compile:
        settings += ["compile", "bfloat16 compile"]
    teachers = {setting: _with(sampled, setting) for setting in settings}
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


def _with(sampled: SampledDump, setting: str) -> Teacher:
    """Load the same teacher in plain float32 except for the words in ``setting``."""
    recipe, words = sampled.recipe, setting.split()
    precision: Any = next((word for word in words if "float" in word), "float32")
    flags: dict[str, Any] = {name: name in words for name in ("channels_last", "compile")}
    changed = replace(
        recipe,
        teacher=replace(recipe.teacher, precision=precision),
        dump=replace(recipe.dump, **flags),
    )
    return open_teacher(changed, sampled.dataset.num_classes, sampled.teacher.device)


def _changed(expected: Sequence[Logits], found: Sequence[Logits]) -> tuple[float, float]:
    """Return the shares of hard labels and of global labels that differ."""
    both = list(zip(expected, found, strict=True))
    spatial = count_differences(
        (hard_labels(*one, r), hard_labels(*other, r)) for one, other in both for r in RATIOS
    )
    global_ = count_differences(
        (hard_global_labels(one.global_), hard_global_labels(other.global_)) for one, other in both
    )
    return spatial["differ"] / spatial["compared"], global_["differ"] / global_["compared"]


def count_differences(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, int]:
    """Return how many values were ``compared`` over pairs of tensors, and how many ``differ``."""
    compared = differ = 0
    for one, other in pairs:
        compared, differ = compared + one.numel(), differ + int((one != other).sum())
    return {"compared": compared, "differ": differ}


def resident_views(sampled: SampledDump) -> list[Tensor]:
    """Return up to four full batches of real views, normalised, on the teacher's device."""
    teacher, size = sampled.teacher, sampled.recipe.dump.batch_size
    batches = sampled.batches(BLOCK, loading=Loading(size))
    pieces = (TeacherViews.of(batch, sampled.recipe.views, teacher.device) for batch in batches)
    full = [
        normalise(views.images, teacher.mean, teacher.std)
        for views in islice(full_batches(pieces, size), _RESIDENT)
        if len(views) == size
    ]
    if not full:
        raise DataError(
            "too few images for a full batch",
            where=sampled.dataset.name,
            found=f"{sampled.dataset.samples} images in {BLOCK} views",
            expected=f"batches of {size}",
            action="lower --batch-size, or raise --images",
        )
    return full


def printed(report: Mapping[str, Any]) -> Printed:
    """Yield the rates, the limiting side, and the labels that variants change."""
    rates, ratios, goals = (report[key] for key in ("views_per_second", "ratio", "goal"))
    sides = {  # label, and the ratio shown in the side's row
        "dump": ("dump", "dump_to_teacher"),
        "teacher": ("bare teacher", None),
        "loader": (f"loader, {report['workers']} processes", None),
        f"block_{BLOCK}": (f"loader, one core, blocks of {BLOCK} views", "blocks"),
        "block_1": ("loader, one core, blocks of 1 view", None),
    }
    yield Table(
        f"{report['teacher']} on {report['device']}, {report['precision']}, {report['size']} px, "
        f"{report['images']} images x {BLOCK} views, {report['rounds']} rounds",
        timing.comparison_columns("views/s"),
        [
            timing.comparison_row(label, rates[side], ratios.get(ratio), goals.get(ratio))
            for side, (label, ratio) in sides.items()
        ],
    )
    loader, bare = rates["loader"]["median"], rates["teacher"]["median"]
    yield (
        f"the {report['limit']} is the bottleneck: the loader delivers {loader:.4g} views/s with "
        f"{report['workers']} processes, the bare teacher processes {bare:.4g} views/s"
        + ("; on a CPU they share the cores" if report["device"] == "cpu" else "")
    )
    if report["variants"]:
        yield Table(
            "bare teacher with other settings, and labels that differ from float32's",
            ("", "views/s", "ratio", "hard labels, %", "global labels, %"),
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
    """Yield the dump against the bare teacher, and the bottleneck."""
    about = f"{report['teacher']}, {report['precision']}, {report['workers']} loader processes"
    for name, ratio in (
        (f"{about}: views/s of the dump / of the bare teacher", "dump_to_teacher"),
        (f"loader, one core: views/s in blocks of {BLOCK} views / of 1 view", "blocks"),
    ):
        goal = report["goal"][ratio]
        yield timing.Figure.of_ratio(name, report["ratio"][ratio], at_least=goal)
    names = {"dump": "dump", "teacher": "bare teacher", "loader": "loader"}
    rates = {label: report["views_per_second"][name]["median"] for name, label in names.items()}
    each = ", ".join(f"{label} {rate:,.0f}" for label, rate in rates.items())
    yield timing.Figure(f"{about}: views/s", f"{each}; the {report['limit']} is the bottleneck")
