"""``plan``: forecasts, from a small part done for real."""

from typing import Annotated

import typer

from cskd_pipeline.cli.options import Outcome, require_encodings
from cskd_pipeline.cli.parameters import RecipeLoader
from cskd_pipeline.cli.reports import print_report
from cskd_pipeline.cli.root import plan_app
from cskd_pipeline.config.sections import DumpRecipe, TrainRecipe
from cskd_pipeline.runtime.console import Terminal


@plan_app.command(
    name="dump",
    flags="--shards --teacher --weights --encoding --split --batch-size --workers --device",
    epilog="Example: cskd-pipeline plan dump --recipe paper_regnety_160 --shards train.json "
    "--views 30 --views 300 --devices 8",
)
def plan_dump(
    terminal: Terminal,
    load: RecipeLoader[DumpRecipe],
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
) -> Outcome:
    """Forecast bytes and time of a dump, for every encoding, from a few hundred images."""
    recipe = load({"cache.views": max(views)} if views else {})
    load.require(recipe, "--shards --teacher")
    require_encodings(recipe.cache.encodings)
    from cskd_pipeline.tools.estimate import estimate_dump

    report = estimate_dump.plan_dump(
        recipe, views=views or (), devices=devices or (), images=images
    )
    return print_report(terminal, report, estimate_dump.printed(report))


@plan_app.command(
    name="train",
    flags="--shards --cache --student --method --epochs --split --batch-size --workers --device",
    epilog="Example: cskd-pipeline plan train --recipe paper_tiny_cskd --shards train.json "
    "--cache cache",
)
def plan_train(
    terminal: Terminal,
    load: RecipeLoader[TrainRecipe],
    updates: Annotated[
        int, typer.Option(min=2, metavar="N", help="How many updates to try it on, each way.")
    ] = 20,
) -> Outcome:
    """Forecast the time of a training run, and whether the loader or the device is its limit."""
    recipe = load()
    load.require(recipe, "--shards")
    from cskd_pipeline.tools.estimate import estimate_train

    report = estimate_train.plan_train(recipe, updates=updates)
    return print_report(terminal, report, estimate_train.printed(report))
