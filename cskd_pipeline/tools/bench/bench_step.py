"""``bench step``: the cost of a training step from a cache, against a plain one and a live teacher.

All sides run the real training step (:meth:`cskd_pipeline.pipeline.trainer.Trainer.step`) on
batches already on the device, taking turns: ``none`` learns from labels alone; ``cskd`` and
``deit`` take their targets from the envelope encoding; ``live`` is ``cskd`` with the teacher run in
every step, as in the authors' code. Pixels, labels, cached logits and weights are random, with real
shapes and as many lines per envelope as real ones; no speed depends on their values.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.data.batches import Batch, Pairing, RenderedViews, compose
from cskd_pipeline.data.full_batches import logits_of
from cskd_pipeline.data.images import ImageSource
from cskd_pipeline.data.plan import SampleSet
from cskd_pipeline.data.training_views import TrainingViews
from cskd_pipeline.distill.encodings import ENCODINGS
from cskd_pipeline.distill.targets import LogitTargets, Targets
from cskd_pipeline.models.teacher import Teacher, TeacherSource, load_teacher
from cskd_pipeline.pipeline.trainer import Trainer
from cskd_pipeline.runtime.device import device_name, pick_device, use_threads
from cskd_pipeline.tools.bench import timing
from cskd_pipeline.tools.tables import Printed, Table
from cskd_pipeline.views.bits import derive_seed
from cskd_pipeline.views.draw import draw
from cskd_pipeline.views.mixing import draw_mix
from cskd_pipeline.views.policy import ViewPolicy

METHODS = ("none", "deit", "cskd")
LIVE = "live"
GOAL = 1.03
"""Upper bound on step time, cskd from a cache / none."""
LIVE_GOALS = {
    "deit_tiny_distilled_patch16_224": 4.5,
    "deit_small_distilled_patch16_224": 2.0,
    "deit_base_distilled_patch16_224": 1.25,
}
"""Lower bound on step time, live RegNetY-160 teacher / cskd from a cache, on a GPU."""
PRECISION = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""The student's autocast -> the teacher's precision."""
CLASSES = 1000
STRIDE = 32  # most CNNs have 7 x 7 locations at 224 px
_STEPS = 10_000  # per epoch, so that the learning rate stays at its initial value
_IMAGE = (500, 375)


def bench_step(
    recipe: TrainRecipe,
    *,
    students: Sequence[str],
    teacher: str | None,
    rounds: int,
) -> dict[str, Any]:
    """Train each of ``students`` for some steps on every side.

    Args:
        recipe: batch size, view size (``views``), optimizer, autocast and device.
        teacher: timm name of the live teacher, a CNN; None: no such side.

    Returns:
        By student: images per second of every side; ``ratio``: step time of ``deit`` and ``cskd``
        relative to ``none``, of ``live`` relative to ``cskd``, medians with spread; on CUDA
        ``peak_memory`` of each side in bytes.
    """
    use_threads(recipe.run.threads)
    device = pick_device(recipe.run.device)
    policy = recipe.views or ViewPolicy()
    micro_batch = recipe.batch.batch_size // recipe.batch.accumulation
    live = None
    if teacher is not None:
        live = load_teacher(
            TeacherSource(
                teacher,
                "random",
                CLASSES,
                mean=policy.mean,  # arbitrary: the images are noise
                std=policy.std,
                precision=PRECISION[recipe.run.amp],
            ),
            size=policy.size,
            batch_size=micro_batch,
            channels_last=True,
            compile=recipe.run.compile,
            device=device,
        )
    side = max(1, policy.size // STRIDE)
    grid = (side, side) if live is None else live.grid
    batch = synthetic_batch(policy, micro_batch, grid).to(device)
    measured = {}
    for name in students:
        changed = replace(recipe, student=replace(recipe.student, name=name))
        trainers = _trainers(changed, policy, grid, live, device)
        measured[name] = _measure(trainers, batch, rounds)
    has_goals = device.type == "cuda" and (teacher or "").startswith("regnety_160")
    return {
        "device": device_name(device),
        "size": policy.size,
        "batch_size": recipe.batch.batch_size,
        "amp": recipe.run.amp,
        "compile": recipe.run.compile,
        "rounds": rounds,
        "teacher": teacher,
        "lines_per_location": _lines_per_location(batch),
        "students": measured,
        "goal": {
            "cskd": GOAL,
            "live": {n: goal for n, goal in LIVE_GOALS.items() if has_goals and n in measured},
        },
    }


def _measure(trainers: Mapping[str, Trainer], batch: Batch, rounds: int) -> dict[str, Any]:
    peaks: dict[str, int] = {}

    def step(name: str, _: int) -> None:
        trainer = trainers[name]
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)
        parts = trainer.step(iter([batch] * trainer.loader.accumulation))
        parts.tolist()  # waits for the device
        if trainer.device.type == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated(trainer.device)

    plain = trainers["none"]
    seconds = timing.time_turns(trainers, step, rounds, f"training {plain.student.name}")
    images = plain.loader.batch_size
    ratios = {name: timing.ratio(seconds["none"], seconds[name]) for name in ("deit", "cskd")}
    if LIVE in seconds:
        ratios[LIVE] = timing.ratio(seconds["cskd"], seconds[LIVE])
    return {
        "images_per_second": {name: timing.rates(times, images) for name, times in seconds.items()},
        "ratio": ratios,
        "peak_memory": peaks or None,
    }


