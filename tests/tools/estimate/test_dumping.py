"""A forecast of a dump matches the dump's bytes, and includes all of its time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cskd_pipeline.cache.info import describe
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cli.reports import print_report
from cskd_pipeline.config.reading import load_recipe
from cskd_pipeline.config.sections import DumpRecipe
from cskd_pipeline.distill.encodings import ENCODINGS
from cskd_pipeline.models.teacher import Logits
from cskd_pipeline.pipeline.dump import dump_teacher
from cskd_pipeline.runtime.console import Terminal
from cskd_pipeline.tools import estimate_dump
from tests.cache.factories import CLASSES
from tests.cache.factories import teacher as teacher_manifest
from tests.clock import FakeClock
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.tools.estimate import slow

VIEWS = 6


def recipe_of(shards: Path, cache: Path, encodings: list[str]) -> DumpRecipe:
    return load_recipe(
        DumpRecipe,
        None,
        [
            *world.VIEWS,
            f"cache.encodings={json.dumps(encodings)}",
            f"cache.views={VIEWS}",
            "cache.view_block=2",
            "dump.batch_size=16",
        ],
        {
            "data.shards": str(shards),
            "cache.path": str(cache),
            "teacher.name": "tests.tools.estimate.slow:teacher",
            "teacher.weights": "random",
            "dump.workers": 0,
            "dump.device": "cpu",
        },
    )


@pytest.fixture(scope="module")
def both(
    small: World,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the forecast, the dump's summary, and the description of its cache."""
    path = tmp_path_factory.mktemp("plan") / "cache"
    recipe = recipe_of(small.shards, path, list(ENCODINGS))
    recipe = replace(recipe, cache=replace(recipe.cache, sampled_draws=2))
    report = estimate_dump.plan_dump(recipe, views=(VIEWS, 60), devices=(1, 4))
    assert not path.exists()
    return report, dump_teacher(recipe), describe(open_cache(path))


def row(report: dict[str, Any], views: int, *encodings: str) -> dict[str, Any]:
    (match,) = (
        row
        for row in report["forecast"]
        if (row["views"], tuple(row["encodings"])) == (views, encodings)
    )
    return dict(match)


def test_bytes_match_the_dump(both: tuple[dict[str, Any], ...]) -> None:
    report, _, info = both
    for name in ENCODINGS:
        assert report["bytes_per_view"][name] == pytest.approx(
            info["encodings"][name]["bytes_per_view"], rel=0.15
        )
    size = row(report, VIEWS, *ENCODINGS)["bytes"]
    assert size == pytest.approx(info["bytes"] - info["bytes_by_array"]["metadata"], rel=0.15)
    assert row(report, 60, *ENCODINGS)["bytes"] == pytest.approx(10 * size, rel=1e-3)
    for name in ("files", "largest_folder"):
        assert row(report, VIEWS, *ENCODINGS)[name] == info[name]


def test_a_slow_teacher_is_the_limit_and_all_of_its_batches_count(
    both: tuple[dict[str, Any], ...],
) -> None:
    report, summary, _ = both
    assert report["limit"] == "device"
    forecast = row(report, VIEWS, *ENCODINGS)["seconds"]
    batches = VIEWS * 96 / 16
    assert min(forecast, summary["seconds"]) >= batches * slow.SECONDS


def test_more_devices_share_the_time(both: tuple[dict[str, Any], ...]) -> None:
    for entry in both[0]["forecast"]:
        one, four = entry["device_seconds"]["1"], entry["device_seconds"]["4"]
        assert one == pytest.approx(4 * four)
        assert one <= entry["seconds"]


def test_every_encoding_and_number_of_views_is_forecast(both: tuple[dict[str, Any], ...]) -> None:
    report = both[0]
    listed = [(row["views"], tuple(row["encodings"])) for row in report["forecast"]]
    stored = [*((name,) for name in ENCODINGS), tuple(ENCODINGS)]
    assert listed == [(views, names) for views in (VIEWS, 60) for names in stored]
    assert report["dataset"]["samples"] == 96


