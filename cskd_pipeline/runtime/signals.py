"""Stop signals, handled where the work can be resumed.

Ctrl-C (SIGINT) comes from a person and ends a command with ``KeyboardInterrupt``. SIGTERM, SIGHUP
and SIGUSR1 come from a scheduler or a closing terminal: the command also saves its state, but ends
with :class:`Requeue`, whose exit code says that the same command may be queued again.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

REQUEUE = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""SIGHUP comes from a closed terminal, SIGUSR1 from Slurm before a time limit (``--signal``)."""
STOPPING = (signal.SIGINT, *REQUEUE)


class Requeue(BaseException):
    """The counterpart of ``KeyboardInterrupt`` for ``REQUEUE``; its text names the signals."""

    def __init__(self, signals: Iterable[int]) -> None:
        super().__init__(", ".join(signal.Signals(number).name for number in sorted(signals)))


class Stop:
    """The stop signals that the process has received.

    A second SIGINT stops it at once. Other signals may be repeated: ``timeout`` sends SIGTERM more
    than once, torchrun after Ctrl-C in a terminal.
    """

    def __init__(self) -> None:
        self.signals: set[int] = set()
        self.idle = False
        """True if there is nothing to finish, so that a signal ends the work at once."""

    @property
    def requested(self) -> bool:
        """Return whether a signal has been received."""
        return bool(self.signals)

    @property
    def requeue(self) -> bool:
        """Return whether a scheduler sent one, which leaves little time; Ctrl-C has priority."""
        return self.requested and signal.SIGINT not in self.signals

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` if a signal has been received."""
        if self.requested:
            raise KeyboardInterrupt

    def add(self, signals: Iterable[int]) -> None:
        """Add signals that other processes of the job have received."""
        self.signals.update(signals)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in self.signals:
            raise KeyboardInterrupt
        self.signals.add(signum)
        if self.idle:
            raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Collect the signals in ``STOPPING`` instead of dying from them, for work in small steps.

    The loop inside checks ``stop.requested`` wherever it can stop without loss, saves, and raises
    ``KeyboardInterrupt``, which leaves the block as :class:`Requeue` after a scheduler's signal.
    Outside the main thread, where Python delivers no signals, none is collected.
    """
    global _innermost
    stop, outer = Stop(), _innermost
    stop.add(_received)
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
_received: set[int] = set()
"""The signals that :func:`requeue_requests` has received."""
_SEND_AGAIN = 0.1
"""Seconds; a signal during ``sys.unraisablehook`` would be lost again."""


def pause(seconds: float) -> None:
    """Sleep while nothing is in progress; a signal collected by :func:`stop_requests` ends this.

    Raises:
        KeyboardInterrupt: a signal was received, before or during the sleep.
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
    """Raise :class:`Requeue` at the first signal in ``REQUEUE``; ignore later ones.

    The exception may be lost where it is raised: Python ignores it in a finalizer, pydantic while
    it builds a model. Python reports such a loss, and the signal (Ctrl-C too) is sent again. After
    a loss without a report, the next :func:`stop_requests` inside starts with a scheduler's signal.
    """
    global _received
    outer, report = _received, sys.unraisablehook
    received: set[int] = set()
    raised = False
    timers: list[threading.Timer] = []

    def receive(signum: int, frame: FrameType | None) -> None:
        nonlocal raised
        received.add(signum)
        if not raised:
            raised = True
            raise Requeue(received)

    def send(number: int) -> None:
        nonlocal raised
        raised = False
        signal.pthread_kill(threading.main_thread().ident or 0, number)

    def send_again(lost: sys.UnraisableHookArgs) -> None:
        if isinstance(lost.exc_value, Requeue):
            number = max(received)
        elif lost.exc_type is KeyboardInterrupt:
            number = signal.SIGINT
        else:
            report(lost)
            return
        timer = threading.Timer(_SEND_AGAIN, send, (number,))
        timer.start()
        timers.append(timer)

    with _handled(REQUEUE, receive):
        try:
            _received, sys.unraisablehook = received, send_again
            yield
        finally:
            _received, sys.unraisablehook = outer, report
            for timer in timers:
                timer.cancel()
            for timer in timers:  # a signal after the handlers' removal would kill the process
                timer.join()


@contextmanager
def _handled(numbers: Iterable[signal.Signals], handler: Callable[..., Any]) -> Iterator[None]:
    """Handle signals, except schedulers' ignored ones: ``nohup`` ignores SIGHUP."""
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
