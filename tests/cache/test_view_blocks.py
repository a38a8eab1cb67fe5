"""File counts are predicted, and view blocks chosen to keep them small."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cskd_pipeline.cache.check import check_bytes, check_structure
from cskd_pipeline.cache.convert import Conversion, convert
from cskd_pipeline.cache.info import describe
from cskd_pipeline.cache.layout import RECORD, stored_arrays
from cskd_pipeline.cache.manifest import CacheManifest, ShardInfo
from cskd_pipeline.cache.merge import merge
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.summary import summarise
from cskd_pipeline.cache.units import FileCounts, choose_view_block, count_files
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.errors import CacheError, UsageError
from tests.cache.factories import BLOCK, COUNTS, VIEWS, dataset, fill, make, manifest, teacher, tree
from tests.serving import serving

IMAGENET, SHARDS, LONGEST = 300, 1024, 1252


def manifest_of_size(
    views: int, shards: int = SHARDS, longest: int = LONGEST, classes: int = 1000, **changes: Any
) -> CacheManifest:
    """Return a manifest with realistic sizes; other fields are toy values."""
    infos = tuple(ShardInfo(f"{n}.tar", longest, 0, "", "", 24) for n in range(shards))
    data = replace(dataset(), num_classes=classes, shards=infos, class_names=None)
    grid = teacher(num_classes=classes, grid=(7, 7))
    fields = {"encodings": ("envelope",), "view_block": 1, **changes}
    return manifest(dataset=data, teacher=grid, views=views, **fields)


def count_on_disk(path: Path) -> FileCounts:
    folders = [path, *(p for p in path.rglob("*") if p.is_dir())]
    return FileCounts(len(tree(path)), max(len(list(folder.iterdir())) for folder in folders))


@pytest.mark.parametrize(
    ("counts", "views", "block", "encodings"),
    [
        ((1,) * 12, 1, 1, ("dense", "envelope")),  # the largest folder has a file for each shard
        ((3, 1), 6, 3, ("dense",)),  # a file for each view
        ((2,), 2, 2, ("envelope",)),  # a file for each unit
        ((1,), 15, 1, ("envelope",)),  # the largest folder has one for each block
    ],
)
def test_the_predicted_file_counts_match_the_disk(
    tmp_path: Path, counts: tuple[int, ...], views: int, block: int, encodings: tuple[str, ...]
) -> None:
    shape = {"views": views, "view_block": block, "encodings": encodings}
    writer = make(tmp_path / "c", dataset=dataset(counts), **shape)
    assert count_files(writer.manifest) == count_on_disk(tmp_path / "c")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 50),
        ({"shards": 1}, 10),
        ({"shards": 1, "encodings": ("dense",)}, 6),  # 8 views of 123 MB fit; 6 divides 300
        ({"views": 30}, 10),
        ({"encodings": ("topk",)}, 100),
        ({"encodings": ("dense",)}, 6),  # a file for each view, whatever the block is
        ({"views": 7}, 7),
        ({"views": 11, "shards": 1}, 1),
        ({"views": 302}, 2),
        ({"views": 12, "shards": 1, "longest": 100_000, "encodings": ("dense", "envelope")}, 1),
        ({"views": 1, "shards": 1, "longest": 1, "classes": 1, "encodings": ("dense",)}, 1),
    ],
)
def test_the_chosen_block_divides_the_views_and_fits_in_memory(
    changes: dict[str, Any], expected: int
) -> None:
    cache_manifest = manifest_of_size(**{"views": IMAGENET, **changes})
    assert choose_view_block(cache_manifest, cache_manifest.views) == expected


def test_300_views_of_imagenet_are_within_the_hubs_limits() -> None:
    imagenet = manifest_of_size(IMAGENET)
    current = count_files(replace(imagenet, view_block=10))
    assert current.files == 187_403
    assert current.excess == "more than the 100,000 per repository that the Hub recommends"
    few = count_files(replace(imagenet, view_block=choose_view_block(imagenet, IMAGENET)))
    assert few.files < 40_000
    assert few.largest_folder < 5_000
    assert few.excess is None
    dense = manifest_of_size(IMAGENET, encodings=("dense",))  # no block helps
    assert count_files(replace(dense, view_block=choose_view_block(dense, IMAGENET))).excess
    both = FileCounts(100_001, 10_001)
    assert (
        both.excess
        == "more than the 100,000 per repository and 10,000 per folder that the Hub recommends"
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache, ``old``, and its repacked copy, ``new``."""
    path = tmp_path_factory.mktemp("blocks")
    make(path / "old")
    convert(path / "old", path / "new", Conversion(view_block=VIEWS))
    return path


