"""This program's own commands, as demo and study run them: one after the other or side by side."""

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
"""Runs ``cskd-pipeline`` with these words and returns its summary."""

_LOOK = 0.1  # seconds between looks at processes that run


def announced(command: Command) -> Callable[..., Summary]:
    """Return ``command`` of texts and paths, which logs each call as a user would type it."""
    return lambda *arguments: command(_logged(arguments))


def side_by_side(
    calls: Mapping[str, Sequence[str | Path]],
    processes: int,
    logs: Path,
    *,
    grace: float | None = None,
) -> Generator[tuple[str, Summary], None, None]:
    """Run commands as processes of their own, ``processes`` at a time, started in their order.

    The news of each is in ``logs/NAME.log``. If one fails, or the caller stops, those that run are
    stopped as by Ctrl-C, which lets them save their state, and waited for.

    Args:
        grace: seconds of that wait, after which they are killed with all that they started; None:
            as long as it takes.

    Yields:
        Name and summary of each, as they end.

    Raises:
        CskdError: a command failed; its own problem, where, found, expected and action.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = deque(calls.items())
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                name, arguments = waiting.popleft()
                running[name] = _start(_logged(arguments), logs / name, grace is not None)
            ended = [name for name, process in running.items() if process.poll() is not None]
            for name in ended:
                yield name, _summary(running.pop(name).returncode, logs / name)
            if not ended:
                time.sleep(_LOOK)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _logged(arguments: Sequence[str | Path]) -> list[str]:
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
    found: Any = None
    with suppress(ValueError):
        found = json.loads(Path(f"{log}.json").read_text(encoding="utf-8"))
    if code == 0 and isinstance(found, dict):
        return found
    error = found.get("error") if isinstance(found, dict) else None
    if not isinstance(error, dict):
        raise CskdError(
            "a command ended before its time",
            where=f"{log}.log",
            found=f"signal {-code}" if code < 0 else f"exit code {code}",
            action="see the end of that file; run the same command again: what is finished is kept",
        )
    fields = ("where", "found", "expected", "action", "problems")
    raise CskdError(
        f"{log.name}: {error.get('problem')}",
        **{name: error[name] for name in fields if error[name]},
    )
