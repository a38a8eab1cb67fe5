"""Run ``cskd-pipeline`` commands from demo and study, one by one or in parallel processes."""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cskd_pipeline.errors import CskdError

log = logging.getLogger(__name__)

Summary = dict[str, Any]
Command = Callable[[list[str]], Summary]
"""Runs ``cskd-pipeline`` with the given arguments and returns its summary."""

_POLL = 0.1  # seconds between checks of the running processes


def with_logging(command: Command) -> Callable[..., Summary]:
    """Return a function that logs its arguments as a command line and calls ``command``."""
    return lambda *arguments: command(_log_call(arguments))


def side_by_side(
    calls: Mapping[str, Sequence[str | Path]],
    processes: int,
    logs: Path,
    *,
    grace: float | None = None,
) -> Generator[tuple[str, Summary], None, None]:
    """Run commands as separate processes, started in order, ``processes`` at a time.

    Each logs to ``logs/NAME.log``. If one fails or the caller stops, the others are terminated as
    by Ctrl-C, which lets them save their state.

    Args:
        grace: seconds to wait for terminated processes before killing their process groups; None:
            no limit.

    Yields:
        Name and summary of each command as it ends.

    Raises:
        CskdError: a command failed; the error is the command's own.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = deque(calls.items())
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                name, arguments = waiting.popleft()
                running[name] = _start(_log_call(arguments), logs / name, grace is not None)
            ended = [name for name, process in running.items() if process.poll() is not None]
            for name in ended:
                yield name, _summary(running.pop(name).returncode, logs / name)
            if not ended:
                time.sleep(_POLL)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _log_call(arguments: Sequence[str | Path]) -> list[str]:
    words = [str(argument) for argument in arguments]
    log.info(f"$ cskd-pipeline {shlex.join(words)}")
    return words


def _start(words: Sequence[str], log: Path, own_group: bool) -> subprocess.Popen[bytes]:
    with open(f"{log}.json", "wb") as out, open(f"{log}.log", "wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "cskd_pipeline", *words, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=own_group,
        )


def _summary(code: int, log: Path) -> Summary:
    output: Any = None
    with suppress(ValueError):
        output = json.loads(Path(f"{log}.json").read_text(encoding="utf-8"))
    if code == 0 and isinstance(output, dict):
        return output
    error = output.get("error") if isinstance(output, dict) else None
    if not isinstance(error, dict):
        raise CskdError(
            "a command ended without a result",
            where=f"{log}.log",
            found=f"signal {-code}" if code < 0 else f"exit code {code}",
            action="see the end of the log, then run the same command again to continue",
        )
    fields = ("where", "found", "expected", "action", "problems")
    raise CskdError(
        f"{log.name}: {error.get('problem')}",
        **{name: error[name] for name in fields if error[name]},
    )
