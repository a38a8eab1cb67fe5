"""A steady rate excludes the start, and reports its cost."""

from __future__ import annotations

import pytest

from cskd_pipeline.tools.bench import timing


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def steady_rate(seconds: list[float], total: int, each: int = 10) -> timing.SteadyRate:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "clock", clock)
        steady = timing.SteadyRate(total)
        for wait in seconds:
            clock.now += wait
            steady.advance(each)
    return steady


def test_a_slow_start_does_not_count() -> None:
    steady = steady_rate([30.0, *[0.5] * 9], total=100)
    assert steady.rate == pytest.approx(20.0)
    # 34.5 s in all, of which 100 items at 20/s take 5 s.
    assert steady.startup == pytest.approx(29.5)


def test_an_initial_burst_does_not_count() -> None:
    steady = steady_rate([1.0, 0.0, 0.0, *[1.0] * 7], total=100)
    assert steady.rate == pytest.approx(10.0)


def test_a_constant_rate_has_no_startup() -> None:
    steady = steady_rate([0.25] * 12, total=120)
    assert steady.rate == pytest.approx(40.0)
    assert steady.startup == pytest.approx(0.0)


def test_a_single_mark_is_timed_from_the_start() -> None:
    steady = steady_rate([2.0], total=10)
    assert steady.rate == pytest.approx(5.0)
    assert steady.startup == 0.0
