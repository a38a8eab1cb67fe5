"""``bench loader`` runs both loaders on the same work in turn, timm's as timm sets it up."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.errors import DataError
from cskd_pipeline.tools.bench import bench_loader as bench
from cskd_pipeline.views.policy import ViewPolicy
from tests.clock import FakeClock
from tests.pipeline import world
from tests.pipeline.conftest import World

Capture = pytest.CaptureFixture[str]


def test_ratios_are_speeds_relative_to_timm(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = FakeClock(), Counter[tuple[str, int]]()

    def side(name: str, seconds: float) -> Any:
        def step(number: int) -> int:
            calls[name, number] += 1
            clock.advance(seconds)
            return 16

        return step

    monkeypatch.setattr(
        bench, "_ours", lambda d, p, n, size: side(f"ours {n}", 1.0 if n == 1 else 0.25)
    )
    monkeypatch.setattr(bench, "_timms", lambda *_: side("timm", 2))
    monkeypatch.setattr(bench.timing, "clock", clock)
    report = bench.bench_loader(load_dataset(small.shards), size=32, batch_size=16, rounds=4)
    assert report["ratio"]["repeats_1"] == {"median": 2, "low": 2, "high": 2}
    assert report["ratio"]["repeats_3"]["median"] == 8
    assert report["images_per_second_per_core"]["timm"]["median"] == 8
    batches = {number for name, number in calls if name == "timm"}
    assert batches == set(range(8))
    assert all(calls[name, number] == (2 if number < 2 else 1) for name, number in calls)


def test_sides_that_do_unequal_work_are_not_compared(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_timms", lambda *_: lambda number: 15)
    with pytest.raises(AssertionError, match="timm"):
        bench.bench_loader(load_dataset(small.shards), size=32, batch_size=16, rounds=3)


def test_timms_side_reads_the_same_tars_with_the_same_policy(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {}
    real = bench.create_loader

    def recorded(dataset: Any, **options: Any) -> Any:
        settings.update(options, loader=real(dataset, **options))
        return settings["loader"]

    monkeypatch.setattr(bench, "create_loader", recorded)
    policy = ViewPolicy(size=48)
    dataset = load_dataset(small.shards)
    step = bench._timms(dataset, tmp_path, policy, 16)
    assert sum(step(number) for number in range(13)) == 13 * 16  # more than two epochs of 96
    pixels, targets = next(iter(settings["loader"].loader))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (16, 3, 48, 48)
    assert targets.shape == (16, 4)
    assert (settings["scale"], settings["ratio"]) == (policy.crop_area, policy.crop_ratio)
    assert (settings["re_prob"], settings["hflip"]) == (policy.erase, policy.flip)
    linked = sorted(path.resolve() for path in tmp_path.glob("*.tar"))
    assert linked == sorted(Path(shard.path).resolve() for shard in dataset.shards)


def test_shards_in_which_timm_finds_no_samples_are_refused() -> None:
    with pytest.raises(DataError, match="finds no samples"):
        next(bench._endless([]))


def test_the_command_prints_ratios_and_goals(small: World, capsys: Capture) -> None:
    words = ("--shards", small.shards, "--size", 32, "--batch-size", 16, "--rounds", 3, "--quiet")
    assert world.cli("bench", "loader", *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["repeats", "repeats", "timm"]
    assert world.cli("bench", "loader", *words, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["goal"] == {"repeats_1": 1.5, "repeats_3": 2.0}
    assert report["images_per_round"] == 32


def test_shards_without_a_number_of_classes_are_measured(small: World) -> None:
    dataset = replace(load_dataset(small.shards), num_classes=None, class_names=None)
    assert bench.loader_rate(dataset, size=32, batch_size=16, workers=0, images=32) > 0
