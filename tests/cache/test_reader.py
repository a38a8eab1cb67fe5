"""A reader returns finished units as written, or reports what is wrong and where."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import zarr

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.chunks import BytesLRU, ChunkReader, DamageError
from cskd_pipeline.cache.folders import Folder
from cskd_pipeline.cache.key_index import KeyIndex
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.units import Unit
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.distill.encodings import Rows
from cskd_pipeline.errors import CacheError, ManifestError
from cskd_pipeline.runtime import schemas
from tests.cache.factories import (
    BLOCK,
    COUNTS,
    VIEWS,
    data_files,
    dataset,
    fill,
    make,
    manifest,
    responses,
    unit_data,
)


def equal(found: np.ndarray, expected: np.ndarray, ragged: bool = False) -> bool:
    if ragged:  # pad the shorter one with fill
        length = max(found.shape[1], expected.shape[1])
        found, expected = (
            np.concatenate(
                [a, np.full((len(a), length - a.shape[1], *a.shape[2:]), 65535, a.dtype)], axis=1
            )
            for a in (found, expected)
        )
    return found.dtype == expected.dtype and np.array_equal(found, expected)


def read_everything(path: Path) -> dict[str, object]:
    """Return everything that a reader can read from a cache, as comparable values."""
    reader = open_cache(path)
    found: dict[str, object] = {
        "manifest": reader.manifest.to_json(),
        "done": reader.done().tolist(),
    }
    found["top1"] = reader.top1()
    for shard, count in enumerate(reader.counts):
        found[f"keys {shard}"] = reader.keys(shard)
        found[f"labels {shard}"] = reader.labels(shard).tolist()
        found[f"crc {shard}"] = reader.image_crc32(shard).tolist()
        for view in range(reader.views):
            found[f"seeds {view} {shard}"] = reader.seeds(view, shard).tolist()
            found[f"digests {view} {shard}"] = reader.view_digests(view, shard).tolist()
            for encoding in reader.encodings:
                rows = reader.rows(encoding, view, shard, range(count))
                found |= {f"{name} {view} {shard}": rows[name].tobytes() for name in rows}
    return found


# Values


def test_everything_is_read_as_written(finished: Path) -> None:
    reader = open_cache(finished)
    assert reader.views == VIEWS
    assert reader.counts == COUNTS
    assert reader.shard_ids == dataset().shard_ids
    assert reader.done().all()
    total = np.zeros(2, np.int64)
    for block in range(VIEWS // BLOCK):
        for shard in range(3):
            unit = Unit(block, shard, range(block * BLOCK, (block + 1) * BLOCK))
            data = unit_data(unit, manifest())
            total += data.top1.sum(axis=0, dtype=np.int64)
            assert reader.keys(shard) == data.keys
            assert equal(reader.labels(shard), data.labels)
            assert equal(reader.image_crc32(shard), data.image_crc32)
            for row, view in enumerate(unit.views):
                assert equal(reader.seeds(view, shard), data.seeds[row])
                assert equal(reader.view_digests(view, shard), data.view_digests[row])
                for name, values in data.arrays.items():
                    found = reader.rows(name.split("/")[0], view, shard, range(COUNTS[shard]))
                    assert equal(found[name], values[row], name == "envelope/lines"), name
    assert reader.top1() == tuple(total)


@pytest.mark.parametrize("encoding", ["dense", "envelope"])
def test_gathered_rows_are_in_the_requested_order(finished: Path, encoding: str) -> None:
    reader = open_cache(finished)
    rng = np.random.default_rng(1)
    rows = [(v, s, o) for v in range(VIEWS) for s in range(3) for o in range(COUNTS[s])]
    index = rng.permutation(np.array(rows * 2))
    found = reader.gather(encoding, index)
    for name, values in found.items():
        for (view, shard, offset), value in zip(index.tolist(), values, strict=True):
            expected = responses(view, shard, COUNTS[shard])[name][offset]
            assert equal(value[None], expected[None], name == "envelope/lines")


def test_more_lines_than_a_chunk_contains_are_read(finished: Path) -> None:
    found = open_cache(finished).gather(
        "envelope", np.array([(v, 0, o) for v in range(4) for o in range(5)])
    )
    lines = found["envelope/lines"]
    assert lines.shape[1] > 8  # lines per chunk; the toy data has up to 10
    assert (lines[:, -1] != 65535).any()  # and no unused line


def test_an_empty_selection_of_rows_is_empty(finished: Path) -> None:
    reader = open_cache(finished)
    for encoding in reader.encodings:
        for name, rows in reader.rows(encoding, 0, 0, []).items():
            assert len(rows) == 0, name


def test_returned_arrays_are_writable(finished: Path) -> None:
    reader = open_cache(finished)
    for encoding in reader.encodings:
        first = reader.rows(encoding, 1, 0, [0, 1])
        for values in first.values():
            values[:] = 0
        again = reader.rows(encoding, 1, 0, [0, 1])
        assert any((values != 0).any() for values in again.values())


def test_an_unpickled_reader_opens_its_own_files(finished: Path) -> None:
    reader = open_cache(finished, memory=12345)
    reader.rows("envelope", 0, 0, [0])
    reader.rows("dense", 0, 0, [0])
    message = pickle.dumps(reader)
    assert len(message) < 10_000  # no slab is pickled
    copy = pickle.loads(message)
    assert copy.done().all()
    assert copy._memory == 12345
    for encoding in reader.encodings:
        ours, theirs = reader.rows(encoding, 3, 1, [2]), copy.rows(encoding, 3, 1, [2])
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_slabs_are_kept_within_the_memory_limit(finished: Path) -> None:
    reader = open_cache(finished, memory=4000)
    used = []
    for view in range(VIEWS):
        for shard in range(3):
            reader.rows("envelope", view, shard, [0])
            kept = reader.slabs._slabs
            used.append(kept.used)
            arrays = [a for rows, _ in kept._items.values() for a in rows.values()]
            assert sum((a if a.base is None else a.base).nbytes for a in arrays) <= 4000
            with pytest.raises(ValueError, match="read-only"):
                reader.seeds(view, shard)[0] = 1
    assert max(used) <= 4000
    assert used[-1] > 1000


def test_a_kept_slab_is_not_read_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_cache(finished)
    reader.rows("envelope", 0, 0, [0])
    monkeypatch.setattr(os, "open", None)
    reader.rows("envelope", 0, 0, [3])


def test_the_least_recently_used_entry_is_evicted_first() -> None:
    kept: BytesLRU[str, int] = BytesLRU(10)
    kept.put("a", 1, 4)
    kept.put("b", 2, 4)
    assert kept.get("a") == 1
    kept.put("c", 3, 4)
    assert (kept.get("a"), kept.get("b"), kept.get("c"), kept.used) == (1, None, 3, 8)
    kept.put("a", 5, 6)
    assert (kept.get("a"), kept.get("c"), kept.used) == (5, 3, 10)
    kept.put("d", 6, 100)  # larger than the limit: kept until the next put
    assert (kept.get("d"), kept.get("a"), kept.used) == (6, None, 100)
    kept.put("e", 7, 1)
    assert (kept.get("d"), kept.used) == (None, 1)


# Missing units


def test_unfinished_units_cannot_be_read(tmp_path: Path) -> None:
    writer = CacheWriter.create(tmp_path / "c", manifest())
    fill(writer, writer.todo()[:2])
    reader = open_cache(tmp_path / "c")
    assert reader.done().tolist() == [[True, True, False], [False, False, False]]
    reader.require_done(views=[0, 1], shards=[0, 1])
    for attempt in (
        lambda: reader.rows("dense", 2, 0, [0]),
        lambda: reader.rows("envelope", 0, 2, [0]),
        lambda: reader.seeds(0, 2),
        lambda: reader.view_digests(3, 1),
        lambda: reader.keys(2),
        lambda: reader.labels(2),
    ):
        with pytest.raises(CacheError, match="not written yet") as caught:
            attempt()
        assert "dump-teacher" in str(caught.value)


def test_missing_units_are_counted_and_named(tmp_path: Path) -> None:
    writer = CacheWriter.create(tmp_path / "c", manifest())
    fill(writer, writer.todo()[:4])
    reader = open_cache(tmp_path / "c")
    with pytest.raises(CacheError) as caught:
        reader.require_done()
    assert "2 of 6 units missing" in str(caught.value)
    assert caught.value.problems == [
        "missing: views 2-3 of shard 1 (train-0001.tar)",
        "missing: views 2-3 of shard 2 (train-0002.tar)",
    ]
    assert "dump-teacher command" in str(caught.value)
    with pytest.raises(CacheError, match="too few views") as caught:
        reader.require_done(views=range(6))
    assert "views 0-3" in str(caught.value)
    with pytest.raises(CacheError, match="1 of 1 units"):
        reader.require_done(views=[3], shards=[2])


@pytest.mark.parametrize("path", ["", "nothing", "file", "empty"])
def test_a_folder_without_a_cache_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CacheError, match="not a teacher cache"):
        open_cache(tmp_path / path)


def rewrite_group(path: Path, document: object) -> None:
    (path / "zarr.json").write_bytes(layout.to_bytes(layout.group_document({"cskd": document})))


def test_a_newer_format_version_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "c")
    document = manifest().to_json() | {"format_version": 3}
    rewrite_group(tmp_path / "c", {"manifest": document, "sha256": "0" * 64})
    with pytest.raises(ManifestError, match=r"format_version: found 3, expected 2"):
        open_cache(tmp_path / "c")


def test_oversized_attributes_are_neither_written_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "c")
    monkeypatch.setattr(schemas, "MAX_BYTES", 2000)
    with pytest.raises(CacheError, match="more than the 2000 allowed"):
        open_cache(tmp_path / "c")
    with pytest.raises(CacheError, match="manifest is too large"):
        CacheWriter.create(tmp_path / "d", manifest())
    assert list((tmp_path / "d").iterdir()) == []


def test_altered_array_documents_are_refused_by_field(tmp_path: Path) -> None:
    """Only zarr uses them, but every reader must see the same cache."""
    path = tmp_path / "c"
    make(path)
    document = path / "envelope/lines/zarr.json"
    content = document.read_text()
    changes = {
        "fill_value": ('"fill_value": 65535', '"fill_value": 65534'),
        "data_type": ('"data_type": "uint16"', '"data_type": "int16"'),
        "dimension_names": ('"line"', '"lines"'),
        "shape": ('"shape": [\n  4,\n  3', '"shape": [\n  4,\n  4'),
        "chunk_grid": ('"chunk_grid": {\n  "name": "regular"', '"chunk_grid": {\n  "name": "odd"'),
        "codecs": ('"checksum": true', '"checksum": false'),
        "attributes": ('"attributes": {}', '"attributes": {"x": 1}'),
        "storage_transformers": ('"storage_transformers": []', '"storage_transformers": [1]'),
        "zarr_format": ('"zarr_format": 3', '"zarr_format": 2'),
    }
    for name, (old, new) in changes.items():
        assert content.count(old) == 1, name
        document.write_text(content.replace(old, new))
        for open_it in (open_cache, CacheWriter.open):
            with pytest.raises(CacheError, match="does not match its manifest") as caught:
                open_it(path)
            assert [line.split(":")[:2] for line in caught.value.problems] == [
                ["envelope/lines/zarr.json", f" {name}"]
            ]


def test_a_long_field_is_shown_near_the_difference(tmp_path: Path) -> None:
    """For example a note added to the group with zarr, after a manifest of any length."""
    make(tmp_path / "c")
    zarr.open_group(tmp_path / "c").attrs["note"] = 1
    with pytest.raises(CacheError, match="the manifest was altered") as caught:
        open_cache(tmp_path / "c")
    found, _, expected = str(caught.value.found).partition(", expected ")
    assert found.startswith("attributes: found …")
    assert found.endswith('"},"note":1}')
    assert found.removeprefix("attributes: found ").startswith(expected[:-1])
    assert len(found) < 300


def test_a_difference_outside_all_fields_is_located_by_byte(tmp_path: Path) -> None:
    make(tmp_path / "c")
    document = json.loads((tmp_path / "c/zarr.json").read_text())
    (tmp_path / "c/zarr.json").write_bytes(layout.to_bytes({**document, "more": None}))
    with pytest.raises(CacheError, match=r"from byte \d+: found b'"):
        open_cache(tmp_path / "c")


def test_an_unknown_encoding_is_refused(tmp_path: Path) -> None:
    cache_manifest = manifest(encodings=("dense", "holographic"))
    tmp_path.joinpath("zarr.json").write_bytes(layout.manifest_document(cache_manifest))
    with pytest.raises(CacheError, match="unknown encoding") as caught:
        open_cache(tmp_path)
    assert "holographic" in str(caught.value)


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "c")
    group = tmp_path / "c/zarr.json"
    group.write_text(group.read_text().replace('"random"', '"imagenet"'))
    with pytest.raises(CacheError, match="was altered"):
        open_cache(tmp_path / "c")


# Lost or altered files; tests/faults/test_damage.py covers every kind of file


def test_a_file_truncated_at_any_length_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "c"
    make(path, views=2)
    for name in data_files(path):
        content = (path / name).read_bytes()
        for length in {1, 4, len(content) // 2, len(content) - 1}:
            (path / name).write_bytes(content[:length])
            with pytest.raises(CacheError):
                read_everything(path)
        (path / name).write_bytes(content)


def test_an_erased_index_is_not_mistaken_for_unwritten_chunks(tmp_path: Path) -> None:
    """All ones mean "not written" in an index, and an erased block of a disk reads as all ones."""
    path = tmp_path / "c"
    make(path)
    for name in ("envelope/lines", "dense/spatial"):
        array = layout.stored_arrays(manifest())[name]
        name = array.key(0, 0)
        content = (path / name).read_bytes()
        length = 16 * math.prod(array.chunks_per_file)
        # All of the index, and all but the first chunk's entry: then only lines beyond 8 are lost.
        for kept in range(0, length, 16)[:2]:
            start = len(content) - 4 - length + kept
            (path / name).write_bytes(content[:start] + b"\xff" * (length - kept) + content[-4:])
            with pytest.raises(DamageError, match="crc32c does not match"):
                ChunkReader(Folder(path)).read(array, 0, 0)
        (path / name).write_bytes(content)


def test_keys_of_another_shard_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    make(path)
    one, other = path / "key/c/0/0/0", path / "key/c/1/0/0"
    other.write_bytes(one.read_bytes())
    with pytest.raises(CacheError, match="a file of another unit") as caught:
        open_cache(path).keys(1)
    assert caught.value.where == other


def test_irregular_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    make(path)
    for make_odd in (os.mkfifo, os.mkdir):
        (path / "label/c/0/0").rename(tmp_path / "aside")
        make_odd(path / "label/c/0/0")
        with pytest.raises(CacheError, match="not a regular file"):
            open_cache(path).labels(0)
        (path / "label/c/0/0").unlink() if make_odd is os.mkfifo else (path / "label/c/0/0").rmdir()
        (tmp_path / "aside").rename(path / "label/c/0/0")


def test_an_io_error_is_reported(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_cache(finished)

    def failing(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(CacheError, match="Input/output error") as caught:
        reader.rows("dense", 0, 0, [0])
    assert "digest/c/0/0" in str(caught.value)


def test_impossible_values_are_refused(tmp_path: Path) -> None:
    """Well-formed untrusted chunks: classes that do not exist, crossings without a class."""

    def corrupted(change: str) -> Rows:
        data = unit_data(Unit(0, 0, range(2)), manifest(encodings=("envelope",)))
        lines = data.arrays["envelope/lines"]
        if change == "class":
            lines[0, 1, 0, 0, 0, 0] = 20
        elif change == "no class":
            lines[0, 1, 0, 0, 0, 0] = 65535
        elif change == "label":
            data.arrays["envelope/global_label"][0, 1] = 20
        return data

    for change in ("class", "no class", "label"):
        writer = CacheWriter.create(tmp_path / change, manifest(encodings=("envelope",)))
        writer.write_unit(writer.todo()[0], corrupted(change))
        with pytest.raises(CacheError, match="damaged") as caught:
            open_cache(tmp_path / change).rows("envelope", 0, 0, [0])
        assert "of 20" in str(caught.value)


# Opening and reading


def test_opening_a_large_cache_opens_no_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only documents are read, and folders listed."""
    cache_manifest = manifest(dataset=dataset((3,) * 1024), views=20, view_block=10)
    CacheWriter.create(tmp_path, cache_manifest)
    for block in range(2):
        (tmp_path / f"digest/c/{block}").mkdir(parents=True)
        for shard in range(1024):
            (tmp_path / f"digest/c/{block}/{shard}").touch()
    open_cache(tmp_path)
    opened = []
    os_open = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or os_open(path, *rest))
    reader = open_cache(tmp_path)
    assert reader.done().all()
    assert len(opened) == len(layout.array_documents(cache_manifest)) + 1


