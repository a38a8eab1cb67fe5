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
    """Return what runs a command in this process, as quiet as this one, and returns its summary."""
    inherited = {"--quiet": terminal.quiet, "--json": terminal.json}

    def command(arguments: list[str]) -> dict[str, Any]:
        """Run a command and return its summary."""
        with restore_reporting():
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
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Of images, views, weights and order.")
    ] = 0,
) -> Outcome:
    """Run the whole pipeline on small images: shards, teacher, cache, students, a table, a page."""
    from cskd_pipeline.tools import demo as pipeline_demo

    report = pipeline_demo.run_demo(out, _run_inside(terminal), seed)
    return print_report(terminal, report, pipeline_demo.printed(report))


@dataclass(frozen=True)
class StudyFlags:
    """Say how a study is run."""

    recipes: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Recipes of your own: teacher.toml, dump.toml, none.toml, deit.toml, cskd.toml.",
        ),
    ] = None
    seeds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Runs of every arm; the seeds are 1 to N.")
    ] = 3
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Students at a time. Default: 4 on a GPU, else what the cores allow.",
        ),
    ] = None
    device: Device = None


@app.command(epilog="Example: cskd-pipeline study --out study-out")
def study(
    terminal: Terminal,
    flags: StudyFlags,
    shards: Annotated[
        str | None,
        flag("--shards", help="CIFAR-10's, for an hour of a GPU; without, pages of digits."),
    ] = None,
    val_shards: Annotated[
        str | None, flag("--val-shards", TrainRecipe, help="Shards to evaluate on.")
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="A new folder, or the study's own to resume.")
    ] = Path("study-out"),
) -> Outcome:
    """Ask whether CKF helps, and when: students with every method, and forks late in a run.

    A teacher, its cache, whole runs over several seeds, and forks of the one at r = 1 once it has
    learned what local labels can teach. Run the same command again after an interruption.
    """
    require_companion(
        "--shards SHARDS", shards, {"--recipes": flags.recipes, "--val-shards": val_shards}
    )
    require_companion("--val-shards SHARDS", val_shards, {"--shards": shards})
    from cskd_pipeline.tools.study.report import printed
    from cskd_pipeline.tools.study.run_study import StudyConfig, run_study

    config = StudyConfig(out, shards, val_shards, **vars(flags))
    report = run_study(config, _run_inside(terminal))
    return print_report(terminal, report, printed(report))


@bench_app.command(
    "all",
    epilog="Example: cskd-pipeline bench all --seconds 540 --shards 'train-*.tar' --out bench-out",
)
def bench_everything(
    terminal: Terminal,
    shards: RequiredShards,
    cifar10: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="CIFAR-10's shards, *train-*.tar and *validation-*.tar, for the study; without "
            "them none is done.",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=1, metavar="N", help="Stop after so long; the same command goes on."),
    ] = None,
    device: Device = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="A new folder, or the one to resume.")
    ] = Path("bench-out"),
) -> Outcome:
    """Measure all that a GPU must show, in order of worth, as a Markdown table of this machine.

    A view's logits and cached labels must be those of a live teacher; then bench step, dump and
    loader, and the study's forks with what is left. On a CPU all of it is small.
    """
    from cskd_pipeline.tools.bench import bench_all as bench

    report = bench.bench_all(bench.AllConfig(shards, out, cifar10, seconds, device))
    outcome = print_report(terminal, report, bench.printed(report))
    bench.require_ok(report)
    return outcome
