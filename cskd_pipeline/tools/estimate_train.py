"""``plan train``: forecast the time of a training run and its bottleneck, loader or device.

A few real updates are run with the recipe's data, student and loss: the loader alone, the device
alone on a preloaded batch, then both together as in training. Nothing is written.
"""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.pipeline.trainer import Trainer
from cskd_pipeline.pipeline.training_data import open_training_data
from cskd_pipeline.runtime.device import pick_device, use_threads
from cskd_pipeline.runtime.progress import duration, progress
from cskd_pipeline.tools.bench.timing import SteadyRate
from cskd_pipeline.tools.tables import Printed, Table

UPDATES = 20


def plan_train(recipe: TrainRecipe, *, updates: int = UPDATES) -> dict[str, Any]:
    """Forecast the run of ``recipe``, without evaluation and checkpoints.

    Args:
        updates: number of updates to time, for each of the three measurements.

    Returns:
        Images per second of loader, device, and both together; ``limit`` (``loader`` or
        ``device``); number of loader processes to feed the device; seconds per epoch and in total.
    """
    use_threads(recipe.run.threads)
    if recipe.data.drift == "skip":  # skipping reads every image first; rates do not change
        recipe = replace(recipe, data=replace(recipe.data, drift="warn"))
    views = open_training_data(recipe).views
    trainer = Trainer(recipe, views, pick_device(recipe.run.device))
    loader, batch_size = trainer.loader, recipe.batch.batch_size
    loading, seconds, together = _try_updates(trainer, min(updates, trainer.total_updates))
    device = batch_size / statistics.median(seconds[len(seconds) // 4 :])
    rates = {
        "loader": batch_size * loading.rate,
        "device": device,
        "together": batch_size * together.rate,
    }
    epoch = trainer.steps_per_epoch * batch_size / rates["together"]
    return {
        "student": recipe.student.name,
        "method": recipe.distill.method,
        "device": str(trainer.device),
        "samples": views.samples.total,
        "batch_size": batch_size,
        "workers": loader.workers,
        "images_per_second": rates,
        "limit": "loader" if rates["loader"] < device else "device",
        "workers_to_feed_the_device": math.ceil(
            device / (rates["loader"] / max(1, loader.workers))
        ),
        "updates_per_epoch": trainer.steps_per_epoch,
        "epochs": recipe.schedule.epochs,
        "seconds_per_epoch": epoch,
        "seconds": together.startup + epoch * recipe.schedule.epochs,
    }


def _try_updates(trainer: Trainer, updates: int) -> tuple[SteadyRate, list[float], SteadyRate]:
    """Time the loader alone, each update of the device alone, and both together."""
    loader = trainer.loader
    batches = updates * loader.accumulation
    with progress(3 * updates, "updates", "measuring") as meter:
        loading = SteadyRate(updates)
        kept: list[Batch] = []
        for number, batch in enumerate(loader.batches(batches), start=1):
            kept = [*kept, batch][: loader.accumulation]
            if number % loader.accumulation == 0:
                loading.advance(1)
                meter.advance()
        seconds = []
        for _ in range(updates):
            started = time.perf_counter()
            trainer.step(iter(kept)).tolist()  # waits for the device
            seconds.append(time.perf_counter() - started)
            meter.advance()
        trainer.update = 0
        together = SteadyRate(updates)
        loader.start_at(0)
        source = loader.batches(batches)
        for _ in range(updates):
            trainer.step(source).tolist()
            together.advance(1)
            meter.advance()
    return loading, seconds, together


def printed(report: Mapping[str, Any]) -> Printed:
    """Yield the forecast as a table, and the bottleneck."""
    rates = report["images_per_second"]
    images = [n * report["updates_per_epoch"] * report["batch_size"] for n in (1, report["epochs"])]
    labels = {
        "loader": f"loader alone, {report['workers']} processes",
        "device": "device alone",
        "together": "both: this run",
    }
    yield Table(
        f"{report['student']}, {report['method']}, on {report['device']}",
        ("", "images/s", "1 epoch", f"{report['epochs']} epochs"),
        [
            (label, f"{rates[name]:.4g}", *(duration(n / rates[name]) for n in images))
            for name, label in labels.items()
        ],
    )
    workers = report["workers_to_feed_the_device"]
    if report["device"] == "cpu":
        advice = "loader and student share the CPU cores"
    elif report["limit"] == "loader":
        advice = f"{workers} loader processes on as many cores would feed the device"
    else:
        advice = f"{workers} loader processes would feed it"
    yield f"the {report['limit']} is the bottleneck; {advice}"
