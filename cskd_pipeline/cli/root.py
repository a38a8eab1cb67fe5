"""The program and its groups of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from cskd_pipeline import __version__
from cskd_pipeline.cli.options import Outcome

PROGRAM = "cskd-pipeline"

app = typer.Typer(
    name=PROGRAM,
    help="Distill a CNN into a ViT in two stages that meet at a cache (CSKD, arXiv 2307.08500): "
    "dump-teacher runs the CNN once over augmented images and stores what it says of every place, "
    "train reads that and never loads the CNN.",
    # bash, zsh and fish ask the program itself, by an environment variable, which typer answers
    # before any command runs: --install-completion writes the few lines that make them ask.
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(help="Look at teacher caches.")
app.add_typer(cache_app, name="cache")
plan_app = typer.Typer(help="Know the cost before paying it: a small part is done for real.")
app.add_typer(plan_app, name="plan")
bench_app = typer.Typer(help="Measure, on this machine and your data.")
app.add_typer(bench_app, name="bench")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """What holds for the program as a whole."""


def parse_and_run(arguments: list[str]) -> Outcome | int:
    """What the command returned, or an exit code, with which typer answers --version, say."""
    outcome: Outcome | int = app(args=arguments, prog_name=PROGRAM, standalone_mode=False)
    return outcome
