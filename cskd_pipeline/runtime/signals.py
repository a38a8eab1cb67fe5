"""Stopping where the work can be taken up again.

Ctrl-C (SIGINT) is a person's, and ends a command with ``KeyboardInterrupt``. SIGTERM, SIGHUP and
SIGUSR1 are a scheduler's or a closing terminal's: the command saves as well, and ends with
:class:`Requeue`, so that its exit code says that the same command may be queued again.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

REQUEUE = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""The second is a closed terminal's, the third Slurm's before a time limit, with ``--signal``."""
STOPPING = (signal.SIGINT, *REQUEUE)


class Requeue(BaseException):
    """The counterpart of ``KeyboardInterrupt`` for the signals in ``REQUEUE``; names them."""

    def __init__(self, signals: Iterable[int]) -> None:
        super().__init__(", ".join(signal.Signals(number).name for number in sorted(signals)))


class Stop:
    """The stop signals that the process has received.

    A second SIGINT stops it at once. Others may come several times: ``timeout`` sends SIGTERM
    twice, torchrun after a terminal's Ctrl-C.
    """

    def __init__(self) -> None:
        self.signals: set[int] = set()
        self.idle = False
        """There is nothing to finish, so a signal ends the work at once."""

    @property
    def requested(self) -> bool:
        """Return whether a signal has come."""
        return bool(self.signals)

    @property
    def requeue(self) -> bool:
        """Return whether a scheduler's has, which leaves little time; Ctrl-C outweighs it."""
        return self.requested and signal.SIGINT not in self.signals

    def check(self) -> None:
        """Leave by ``KeyboardInterrupt`` if a signal has come."""
        if self.requested:
            raise KeyboardInterrupt

    def add(self, signals: Iterable[int]) -> None:
        """Add those that other processes of the job have received."""
        self.signals.update(signals)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in self.signals:
            raise KeyboardInterrupt
        self.signals.add(signum)
        if self.idle:
            raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Collect the signals in ``STOPPING`` instead of dying of them, for work in small steps.

    The loop inside checks ``stop.requested`` wherever it can stop without loss, saves, and raises
    ``KeyboardInterrupt``, which leaves the block as :class:`Requeue` on a scheduler's signal.
    Outside the main thread, where Python delivers no signals, ``requested`` stays False.
    """
    global _innermost
    stop, outer = Stop(), _innermost
    with _handled(STOPPING, stop._receive):
        try:
            _innermost = stop
            yield stop
        except KeyboardInterrupt:
            if stop.requeue:
                raise Requeue(stop.signals) from None
            raise
        finally:
            _innermost = outer


_innermost: Stop | None = None


def pause(seconds: float) -> None:
    """Sleep where nothing is in hand: a signal that :func:`stop_requests` collects ends the work.

    Raises:
        KeyboardInterrupt: one has come, before or now.
    """
    stop = _innermost or Stop()
    try:
        stop.idle = True
        stop.check()
        time.sleep(seconds)
    finally:
        stop.idle = False


@contextmanager
def requeue_requests() -> Iterator[None]:
    """Raise :class:`Requeue` at the first signal in ``REQUEUE``; later ones change nothing."""
    raised = False

    def receive(signum: int, frame: FrameType | None) -> None:
        nonlocal raised
        if not raised:
            raised = True
            raise Requeue({signum})

    with _handled(REQUEUE, receive):
        yield


@contextmanager
def _handled(numbers: Iterable[signal.Signals], handler: Callable[..., Any]) -> Iterator[None]:
    """Handle signals, but for schedulers' that were ignored before, as ``nohup`` ignores SIGHUP."""
    previous: dict[signal.Signals, Any] = {}
    try:
        for number in numbers:
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread
        previous.clear()
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
