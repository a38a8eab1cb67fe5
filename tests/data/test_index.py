"""Opening a data set, and describing it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cskd_pipeline.cache.manifest import DatasetManifest
from cskd_pipeline.data import index as index_module
from cskd_pipeline.data import shards as shards_module
from cskd_pipeline.data.describe import describe, index_shards
from cskd_pipeline.data.index import (
    Dataset,
    find_class_names,
    load_dataset,
    name_of,
    refuse_duplicate_keys,
)
from cskd_pipeline.data.shards import TarShard
from cskd_pipeline.errors import ClassesError, DataError, ImageError, ManifestError, ShardError
from cskd_pipeline.runtime.progress import listen
from tests.conftest import COUNTS
from tests.images import CLASSES, Sample, sample, samples, write_shard, write_shards


class RecordedProgress:
    """Progress that records units, totals and counts."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}
        self.totals: dict[str, int | None] = {}
        self.unit = ""

    @contextmanager
    def show(self, total: int | None, unit: str, description: str, done: int) -> Iterator[Any]:
        self.totals[unit], self.unit = total, unit
        yield self

    def advance(self, count: int = 1) -> None:
        self.done[self.unit] = self.done.get(self.unit, 0) + count


def test_shards_are_opened_in_order_with_names_and_counts(shards: Path) -> None:
    dataset = load_dataset(shards)
    assert dataset.counts == COUNTS
    assert dataset.samples == sum(COUNTS)
    assert dataset.class_names == CLASSES
    assert dataset.num_classes == len(CLASSES)
    assert dataset.name == "train"
    assert dataset.manifest is None


def test_a_manifest_describes_the_shards(shards: Path) -> None:
    progress = RecordedProgress()
    listen(progress)
    manifest = index_shards(shards)
    listen(None)  # opening shards reports progress too
    paths = sorted(shards.glob("*.tar"))
    for info, path, shard in zip(manifest.shards, paths, load_dataset(shards).shards, strict=True):
        assert info.name == path.name
        assert info.bytes == path.stat().st_size
        assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (info.count, info.keys_sha256) == (len(shard), shard.keys_sha256)
    total = sum(path.stat().st_size for path in paths)
    assert progress.done == {"shards": 4, "bytes": total}
    assert progress.totals == {"shards": 4, "bytes": total}
    assert DatasetManifest.from_json(manifest.to_json()) == manifest


def test_a_data_set_opened_with_its_manifest_reads_no_tar(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    manifest = index_shards(shards, name="birds & others")
    manifest.save(tmp_path / "copy/manifest.json")
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "read_index", None)
        dataset = load_dataset(tmp_path / "copy/manifest.json")
        assert dataset.counts == COUNTS
        assert dataset.shard_ids == manifest.shard_ids
        assert (dataset.name, dataset.num_classes) == ("birds & others", 5)
        assert describe(dataset) == manifest
    assert next(dataset.shards[0].read_images([0]))


def test_shards_in_several_folders_have_relative_names(
    tmp_path: Path,
) -> None:
    write_shard(tmp_path / "a.tar", samples(0, 2))
    (tmp_path / "more").mkdir()
    write_shard(tmp_path / "more/b.tar", samples(2, 2))
    spec = [tmp_path / "a.tar", tmp_path / "more/b.tar"]
    manifest = index_shards(spec, num_classes=5)
    assert [shard.name for shard in manifest.shards] == ["a.tar", "more/b.tar"]
    manifest.save(tmp_path / "manifest.json")
    assert load_dataset(tmp_path / "manifest.json").counts == (2, 2)


