"""Stopping where the work can be taken up again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether somebody asked the process to stop; a second request stops it at once."""

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Collect SIGINT and SIGTERM instead of dying of them, for work that commits in small steps.

    The loop inside asks ``stop.asked`` wherever it could stop without loss, saves, and raises
    ``KeyboardInterrupt`` itself. Outside the main thread, where Python delivers no signals, nothing
    is collected and ``asked`` stays False.
    """
    stop = Stop()
    previous: dict[signal.Signals, object] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, stop._ask)
    except ValueError:  # not the main thread
        previous.clear()
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() gave us
