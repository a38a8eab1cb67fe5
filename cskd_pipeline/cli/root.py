"""The program and its groups of commands."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from cskd_pipeline import __version__
from cskd_pipeline.cli.options import Outcome
from cskd_pipeline.cli.parameters import expanded

PROGRAM = "cskd-pipeline"
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Raised:
    """Carry what a command raised past typer.

    It would make an Abort of an EOFError, exit silently on a broken pipe of any kind, and make an
    exit code of a KeyboardInterrupt.
    """

    error: BaseException


class _Command(TyperCommand):
    def invoke(self, ctx: Any) -> Any:
        """Return what the command returned, or what it raised."""
        try:
            return super().invoke(ctx)
        except BaseException as error:
            return _Raised(error)


class _Commands(typer.Typer):
    def command(
        self, *args: Any, flags: str = "", **options: Any
    ) -> Callable[[_Function], _Function]:
        """Register a function as a command; :mod:`~cskd_pipeline.cli.parameters` says how."""
        register = super().command(*args, cls=_Command, **options)

        def decorate(function: _Function) -> _Function:
            """Return ``function`` as it is, once it is registered."""
            register(expanded(function, flags))
            return function

        return decorate


app = _Commands(
    name=PROGRAM,
    help="Distill a CNN into a ViT in two stages that meet at a cache (CSKD, arXiv 2307.08500): "
    "dump-teacher runs the CNN once over augmented images and stores its logits at every location, "
    "train reads those and never loads the CNN.",
    # bash, zsh and fish call the program itself, with an environment variable that typer handles
    # before any command runs: --install-completion writes the few lines that make them call.
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = _Commands(help="Look at teacher caches.")
app.add_typer(cache_app, name="cache")
plan_app = _Commands(help="Know the cost before paying it: a small part is done for real.")
app.add_typer(plan_app, name="plan")
bench_app = _Commands(help="Measure, on this machine and your data.")
app.add_typer(bench_app, name="bench")


def _show_version(given: bool) -> None:
    if given:
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
    """Hold the options of the program as a whole."""


def parse_and_run(arguments: list[str]) -> Outcome | int:
    """Return what the command returned, or an exit code, as typer gives for --version.

    Raises:
        BaseException: what the command raised, unchanged, or the parser's own.
    """
    outcome: Outcome | int | _Raised = app(args=arguments, prog_name=PROGRAM, standalone_mode=False)
    if isinstance(outcome, _Raised):
        raise outcome.error
    return outcome