def test_a_tar_whose_size_differs_from_the_manifest_is_refused(
    tmp_path: Path, shards: Path
) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    index_shards(shards).save(tmp_path / "copy/manifest.json")
    with open(tmp_path / "copy/train-0002.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ShardError, match="1 of 4 shards do not match the manifest") as caught:
        load_dataset(tmp_path / "copy/manifest.json")
    assert "train-0002.tar" in caught.value.problems[0]


def test_a_tar_whose_sample_count_differs_from_its_info_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, (3, 4))
    split = {"filenames": ["train-0000.tar", "train-0001.tar"], "shard_lengths": [3, 5]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    with pytest.raises(ShardError, match="1 of 2 shards do not have the number") as caught:
        load_dataset(tmp_path)
    assert caught.value.problems[0].endswith("train-0001.tar: 4 samples, expected 5")


def test_conflicting_numbers_of_classes_are_refused(shards: Path) -> None:
    with pytest.raises(DataError, match="conflicting numbers of classes"):
        load_dataset(shards, num_classes=6)
    with pytest.raises(DataError, match="conflicting numbers of classes"):
        load_dataset(shards).with_classes(6)


def test_labels_are_checked_when_the_number_of_classes_becomes_known(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", samples(0, 5))
    dataset = load_dataset(path)
    assert dataset.num_classes is None
    assert dataset.with_classes(5).num_classes == 5
    for n in (4, None):
        with pytest.raises(DataError, match=r"out of range|number of classes"):
            describe(dataset.with_classes(n) if n else dataset)
    with pytest.raises(ShardError, match="out of range"):
        load_dataset(path, num_classes=4)


def test_class_names_are_found_next_to_the_shards(tmp_path: Path) -> None:
    assert find_class_names(tmp_path) is None
    (tmp_path / "_info.json").write_text('{"splits": {}, "class_names": ["a", "b"]}')
    assert find_class_names(tmp_path) == ("a", "b")
    (tmp_path / "classes.json").write_text('["x", "y", "z"]')
    assert find_class_names(tmp_path) == ("x", "y", "z")
    for content in ('{"a": 0}', "[]", "[1]"):
        (tmp_path / "classes.json").write_text(content)
        with pytest.raises(DataError, match="class names"):
            find_class_names(tmp_path)


def test_a_key_in_two_shards_is_refused_with_both(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", samples(0, 5))
    write_shard(tmp_path / "b.tar", samples(5, 4))
    write_shard(tmp_path / "c.tar", samples(8, 3))  # shares a key with b
    write_shard(tmp_path / "d.tar", samples(4, 1))  # shares a key with a
    with pytest.raises(DataError, match="2 keys are not unique") as caught:
        index_shards(tmp_path, num_classes=5)
    keys = [sample(number)[0] for number in (8, 4)]
    pairs = [("b.tar", "c.tar"), ("a.tar", "d.tar")]
    assert caught.value.problems == [
        f"{key}: in {tmp_path / first} and {tmp_path / second}"
        for key, (first, second) in zip(keys, pairs, strict=True)
    ]


def test_different_keys_with_equal_hashes_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path, (3, 4))
    monkeypatch.setattr(index_module, "hash", lambda key: len(key), raising=False)
    refuse_duplicate_keys(load_dataset(tmp_path))


def test_all_images_of_0_bytes_are_listed(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, (4, 6))
    for path, spoiled in zip(paths, ((1,), (0, 5)), strict=True):
        write_shard(
            path, [emptied(s) if i in spoiled else s for i, s in enumerate(samples_of(path))]
        )
    with pytest.raises(ImageError, match="3 images have 0 bytes") as caught:
        load_dataset(tmp_path)
    assert caught.value.problems == [
        f"{paths[shard]}: {sample(number)[0]}" for shard, number in ((0, 1), (1, 4), (1, 9))
    ]
    assert "data.corrupt=skip" in str(caught.value)
    assert load_dataset(tmp_path, empty="pass").counts == (4, 6)


def samples_of(path: Path) -> list[Sample]:
    """Return the samples of a tar that :func:`write_shards` wrote."""
    keys = TarShard(path).keys
    first = int(keys[0].rpartition("_")[2])
    return samples(first, len(keys))


def emptied(content: Sample) -> Sample:
    key, fields = content
    return key, {n: data if n in ("cls", "json") else b"" for n, data in fields.items()}


def test_a_tar_name_that_a_manifest_may_not_have_is_refused(
    tmp_path: Path,
) -> None:
    write_shard(tmp_path / "a:b.tar", samples(0, 5))
    with pytest.raises(ManifestError, match="1 problem") as caught:
        index_shards(tmp_path, num_classes=5)
    assert "'a:b.tar'" in caught.value.problems[0]


def test_leaving_samples_out_equals_tars_without_them(tmp_path: Path) -> None:
    every = samples(0, 7)
    (tmp_path / "full").mkdir()
    (tmp_path / "fewer").mkdir()
    for name, rows in (("a.tar", range(4)), ("b.tar", range(4, 7))):
        write_shard(tmp_path / "full" / name, [every[i] for i in rows])
        write_shard(tmp_path / "fewer" / name, [every[i] for i in rows if i not in (1, 3)])
    fewer = load_dataset(tmp_path / "fewer", num_classes=5)
    index_shards(tmp_path / "full", num_classes=5).save(tmp_path / "full/manifest.json")
    for full in (tmp_path / "full", tmp_path / "full/manifest.json"):
        found = load_dataset(full, num_classes=5).without({0: [3, 1]})
        assert found.counts == fewer.counts == (2, 3)
        assert found.shard_ids == fewer.shard_ids
        assert describe(found).shard_ids == fewer.shard_ids
        assert describe(found).counts == (2, 3)
        for one, other in zip(found.shards, fewer.shards, strict=True):
            assert one.keys == other.keys
            assert one.index.label.tolist() == other.index.label.tolist()
            rows = range(len(one))
            assert list(one.read_images(rows)) == list(other.read_images(rows))
    with pytest.raises(DataError, match="no samples left") as caught:
        found.without({1: [0, 1, 2]})
    assert "b.tar" in caught.value.problems[0]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar"], "imagenet1k-train"),
        (["a.tar", "b.tar"], "photos"),
        (["only.tar"], "only"),
        (["000.tar", "001.tar"], "photos"),
    ],
)
def test_a_data_set_is_named_after_its_tars(names: list[str], expected: str) -> None:
    assert name_of([Path("/data/photos") / name for name in names]) == expected


def test_shards_are_identified_by_their_keys_without_a_manifest(dataset: Dataset) -> None:
    assert len(set(dataset.shard_ids)) == len(COUNTS)
    assert describe(dataset).shard_ids == dataset.shard_ids


def test_folders_of_one_data_set_must_have_the_same_class_names(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        write_shard(folder / "x.tar", samples(10 * number, 4))
    (folders[1] / "classes.json").write_text(json.dumps(CLASSES))
    spec = ",".join(f"{folder}/x.tar" for folder in folders)
    assert load_dataset(spec).class_names == CLASSES  # a folder without class names is ignored
    (folders[2] / "classes.json").write_text(json.dumps(CLASSES[::-1]))
    with pytest.raises(ClassesError, match="the same 5 names in another order") as caught:
        load_dataset(spec)
    assert f"the shards in {folders[2]} and the shards in {folders[1]}" in str(caught.value)
