"""A converted cache equals a dump in the same encodings and records its source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cskd_pipeline.cache import convert as converting
from cskd_pipeline.cache.convert import Conversion, convert
from cskd_pipeline.cache.manifest import CacheManifest
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.distill.encodings import ENCODINGS
from cskd_pipeline.errors import CacheError, UsageError
from tests.cache.factories import BLOCK, COUNTS, VIEWS, data_files, fill, make, manifest, tree


def convert_to(
    source: Path | str,
    target: Path,
    *encodings: str,
    stopped: Callable[[], bool] = lambda: False,
    **options: Any,
) -> dict[str, Any]:
    return convert(source, target, Conversion(encodings, **options), stopped=stopped)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("convert") / "dense"
    make(path, encodings=("dense",))
    return path


@pytest.mark.parametrize("rows", [1, 2, 4, 64])
def test_converted_rows_equal_the_encoded_logits(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """The batch size of the encoding does not matter, nor a smaller last batch."""
    monkeypatch.setattr(converting, "_ROWS", rows)
    names = ("envelope", "topk", "dense-q8", "sampled")
    result = convert_to(source, tmp_path / "c", *names)
    assert result["complete"] is True
    assert result["units_missing"] == 0
    assert result["views_written"] == VIEWS * sum(COUNTS)
    old, new = open_cache(source), open_cache(tmp_path / "c")
    assert tuple(new.encodings) == names
    for view in range(VIEWS):
        for shard, count in enumerate(COUNTS):
            dense = old.rows("dense", view, shard, range(count))
            logits = [torch.from_numpy(values) for values in dense.values()]
            seeds = old.seeds(view, shard)
            for name in names:
                rows = new.rows(name, view, shard, range(count))
                for array, values in ENCODINGS[name].encode(*logits, seeds).items():
                    assert np.array_equal(rows[array], values.numpy()), array


def test_metadata_is_copied_unchanged(source: Path, tmp_path: Path) -> None:
    convert_to(source, tmp_path / "c", "envelope")
    old, new = open_cache(source), open_cache(tmp_path / "c")
    for shard in range(len(COUNTS)):
        assert new.keys(shard) == old.keys(shard)
        assert np.array_equal(new.labels(shard), old.labels(shard))
        assert np.array_equal(new.image_crc32(shard), old.image_crc32(shard))
        for view in range(VIEWS):
            assert np.array_equal(new.seeds(view, shard), old.seeds(view, shard))
            assert np.array_equal(new.view_digests(view, shard), old.view_digests(view, shard))
            assert np.array_equal(new.top1_of(view, shard), old.top1_of(view, shard))
    assert new.top1() == old.top1()
    mine, theirs = new.manifest.to_json(), old.manifest.to_json()
    assert mine.pop("parent") == {
        "digest": old.digest(),
        "manifest_sha256": old.manifest.digest(),
        "created": theirs["created"],
        "encodings": ["dense"],
        "views": VIEWS,
        "shards": len(COUNTS),
    }
    for name in ("encodings", "created"):
        del mine[name], theirs[name]
    assert mine == theirs


def test_a_copy_in_the_same_encodings_has_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path / "a")
    convert_to(tmp_path / "a", tmp_path / "b")
    old, new = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert old.keys() == new.keys()
    assert [name for name in old if old[name] != new[name]] == ["zarr.json"]


@pytest.mark.parametrize(("views", "block"), [(1, 1), (2, BLOCK), (3, 3)])
def test_a_subset_of_views_and_shards_is_converted(
    source: Path, tmp_path: Path, views: int, block: int
) -> None:
    convert_to(source, tmp_path / "c", "dense", views=views, shards=(1, 3))
    old, new = open_cache(source), open_cache(tmp_path / "c")
    assert new.manifest.dataset.shards == old.manifest.dataset.shards[1:3]
    assert (new.views, new.manifest.view_block) == (views, block)
    for view in range(views):
        for shard, count in enumerate(COUNTS[1:]):
            mine = new.rows("dense", view, shard, range(count))
            theirs = old.rows("dense", view, shard + 1, range(count))
            assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
            assert new.keys(shard) == old.keys(shard + 1)
            assert np.array_equal(new.seeds(view, shard), old.seeds(view, shard + 1))
            assert np.array_equal(new.top1_of(view, shard), old.top1_of(view, shard + 1))


def test_more_views_extend_a_converted_cache(source: Path, tmp_path: Path) -> None:
    convert_to(source, tmp_path / "c", "envelope", views=BLOCK)
    result = convert_to(source, tmp_path / "c", "envelope")
    assert (result["views"], result["complete"]) == (VIEWS, True)
    assert result["views_written"] == (VIEWS - BLOCK) * sum(COUNTS)
    convert_to(source, tmp_path / "full", "envelope")
    for name in data_files(tmp_path / "full"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "full" / name).read_bytes()


def test_an_interrupted_conversion_resumes(source: Path, tmp_path: Path) -> None:
    interruptions = iter([False, False, True])
    with pytest.raises(KeyboardInterrupt):
        convert_to(source, tmp_path / "c", "envelope", stopped=lambda: next(interruptions))
    assert open_cache(tmp_path / "c").done().sum() == 2
    result = convert_to(source, tmp_path / "c", "envelope")
    assert result["units_written"] == VIEWS // BLOCK * len(COUNTS) - 2
    convert_to(source, tmp_path / "full", "envelope")
    files = data_files(tmp_path / "full")
    assert files == data_files(tmp_path / "c")
    for name in files:
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "full" / name).read_bytes()


def test_finished_units_of_an_unfinished_cache_are_converted(tmp_path: Path) -> None:
    writer = CacheWriter.create(tmp_path / "a", manifest(encodings=("dense",)))
    fill(writer, writer.todo(shards=[1]))
    result = convert_to(tmp_path / "a", tmp_path / "b", "envelope")
    assert (result["units_written"], result["units_missing"]) == (2, 4)
    assert result["complete"] is False
    assert open_cache(tmp_path / "b").done().tolist() == [[False, True, False]] * 2
    fill(writer)
    result = convert_to(tmp_path / "a", tmp_path / "b", "envelope")
    assert (result["units_written"], result["units_missing"]) == (4, 0)
    assert result["complete"] is True


def test_a_larger_block_waits_for_all_its_source_blocks(tmp_path: Path) -> None:
    """A block of three views takes two from the source's first block and one from its second."""
    writer = CacheWriter.create(tmp_path / "a", manifest(encodings=("dense",)))
    fill(writer, [unit for unit in writer.todo() if unit.block == 0 or unit.shard == 1])
    result = convert_to(tmp_path / "a", tmp_path / "b", "envelope", views=3)
    assert (result["units_written"], result["units_missing"]) == (1, 2)
    assert open_cache(tmp_path / "b").done().tolist() == [[False, True, False]]
    fill(writer)
    result = convert_to(tmp_path / "a", tmp_path / "b", "envelope", views=3)
    assert (result["units_written"], result["complete"]) == (2, True)


