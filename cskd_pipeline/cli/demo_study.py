"""Commands that run other commands: the demo, the study, and all measurements in one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cskd_pipeline.cli.options import Device, Outcome, RequiredShards, flag, require_companion
from cskd_pipeline.cli.reports import print_report
from cskd_pipeline.cli.root import app, bench_app, parse_and_run
from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.runtime.console import Terminal
from cskd_pipeline.runtime.progress import restore_reporting

if TYPE_CHECKING:
    from cskd_pipeline.tools.commands import Command


def _run_inside(terminal: Terminal) -> Command:
    """Return a function that runs a command in this process, with --quiet and --json inherited."""
    inherited = {"--quiet": terminal.quiet, "--json": terminal.json}

    def command(arguments: list[str]) -> dict[str, Any]:
        """Run a command and return its summary."""
        with restore_reporting():
            outcome = parse_and_run([*arguments, *(name for name in inherited if inherited[name])])
        if not isinstance(outcome, dict):  # typer turns KeyboardInterrupt into an exit code
            raise KeyboardInterrupt
        return outcome

    return command


@app.command(example="demo --out demo-out")
def demo(
    terminal: Terminal,
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new or empty folder.")] = Path(
        "demo-out"
    ),
    seed: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Random seed of images, views, weights, order."),
    ] = 0,
) -> Outcome:
    """Run the whole pipeline on small images, from shards to a page that compares the students."""
    from cskd_pipeline.tools import demo as pipeline_demo

    report = pipeline_demo.run_demo(out, _run_inside(terminal), seed)
    return print_report(terminal, report, pipeline_demo.printed(report))


@dataclass(frozen=True)
class StudyFlags:
    """Flags for how a study runs."""

    recipes: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with your teacher.toml, dump.toml, none.toml, deit.toml and cskd.toml.",
        ),
    ] = None
    seeds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Runs per arm, with seeds 1 to N.")
    ] = 3
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Students to train at a time; default: 4 on a GPU, else by CPU cores.",
        ),
    ] = None
    device: Device = None


@app.command(example="study --out study-out")
def study(
    terminal: Terminal,
    flags: StudyFlags,
    shards: Annotated[
        str | None,
        flag(
            "--shards",
            help="CIFAR-10 shards (an hour on a GPU); default: pages of digits.",
        ),
    ] = None,
    val_shards: Annotated[
        str | None,
        flag("--val-shards", TrainRecipe, help="Evaluation shards, required with --shards."),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="A new folder, or a study's to resume.")
    ] = Path("study-out"),
) -> Outcome:
    """Test whether and when CKF helps: students of every method, and forks late in a run.

    Trains a teacher, dumps its cache, trains students over several seeds, and forks the run at
    r = 1 once it has learned what local labels can teach. After an interruption, run the same
    command again.
    """
    require_companion("--shards SHARDS", shards, recipes=flags.recipes, val_shards=val_shards)
    require_companion("--val-shards SHARDS", val_shards, shards=shards)
    from cskd_pipeline.tools.study.report import printed
    from cskd_pipeline.tools.study.run_study import StudyConfig, run_study

    config = StudyConfig(out, shards, val_shards, **vars(flags))
    report = run_study(config, _run_inside(terminal))
    return print_report(terminal, report, printed(report))


@bench_app.command(
    "all",
    example="bench all --seconds 540 --shards 'train-*.tar' --out bench-out",
)
def bench_everything(
    terminal: Terminal,
    shards: RequiredShards,
    cifar10: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder with CIFAR-10's *train-*.tar and *validation-*.tar shards; default: no "
            "study.",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=1, metavar="N", help="Stop after N seconds; run the command again to continue."
        ),
    ] = None,
    device: Device = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="A new folder, or one to resume.")
    ] = Path("bench-out"),
) -> Outcome:
    """Run every check and benchmark for a GPU, most important first, into a Markdown table.

    First, a view's logits and cached labels must equal a live teacher's. Then follow bench step,
    dump and loader, and in the remaining time the study's forks. On a CPU all of it is small.
    """
    from cskd_pipeline.tools.bench import bench_all as bench

    report = bench.bench_all(bench.AllConfig(shards, out, cifar10, seconds, device))
    outcome = print_report(terminal, report, bench.printed(report))
    bench.require_ok(report)
    return outcome
