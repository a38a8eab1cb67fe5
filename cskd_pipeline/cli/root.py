"""The program: its groups of commands, and how a command runs: errors, signals, exit codes."""

import contextlib
import errno
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from cskd_pipeline import __version__
from cskd_pipeline.cli.options import Outcome
from cskd_pipeline.cli.parameters import expand
from cskd_pipeline.errors import CskdError, Interrupted, OutputError, Preempted, UsageError
from cskd_pipeline.runtime.atomic import FULL
from cskd_pipeline.runtime.console import Terminal
from cskd_pipeline.runtime.progress import restore_reporting
from cskd_pipeline.runtime.signals import Requeue, requeue_requests

PROGRAM = "cskd-pipeline"
# The parser's error class, which typer does not export: click's, or typer's copy of it.
_ParserError: Any = typer.BadParameter.__mro__[1]
_FILE_ERRORS = {
    getattr(errno, name)
    for name in ["ENOENT", "EACCES", "EPERM", "EROFS", "EISDIR", "ENOTDIR", "ENAMETOOLONG"]
}
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Raised:
    """An exception of a command, carried past typer.

    typer would turn an EOFError into an Abort and a KeyboardInterrupt into an exit code, and exit
    silently on a broken pipe of any kind.
    """

    error: BaseException


class _Command(TyperCommand):
    def invoke(self, ctx: Any) -> Any:
        """Return the command's outcome, or the exception that it raised."""
        try:
            return super().invoke(ctx)
        except BaseException as error:
            return _Raised(error)


class _Commands(typer.Typer):
    def command(
        self, *args: Any, flags: str = "", example: str = "", **options: Any
    ) -> Callable[[_Function], _Function]:
        """Register a function as a command; see :mod:`~cskd_pipeline.cli.parameters`."""
        options |= {"cls": _Command, "epilog": f"Example: {PROGRAM} {example}"}

        def decorate(function: _Function) -> _Function:
            """Register ``function`` and return it unchanged."""
            # Paragraphs of help are wrapped to the terminal, except those that begin with \b.
            text = re.sub(r"(?<![\n\x08])\n(?=\S)", " ", inspect.getdoc(function) or "")
            super(_Commands, self).command(*args, help=text, **options)(expand(function, flags))
            return function

        return decorate


app = _Commands(
    name=PROGRAM,
    help="Distill a CNN into a ViT in two stages (CSKD, arXiv 2307.08500): dump-teacher runs the "
    "CNN once over augmented images and caches its logits at every location; train reads the cache "
    "and never loads the CNN.",
    # For completion, shells call the program itself with an environment variable that typer handles
    # before any command runs; --install-completion sets that up.
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = _Commands(help="Inspect, verify, publish, convert, upgrade and merge teacher caches.")
app.add_typer(cache_app, name="cache")
plan_app = _Commands(help="Forecast the cost of a dump or a training run from a short trial.")
app.add_typer(plan_app, name="plan")
bench_app = _Commands(help="Benchmark the pipeline on this machine.")
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
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Accept the options of the program itself."""


def parse_and_run(arguments: list[str]) -> Outcome | int:
    """Run one command and return its outcome, or typer's exit code, as for --version; exceptions
    of the command propagate unchanged.
    """
    outcome: Outcome | int | _Raised = app(args=arguments, prog_name=PROGRAM, standalone_mode=False)
    if isinstance(outcome, _Raised):
        raise outcome.error
    return outcome


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    Wrong usage, full disks and this package's errors end in a message, bugs in a traceback.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):  # escapes characters that a terminal lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    terminal = Terminal(json="--json" in arguments)
    try:
        with restore_reporting(), _translate_os_errors():
            outcome = _run(arguments or ["--help"], terminal)
            if isinstance(outcome, int):
                return outcome
            if outcome is not None:
                terminal.result(outcome)
    except CskdError as error:
        terminal.error(error)
        return error.exit_code
    return 0


def _run(arguments: list[str], terminal: Terminal) -> Outcome | int:
    """Run one command and return its outcome; raise wrong usage and interruptions as CskdErrors."""
    # With --json, the output of libraries must not mix with the object on stdout.
    redirect = contextlib.redirect_stdout(sys.stderr) if terminal.json else contextlib.nullcontext()
    try:
        with requeue_requests(), redirect:
            return parse_and_run(arguments)
    except Requeue as error:
        raise Preempted(f"stopped by {error}", action=_next_step(arguments)) from error
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted", action=_next_step(arguments)) from error
    except _ParserError as error:
        context = getattr(error, "ctx", None)
        path = PROGRAM if context is None else context.command_path
        raise UsageError(error.format_message(), action=f"see {path} --help") from error


def _next_step(arguments: list[str]) -> str:
    """Return the advice that ends the message of an interruption."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    line = shlex.join([PROGRAM, *arguments])
    resumable = [["cache", name] for name in ("convert", "merge", "upgrade")]
    if command == "dump-teacher" or arguments[:2] in resumable:
        return f"finished units are kept, continue with: {line}"
    if command == "study" or arguments[:2] == ["bench", "all"]:
        return f"finished results are kept, continue with: {line}"
    if command == "train":
        resume = "" if "--resume" in arguments else " --resume"
        return f"the last checkpoint is kept, continue with: {line}{resume}"
    return f"start again with: {line}"


@contextlib.contextmanager
def _translate_os_errors() -> Iterator[None]:
    """Raise a full disk and an inaccessible file as CskdErrors; other OS errors are bugs."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise OutputError(
                "no space left on the device",
                where=error.filename,
                found=error.strerror,
                action="free some space and run the same command again: finished parts are kept",
            ) from error
        if error.filename is not None and error.errno in _FILE_ERRORS:
            raise CskdError(
                "a file cannot be accessed", where=error.filename, found=error.strerror
            ) from error
        raise
