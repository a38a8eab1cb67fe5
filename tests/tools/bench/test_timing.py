"""A steady rate leaves the start out, and says what the start cost."""

from __future__ import annotations

import pytest

from cskd_pipeline.tools.bench import timing


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def ran(seconds: list[float], total: int, each: int = 10) -> timing.SteadyRate:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "clock", clock)
        steady = timing.SteadyRate(total)
        for wait in seconds:
            clock.now += wait
            steady.advance(each)
    return steady


def test_a_slow_start_does_not_count() -> None:
    steady = ran([30.0, *[0.5] * 9], total=100)
    assert steady.rate == pytest.approx(20.0)
    # 34.5 s in all, of which 100 pieces at 20 a second take 5.
    assert steady.startup == pytest.approx(29.5)


def test_a_burst_of_what_was_ready_does_not_count() -> None:
    steady = ran([1.0, 0.0, 0.0, *[1.0] * 7], total=100)
    assert steady.rate == pytest.approx(10.0)


def test_an_even_rate_is_that_rate_and_starts_at_once() -> None:
    steady = ran([0.25] * 12, total=120)
    assert steady.rate == pytest.approx(40.0)
    assert steady.startup == pytest.approx(0.0)


def test_one_piece_counts_from_the_beginning() -> None:
    steady = ran([2.0], total=10)
    assert steady.rate == pytest.approx(5.0)
    assert steady.startup == 0.0
