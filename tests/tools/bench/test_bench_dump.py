"""``bench dump`` runs a dump and its parts in turn, and counts the labels that variants change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from cskd_pipeline.config.reading import load_recipe
from cskd_pipeline.config.sections import DumpRecipe
from cskd_pipeline.errors import DataError
from cskd_pipeline.models.teacher import Logits
from cskd_pipeline.pipeline import dump
from cskd_pipeline.tools.bench import bench_dump as bench
from cskd_pipeline.tools.bench import sampled_dump
from cskd_pipeline.tools.bench.sampled_dump import SampledDump
from tests.clock import FakeClock
from tests.pipeline import world
from tests.pipeline.conftest import World

Capture = pytest.CaptureFixture[str]
SETS = ["data.num_classes=4", f"teacher.kwargs={world.TEACHER_KWARGS}"]


def recipe_of(small: World, *sets: str) -> DumpRecipe:
    flags = {
        "data.shards": str(small.shards),
        "teacher.name": world.TEACHER,
        "teacher.weights": "random",
        "dump.workers": 0,
        "dump.device": "cpu",
        "dump.batch_size": 16,
    }
    return load_recipe(DumpRecipe, None, [*world.VIEWS, *SETS, *sets], flags)


def test_each_side_has_its_rate_and_the_slower_of_loader_and_teacher_is_the_limit(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()

    def dumped(sampled: SampledDump, views: int) -> Iterator[int]:
        for _ in range(80):
            clock.advance(0.2)
            yield 1

    real = sampled_dump.unit_batches
    monkeypatch.setattr(SampledDump, "dump", dumped)

    def slow(dataset: Any, units: Any, *arguments: Any) -> Any:
        for batch in real(dataset, units, *arguments):
            clock.advance(len(batch) * (0.05 if len(units[0][1]) == 10 else 0.1))
            yield batch

    monkeypatch.setattr(sampled_dump, "unit_batches", slow)
    monkeypatch.setattr(bench.timing, "clock", clock)
    monkeypatch.setattr(bench.timing, "wait_for", lambda device: clock.advance(16 * 0.1))
    report = bench.bench_dump(recipe_of(small), images=8, rounds=3, with_variants=False)
    rates = {name: spread["median"] for name, spread in report["views_per_second"].items()}
    assert rates == pytest.approx(
        {"dump": 5, "teacher": 10, "loader": 20, "block_10": 20, "block_1": 10}
    )
    assert report["ratio"]["dump_to_teacher"]["median"] == pytest.approx(0.5)
    assert report["ratio"]["blocks"]["median"] == pytest.approx(2)
    assert report["limit"] == "teacher"
    assert report["goal"] == {"dump_to_teacher": 0.95, "blocks": 1.4}


def test_changed_labels_are_counted_over_all_locations_and_ratios() -> None:
    draws = torch.Generator().manual_seed(0)
    spatial = torch.randn(4, 5, 2, 2, generator=draws).half()
    logits = Logits(spatial, spatial.float().mean((2, 3)).half())
    assert bench._changed([logits], [logits]) == (0.0, 0.0)
    changed = logits.spatial.clone()
    changed[0, :, 0, 0] = 0
    top = logits.spatial[0, :, 0, 0].argmin()
    changed[0, top, 0, 0] = 60000  # the top class at every r except 0
    other = Logits(changed, logits.global_)
    assert bench._changed([logits], [other]) == (4 / (5 * 16), 0.0)
    global_ = logits.global_.roll(1, dims=1)
    assert bench._changed([logits], [Logits(logits.spatial, global_)])[1] == 1.0


def test_variants_are_teachers_with_other_settings_than_float32(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(small)
    dataset, teacher = bench.open_stage_one(recipe)
    sampled = SampledDump.of(recipe, dataset, teacher, dataset.samples)
    monkeypatch.setattr(dump, "load_dataset", None)  # the shards are not opened again
    resident = bench.resident_views(sampled)
    assert {len(views) for views in resident} == {16}
    clock = FakeClock()

    def ticking() -> float:
        clock.advance(0.5)
        return clock()

    monkeypatch.setattr(bench.timing, "clock", ticking)
    report = bench.variants(sampled, resident, 3, compile=False)
    assert list(report) == ["float32", "channels_last", "bfloat16", "bfloat16 channels_last"]
    assert report["float32"]["hard_labels_changed"] == 0.0
    halves = bench._with(sampled, "bfloat16 channels_last")
    plain = bench._with(sampled, "float32")
    assert (halves.precision, halves.channels_last) == ("bfloat16", True)
    assert (plain.precision, plain.channels_last) == ("float32", False)
    assert all(row["ratio"]["median"] == 1.0 for row in report.values())


def test_too_few_images_for_a_batch_are_refused(small: World) -> None:
    with pytest.raises(DataError, match="batches of 100000"):
        bench.bench_dump(
            replace(recipe_of(small), dump=replace(recipe_of(small).dump, batch_size=100_000)),
            images=4,
            rounds=3,
            with_variants=False,
        )


def test_the_command_prints_rates_the_limit_and_variants(small: World, capsys: Capture) -> None:
    words: tuple[Any, ...] = ("--shards", small.shards, "--teacher", world.TEACHER)
    words += ("--weights", "random", "--images", 8, "--rounds", 3, "--batch-size", 16)
    words += ("--workers", 1, "--device", "cpu", "--size", 32, *world.as_flags(SETS))
    assert world.cli("bench", "dump", *words, "--variants") == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[2:7]] == [
        *("dump", "bare", "loader,", "loader,", "loader,")
    ]
    assert " is the bottleneck: the loader delivers " in err
    assert world.cli("bench", "dump", *words, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["workers"], report["variants"]) == (1, {})
    assert 8 <= report["images"] <= 10  # images from every tar
    assert world.cli("bench", "dump", *words, "--compile") == 2