def test_the_table_has_a_row_per_encoding_and_number_of_views(
    both: tuple[dict[str, Any], ...], capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(Terminal(), both[0], estimate_dump.printed(both[0]))
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 + 2 * (len(ENCODINGS) + 1)
    assert "the device is the bottleneck" in err


def test_the_command_forecasts_and_leaves_no_files(
    small: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sets = world.as_flags([*world.VIEWS, f"teacher.kwargs={world.TEACHER_KWARGS}"])
    words = ("--shards", small.shards, "--teacher", world.TEACHER, "--weights", "random")
    rest = ("--views", 4, "--devices", 2, "--images", 32, "--workers", 0, "--batch-size", 16)
    assert world.cli("plan", "dump", *words, *rest, *sets, "--json") == 0
    report = world.last_json(capsys.readouterr().out)
    assert report["measured"]["samples"] == 33  # 11 of each of three tars
    assert report["measured"]["workers"] == 0
    assert [row["encodings"] for row in report["forecast"]] == [[name] for name in ENCODINGS]
    assert list(tmp_path.iterdir()) == []


def test_a_short_batch_takes_the_teacher_as_long_as_a_full_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dump has full batches; a trial's short ones are padded."""
    clock = FakeClock()

    def logits(batch: Any) -> Logits:
        clock.advance(8.0)  # however many views there are
        return Logits(torch.zeros(batch.count, 2, 1, 1), torch.zeros(batch.count, 2))

    monkeypatch.setattr(estimate_dump.time, "perf_counter", clock)
    teacher = SimpleNamespace(batch_size=16, name="teacher")
    sampled: Any = SimpleNamespace(logits=logits, teacher=teacher, manifest=None)
    batches: Any = [SimpleNamespace(count=count) for count in (3, 16, 5)]
    seconds, responses = estimate_dump._time_teacher(sampled, batches)
    assert seconds == 8.0 / 16
    assert len(responses) == 24


# --- the arithmetic, on invented rates ------------------------------------------------------------

SIZES = {
    "dense": 1000.0,
    "envelope": 10.0,
    "dense-q8": 500.0,
    "sampled": 80.0,
    "topk": 100.0,
    estimate_dump.COMMON: 7.0,
}
COSTS = {"dense": 0.0, "envelope": 10.0, "dense-q8": 0.0, "topk": 0.0, "sampled": 0.0}
TRIAL = estimate_dump.DumpTrial(
    samples=10,
    views=20,
    workers=2,
    loader_views_per_second=50.0,
    teacher_views_per_second=100.0,
    dump_views_per_second=40.0,
    startup_seconds=3.0,
    encode_ms_per_view=COSTS,
    bytes_per_view=SIZES,
)


def forecast(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    trial: estimate_dump.DumpTrial = TRIAL,
    *,
    counts: tuple[int, ...] = (600, 400),
    views: int = 2,
) -> dict[str, Any]:
    """Forecast a dump, by default of 1000 samples in two views, encoded as ``dense``."""
    dataset = SimpleNamespace(name="invented", samples=sum(counts), counts=counts)
    teacher = SimpleNamespace(name="invented", num_classes=CLASSES, device=torch.device(device))
    monkeypatch.setattr(estimate_dump, "teacher_info", lambda *_: teacher_manifest())
    monkeypatch.setattr(estimate_dump, "open_stage_one", lambda *_: (dataset, teacher))
    monkeypatch.setattr(estimate_dump, "try_dump", lambda *_: trial)
    recipe = recipe_of(Path("shards"), Path("cache"), ["dense"])
    return estimate_dump.plan_dump(recipe, views=(views,), devices=(1, 4))


def test_more_files_than_the_hub_recommends_give_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    report = forecast(monkeypatch, "cpu", counts=(10, 20))
    assert not caplog.messages
    # Two tar shards, one block of two views: per shard 3 files, 4 for its unit and 3 of dense
    # (global logits and two views), and 11 documents.
    assert row(report, 2, "dense")["files"] == 2 * (3 + 4 + 3) + 11
    assert row(report, 2, "dense")["largest_folder"] == 9
    report = forecast(monkeypatch, "cpu", counts=(10,) * 1024, views=300)
    assert row(report, 300, "envelope")["files"] > 900_000
    (warning,) = caplog.messages  # only for the recipe's encodings
    assert warning.startswith("300 views in dense: ")
    assert "more than the 100,000 per repository that the Hub recommends" in warning
    assert "cache.view_block=0" in warning


def test_bytes_include_seeds_and_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    report = forecast(monkeypatch, "cpu")
    for name in ENCODINGS:
        assert row(report, 2, name)["bytes"] == 2000 * (SIZES[name] + 7)


def test_time_is_startup_plus_views_at_the_rate_of_the_dump(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loader is the limit: the device's cost of an encoding changes nothing."""
    report = forecast(monkeypatch, "cuda")
    assert report["limit"] == "loader"
    for name in ENCODINGS:
        assert row(report, 2, name)["seconds"] == pytest.approx(3.0 + 2000 / 40)


def test_the_cost_of_an_encoding_counts_if_the_device_is_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A view of envelope takes the device twice as long as one of dense."""
    report = forecast(monkeypatch, "cuda", replace(TRIAL, loader_views_per_second=400.0))
    assert report["limit"] == "device"
    assert row(report, 2, "dense")["seconds"] == pytest.approx(3.0 + 2000 / 40)
    assert row(report, 2, "envelope")["seconds"] == pytest.approx(3.0 + 2000 / 20)


@pytest.mark.parametrize(
    ("device", "dense", "envelope"), [("cuda", 100.0, 50.0), ("cpu", 40.0, 40.0)]
)
def test_gpus_have_separate_loaders_and_cpus_share_cores(
    monkeypatch: pytest.MonkeyPatch, device: str, dense: float, envelope: float
) -> None:
    report = forecast(monkeypatch, device)
    for name, rate in (("dense", dense), ("envelope", envelope)):
        seconds = row(report, 2, name)["device_seconds"]
        assert seconds == pytest.approx({"1": 2000 / rate, "4": 2000 / (4 * rate)})


@pytest.mark.parametrize(
    ("workers", "loader", "needed"), [(2, 50.0, 4), (2, 400.0, 1), (0, 30.0, 4), (4, 100.0, 4)]
)
def test_the_number_of_loader_processes_follows_from_their_rate(
    monkeypatch: pytest.MonkeyPatch, workers: int, loader: float, needed: int
) -> None:
    """The device processes 100 views/s; with 2 processes delivering 50 together, it needs 4."""
    report = forecast(
        monkeypatch, "cuda", replace(TRIAL, workers=workers, loader_views_per_second=loader)
    )
    assert report["workers_to_feed_a_device"] == needed
