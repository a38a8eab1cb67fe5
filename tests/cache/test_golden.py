"""A pinned cache of every encoding, which must stay readable and reproducible.

``python -m tests.cache.test_golden`` pins it again; do that only with a new format version.
"""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import torch
import zarr

from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.units import UnitData
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.distill.encodings import ENCODINGS
from tests.cache.factories import dataset, keys, manifest, teacher, tree

GOLDEN = Path(__file__).parents[1] / "golden" / "cache.json"
PINNED = ("dense", "dense-q8", "topk", "envelope")  # sampled: test_sampled.py
COUNT, CLASSES, GRID, VIEWS = 3, 30, (2, 2), 2


def logits(view: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (B, K, h, w) and (B, K) float16, by arithmetic alone."""
    i = torch.arange(COUNT * CLASSES * GRID[0] * GRID[1]) + 1000 * view
    spatial = (i * 37 % 101 - 50).reshape(COUNT, CLASSES, *GRID).half() / 8
    global_ = (i[: COUNT * CLASSES] * 61 % 89 - 44).reshape(COUNT, CLASSES).half() / 16
    return spatial, global_


def encoded(name: str, view: int) -> dict[str, torch.Tensor]:
    return ENCODINGS[name].encode(*logits(view), np.zeros(COUNT, np.uint64))


def write(path: Path) -> None:
    toy = dataset((COUNT,))
    pinned_manifest = manifest(
        dataset=replace(toy, num_classes=CLASSES, class_names=None),
        teacher=teacher(num_classes=CLASSES, grid=GRID),
        views=VIEWS,
        encodings=PINNED,
    )
    writer = CacheWriter.create(path, pinned_manifest)
    parts = [
        {array: rows for name in PINNED for array, rows in encoded(name, view).items()}
        for view in range(VIEWS)
    ]
    seeds = np.arange(VIEWS * COUNT, dtype=np.uint64).reshape(VIEWS, COUNT) + np.uint64(2**63)
    data = UnitData(
        keys=keys(0, COUNT),
        labels=np.arange(COUNT, dtype=np.int32),
        image_crc32=np.arange(COUNT, dtype=np.uint32) + 2**31,
        seeds=seeds,
        view_digests=seeds.astype(np.uint32) + np.uint32(7),
        arrays={name: np.stack([part[name].numpy() for part in parts]) for name in parts[0]},
        top1=np.array([[1, COUNT], [2, COUNT]], np.uint32),
    )
    assert writer.write_unit(writer.todo()[0], data)


@pytest.fixture
def pinned(tmp_path: Path) -> tuple[dict[str, bytes], str]:
    """The pinned files, and the version of numcodecs (with its zstd) that wrote them."""
    document = json.loads(GOLDEN.read_text())
    return {n: base64.b64decode(text) for n, text in document["files"].items()}, document[
        "numcodecs"
    ]


def write_files(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_the_pinned_cache_is_read_as_written(
    tmp_path: Path, pinned: tuple[dict[str, bytes], str]
) -> None:
    write_files(pinned[0], tmp_path / "c")
    reader = open_cache(tmp_path / "c")
    assert reader.keys(0) == ["train/0-0", "train/0-é1", "train/0-éé2"]
    assert reader.labels(0).tolist() == [0, 1, 2]
    assert reader.image_crc32(0).tolist() == [2**31, 2**31 + 1, 2**31 + 2]
    assert reader.seeds(1, 0).tolist() == [2**63 + 3, 2**63 + 4, 2**63 + 5]
    assert reader.view_digests(0, 0).tolist() == [7, 8, 9]
    assert reader.top1() == (3, 6)
    assert tuple(reader.encodings) == PINNED
    for name in PINNED:
        for view in range(VIEWS):
            expected = encoded(name, view)
            found = reader.rows(name, view, 0, range(COUNT))
            for array, rows in expected.items():
                assert np.array_equal(found[array], rows.numpy()), array


def test_the_pinned_cache_is_reproduced(
    tmp_path: Path, pinned: tuple[dict[str, bytes], str]
) -> None:
    files, version = pinned
    write(tmp_path / "c")
    found = tree(tmp_path / "c")
    assert found.keys() == files.keys()
    for name, content in files.items():
        if name.endswith("zarr.json") or version == numcodecs.__version__:
            assert found[name] == content, name
    if version != numcodecs.__version__:
        pytest.skip(f"chunks were compared by value only: numcodecs {numcodecs.__version__}")


def test_plain_zarr_reads_the_pinned_rows(
    tmp_path: Path, pinned: tuple[dict[str, bytes], str]
) -> None:
    write_files(pinned[0], tmp_path / "c")
    group = zarr.open_group(tmp_path / "c", mode="r")
    for name in PINNED:
        for view in range(VIEWS):
            rows = {n: v.numpy()[None] for n, v in encoded(name, view).items()}
            for array, values in ENCODINGS[name].pack(rows).items():
                inner = tuple(slice(0, n) for n in values.shape[2:])
                found = group[array][(view, 0, slice(0, COUNT), *inner)]
                assert np.array_equal(found, values[0]), array


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "c")
        texts = {n: base64.b64encode(b).decode() for n, b in tree(Path(folder) / "c").items()}
        document = {"numcodecs": numcodecs.__version__, "files": texts}
        GOLDEN.write_text(json.dumps(document, indent=1) + "\n")
