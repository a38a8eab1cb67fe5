"""A forecast of a run finds its bottleneck, and includes all of its time."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cskd_pipeline.cli.reports import print_report
from cskd_pipeline.data import batches
from cskd_pipeline.pipeline.train import train
from cskd_pipeline.pipeline.trainer import Trainer
from cskd_pipeline.runtime.console import Terminal
from cskd_pipeline.tools import estimate_train
from tests.pipeline import world
from tests.pipeline.conftest import World


def sleep_before(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
    original = getattr(owner, name)

    def slower(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, slower)


def test_a_slow_student_is_the_limit_and_all_of_its_updates_count(
    small: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sleep_before(monkeypatch, Trainer, "parts", 0.4)
    recipe = world.train_recipe(small.shards, small.cache, tmp_path / "run", epochs=2)
    report = estimate_train.plan_train(recipe, updates=6)
    assert not (tmp_path / "run").exists()
    assert report["limit"] == "device"
    rates = report["images_per_second"]
    assert rates["device"] < 16 / 0.4
    assert rates["device"] < rates["loader"]
    summary = train(recipe)
    assert summary["updates"] == report["updates_per_epoch"] * 2
    assert min(report["seconds"], summary["seconds"]) >= summary["updates"] * 0.4


def test_a_slow_disk_is_the_limit(
    small: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sleep_before(monkeypatch, batches, "decode", 0.03)
    recipe = world.train_recipe(small.shards, small.cache, tmp_path / "run", epochs=2)
    report = estimate_train.plan_train(recipe, updates=4)
    assert report["limit"] == "loader"
    assert report["workers_to_feed_the_device"] > 1
    rates = report["images_per_second"]
    assert max(rates["together"], rates["loader"]) < rates["device"]
    print_report(Terminal(), report, estimate_train.printed(report))
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5
    assert "the loader is the bottleneck" in err


def test_a_run_without_a_cache_is_forecast_too(
    small: World,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--shards", small.shards, "--method", "none", "--student", world.STUDENT)
    sets = world.as_flags([*world.train_sets(), *world.VIEWS])
    rest = ("--epochs", 3, "--batch-size", 16, "--updates", 2, "--workers", 0, "--json")
    assert world.cli("plan", "train", *words, *rest, *sets) == 0
    report = world.last_json(capsys.readouterr().out)
    assert report["method"] == "none"
    assert report["epochs"] == 3
    assert report["seconds"] >= 3 * report["seconds_per_epoch"]
    assert report["samples"] == 96


class KnownRate:
    """Replaces ``SteadyRate``: the loader delivers 2 updates/s, the run 1 after 5 seconds."""

    created = 0

    def __init__(self, total: int) -> None:
        self.rate, self.startup = ((2.0, 1.0), (1.0, 5.0))[KnownRate.created]
        KnownRate.created += 1

    def advance(self, count: int) -> None:
        pass


def test_time_and_processes_follow_from_the_rates(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KnownRate, "created", 0)
    monkeypatch.setattr(estimate_train, "SteadyRate", KnownRate)
    recipe = world.train_recipe(small.shards, small.cache, tmp_path, epochs=3)
    recipe = replace(recipe, run=replace(recipe.run, workers=2))
    report = estimate_train.plan_train(recipe, updates=1)
    rates = report["images_per_second"]
    assert (rates["loader"], rates["together"]) == (2.0 * 16, 1.0 * 16)
    assert report["seconds_per_epoch"] == report["updates_per_epoch"]
    assert report["seconds"] == 5.0 + 3 * report["updates_per_epoch"]
    each = rates["loader"] / 2
    needed = report["workers_to_feed_the_device"]
    assert (needed - 1) * each < rates["device"] <= needed * each
