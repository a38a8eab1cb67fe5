"""``describe`` answers a newcomer's questions from the files themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cskd_pipeline.cache.info import describe
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.errors import CacheError
from tests.cache.making import COUNTS, fill, make, manifest, tree


def test_a_finished_cache_is_described(tmp_path: Path) -> None:
    path = tmp_path / "c"
    make(path, license="CC-BY-4.0")
    found = json.loads(json.dumps(describe(path)))
    assert found["complete"] is True
    assert found["units"] == {"done": 6, "total": 6}
    assert found["samples"] == sum(COUNTS)
    assert found["dataset"] == {"name": "toy", "num_classes": 20, "shards": 3}
    assert found["teacher"]["name"] == "resnet10t"
    assert found["policy"]["version"] == "deit-v1"
    assert found["license"] == "CC-BY-4.0"
    assert found["losses"] == {"deit": ["hard", "soft"], "cskd": ["hard", "soft"]}
    # From making.unit_data: view % count correct of count, for every view and tar shard.
    correct = sum(view % count for view in range(4) for count in COUNTS)
    assert found["teacher_top1"] == 100 * correct / (4 * sum(COUNTS))


def test_bytes_are_the_lengths_of_the_files(tmp_path: Path) -> None:
    path = tmp_path / "c"
    make(path)
    found, files = describe(path), tree(path)
    assert found["bytes"] == sum(map(len, files.values())) == sum(found["bytes_by_array"].values())
    lines = sum(len(data) for name, data in files.items() if name.startswith("envelope/lines/c/"))
    labels = sum(len(data) for name, data in files.items() if name.startswith("envelope/global"))
    labels -= len(files["envelope/global_label/zarr.json"])
    assert found["bytes_by_array"]["envelope/lines"] == lines
    views = 4 * sum(COUNTS)
    assert found["bytes_per_view"]["envelope"] == round((lines + labels) / views, 2)
    assert found["encodings"]["envelope"]["serves"] == ["hard"]


def test_an_unfinished_cache_says_what_is_done(tmp_path: Path) -> None:
    writer = CacheWriter.create(tmp_path / "c", manifest(encodings=("envelope",)))
    found = describe(tmp_path / "c")
    assert found["teacher_top1"] is None
    assert found["bytes_per_view"]["envelope"] is None
    assert found["bytes_by_array"]["seed"] == 0
    fill(writer, writer.todo(shards=[1]))
    found = describe(tmp_path / "c")
    assert found["complete"] is False
    assert found["units"] == {"done": 2, "total": 6}
    assert [shard["views_done"] for shard in found["shards"]] == [0, 4, 0]
    assert found["losses"] == {"deit": ["hard"], "cskd": ["hard"]}


def test_a_folder_without_a_cache_is_not_described(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="not a teacher cache"):
        describe(tmp_path)
