"""The format is zarr v3: zarr reads what we write, and we read what zarr writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import TransposeCodec, ZstdCodec
from zarr.storage import LocalStore, MemoryStore

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.chunks import (
    ChunkReader,
    DamageError,
    StoredArray,
    _content_size,
    encode_file,
)
from cskd_pipeline.cache.folders import Folder
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.units import Unit
from cskd_pipeline.distill.encodings import ENCODINGS
from tests.cache.factories import BLOCK, COUNTS, VIEWS, manifest, tree, unit_data


def test_plain_zarr_reads_every_array(finished: Path) -> None:
    group = zarr.open_group(finished, mode="r")
    all_units = np.ones((VIEWS // BLOCK, len(COUNTS)), bool)
    assert group.attrs["cskd"]["manifest"] == manifest().to_json()
    records = group["digest"][:].reshape(VIEWS // BLOCK, len(COUNTS), -1, 32)
    assert bytes(records[1, 2, 0]) == open_cache(finished).unit_digests(all_units)[1, 2].tobytes()
    for block in range(VIEWS // BLOCK):
        views = range(block * BLOCK, (block + 1) * BLOCK)
        for shard, count in enumerate(COUNTS):
            data = unit_data(Unit(block, shard, views), manifest())
            index = slice(views[0], views[-1] + 1), shard, slice(0, count)
            assert np.array_equal(group["seed"][index], data.seeds)
            assert np.array_equal(group["view_digest"][index], data.view_digests)
            assert np.array_equal(group["top1"][index[:2]], data.top1)
            assert np.array_equal(group["label"][shard, :count], data.labels)
            assert np.array_equal(group["image_crc32"][shard, :count], data.image_crc32)
            assert layout.keys_of(group["key"][shard, :count]) == data.keys
            for name in ("dense/spatial", "dense/global", "envelope/global_label"):
                assert np.array_equal(group[name][index], data.arrays[name])
            lines = group["envelope/lines"][index]
            classes = data.arrays["envelope/lines"][:, :, :, 0]
            assert np.array_equal(lines[:, :, : classes.shape[2], 0], classes)
            assert (lines[:, :, classes.shape[2] :] == 65535).all()


def test_an_open_cache_returns_its_zarr_group_read_only(finished: Path) -> None:
    reader = open_cache(finished)
    group = reader.zarr()
    assert np.array_equal(group["label"][1, : COUNTS[1]], reader.labels(1))
    with pytest.raises(ValueError, match="read-only"):
        group["label"][0, 0] = 1


def test_array_documents_equal_those_of_zarr() -> None:
    cache_manifest = manifest(encodings=tuple(ENCODINGS))
    for name, array in layout.stored_arrays(cache_manifest).items():
        content: dict[str, Any] = {}
        create(MemoryStore(store_dict=content), array)
        theirs = json.loads(content[f"{name}/zarr.json"].to_bytes())
        ours = json.loads(layout.array_documents(cache_manifest)[f"{name}/zarr.json"])
        assert ours == theirs, name


def create(store: Any, array: StoredArray) -> Any:
    """Create ``array`` with zarr's own function."""
    return zarr.create_array(
        store,
        name=array.name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=array.chunk_shape or array.file_shape,
        shards=None if array.chunk_shape is None else array.file_shape,
        filters=[] if array.order is None else [TransposeCodec(order=array.order)],
        compressors=[ZstdCodec(level=array.level, checksum=True)],
        fill_value=array.fill,
        dimension_names=array.axes,
    )


def test_only_core_codecs_and_numeric_types_are_used(finished: Path) -> None:
    codecs, types = set(), set()

    def visit(document: Any) -> None:
        if isinstance(document, dict):
            if "name" in document and "data_type" not in document:
                codecs.add(document["name"])
            if "data_type" in document:
                types.add(document["data_type"])
            for value in document.values():
                visit(value)
        elif isinstance(document, list):
            for value in document:
                visit(value)

    for name in layout.array_documents(manifest()):
        visit(json.loads((finished / name).read_bytes()))
    assert codecs == {
        "regular",
        "default",
        "bytes",
        "zstd",
        "sharding_indexed",
        "transpose",
        "crc32c",
    }
    assert types == {"uint8", "int32", "uint16", "uint32", "uint64", "float16"}


