"""This program's own commands, run by those that run all of them: one after the other or side by
side.
"""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cskd_pipeline.errors import CskdError

log = logging.getLogger(__name__)

Summary = dict[str, Any]
Command = Callable[[list[str]], Summary]
"""Runs ``cskd-pipeline`` with these words and gives its summary."""

_LOOK = 0.1  # seconds between looks at processes that run


def spoken(command: Command) -> Callable[..., Summary]:
    """``command`` of texts and paths, each call told first as a user would type it."""

    def call(*arguments: str | Path) -> Summary:
        words = [str(argument) for argument in arguments]
        log.info(f"$ cskd-pipeline {shlex.join(words)}")
        return command(words)

    return call


def side_by_side(
    calls: Mapping[str, Sequence[str | Path]], processes: int, logs: Path
) -> Iterator[tuple[str, Summary]]:
    """Run commands as processes of their own, ``processes`` at a time, started in their order.

    What each says of its progress is in ``logs/NAME.log``. If one fails, or the caller stops, those
    that run are asked to stop as by Ctrl-C, which lets them save their state, and are waited for.

    Yields:
        Name and summary of each, as they end.

    Raises:
        CskdError: the first failed command's own words.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = deque(calls.items())
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                name, arguments = waiting.popleft()
                words = [str(argument) for argument in arguments]
                log.info(f"$ cskd-pipeline {shlex.join(words)}")
                running[name] = _start(words, logs / name)
            ended = [name for name, process in running.items() if process.poll() is not None]
            for name in ended:
                yield name, _summary(running.pop(name).returncode, logs / name)
            if not ended:
                time.sleep(_LOOK)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _start(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with open(f"{log}.json", "wb") as out, open(f"{log}.log", "wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "cskd_pipeline", *words, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )


def _summary(code: int, log: Path) -> Summary:
    """What an ended command found.

    Raises:
        CskdError: it failed.
    """
    found: Any = None
    with suppress(ValueError):
        found = json.loads(Path(f"{log}.json").read_text(encoding="utf-8"))
    if code == 0 and isinstance(found, dict):
        return found
    told = found.get("error") if isinstance(found, dict) else None
    if not isinstance(told, dict):
        raise CskdError(
            "a command ended before its time",
            where=f"{log}.log",
            found=f"signal {-code}" if code < 0 else f"exit code {code}",
            action="see the end of that file; run the same command again: what is finished is kept",
        )
    fields = ("where", "found", "expected", "action", "problems")
    raise CskdError(
        f"{log.name}: {told.get('problem')}", **{name: told[name] for name in fields if told[name]}
    )
