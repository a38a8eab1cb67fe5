"""Rates of work: sides of a comparison in turn, so that a busy machine is busy for all of them."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from cskd_pipeline.runtime.progress import progress

Spread = Mapping[str, float | None]
"""``median``, ``low`` and ``high``, in this order."""

clock = time.perf_counter
WARM_UP = 0.25  # share of the work that is not counted: processes start, queues fill, caches warm
_UNKNOWN: Spread = {"median": None, "low": None, "high": None}


def take_turns(
    sides: Mapping[str, Callable[[int], float]], rounds: int, doing: str
) -> dict[str, list[float]]:
    """Measure every side in round 0, then in round 1, and so on, in alternating order.

    Args:
        sides: name -> a round's work, given the number of the round, and returning what was
            measured of it; the same number is the same work for all sides.
        doing: what the progress says.

    Returns:
        What each side returned in each round. A first round, which fills memories and files'
        caches, is done and not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    with progress(len(sides) * (rounds + 1), "rounds", doing) as meter:
        for number in range(-1, rounds):
            names = list(sides)
            for name in names if number % 2 else names[::-1]:
                measured = sides[name](max(number, 0))
                if number >= 0:
                    found[name].append(measured)
                meter.advance()
    return found


def time_turns(
    works: Mapping[str, Callable[[int], object]], rounds: int, doing: str
) -> dict[str, list[float]]:
    """Return the seconds of each work in each round, see :func:`take_turns`."""

    def seconds(work: Callable[[int], object], number: int) -> float:
        began = clock()
        work(number)
        return clock() - began

    return take_turns({name: partial(seconds, works[name]) for name in works}, rounds, doing)


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


class SteadyRate:
    """Measure the rate of a pipeline once its start is over.

    Args:
        total: how much there will be in all.
    """

    def __init__(self, total: int) -> None:
        self._total, self._started = total, clock()
        self._marks: list[tuple[int, float]] = []

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
