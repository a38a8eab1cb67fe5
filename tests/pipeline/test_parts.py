"""Parts of one cache, dumped by array tasks or several labs: concurrently, or merged later."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cskd_pipeline.cache import manifest as manifest_module
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.pipeline.dump import dump_teacher
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.processes import server

Capture = pytest.CaptureFixture[str]
TASKS = [(shards, views) for shards in ("0:1", "1:3") for views in ("0:2", "2:4")]


def dump_args(small: World, cache: Path, *more: object) -> list[object]:
    """Return the command that dumps the world's cache; ``more`` may select a part."""
    return [
        *("dump-teacher", "--shards", small.shards, "--cache", cache, "--quiet"),
        *("--teacher", world.TEACHER, "--weights", "random", "--workers", 0, "--device", "cpu"),
        *world.as_flags(world.dump_sets()),
        *more,
    ]


def test_concurrent_dumps_of_overlapping_parts_complete_one_cache(
    small: World, tmp_path: Path
) -> None:
    parts = [("--shard-range", "0:2"), ("--shard-range", "1:3")]
    running = [
        server().start(*dump_args(small, tmp_path / "cache", *part), log=tmp_path / f"log {number}")
        for number, part in enumerate(parts)
    ]
    for process in running:
        ended = process.wait()
        assert ended.code == 0, ended.output
    assert world.cache_files(tmp_path / "cache") == world.cache_files(small.cache)


def test_array_tasks_fill_one_cache(small: World, tmp_path: Path) -> None:
    for shards, views in reversed(TASKS):
        part = ("--shard-range", shards, "--view-range", views)
        assert world.cli(*dump_args(small, tmp_path / "cache", *part)) == 0
    assert world.cache_files(tmp_path / "cache") == world.cache_files(small.cache)


def test_caches_of_array_tasks_merge_into_the_bytes_of_one_dump(
    small: World, tmp_path: Path, capsys: Capture
) -> None:
    parts = [tmp_path / f"part {number}" for number in range(len(TASKS))]
    for part, (shards, views) in zip(parts, TASKS, strict=True):
        words = dump_args(small, part, "--shard-range", shards, "--view-range", views)
        assert world.cli(*words) == 0
    capsys.readouterr()
    assert world.cli("cache", "merge", *parts, "--out", tmp_path / "merged", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["units_copied"], report["units_compared"], report["units_missing"]) == (6, 0, 0)
    assert report["complete"]
    assert world.cache_files(tmp_path / "merged") == world.cache_files(small.cache)
    open_cache(tmp_path / "merged").require_done()


def test_slices_cut_by_convert_merge_into_their_source(small: World, tmp_path: Path) -> None:
    slices = [tmp_path / "a", tmp_path / "b"]
    for path, shards in zip(slices, ("0:2", "2:3"), strict=True):
        assert world.cli("cache", "convert", small.cache, path, "--shards", shards, "-q") == 0
    assert world.cli("cache", "merge", *slices, "--out", tmp_path / "merged", "-q") == 0
    assert world.cache_files(tmp_path / "merged") == world.cache_files(small.cache)
    merged, original = open_cache(tmp_path / "merged"), open_cache(small.cache)
    assert merged.manifest.dataset == original.manifest.dataset


@pytest.mark.parametrize(
    ("views", "part", "block"), [(12, (4, 8), 4), (12, (0, 6), 6), (30, (10, 20), 10)]
)
def test_the_automatic_view_block_divides_the_part(
    small: World, tmp_path: Path, views: int, part: tuple[int, int], block: int
) -> None:
    sets = ["cache.view_block=0"]
    recipe = world.dump_recipe(
        small.shards, tmp_path / "c", sets, views=views, encodings='["envelope"]'
    )
    dump_teacher(recipe, shard_range=(2, 3), view_range=part)
    reader = open_cache(tmp_path / "c")
    assert (reader.manifest.views, reader.manifest.view_block) == (views, block)
    reader.require_done(range(*part), [2])
    assert reader.done().sum() == (part[1] - part[0]) // block


@pytest.mark.parametrize(
    ("part", "facts"),
    [
        (("--view-range", "2:6"), ["exceeds the cache", "0:4", "--views"]),
        (
            ("--view-range", "1:3"),
            ["divide into blocks", "4 views, of which 1:3 now, in blocks of 2"],
        ),
    ],
)
def test_invalid_view_ranges_are_refused_and_nothing_is_written(
    small: World, tmp_path: Path, capsys: Capture, part: tuple[str, ...], facts: list[str]
) -> None:
    assert world.cli(*dump_args(small, tmp_path / "c", *part)) == 2
    message = capsys.readouterr().err
    assert all(fact in message for fact in facts), message
    assert not (tmp_path / "c").exists()


@pytest.fixture
def fake_newer_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that fakes a fake_newer_torch torch."""
    version = manifest_module.metadata.version

    def faked(name: str) -> str:
        return "99.0" if name == "torch" else version(name)

    return lambda: monkeypatch.setattr(manifest_module.metadata, "version", faked)


def test_a_dump_with_other_versions_resumes_only_if_they_are_accepted(
    small: World, tmp_path: Path, capsys: Capture, fake_newer_torch: Callable[[], None]
) -> None:
    cache = tmp_path / "c"
    assert world.cli(*dump_args(small, cache, "--shard-range", "2:3")) == 0
    fake_newer_torch()
    assert world.cli(*dump_args(small, cache)) == 1
    message = capsys.readouterr().err
    assert "--accept-versions" in message
    assert "and 99.0" in message
    assert open_cache(cache).done().sum() == 2
    assert world.cli(*dump_args(small, cache, "--accept-versions")) == 0
    [other] = open_cache(cache).manifest.other_versions
    assert other["torch"] == "99.0"
    assert world.cache_files(cache) == world.cache_files(small.cache)


def test_parts_of_other_versions_merge_only_if_they_are_accepted(
    small: World, tmp_path: Path, capsys: Capture, fake_newer_torch: Callable[[], None]
) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    assert world.cli(*dump_args(small, parts[0], "--view-range", "0:2")) == 0
    fake_newer_torch()
    assert world.cli(*dump_args(small, parts[1], "--view-range", "2:4")) == 0
    command = ["cache", "merge", *parts, "--out", tmp_path / "c", "-q"]
    assert world.cli(*command) == 1
    message = capsys.readouterr().err
    assert f"{parts[1]}: torch: " in message
    assert "--accept-versions" in message
    assert not (tmp_path / "c").exists()
    assert world.cli(*command, "--accept-versions") == 0
    [other] = open_cache(tmp_path / "c").manifest.other_versions
    assert other["torch"] == "99.0"
    assert world.cache_files(tmp_path / "c") == world.cache_files(small.cache)