def _trainers(
    recipe: TrainRecipe,
    policy: ViewPolicy,
    grid: tuple[int, int],
    teacher: Teacher | None,
    device: torch.device,
) -> dict[str, Trainer]:
    """Return a trainer for each side; they differ in the method and the source of targets."""
    views = synthetic_views(policy, grid, recipe.batch.batch_size * _STEPS)

    def cached(batch: Batch) -> Targets:
        return ENCODINGS["envelope"].targets(batch.targets)

    def live(batch: Batch) -> Targets:
        assert teacher is not None
        return LogitTargets(*logits_of(teacher, batch, policy))

    trainers = {}
    for method in METHODS:
        hard: Any = {"method": method, "global_kind": "hard", "spatial_kind": "hard"}
        changed = replace(recipe, distill=replace(recipe.distill, **hard))
        targets = None if method == "none" else cached
        trainers[method] = Trainer(changed, views, device, targets=targets)
    if teacher is not None:
        trainers[LIVE] = Trainer(changed, views, device, targets=live)
    return trainers


def synthetic_views(policy: ViewPolicy, grid: tuple[int, int], samples: int) -> TrainingViews:
    """Return views without images, for trainers whose batches are synthetic."""
    return TrainingViews(
        SampleSet((samples,), ("",)), ImageSource(()), policy, 0, CLASSES, grid=grid
    )


def synthetic_batch(policy: ViewPolicy, count: int, grid: tuple[int, int]) -> Batch:
    """Return ``count`` views of noise, erased and mixed as ``policy`` draws it, with targets.

    Logits are normal: a part shared by all locations, plus half as much per location.
    """
    numbers = np.random.default_rng(0)
    mixes = [draw_mix(derive_seed("bench", i), i, policy) for i in range(count)]
    params = [draw(derive_seed("bench", i), policy, *_IMAGE) for i in range(count)]
    side = policy.size
    pixels = numbers.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    labels = numbers.integers(0, CLASSES, (2, count))
    rows = np.stack([np.zeros(count, np.int64), np.zeros(count, np.int64), np.arange(count)], 1)
    unknown = np.zeros(count, np.uint32)
    views = RenderedViews(rows, pixels, params, unknown.astype(np.uint64), unknown, unknown, 0)
    batch = compose(labels, Pairing(rows, rows[::-1], mixes), views)
    return replace(batch, targets=_envelopes(count, grid))


def _envelopes(count: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(0)
    shared = torch.randn(count, CLASSES, 1, 1, generator=draws)
    spatial = shared + 0.5 * torch.randn(count, CLASSES, *grid, generator=draws)
    seeds = np.zeros(len(spatial), np.uint64)
    return ENCODINGS["envelope"].encode(spatial.half(), spatial.mean((2, 3)).half(), seeds)


def _lines_per_location(batch: Batch) -> float:
    classes = batch.targets["envelope/lines"][:, :, 0]
    return float((classes.to(torch.int32) != 65535).sum(1).float().mean())


def printed(report: Mapping[str, Any]) -> Printed:
    """Yield a table for each student."""
    for student, found in report["students"].items():
        goals = {"cskd": report["goal"]["cskd"], LIVE: report["goal"]["live"].get(student)}
        rows = []
        for name, rate in found["images_per_second"].items():
            peak = found["peak_memory"] and found["peak_memory"][name] / 2**30
            row = timing.comparison_row(name, rate, found["ratio"].get(name), goals.get(name))
            rows.append((*row, peak))
        yield Table(
            f"{student}: batches of {report['batch_size']} at {report['size']} px, "
            f"{report['device']}, amp {report['amp']}; step time relative to none (live: to cskd)",
            (*timing.comparison_columns("images/s", "step time"), "peak GiB"),
            rows,
        )


def figures(report: Mapping[str, Any]) -> Iterator[timing.Figure]:
    """Yield each student's step from a cache against a plain one and against a live teacher's."""
    for student, found in report["students"].items():
        about = f"{student}, {report['amp']}, batches of {report['batch_size']}"
        rates, ratios, goals = found["images_per_second"], found["ratio"], report["goal"]
        name = f"{about}: step time, cskd from a cache / none"
        yield timing.Figure.of_ratio(name, ratios["cskd"], at_most=goals["cskd"])
        if LIVE in ratios:
            name = f"{about}: step time, live {report['teacher']} / cskd from a cache"
            yield timing.Figure.of_ratio(name, ratios[LIVE], at_least=goals[LIVE].get(student))
        each = ", ".join(f"{side} {rate['median']:,.0f}" for side, rate in rates.items())
        yield timing.Figure(f"{about}: images/s", each)
