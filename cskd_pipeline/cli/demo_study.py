"""Commands that run other commands: the demo of it all, and the study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cskd_pipeline.cli.options import SHARDS_HELP, Device, Json, Outcome, Quiet
from cskd_pipeline.cli.root import app, parse_and_run
from cskd_pipeline.runtime.console import Terminal, kept

if TYPE_CHECKING:
    from cskd_pipeline.tools.commands import Command


def _run_inside(quiet: bool, json: bool) -> Command:
    """Runs a command in this process, in the same tone, and gives what it found."""
    inherited = [flag for flag, given in (("--quiet", quiet), ("--json", json)) if given]

    def command(arguments: list[str]) -> dict[str, Any]:
        with kept():
            outcome = parse_and_run([*arguments, *inherited])
        if not isinstance(outcome, dict):  # typer's way with KeyboardInterrupt is an exit code
            raise KeyboardInterrupt
        return outcome

    return command


@app.command(epilog="Example: cskd-pipeline demo --out demo-out")
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="An empty or new folder.")] = Path(
        "demo-out"
    ),
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Run the whole pipeline on small real images: shards, teacher, cache, students, a table."""
    terminal = Terminal.listening(quiet=quiet, json=json)
    from cskd_pipeline.tools.demo import run_demo

    found = run_demo(out, terminal, _run_inside(quiet, json))
    return found if json else None  # without --json the demo has drawn its own table


@app.command(
    epilog="Example: cskd-pipeline study --shards 'cifar10/train-*.tar' "
    "--val-shards 'cifar10/validation-*.tar' --out study-out"
)
def study(
    shards: Annotated[str, typer.Option("--shards", metavar="SHARDS", help=SHARDS_HELP)],
    val_shards: Annotated[
        str, typer.Option("--val-shards", metavar="SHARDS", help="Shards to evaluate on.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="A new folder, or the study's own to go on with.")
    ] = Path("study-out"),
    size: Annotated[
        Literal["cpu", "gpu"] | None,
        typer.Option(
            help="Which of stages/study's recipes: cifar10_cpu_* for two cores and half an hour, "
            "cifar10_* for an hour of a GPU. Default: what there is."
        ),
    ] = None,
    recipes: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Recipes of your own instead: teacher.toml, dump.toml, none.toml, deit.toml and "
            "cskd.toml.",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Runs of every method; the seeds are 1 to N.")
    ] = 3,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Students at a time. Default: 1 on a GPU, else what the cores allow.",
        ),
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Teacher, cache, and one student with every method and CKF schedule, over several seeds.

    Ends with a table of means and deviations, a plot, and whether the paper's ordering held. Run
    the same command again after an interruption: finished runs are kept.
    """
    terminal = Terminal.listening(quiet=quiet, json=json)
    from cskd_pipeline.runtime.atomic import NO_LOCKS, sole_writer
    from cskd_pipeline.tools.study import run_study as studying
    from cskd_pipeline.tools.study.report import show

    with sole_writer(out) as held:
        if not held:
            terminal.warn(NO_LOCKS.format(out))
        report = studying.run_study(
            shards,
            val_shards,
            out,
            _run_inside(quiet, json),
            size=size,
            recipes=recipes,
            seeds=seeds,
            jobs=jobs,
            device=device,
        )
    show(report, terminal)
    return report if json else None
