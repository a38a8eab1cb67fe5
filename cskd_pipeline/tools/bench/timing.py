"""Rates of work: sides of a comparison in turn, so that a busy machine is busy for all of them."""

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
WARM_UP = 0.25  # share of the work that is not counted: processes start, queues fill, caches warm
_UNKNOWN: Spread = {"median": None, "low": None, "high": None}


def take_turns(
    sides: Iterable[str], measure: Callable[[str, int], float], rounds: int, doing: str
) -> dict[str, list[float]]:
    """Measure every side in round 0, then in round 1, and so on, in alternating order.

    Args:
        measure: does a side's work of a round, given the side and the number of the round, which
            is the same work for all sides, and returns what was measured of it.
        doing: what the progress says.

    Returns:
        What was measured of each side in each round. A first round, which fills memories and files'
        caches, is done and not counted.
    """
    found: dict[str, list[float]] = {side: [] for side in sides}
    with progress(len(found) * (rounds + 1), "rounds", doing) as meter:
        for number in range(-1, rounds):
            for side in list(found) if number % 2 else reversed(found):
                measured = measure(side, max(number, 0))
                if number >= 0:
                    found[side].append(measured)
                meter.advance()
    return found


def time_turns(
    sides: Iterable[str], work: Callable[[str, int], object], rounds: int, doing: str
) -> dict[str, list[float]]:
    """Return the seconds that ``work`` took for each side in each round, see :func:`take_turns`."""

    def seconds(side: str, number: int) -> float:
        began = clock()
        work(side, number)
        return clock() - began

    return take_turns(sides, seconds, rounds, doing)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the lowest and the highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def rates(seconds: Sequence[float], count: int) -> dict[str, float]:
    """Return the rates per second of rounds of ``count`` things each."""
    return spread([count / value for value in seconds])


def ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Return how many times as fast ``one`` is, round by round; seconds given."""
    return spread([theirs / ours for ours, theirs in zip(one, other, strict=True)])


def comparison_columns(unit: str, ratio: str = "ratio") -> tuple[str, ...]:
    """Return the columns of a table of :func:`comparison_row`."""
    return ("", unit, "lowest", "highest", ratio, "lowest", "highest", "goal")


def comparison_row(
    name: str, rate: Spread, ratio: Spread | None = None, goal: float | None = None
) -> tuple[object, ...]:
    """Return the cells of one side."""
    return (name, *rate.values(), *(ratio or _UNKNOWN).values(), goal)


class Figure(NamedTuple):
    """Hold a measured figure; ``goal`` is empty where there is none, then ``reached`` is None."""

    what: str
    found: str
    goal: str = ""
    reached: bool | None = None

    @classmethod
    def of_ratio(
        cls,
        what: str,
        ratio: Spread,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> Figure:
        """Return a ratio with its spread, and whether it reaches its goal."""
        median, low, high = ratio.values()
        assert median is not None
        found = f"{median:.3g} ({low:.3g} to {high:.3g})"
        if at_most is not None:
            return cls(what, found, f"≤ {at_most:g}", median <= at_most)
        if at_least is not None:
            return cls(what, found, f"≥ {at_least:g}", median >= at_least)
        return cls(what, found)

    @property
    def cells(self) -> tuple[str, ...]:
        """Return the figure as a line of a table: what was measured, found, its goal, reached."""
        marks = {True: "yes", False: "no", None: ""}
        return (self.what, self.found, self.goal, marks[self.reached])


class SteadyRate:
    """Measure the rate of a pipeline once its start is over.

    Args:
        total: how much there will be in all.
    """

    def __init__(self, total: int) -> None:
        self._total, self._started = total, clock()
        self._marks: list[tuple[int, float]] = []

    @classmethod
    def of(cls, counts: Iterable[int], total: int) -> SteadyRate:
        """Measure a pipeline that yields how much it has done just now."""
        rate = cls(total)
        for count in counts:
            rate.advance(count)
        return rate

    def advance(self, count: int) -> None:
        """Count ``count`` more as done now."""
        done = self._marks[-1][0] if self._marks else 0
        self._marks.append((done + count, clock()))

    @property
    def rate(self) -> float:
        """Return the rate per second, from the first mark past the warm-up to the last mark.

        With too few marks for that, over everything, the start included.
        """
        assert self._marks, "nothing was done"
        done, last = self._marks[-1]
        warm = [mark for mark in self._marks[:-1] if mark[0] >= WARM_UP * self._total]
        first, began = warm[0] if warm else (0, self._started)
        return (done - first) / max(last - began, 1e-9)

    @property
    def startup(self) -> float:
        """Return the seconds that the whole took beyond what it takes at :attr:`rate`."""
        done, last = self._marks[-1]
        return max(0.0, last - self._started - done / self.rate)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one core: more gain small tensors nothing, and wait on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def wait_for(device: torch.device) -> None:
    """Return once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
