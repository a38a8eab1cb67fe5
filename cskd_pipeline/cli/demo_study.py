"""Commands that run other commands: the demo of it all, and the study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cskd_pipeline.cli.options import Device, Outcome, RequiredShards, flag
from cskd_pipeline.cli.reports import print_report
from cskd_pipeline.cli.root import app, parse_and_run
from cskd_pipeline.config import TrainRecipe
from cskd_pipeline.runtime.console import Terminal, kept

if TYPE_CHECKING:
    from cskd_pipeline.tools.commands import Command


def _run_inside(terminal: Terminal) -> Command:
    """Return what runs a command in this process, as quiet as this one, and returns its summary."""
    inherited = {"--quiet": terminal.quiet, "--json": terminal.json}

    def command(arguments: list[str]) -> dict[str, Any]:
        """Run a command and return its summary."""
        with kept():
            outcome = parse_and_run([*arguments, *(name for name in inherited if inherited[name])])
        if not isinstance(outcome, dict):  # typer's way with KeyboardInterrupt is an exit code
            raise KeyboardInterrupt
        return outcome

    return command


@app.command(epilog="Example: cskd-pipeline demo --out demo-out")
def demo(
    terminal: Terminal,
    out: Annotated[Path, typer.Option(metavar="DIR", help="An empty or new folder.")] = Path(
        "demo-out"
    ),
) -> Outcome:
    """Run the whole pipeline on small real images: shards, teacher, cache, students, a table."""
    from cskd_pipeline.tools import demo as pipeline_demo

    report = pipeline_demo.run_demo(out, _run_inside(terminal))
    return print_report(terminal, report, pipeline_demo.printed(report))


@dataclass(frozen=True)
class StudyFlags:
    """Say how a study is run."""

    size: Annotated[
        Literal["cpu", "gpu"] | None,
        typer.Option(
            help="Which of stages/study's recipes: cifar10_cpu_* for two cores and half an hour, "
            "cifar10_* for an hour of a GPU. Default: what there is."
        ),
    ] = None
    recipes: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Recipes of your own instead: teacher.toml, dump.toml, none.toml, deit.toml and "
            "cskd.toml.",
        ),
    ] = None
    seeds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Runs of every method; the seeds are 1 to N.")
    ] = 3
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Students at a time. Default: 1 on a GPU, else what the cores allow.",
        ),
    ] = None
    device: Device = None


@app.command(
    epilog="Example: cskd-pipeline study --shards 'cifar10/train-*.tar' "
    "--val-shards 'cifar10/validation-*.tar' --out study-out"
)
def study(
    terminal: Terminal,
    shards: RequiredShards,
    val_shards: Annotated[str, flag("--val-shards", TrainRecipe, help="Shards to evaluate on.")],
    flags: StudyFlags,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="A new folder, or the study's own to go on with.")
    ] = Path("study-out"),
) -> Outcome:
    """Train a teacher, and students with every method and CKF schedule over several seeds.

    Ends with a table of means and deviations, a plot, and whether the paper's ordering held. Run
    the same command again after an interruption: finished runs are kept.
    """
    from cskd_pipeline.tools.study.report import printed
    from cskd_pipeline.tools.study.run_study import StudyConfig, run_study

    report = run_study(StudyConfig(shards, val_shards, out, **vars(flags)), _run_inside(terminal))
    return print_report(terminal, report, printed(report))
