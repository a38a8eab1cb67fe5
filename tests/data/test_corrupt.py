"""Images that cannot be decoded are found by decoding all images."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cskd_pipeline.cli import main
from cskd_pipeline.data import corrupt
from cskd_pipeline.data.corrupt import find_corrupt, without_corrupt
from cskd_pipeline.data.images import ImageSource
from cskd_pipeline.data.index import Dataset, load_dataset
from cskd_pipeline.data.left_out import LeftOuts, by_shard
from cskd_pipeline.errors import ManifestError
from cskd_pipeline.runtime.distributed import ALONE
from tests.images import CLASSES, Sample, samples, write_shard

Capture = pytest.CaptureFixture[str]
SPOILED = {0: [0, 70, 99], 1: [3, 4]}


def spoiled(content: Sample, how: int) -> Sample:
    """Return the sample with its image truncated to half, to 0 bytes or to 1 byte, or replaced."""
    key, fields = content
    field, data = next((n, d) for n, d in fields.items() if n not in ("cls", "json"))
    ways = (data[: len(data) // 2], b"", b"<html>404</html>", data[:1])
    return key, {**fields, field: ways[how % len(ways)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two tars, of 100 and 8 samples, some with corrupt images."""
    path = tmp_path_factory.mktemp("spoiled")
    (path / "classes.json").write_text(json.dumps(CLASSES))
    for shard, (first, count) in enumerate(((0, 100), (100, 8))):
        content = samples(first, count)
        for how, row in enumerate(SPOILED[shard]):
            content[row] = spoiled(content[row], how)
        write_shard(path / f"t-{shard}.tar", content)
    return path


def every(dataset: Dataset) -> np.ndarray:
    return np.array([(s, i) for s, count in enumerate(dataset.counts) for i in range(count)])


@pytest.mark.parametrize("workers", [0, 2])
def test_all_are_found_with_any_number_of_workers_and_parts(folder: Path, workers: int) -> None:
    dataset = load_dataset(folder, empty="pass")
    images = ImageSource(dataset.shards)
    found = find_corrupt(images, every(dataset), workers=workers)
    assert by_shard(found) == SPOILED
    assert all(image.reason for image in found)
    shares = [
        find_corrupt(images, every(dataset), workers=workers, part=part, parts=3)
        for part in range(3)
    ]
    assert sorted(image for share in shares for image in share) == found


def test_images_that_the_dump_has_decoded_are_skipped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load_dataset(folder, empty="pass")
    images = ImageSource(dataset.shards)
    crcs = np.array([crc for _, crc in images.crc32(every(dataset))], np.uint32)
    crcs[70] ^= 1
    cache: Any = SimpleNamespace(image_crc32=lambda shard: np.split(crcs, [100])[shard])
    images = ImageSource(dataset.shards, cache=cache)
    decode, decoded = corrupt.decode, []

    def counted(data: bytes, where: object) -> np.ndarray:
        decoded.append(where)
        return decode(data, where)

    monkeypatch.setattr(corrupt, "decode", counted)
    assert by_shard(find_corrupt(images, every(dataset))) == {0: [70]}
    assert len(decoded) == 1


def test_the_record_spares_reading_the_images_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load_dataset(folder, empty="pass")
    first = LeftOuts(tmp_path, ALONE)
    fewer = without_corrupt(dataset, first)
    assert fewer.counts == (97, 6)
    assert not {shard.key(0) for shard in dataset.shards[:1]} & set(fewer.shards[0].keys)
    first.write()
    lines = (tmp_path / "left_out.csv").read_text().splitlines()
    assert lines[:2] == ["reason,shard,offset,key", f"corrupt,0,0,{dataset.shards[0].key(0)}"]
    assert len(lines) == 1 + 5

    monkeypatch.setattr(corrupt, "find_corrupt", lambda *_, **__: pytest.fail("reads images"))
    again = LeftOuts(tmp_path, ALONE)
    assert without_corrupt(dataset, again).shard_ids == fewer.shard_ids
    again.write()
    assert (tmp_path / "left_out.csv").read_text().splitlines() == lines

    record = json.loads((tmp_path / "corrupt.json").read_text())
    (tmp_path / "corrupt.json").write_text(json.dumps({**record, "corrupt": {"0": [100]}}))
    with pytest.raises(ManifestError, match="1 problem"):
        without_corrupt(dataset, LeftOuts(tmp_path, ALONE))
    (tmp_path / "corrupt.json").write_text(json.dumps({**record, "shards": "different"}))
    with pytest.raises(pytest.fail.Exception, match="reads images"):
        without_corrupt(dataset, LeftOuts(tmp_path, ALONE))


def index(folder: Path, out: Path, *more: str) -> int:
    return main(["index", str(folder), "--out", str(out), "--workers", "0", *more])


def test_index_lists_corrupt_images_and_writes_no_manifest(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "manifest.json"
    dataset = load_dataset(folder, empty="pass")
    keys = [dataset.shards[shard].key(row) for shard, rows in SPOILED.items() for row in rows]
    assert index(folder, out, "--check-images") == 1
    captured = capsys.readouterr()
    assert "5 of 108 images cannot be decoded" in captured.err
    assert "data.corrupt=skip" in captured.err
    for key in keys:
        assert captured.out.count(key) == 1
    assert index(folder, out, "--check-images", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert [image["key"] for image in document["corrupt"]] == keys
    assert document["corrupt"][1]["found"].startswith("0 bytes")
    assert not out.exists()


def test_index_of_intact_images_writes_a_manifest(
    shards: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert index(shards, tmp_path / "manifest.json", "--check-images") == 0
    assert (tmp_path / "manifest.json").exists()
    capsys.readouterr()
    assert index(shards, tmp_path / "other.json") == 2  # --workers has no effect
    assert "--check-images" in capsys.readouterr().err
