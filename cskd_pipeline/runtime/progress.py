"""Progress of long work: reported from anywhere, shown by whoever listens.

As with ``logging``, which carries news and warnings, the work need not know who listens. The
command line's :class:`cskd_pipeline.runtime.console.Terminal` does; a library's user hears no
progress unless she calls :func:`listen`; news and warnings go where her ``logging`` sends them.
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
"""From this share of the time spent waiting for data on, data and not the device is the limit."""

T = TypeVar("T")


class Meter:
    """The progress of a piece of work. The rate leaves out what was done before it began.

    Args:
        total: units in all; None where nobody knows.
        done: units that an earlier run had finished.
        clock: seconds that never run backwards.
        moved: called after every step.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
        moved: Callable[[Meter], None] | None = None,
    ) -> None:
        self.total, self.unit, self.count = total, unit, done
        self.waited = 0.0
        """Seconds spent waiting for what :meth:`timed` passed on."""
        self._first, self._clock, self._moved = done, clock, moved
        self._started = clock()
        self._fed = False

    def advance(self, count: int = 1) -> None:
        """``count`` more units are done."""
        self.count += count
        if self._moved is not None:
            self._moved(self)

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """``batches``, whose making counts as waiting for data, while all else is the device's."""
        self._fed = True
        source = iter(batches)
        while True:
            asked = self._clock()
            try:
                batch = next(source)
            except StopIteration:
                return
            finally:
                self.waited += self._clock() - asked
            yield batch

    @property
    def data_wait(self) -> float:
        """The share of the time that was spent waiting for data."""
        return self.waited / self.seconds if self.seconds > 0 else 0.0

    @property
    def limit(self) -> str:
        """Return which side holds up the other: ``data`` or ``device``."""
        return limiting_side(self.data_wait)

    @property
    def seconds(self) -> float:
        """Return the seconds since the meter started."""
        return self._clock() - self._started

    @property
    def rate(self) -> float:
        """Units per second since the meter started; 0 before the first."""
        return (self.count - self._first) / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        """``30/120 views, 12.3 views/s, 0:07 left``, and ``data wait 2 %, limit: device``."""
        of = f"/{self.total}" if self.total is not None else ""
        parts = [f"{self.count}{of} {self.unit}"]
        if self.rate > 0:
            shown = f"{self.rate:.3g}" if self.rate < 1000 else f"{self.rate:.0f}"
            parts.append(f"{shown} {self.unit}/s")
            if self.total is not None and self.count < self.total:
                parts.append(f"{duration((self.total - self.count) / self.rate)} left")
        if self._fed and self.rate > 0:
            parts += [f"data wait {100 * self.data_wait:.0f} %", f"limit: {self.limit}"]
        return ", ".join(parts)


def limiting_side(data_wait: float) -> str:
    """Return ``data`` or ``device`` by the share of the time that was spent waiting for data."""
    return "data" if data_wait >= DATA_LIMITS else "device"


def duration(seconds: float) -> str:
    """``0:07``, ``12:30``, ``27:46:40``."""
    minutes, second = divmod(math.ceil(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Listener(Protocol):
    """Shows progress; ``show`` is called once for each piece of work."""

    def show(
        self, total: int | None, unit: str, description: str, done: int
    ) -> AbstractContextManager[Meter]:
        """Return a meter that lasts, and is shown, as long as a ``with`` block."""
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
        total: units in all, or None where nobody knows.
        unit: their name in the plural: ``views``.
        done: how many of them earlier runs have finished.
    """
    if _listener is None:
        yield Meter(total, unit, done)
        return
    with _listener.show(total, unit, description, done) as meter:
        yield meter


@contextmanager
def restore_reporting() -> Iterator[None]:
    """Bring back who heard of progress, news and warnings before, when the block ends."""
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
    """Show no progress, news or warnings of this process while the block runs."""
    with restore_reporting():
        listen(None)
        logging.getLogger(PACKAGE).setLevel(logging.CRITICAL + 1)
        yield
