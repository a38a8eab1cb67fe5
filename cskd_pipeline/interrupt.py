"""Stopping where the work can be taken up again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether somebody asked the process to stop; asked again in the same way, it stops at once.

    torchrun sends SIGTERM to processes that had a terminal's Ctrl-C already: one request, not two.
    """

    def __init__(self) -> None:
        self._signals: set[int] = set()

    @property
    def asked(self) -> bool:
        return bool(self._signals)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if signum in self._signals:
            raise KeyboardInterrupt
        self._signals.add(signum)


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
