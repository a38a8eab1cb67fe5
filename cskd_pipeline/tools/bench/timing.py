"""Timing and rates: sides of a comparison take turns, so that other load slows them all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from cskd_pipeline.runtime.progress import progress

Spread = Mapping[str, float | None]
"""``median``, ``low`` and ``high``, in this order."""

clock = time.perf_counter
WARM_UP = 0.25  # share of the work left uncounted: processes start, queues fill, caches warm
_UNKNOWN: Spread = {"median": None, "low": None, "high": None}


def take_turns(
    sides: Iterable[str], measure: Callable[[str, int], float], rounds: int, doing: str
) -> dict[str, list[float]]:
    """Measure every side in round 0, then in round 1, and so on, in alternating order.

    A warm-up round, which fills memory and page cache, is run first and discarded.

    Args:
        measure: runs a side's share of a round, given side and round number, and returns the
            measured value; a round is the same work for all sides.
        doing: label of the progress bar.

    Returns:
        The measured values of each side, by round.
    """
    values: dict[str, list[float]] = {side: [] for side in sides}
    with progress(len(values) * (rounds + 1), "rounds", doing) as meter:
        for number in range(-1, rounds):
            for side in list(values) if number % 2 else reversed(values):
                value = measure(side, max(number, 0))
                if number >= 0:
                    values[side].append(value)
                meter.advance()
    return values


def time_turns(
    sides: Iterable[str], work: Callable[[str, int], object], rounds: int, doing: str
) -> dict[str, list[float]]:
    """Return the seconds ``work`` took for each side in each round, see :func:`take_turns`."""

    def seconds(side: str, number: int) -> float:
        started = clock()
        work(side, number)
        return clock() - started

    return take_turns(sides, seconds, rounds, doing)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the lowest and the highest value."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def rates(seconds: Sequence[float], count: int) -> dict[str, float]:
    """Return the spread of rates per second, for rounds of ``count`` items each."""
    return spread([count / value for value in seconds])


def ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Return how many times as fast as ``other`` ``one`` is, round by round, from their seconds."""
    return spread([theirs / ours for ours, theirs in zip(one, other, strict=True)])


def comparison_columns(unit: str, ratio: str = "ratio") -> tuple[str, ...]:
    """Return the column names for rows of :func:`comparison_row`."""
    return ("", unit, "lowest", "highest", ratio, "lowest", "highest", "goal")


def comparison_row(
    name: str, rate: Spread, ratio: Spread | None = None, goal: float | None = None
) -> tuple[object, ...]:
    """Return the cells of one side."""
    return (name, *rate.values(), *(ratio or _UNKNOWN).values(), goal)


class Figure(NamedTuple):
    """A measured figure; without a goal, ``goal`` is empty and ``met`` is None."""

    name: str
    result: str
    goal: str = ""
    met: bool | None = None

    @classmethod
    def of_ratio(
        cls,
        name: str,
        ratio: Spread,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> Figure:
        """Return a ratio with its spread, its goal and whether the median meets it."""
        median, low, high = ratio.values()
        assert median is not None
        result = f"{median:.3g} ({low:.3g} to {high:.3g})"
        if at_most is not None:
            return cls(name, result, f"≤ {at_most:g}", median <= at_most)
        if at_least is not None:
            return cls(name, result, f"≥ {at_least:g}", median >= at_least)
        return cls(name, result)

    @property
    def cells(self) -> tuple[str, ...]:
        """Return the figure as a table row: name, result, goal, met."""
        marks = {True: "yes", False: "no", None: ""}
        return (self.name, self.result, self.goal, marks[self.met])


class SteadyRate:
    """The rate of a pipeline after its warm-up.

    Args:
        total: number of items in all.
    """

    def __init__(self, total: int) -> None:
        self._total, self._started = total, clock()
        self._marks: list[tuple[int, float]] = []

    @classmethod
    def of(cls, counts: Iterable[int], total: int) -> SteadyRate:
        """Measure a pipeline that yields the number of items just finished."""
        rate = cls(total)
        for count in counts:
            rate.advance(count)
        return rate

    def advance(self, count: int) -> None:
        """Record that ``count`` more items are finished."""
        done = self._marks[-1][0] if self._marks else 0
        self._marks.append((done + count, clock()))

    @property
    def rate(self) -> float:
        """Return items per second, from the first mark past the warm-up to the last mark.

        With too few marks the start is included.
        """
        assert self._marks, "nothing was done"
        done, last = self._marks[-1]
        warm = [mark for mark in self._marks[:-1] if mark[0] >= WARM_UP * self._total]
        first, started = warm[0] if warm else (0, self._started)
        return (done - first) / max(last - started, 1e-9)

    @property
    def startup(self) -> float:
        """Return the seconds spent beyond the time that :attr:`rate` accounts for."""
        done, last = self._marks[-1]
        return max(0.0, last - self._started - done / self.rate)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit PyTorch to one core: on a busy machine, small tensors lose time on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def wait_for(device: torch.device) -> None:
    """Return once the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
