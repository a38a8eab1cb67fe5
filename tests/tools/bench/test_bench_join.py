"""``bench join`` compares equal work in turn, and its simulation opens complete caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.data.training_views import TrainingViews
from cskd_pipeline.errors import UsageError
from cskd_pipeline.tools.bench import bench_join as bench
from cskd_pipeline.tools.bench import timing
from cskd_pipeline.tools.bench.timing import ratio, spread
from tests.clock import FakeClock
from tests.pipeline import world
from tests.pipeline.conftest import World

Capture = pytest.CaptureFixture[str]


def test_sides_take_turns_and_the_warm_up_round_is_discarded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, order = FakeClock(), list[str]()

    def work(side: str, number: int) -> None:
        order.append(f"{side}{number}")
        clock.advance({"a": 1, "b": 3}[side] + number)

    monkeypatch.setattr(timing, "clock", clock)
    seconds = timing.time_turns("ab", work, 3, "working")
    assert seconds == {"a": [1, 2, 3], "b": [3, 4, 5]}
    assert order == ["a0", "b0", "b0", "a0", "a1", "b1", "b2", "a2"]


def test_ratios_are_taken_round_by_round() -> None:
    assert ratio([1, 1, 10], [2, 3, 10]) == {"median": 2, "low": 1, "high": 3}
    assert spread([3, 1, 2]) == {"median": 2, "low": 1, "high": 3}


def recipe(small: World, *sets: str) -> Any:
    return world.train_recipe(small.shards, small.cache, Path(), sets=list(sets))


def test_both_sides_load_the_same_batches_and_only_one_has_targets(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, loaded = FakeClock(), dict[bool, list[Any]]({True: [], False: []})
    real = TrainingViews.__getitem__

    def recorded(self: TrainingViews, rows: np.ndarray) -> Any:
        batch = real(self, rows)
        loaded[bool(batch.targets)].append((rows.tolist(), batch))
        clock.advance(1.25 if batch.targets else 1.0)
        return batch

    monkeypatch.setattr(TrainingViews, "__getitem__", recorded)
    monkeypatch.setattr(timing, "clock", clock)
    report = bench.bench_join(recipe(small, "batch.accumulation=2"), rounds=3)
    assert report["images_per_round"] == 16
    assert report["ratio"] == {"median": 0.8, "low": 0.8, "high": 0.8}
    assert report["images_per_second"]["without"]["median"] == 8.0
    assert len(loaded[True]) == len(loaded[False]) == 4 * 2
    pairs = zip(sorted(loaded[True], key=str), sorted(loaded[False], key=str), strict=True)
    for (rows, with_join), (same_rows, alone) in pairs:
        assert rows == same_rows
        assert torch.equal(with_join.pixels, alone.pixels)
        assert torch.equal(with_join.seed, alone.seed)
        assert torch.equal(with_join.label, alone.label)


def test_method_none_is_refused(small: World) -> None:
    alone = world.train_recipe(small.shards, None, Path(), "none")
    with pytest.raises(UsageError, match="reads no cache"):
        bench.bench_join(alone, rounds=3)


def test_the_simulation_opens_complete_caches_and_readers_do_not_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = Cache.__init__

    def recorded(self: Cache, *arguments: Any) -> None:
        real(self, *arguments)
        opened.append((self.views, self.done().shape, bool(self.done().all())))

    monkeypatch.setattr(Cache, "__init__", recorded)
    report = bench.simulate(shards=6)
    assert report["samples"] == 6 * 1251
    assert set(opened) == {(30, (3, 6), True), (300, (30, 6), True)}
    few, many = report["opening"].values()
    assert 0 < many["reader_bytes"] < 2 * few["reader_bytes"] + 10_000


def test_the_command_needs_shards_and_cache_or_simulates(small: World, capsys: Capture) -> None:
    assert world.cli("bench", "join", "--shards", small.shards) == 2
    assert "--cache DIR" in capsys.readouterr().err
    assert world.cli("bench", "join") == 2
    sets = world.as_flags(world.train_sets())
    words = ("--shards", small.shards, "--cache", small.cache, "--batch-size", 16, "--rounds", 3)
    assert world.cli("bench", "join", *words, *sets, "--quiet") == 0
    out = capsys.readouterr().out
    assert "3 rounds of 16 images" in out
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["with", "without", "ratio"]