def test_targets_are_read_by_view_and_key(finished: Path) -> None:
    """Targets equal the gathered rows; the smallest exact encoding is the default."""
    reader = open_cache(finished)
    pairs = [(2, reader.keys(1)[2]), (0, reader.keys(0)[0]), (2, reader.keys(2)[1])]
    index = np.array([(2, 1, 2), (0, 0, 0), (2, 2, 1)])
    assert reader.find([key for _, key in pairs]).tolist() == index[:, 1:].tolist()
    assert reader.serving(["hard"])[0] == "envelope"
    assert reader.serving(["hard", "soft"]) == ["dense"]
    targets = reader.targets(pairs)
    lines = reader.gather("envelope", index)["envelope/lines"]
    assert targets.hard_spatial(0.0).tolist() == lines[:, 0, 0].tolist()
    dense = reader.targets(pairs, "dense")
    expected = reader.gather("dense", index)["dense/global"].astype(np.float32)
    found = dense.global_log_probabilities(1.0)
    np.testing.assert_allclose(found, expected - np.logaddexp.reduce(expected, 1)[:, None], 1e-4)


def test_missing_targets_are_refused(finished: Path) -> None:
    reader = open_cache(finished)
    key = reader.keys(0)[0]
    with pytest.raises(CacheError, match=r"1 of 2 keys are missing from the cache[^$]*nobody"):
        reader.targets([(0, key), (0, "nobody")])
    with pytest.raises(CacheError, match="too few views"):
        reader.targets([(VIEWS, key)])
    with pytest.raises(CacheError, match="no encoding topk"):
        reader.targets([(0, key)], "topk")
    with pytest.raises(CacheError, match="does not support soft targets"):
        reader.targets([(0, key)], "envelope", kinds=["soft"])
    assert str(VIEWS) in repr(reader)


def test_small_arrays_are_read_once(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading views one by one, as :func:`replay_view` does, reopens no file."""
    reader = open_cache(finished)
    first = reader.image_crc32(1), reader.seeds(0, 1)
    monkeypatch.setattr(reader.store, "shard_chunk", None)
    monkeypatch.setattr(reader.store, "chunk", None)
    assert reader.image_crc32(1) is first[0]
    assert reader.seeds(0, 1) is first[1]
    assert not first[0].flags.writeable


def test_a_reopened_reader_is_equal(finished: Path) -> None:
    reader = open_cache(finished)
    reader.digest()
    other = reader.reopened()
    assert other.store is not reader.store
    assert other.digest() == reader.digest()
    np.testing.assert_array_equal(other.seeds(0, 1), reader.seeds(0, 1))


def test_a_key_in_two_shards_is_refused(finished: Path) -> None:
    reader = open_cache(finished)
    duplicated = KeyIndex([0, 1], lambda _shard: ["a", "b"], "cache")
    with pytest.raises(CacheError, match="or not unique"):
        duplicated.find(["a"])
    with pytest.raises(CacheError, match="its 0 samples"):
        KeyIndex([], reader.keys, "cache").find(["a"])
