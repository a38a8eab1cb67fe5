"""Progress of long work: reported from anywhere, shown by one listener.

As with ``logging``, which carries information and warnings, the work does not know its listener.
On the command line that is :class:`cskd_pipeline.runtime.console.Terminal`. A library user sees
progress after calling :func:`listen`, and log records according to their ``logging`` configuration.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

PACKAGE = "cskd_pipeline"
DATA_LIMITS = 0.1
"""The share of time spent waiting for data from which data, not the device, is the limit."""

T = TypeVar("T")


class Meter:
    """The progress of a piece of work. The rate excludes units done before the start.

    Args:
        total: number of units; None if unknown.
        done: units finished by an earlier run.
        clock: monotonic clock in seconds.
        on_advance: called after every step.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
        on_advance: Callable[[Meter], None] | None = None,
    ) -> None:
        self.total, self.unit, self.count = total, unit, done
        self.waited = 0.0
        """Seconds spent waiting for the batches of :meth:`timed`."""
        self._first, self._clock, self._on_advance = done, clock, on_advance
        self._started = clock()
        self._timed = False

    def advance(self, count: int = 1) -> None:
        """Add ``count`` finished units."""
        self.count += count
        if self._on_advance is not None:
            self._on_advance(self)

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield ``batches``; count the time to get them as waiting for data."""
        self._timed = True
        source = iter(batches)
        while True:
            requested = self._clock()
            try:
                batch = next(source)
            except StopIteration:
                return
            finally:
                self.waited += self._clock() - requested
            yield batch

    @property
    def data_wait(self) -> float:
        """Return the share of time spent waiting for data."""
        return self.waited / self.seconds if self.seconds > 0 else 0.0

    @property
    def limit(self) -> str:
        """Return the side that limits the rate: ``data`` or ``device``."""
        return limiting_side(self.data_wait)

    @property
    def seconds(self) -> float:
        """Return the seconds since the meter started."""
        return self._clock() - self._started

    @property
    def rate(self) -> float:
        """Return units per second since the meter started; 0 before the first."""
        return (self.count - self._first) / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        """Return ``30/120 views, 12.3 views/s, 0:07 left, data wait 2 %, limit: device``."""
        of = f"/{self.total}" if self.total is not None else ""
        parts = [f"{self.count}{of} {self.unit}"]
        if self.rate > 0:
            shown = f"{self.rate:.3g}" if self.rate < 1000 else f"{self.rate:.0f}"
            parts.append(f"{shown} {self.unit}/s")
            if self.total is not None and self.count < self.total:
                parts.append(f"{duration((self.total - self.count) / self.rate)} left")
        if self._timed and self.rate > 0:
            parts += [f"data wait {100 * self.data_wait:.0f} %", f"limit: {self.limit}"]
        return ", ".join(parts)


def limiting_side(data_wait: float) -> str:
    """Return the side that limits the rate, ``data`` or ``device``, given ``Meter.data_wait``."""
    return "data" if data_wait >= DATA_LIMITS else "device"


def duration(seconds: float) -> str:
    """Format a duration: ``0:07``, ``12:30``, ``27:46:40``."""
    minutes, second = divmod(math.ceil(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Listener(Protocol):
    """Shows progress; ``show`` is called once per piece of work."""

    def show(
        self, total: int | None, unit: str, description: str, done: int
    ) -> AbstractContextManager[Meter]:
        """Return a context manager that yields a meter and shows it while its block runs."""
        ...


_listener: Listener | None = None


def listen(listener: Listener | None) -> None:
    """Let ``listener`` show the progress of this process from now on."""
    global _listener
    _listener = listener


@contextmanager
def progress(total: int | None, unit: str, description: str, *, done: int = 0) -> Iterator[Meter]:
    """Yield a meter to ``advance`` while the block runs; the listener shows rate and time left.

    Args:
        total: number of units; None if unknown.
        unit: their name in the plural: ``views``.
        done: units finished by earlier runs.
    """
    if _listener is None:
        yield Meter(total, unit, done)
        return
    with _listener.show(total, unit, description, done) as meter:
        yield meter


@contextmanager
def restore_reporting() -> Iterator[None]:
    """Restore the progress listener and the log handlers when the block ends."""
    logger = logging.getLogger(PACKAGE)
    listener, handlers = _listener, logger.handlers
    level, propagate = logger.level, logger.propagate
    try:
        yield
    finally:
        listen(listener)
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@contextmanager
def silence() -> Iterator[None]:
    """Show no progress and no log records of this process while the block runs."""
    with restore_reporting():
        listen(None)
        logging.getLogger(PACKAGE).setLevel(logging.CRITICAL + 1)
        yield