def test_no_two_units_share_a_file(finished: Path) -> None:
    cache_manifest = manifest()
    arrays = layout.stored_arrays(cache_manifest)
    owners: dict[str, tuple[int, int]] = {}
    for name, array in arrays.items():
        if name in layout.PER_SHARD:
            continue
        for view in range(VIEWS):
            for shard in range(len(COUNTS)):
                unit = (view // BLOCK, shard)
                at = (unit[0], shard * array.file_shape[1]) if name == "digest" else (view, shard)
                assert owners.setdefault(array.key(*at), unit) == unit
    per_shard = {arrays[name].key(shard) for name in layout.PER_SHARD for shard in range(3)}
    assert owners.keys() | per_shard == {n for n in tree(finished) if not n.endswith("zarr.json")}


@st.composite
def arrays_and_values(draw: st.DrawFn) -> tuple[StoredArray, np.ndarray]:
    """Draw any geometry that the layout could use, and the values of one file."""
    rank = draw(st.integers(1, 4))
    axis = st.integers(1, 4)
    chunk = tuple(draw(axis) for _ in range(rank))
    file = tuple(n * draw(axis) for n in chunk)
    shape = tuple(n * draw(st.integers(1, 2)) - draw(st.integers(0, n - 1)) for n in file)
    dtype = draw(st.sampled_from(["uint8", "uint16", "int32", "uint64", "float16"]))
    fill = {"float16": float("nan"), "uint16": 65535, "int32": -1}.get(dtype, 0)
    sharded = draw(st.booleans())
    order = draw(st.none() | st.permutations(range(rank)).map(tuple))
    array = StoredArray(
        "a", dtype, tuple(f"axis{i}" for i in range(rank)), shape, file, fill,
        chunk_shape=chunk if sharded else None, order=order, level=draw(st.sampled_from([1, 8])),
    )  # fmt: skip
    inside = tuple(draw(st.integers(1, min(a, b))) for a, b in zip(file, shape, strict=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = np.full(inside, fill, dtype)
    some = rng.random(inside) < draw(st.sampled_from([0.05, 0.5, 1.0]))
    values[some] = rng.integers(0, 100, int(some.sum())).astype(dtype)
    return array, values


@settings(max_examples=60, deadline=None)
@given(arrays_and_values())
def test_zarr_and_our_reader_return_the_same_values(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[StoredArray, np.ndarray]
) -> None:
    array, values = drawn
    root = tmp_path_factory.mktemp("alike")
    zeros = (0,) * len(array.shape)
    ours = root / "ours" / array.key(*zeros)
    ours.parent.mkdir(parents=True)
    ours.write_bytes(encode_file(array, values))
    (root / "ours/a/zarr.json").write_bytes(layout.to_bytes(array.document()))
    index = tuple(slice(0, n) for n in values.shape)
    read = zarr.open_array(root / "ours/a", mode="r")
    assert np.array_equal(read[index], values, equal_nan=array.dtype == "float16")

    with zarr.config.set({"array.write_empty_chunks": array.chunk_shape is None}):
        create(LocalStore(root / "theirs"), array)[index] = values
    for side in ("ours", "theirs"):
        reader = ChunkReader(Folder(root / side))
        step = array.chunk_shape or array.file_shape
        for corner in np.ndindex(*(-(-n // s) for n, s in zip(values.shape, step, strict=True))):
            at = tuple(i * n for i, n in zip(corner, step, strict=True))
            part = values[tuple(slice(i, i + n) for i, n in zip(at, step, strict=True))]
            try:
                chunk = reader.read(array, *at)
            except DamageError:  # zarr writes no file for a shard that is all fill
                assert side == "theirs"
                chunk = None
            if chunk is None:
                assert np.array_equal(part, np.full_like(part, array.fill), equal_nan=True)
                continue
            assert chunk.shape == step
            inner = chunk[tuple(slice(0, n) for n in part.shape)]
            assert np.array_equal(inner, part, equal_nan=array.dtype == "float16")


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 65535, 65791, 65792, 1_000_000])
@pytest.mark.parametrize("level", [1, 8, 19])
def test_the_size_of_a_frame_is_known_before_decoding(count: int, level: int) -> None:
    from numcodecs.zstd import Zstd

    rng = np.random.default_rng(0)
    for values in (np.zeros(count, np.uint8), rng.integers(0, 256, count, np.uint8)):
        if count:
            assert _content_size(Zstd(level=level, checksum=True).encode(values)) == count


def test_reading_beyond_the_end_of_a_file_fails(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    folder = Folder(tmp_path)
    assert folder.read_part("f", 8, 2) == b"89"
    assert folder.read_part("f", -3, 3) == b"789"
    for start, length in ((8, 3), (11, 1), (-11, 11), (-11, 1)):
        with pytest.raises(DamageError, match="truncated"):
            folder.read_part("f", start, length)


def test_a_chunk_with_the_wrong_declared_size_is_not_decoded(tmp_path: Path) -> None:
    """A decompression bomb is refused by its header."""
    from numcodecs.zstd import Zstd

    array = StoredArray("a", "uint8", ("x",), (100,), (100,), 0)
    (tmp_path / "a/c").mkdir(parents=True)
    bomb = Zstd(level=3, checksum=True).encode(np.zeros(50_000_000, np.uint8))
    (tmp_path / "a/c/0").write_bytes(bomb[:1000])
    with pytest.raises(DamageError, match="not a zstd frame of 100 bytes"):
        ChunkReader(Folder(tmp_path)).read(array, 0)
    (tmp_path / "a/c/0").write_bytes(bytes(100_000))
    with pytest.raises(DamageError, match="more than the"):
        ChunkReader(Folder(tmp_path)).read(array, 0)
