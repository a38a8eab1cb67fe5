"""``plan``: forecasts, from a small part done for real."""

from __future__ import annotations

from typing import Annotated

import typer

from cskd_pipeline.cli.options import (
    ENCODING_NAMES,
    BatchSize,
    CacheOption,
    Device,
    Epochs,
    Json,
    Method,
    Outcome,
    Quiet,
    RecipeFile,
    Sets,
    ShardsOption,
    Split,
    StudentName,
    TeacherName,
    UpdateSize,
    Weights,
    Workers,
    complete_encoding,
    require,
    require_encodings,
)
from cskd_pipeline.cli.root import plan_app
from cskd_pipeline.config import DumpRecipe, TrainRecipe, load_recipe
from cskd_pipeline.runtime.console import Terminal


@plan_app.command(
    name="dump",
    epilog="Example: cskd-pipeline plan dump --recipe paper_regnety_160 --shards train.json "
    "--views 30 --views 300 --devices 8",
)
def plan_dump(
    shards: ShardsOption = None,
    teacher: TeacherName = None,
    weights: Weights = None,
    encoding: Annotated[
        list[str] | None,
        typer.Option(
            metavar=ENCODING_NAMES,
            autocompletion=complete_encoding,
            help="What the tried dump stores.",
        ),
    ] = None,
    views: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Views to forecast; more than once for several."),
    ] = None,
    devices: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Forecast N such devices too; more than once."),
    ] = None,
    images: Annotated[
        int, typer.Option(min=1, metavar="N", help="About how many images to try it on.")
    ] = 256,
    split: Split = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    device: Device = None,
    recipe: RecipeFile = None,
    set_: Sets = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Bytes and time of a dump, for every encoding, from a few hundred images done for real."""
    terminal = Terminal.listening(quiet=quiet, json=json)
    flags = {
        "data.shards": shards,
        "data.split": split,
        "teacher.name": teacher,
        "teacher.weights": weights,
        "cache.encodings": tuple(encoding) if encoding else None,
        "cache.views": max(views) if views else None,
        "dump.batch_size": batch_size,
        "dump.workers": workers,
        "dump.device": device,
    }
    asked = load_recipe(DumpRecipe, recipe, set_ or (), flags)
    require({"--shards SHARDS": asked.data.shards, "--teacher NAME": asked.teacher.name})
    require_encodings(asked.cache.encodings)
    from cskd_pipeline.tools.estimate import estimate_dump

    report = estimate_dump.plan_dump(asked, views=views or (), devices=devices or (), images=images)
    estimate_dump.show(report, terminal)
    return report if json else None


@plan_app.command(
    name="train",
    epilog="Example: cskd-pipeline plan train --recipe paper_tiny_cskd --shards train.json "
    "--cache cache",
)
def plan_train(
    shards: ShardsOption = None,
    cache: CacheOption = None,
    student: StudentName = None,
    method: Method = None,
    epochs: Epochs = None,
    updates: Annotated[
        int, typer.Option(min=2, metavar="N", help="How many updates to try it on, each way.")
    ] = 20,
    split: Split = None,
    batch_size: UpdateSize = None,
    workers: Workers = None,
    device: Device = None,
    recipe: RecipeFile = None,
    set_: Sets = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Time of a training run, and whether the loader or the device is its limit."""
    terminal = Terminal.listening(quiet=quiet, json=json)
    flags = {
        "data.shards": shards,
        "data.cache": cache,
        "data.split": split,
        "student.name": student,
        "distill.method": method,
        "schedule.epochs": epochs,
        "batch.batch_size": batch_size,
        "run.workers": workers,
        "run.device": device,
    }
    asked = load_recipe(TrainRecipe, recipe, set_ or (), flags)
    require({"--shards SHARDS": asked.data.shards})
    from cskd_pipeline.tools.estimate import estimate_train

    report = estimate_train.plan_train(asked, updates=updates)
    estimate_train.show(report, terminal)
    return report if json else None