def test_converting_without_stored_logits_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a", encodings=("envelope",))
    with pytest.raises(CacheError, match="cannot be converted to topk") as caught:
        convert_to(tmp_path / "a", tmp_path / "b", "envelope", "topk")
    assert caught.value.expected is not None
    assert "dense" in caught.value.expected
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "options", [{"views": 5}, {"views": 0}, {"shards": (0, 4)}, {"shards": (2, 2)}]
)
def test_nonexistent_views_and_shards_are_refused(
    source: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="the cache"):
        convert_to(source, tmp_path / "c", "envelope", **options)
    assert not (tmp_path / "c").exists()


def test_a_cache_is_not_converted_into_itself(source: Path, tmp_path: Path) -> None:
    before = tree(source)
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link"):
        with pytest.raises(UsageError, match="into itself"):
            convert_to(source, target, "envelope")
    assert tree(source) == before


def test_a_target_with_a_different_manifest_is_refused(source: Path, tmp_path: Path) -> None:
    make(tmp_path / "c", encodings=("envelope",), root_seed=8)
    before = tree(tmp_path / "c")
    with pytest.raises(CacheError, match="another cache") as caught:
        convert_to(source, tmp_path / "c", "envelope")
    assert any("root_seed" in problem for problem in caught.value.problems)
    assert tree(tmp_path / "c") == before


def test_the_parent_round_trips_and_is_validated() -> None:
    parent = manifest().as_parent(None)
    child = manifest(parent=parent)
    assert CacheManifest.from_json(child.to_json()) == child
    assert child.conflicts(manifest()) == []
    assert "parent" not in manifest().to_json()
    document = child.to_json()
    document["parent"]["manifest_sha256"] = "x"
    with pytest.raises(Exception, match="manifest_sha256"):
        CacheManifest.from_json(document)
