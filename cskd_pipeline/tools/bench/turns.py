"""Two ways of doing the same thing, measured in turn, so that a busy machine is busy for both."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

Clock = Callable[[], float]


def take_turns(
    sides: Mapping[str, Callable[[int], None]], rounds: int, clock: Clock
) -> dict[str, list[float]]:
    """Let every side do round 0, then round 1, and so on, beginning with another side each time.

    Args:
        sides: told the number of the round; the same number is the same work for all.
        clock: seconds that never run backwards.

    Returns:
        Seconds of each side in each round. A first round, which fills memories and files' caches,
        is done and not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-1, rounds):
        names = list(sides)
        for name in names if number % 2 else names[::-1]:
            began = clock()
            sides[name](max(number, 0))
            if number >= 0:
                seconds[name].append(clock() - began)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def rates(seconds: Sequence[float], count: int) -> dict[str, float]:
    """Of ``count`` things a round, per second."""
    return spread([count / value for value in seconds])


def ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times as fast ``one`` is, round by round; seconds given."""
    return spread([theirs / ours for ours, theirs in zip(one, other, strict=True)])