def test_a_repacked_cache_has_the_same_responses(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CSKD_CACHE_DIR", str(tmp_path))
    assert count_on_disk(both / "new").files < count_on_disk(both / "old").files
    old = open_cache(both / "old")
    with serving(both) as served:
        for new in (open_cache(both / "new"), open_cache(f"{served.url}/new")):
            assert new.manifest.view_block == VIEWS
            for view, shard in product(range(VIEWS), range(len(COUNTS))):
                for name in old.encodings:
                    rows = (c.rows(name, view, shard, range(COUNTS[shard])) for c in (new, old))
                    for mine, theirs in zip(*(result.items() for result in rows), strict=True):
                        assert mine[0] == theirs[0]
                        assert mine[1].tobytes() == theirs[1].tobytes()
                for read in ("seeds", "view_digests", "top1_of"):
                    mine, theirs = (getattr(cache, read)(view, shard) for cache in (new, old))
                    assert np.array_equal(mine, theirs)


def test_zarr_reads_the_same_arrays_from_a_repacked_cache(both: Path) -> None:
    old, new = (zarr.open_group(both / name, mode="r") for name in ("old", "new"))
    for name in arrays_of(both / "old"):
        assert np.asarray(old[name][...]).tobytes() == np.asarray(new[name][...]).tobytes(), name


def arrays_of(path: Path) -> list[str]:
    """Return the arrays that do not depend on the view block."""
    return [name for name in stored_arrays(open_cache(path).manifest) if name != RECORD]


def test_a_repacked_cache_is_verified_pinned_and_merged(both: Path, tmp_path: Path) -> None:
    digest = open_cache(both / "new").digest()
    new = open_cache(f"{both / 'new'}@sha256:{digest}")
    units = np.argwhere(new.done()).tolist()
    assert check_structure(new.store, units) + check_bytes(new, units) == []
    slices = [tmp_path / "a", tmp_path / "b"]
    for path, shards in zip(slices, ((0, 1), (1, 3)), strict=True):
        convert(both / "new", path, Conversion(shards=shards))
    merge(slices, tmp_path / "full")
    assert open_cache(tmp_path / "full").digest() == digest
    with pytest.raises(CacheError, match="do not belong together"):
        merge([both / "old", both / "new"], tmp_path / "mixed")


def test_repacking_can_be_reversed(both: Path, tmp_path: Path) -> None:
    convert(both / "new", tmp_path / "c", Conversion(view_block=BLOCK))
    old, new = tree(both / "old"), tree(tmp_path / "c")
    assert [name for name in old if old[name] != new[name]] == ["zarr.json"]
    assert open_cache(both / "old").digest() == open_cache(tmp_path / "c").digest()


def test_finished_units_of_an_unfinished_cache_are_repacked(tmp_path: Path) -> None:
    writer = CacheWriter.create(tmp_path / "a", manifest())
    fill(writer, [unit for unit in writer.todo() if unit.block == 0 or unit.shard == 1])
    result = convert(tmp_path / "a", tmp_path / "b", Conversion(view_block=VIEWS))
    assert (result["units_written"], result["units_missing"]) == (1, 2)
    fill(writer)
    result = convert(tmp_path / "a", tmp_path / "b")
    assert (result["units_written"], result["complete"]) == (2, True)


def test_an_impossible_view_block_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(UsageError, match="does not divide the number of views"):
        convert(tmp_path / "a", tmp_path / "b", Conversion(view_block=3))
    assert not (tmp_path / "b").exists()
    convert(tmp_path / "a", tmp_path / "b", Conversion(view_block=VIEWS))
    before = tree(tmp_path / "b")
    with pytest.raises(UsageError, match="fixed when it is created"):
        convert(tmp_path / "a", tmp_path / "b", Conversion(view_block=1))
    assert tree(tmp_path / "b") == before
    assert convert(tmp_path / "a", tmp_path / "b")["units_written"] == 0


def test_info_counts_the_files_and_suggests_how_to_reduce_them(tmp_path: Path) -> None:
    make(tmp_path / "c")
    info = describe(open_cache(tmp_path / "c"))
    counts = count_on_disk(tmp_path / "c")
    assert (info["files"], info["largest_folder"]) == counts
    assert summarise(info)["files"] == str(counts)
    files = summarise({**info, "files": 187_403, "largest_folder": SHARDS})["files"]
    assert files == (
        "187,403 files, at most 1,024 in a folder, more than the 100,000 per repository that the "
        "Hub recommends: reduce them with cache convert --view-block 0 or, for dense and dense-q8, "
        "which have a file for each view and shard, with another --encoding"
    )
