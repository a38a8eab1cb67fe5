"""The rate of a pipeline once its start is over."""

from __future__ import annotations

import time
from collections.abc import Callable

WARM_UP = 0.25  # share of the work that is not counted: processes start, queues fill, caches warm


class SteadyRate:
    """Told how much was done, whenever something was; says how fast it goes on.

    Args:
        total: how much there will be in all.
        clock: seconds that never run backwards.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._total, self._clock = total, clock
        self._started = clock()
        self._marks: list[tuple[int, float]] = []

    def advance(self, count: int) -> None:
        done = self._marks[-1][0] if self._marks else 0
        self._marks.append((done + count, self._clock()))

    @property
    def rate(self) -> float:
        """Per second, from the first mark past the warm-up to the last mark.

        With too few marks for that, over everything, the start included.
        """
        assert self._marks, "nothing was done"
        done, last = self._marks[-1]
        warm = [mark for mark in self._marks[:-1] if mark[0] >= WARM_UP * self._total]
        first, began = warm[0] if warm else (0, self._started)
        return (done - first) / max(last - began, 1e-9)

    @property
    def startup(self) -> float:
        """Seconds that the whole took beyond what it takes at :attr:`rate`."""
        done, last = self._marks[-1]
        return max(0.0, last - self._started - done / self.rate)
