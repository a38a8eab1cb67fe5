"""Run one command: its result, its errors, signals, and the exit code."""

import contextlib
import errno
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import typer

from cskd_pipeline.cli.options import Outcome
from cskd_pipeline.cli.root import PROGRAM, parse_and_run
from cskd_pipeline.errors import CskdError, Interrupted, OutputError, Preempted, UsageError
from cskd_pipeline.runtime.atomic import FULL
from cskd_pipeline.runtime.console import Terminal, kept
from cskd_pipeline.runtime.signals import Requeue, requeue_requests

# The parser's own error, which typer does not export: click's, or typer's copy of it.
_ParserError: Any = typer.BadParameter.__mro__[1]
_FILE_ERRORS = {
    getattr(errno, name)
    for name in ["ENOENT", "EACCES", "EPERM", "EROFS", "EISDIR", "ENOTDIR", "ENAMETOOLONG"]
}


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
        with kept(), _explained_os_errors():
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
def _explained_os_errors() -> Iterator[None]:
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
