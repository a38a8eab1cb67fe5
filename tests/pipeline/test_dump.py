"""Stage one as a user runs it: killed, extended, split, summarised."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.errors import OutputError
from cskd_pipeline.models.teacher import Logits, Teacher
from cskd_pipeline.pipeline import unit_writer
from cskd_pipeline.pipeline.dump import dump_teacher
from cskd_pipeline.runtime.distributed import Ranks
from cskd_pipeline.runtime.signals import Requeue
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.processes import server, until


def dump_command(small: World, cache: Path, workers: int) -> list[str]:
    return [
        *("dump-teacher", "--shards", str(small.shards)),
        *("--teacher", world.TEACHER, "--weights", "random", "--cache", str(cache)),
        *("--workers", str(workers), "--device", "cpu"),
        *world.as_flags(world.dump_sets()),
    ]


def test_an_interrupted_dump_keeps_its_units_and_prints_how_to_resume(
    small: World, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    process = server().start(*dump_command(small, cache, 0), log=tmp_path / "log")
    until(lambda: list(cache.glob("digest/c/*/*")))
    process.send(signal.SIGINT)
    ended = process.wait()
    done = open_cache(cache).done()
    assert done.sum() > 0
    if ended.code != 0:  # the last unit may already have been in progress
        assert ended.code == 130
        assert "cskd-pipeline dump-teacher" in ended.output
        assert done.sum() < done.size
    assert "Traceback" not in ended.output


def send_at(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, number: signal.Signals
) -> list[int]:
    """Send a signal at the n-th call of a function; the list counts the calls."""
    original, calls = getattr(owner, name), [0]

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, patched)
    return calls


def test_a_stopped_dump_writes_its_complete_units(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first while the second is computed, the second before the command ends."""
    send_at(monkeypatch, unit_writer, "_unit_data", 2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        dump_teacher(world.dump_recipe(small.shards, tmp_path / "cache"))
    assert open_cache(tmp_path / "cache").done().sum() == 2


def test_a_failed_write_while_a_dump_stops_is_an_error(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_at(monkeypatch, unit_writer, "_unit_data", 1, signal.SIGTERM)

    def full(*args: object) -> bool:
        raise OutputError("no space left")

    monkeypatch.setattr(CacheWriter, "write_unit", full)
    with pytest.raises(OutputError):
        dump_teacher(world.dump_recipe(small.shards, tmp_path / "cache"))


def test_a_schedulers_signal_does_not_wait_for_the_current_unit(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit of 35 samples in two views takes 5 batches: the 7th belongs to the second unit."""
    batches = send_at(monkeypatch, Teacher, "_respond", 7, signal.SIGTERM)
    with pytest.raises(Requeue, match="SIGTERM"):
        dump_teacher(world.dump_recipe(small.shards, tmp_path / "cache"))
    assert batches == [7]
    assert open_cache(tmp_path / "cache").done().sum() == 1
    monkeypatch.undo()
    dump_teacher(world.dump_recipe(small.shards, tmp_path / "cache"))
    assert world.cache_files(tmp_path / "cache") == world.cache_files(small.cache)


def test_extending_a_finished_cache_equals_dumping_all_views_at_once(
    small: World, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for views in (2, 4):
        recipe = world.dump_recipe(small.shards, cache, views=views)
        summary = dump_teacher(recipe)
        assert summary["views"] == views
        assert summary["views_written"] == 2 * summary["samples"]
    assert world.cache_files(cache) == world.cache_files(small.cache)


def test_parts_dumped_separately_in_any_order_give_the_same_cache(
    small: World, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for part in ((2, 3), (0, 2)):
        dump_teacher(world.dump_recipe(small.shards, cache), shard_range=part)
    assert world.cache_files(cache) == world.cache_files(small.cache)


def test_the_summary_has_the_views_written_and_the_teachers_top1(
    small: World, tmp_path: Path
) -> None:
    recipe = world.dump_recipe(small.shards, tmp_path / "cache", ["views.mix=0"])
    summary = dump_teacher(recipe)
    reader = open_cache(tmp_path / "cache")
    correct = total = 0
    for view in range(reader.views):
        for shard, count in enumerate(reader.counts):
            rows = reader.rows("dense", view, shard, np.arange(count))
            correct += int((rows["dense/global"].argmax(1) == reader.labels(shard)).sum())
            total += count
    assert summary["views_written"] == total
    assert 0 < summary["data_wait"] < 1
    assert summary["teacher_top1"] == pytest.approx(100 * correct / total)
    files = (tmp_path / "cache" / "envelope").rglob("c/**/*")
    sizes = [path.stat().st_size for path in files if path.is_file()]
    assert summary["bytes_per_view"]["envelope"] == pytest.approx(sum(sizes) / total, abs=0.5)
    again = dump_teacher(recipe)
    assert (again["views_written"], again["complete"]) == (0, True)
    assert again["data_wait"] is None


def test_data_wait_is_a_share_of_all_ranks_time(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second rank spends nearly all of its time waiting."""

    def gather(self: Ranks, value: Any) -> list[Any]:
        is_count = isinstance(value, list) and len(value) == 4 and isinstance(value[2], float)
        return [value, [1, 8, 0.9e6, 1e6]] if is_count else [value]

    monkeypatch.setattr(Ranks, "gather", gather)
    summary = dump_teacher(world.dump_recipe(small.shards, tmp_path / "cache", views=2))
    assert summary["data_wait"] == pytest.approx(0.9, abs=1e-3)


def test_the_recipe_names_the_data_set(small: World, tmp_path: Path) -> None:
    recipe = world.dump_recipe(small.shards, tmp_path / "c", ["data.name=mine"], views=2)
    dump_teacher(recipe)
    assert open_cache(tmp_path / "c").manifest.dataset.name == "mine"
    assert open_cache(small.cache).manifest.dataset.name != "mine"


def test_batches_span_units_so_that_only_the_last_is_short(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    respond = Teacher._respond

    def record_size(teacher: Teacher, x: Tensor) -> Logits:
        sizes.append(len(x))
        return respond(teacher, x)

    monkeypatch.setattr(Teacher, "_respond", record_size)
    for size in (7, 1000):
        sizes.clear()
        sets = [*world.dump_sets(), "dump.workers=0", f"dump.batch_size={size}"]
        cache = tmp_path / str(size)
        summary = dump_teacher(world.dump_recipe(small.shards, cache, sets=sets))
        units, views = summary["units_written"], summary["views_written"]
        assert units > 2
        assert sizes == [size] * (views // size) + [views % size]
        assert open_cache(cache).done().all()


@pytest.mark.parametrize("ahead", [1, 3])
def test_computing_ahead_of_encoding_changes_no_byte(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """As on a GPU, where the teacher computes the next batch while one is encoded."""
    monkeypatch.setattr(unit_writer, "batches_ahead", lambda device: ahead)
    sets = [*world.dump_sets(), "dump.workers=0"]
    dump_teacher(world.dump_recipe(small.shards, tmp_path / "cache", sets=sets))
    assert world.cache_files(tmp_path / "cache") == world.cache_files(small.cache)
