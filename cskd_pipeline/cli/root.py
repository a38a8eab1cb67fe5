"""The program: its groups of commands, and how one is run: errors, signals and exit codes."""

import contextlib
import errno
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from cskd_pipeline import __version__
from cskd_pipeline.cli.options import Outcome
from cskd_pipeline.cli.parameters import expanded
from cskd_pipeline.errors import CskdError, Interrupted, OutputError, Preempted, UsageError
from cskd_pipeline.runtime.atomic import FULL
from cskd_pipeline.runtime.console import Terminal
from cskd_pipeline.runtime.progress import restore_reporting
from cskd_pipeline.runtime.signals import Requeue, requeue_requests

PROGRAM = "cskd-pipeline"
# The parser's own error, which typer does not export: click's, or typer's copy of it.
_ParserError: Any = typer.BadParameter.__mro__[1]
_FILE_ERRORS = {
    getattr(errno, name)
    for name in ["ENOENT", "EACCES", "EPERM", "EROFS", "EISDIR", "ENOTDIR", "ENAMETOOLONG"]
}
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
    """Return what the command returned, or an exit code, as typer gives for --version; what the
    command raises is raised unchanged.
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
    for stream in (sys.stdout, sys.stderr):  # a character that a terminal lacks is shown escaped
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
    """Return what the command returned; make a CskdError of wrong usage and interruptions."""
    # With --json, what libraries print must not reach the one object on stdout.
    away = contextlib.redirect_stdout(sys.stderr) if terminal.json else contextlib.nullcontext()
    try:
        with requeue_requests(), away:
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
    """Return what the user can do after an interruption."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    line = shlex.join([PROGRAM, *arguments])
    resumable = [["cache", name] for name in ("convert", "merge", "upgrade")]
    if command == "dump-teacher" or arguments[:2] in resumable:
        return f"finished units are kept, continue with: {line}"
    if command == "study" or arguments[:2] == ["bench", "all"]:
        return f"what is finished is kept, continue with: {line}"
    if command == "train":
        resume = "" if "--resume" in arguments else " --resume"
        return f"the last checkpoint is kept, continue with: {line}{resume}"
    return f"start again with: {line}"


@contextlib.contextmanager
def _translate_os_errors() -> Iterator[None]:
    """Explain a full disk, and a file that is missing or not ours; other OS errors are bugs."""
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
                "a file cannot be used", where=error.filename, found=error.strerror
            ) from error
        raise
