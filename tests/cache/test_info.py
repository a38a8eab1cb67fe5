"""``describe`` reports a cache from its files, and ``summarise`` shortens the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cskd_pipeline.cache.info import describe
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.summary import summarise
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.distill.encodings import ENCODINGS, Sampled
from cskd_pipeline.errors import CacheError
from cskd_pipeline.runtime.console import flatten
from cskd_pipeline.views.policy import ViewPolicy
from tests.cache.factories import COUNTS, dataset, fill, make, manifest, tree


def test_a_finished_cache_is_described(tmp_path: Path) -> None:
    path = tmp_path / "c"
    make(path, license="CC-BY-4.0")
    found = json.loads(json.dumps(describe(open_cache(path))))
    assert found["complete"] is True
    assert found["units"] == {"done": 6, "total": 6}
    assert found["samples"] == sum(COUNTS)
    assert found["dataset"] == {"name": "toy", "num_classes": 20, "shards": 3}
    assert found["teacher"]["name"] == "resnet10t"
    assert found["policy"]["version"] == "deit-v1"
    assert found["license"] == "CC-BY-4.0"
    assert found["losses"] == {"deit": ["hard", "soft"], "cskd": ["hard", "soft"]}
    # From factories.unit_data: view % count correct of count, for every view and tar shard.
    correct = sum(view % count for view in range(4) for count in COUNTS)
    assert found["teacher_top1"] == 100 * correct / (4 * sum(COUNTS))


def test_reported_bytes_equal_the_file_sizes(tmp_path: Path) -> None:
    path = tmp_path / "c"
    make(path)
    found, files = describe(open_cache(path)), tree(path)
    assert found["bytes"] == sum(map(len, files.values())) == sum(found["bytes_by_array"].values())
    lines = sum(len(data) for name, data in files.items() if name.startswith("envelope/lines/c/"))
    labels = sum(len(data) for name, data in files.items() if name.startswith("envelope/global"))
    labels -= len(files["envelope/global_label/zarr.json"])
    assert found["bytes_by_array"]["envelope/lines"] == lines
    views = 4 * sum(COUNTS)
    assert found["bytes_per_view"]["envelope"] == round((lines + labels) / views, 2)
    assert found["encodings"]["envelope"]["serves"] == ["hard"]


def test_progress_of_an_unfinished_cache_is_reported(tmp_path: Path) -> None:
    writer = CacheWriter.create(tmp_path / "c", manifest(encodings=("envelope",)))
    found = describe(open_cache(tmp_path / "c"))
    assert found["teacher_top1"] is None
    assert found["bytes_per_view"]["envelope"] is None
    assert found["bytes_by_array"]["seed"] == 0
    fill(writer, writer.todo(shards=[1]))
    found = describe(open_cache(tmp_path / "c"))
    assert found["complete"] is False
    assert found["units"] == {"done": 2, "total": 6}
    assert [shard["views_done"] for shard in found["shards"]] == [0, 4, 0]
    assert found["losses"] == {"deit": ["hard"], "cskd": ["hard"]}


def test_citations_of_the_cache_and_the_method_are_given(tmp_path: Path) -> None:
    writer = make(tmp_path / "c", dataset=replace(dataset(), name="to{y}\\x"))
    found = describe(open_cache(tmp_path / "c"))
    assert found["manifest_sha256"] == writer.manifest.digest()
    assert found["digest"] == open_cache(tmp_path / "c").digest()
    assert f"sha256:{found['digest']}" in found["cite"]["cache"]
    assert "resnet10t" in found["cite"]["cache"]
    assert "2307.08500" in found["cite"]["method"]
    bibtex = found["cite"]["bibtex"]
    assert bibtex.startswith("@misc{")
    assert bibtex.count("{") == bibtex.count("}")
    assert "Teacher cache of resnet10t on toyx: 4 views" in bibtex
    assert "year = {2026}" in bibtex


def test_supported_targets_of_each_encoding_are_reported(tmp_path: Path) -> None:
    CacheWriter.create(tmp_path / "c", manifest(encodings=tuple(ENCODINGS)))
    found = describe(open_cache(tmp_path / "c"))["encodings"]
    assert {name: e["exact"] for name, e in found.items()} == {
        "dense": True, "dense-q8": False, "topk": False, "envelope": True, "sampled": False,
    }  # fmt: skip
    assert (found["topk"]["min_temperature"], found["topk"]["max_temperature"]) == (1.0, None)
    assert found["sampled"]["min_temperature"] == found["sampled"]["max_temperature"] == 1.0
    assert found["dense-q8"]["serves"] == ["soft"]


def test_the_summary_describes_the_targets_of_each_encoding(tmp_path: Path) -> None:
    cache_manifest = manifest(encodings=tuple(ENCODINGS), sampled=Sampled(4, 1 / 3))
    CacheWriter.create(tmp_path / "c", cache_manifest)
    found = summarise(describe(open_cache(tmp_path / "c")))["encodings"]
    assert {name: text.split("; ")[1] for name, text in found.items()} == {
        "dense": "hard and soft targets, exactly",
        "dense-q8": "soft targets, approximately",
        "topk": "soft targets, approximately at temperatures from 1.0",
        "envelope": "hard targets, exactly",
        "sampled": f"soft targets, by unbiased draws, 4 per location at temperature {1 / 3}",
    }


def test_the_parent_of_a_converted_cache_is_reported(tmp_path: Path) -> None:
    parent = manifest().as_parent("cd" * 32)
    CacheWriter.create(tmp_path / "c", manifest(parent=parent))
    found = describe(open_cache(tmp_path / "c"))
    assert found["parent"] == parent
    text = summarise(found)["made"]
    assert f"converted from sha256:{'cd' * 32} (dense, envelope, 4 views" in text


def test_the_summary_has_at_most_20_lines(tmp_path: Path) -> None:
    make(tmp_path / "c", license="CC-BY-4.0", notes="for tests")
    lines = dict(flatten(summarise(describe(open_cache(tmp_path / "c")))))
    assert len(lines) <= 20
    assert lines["data"] == "toy: 12 samples of 20 classes in 3 shards"
    assert lines["complete"] == "yes, 6 units"
    assert lines["teacher"].startswith(
        "resnet10t, float32, 32 px, 2x3 locations; mean 0.5/0.5/0.5, std 0.25/0.25/0.25; "
        "weights from random"
    )
    assert lines["policy"] == "deit-v1, 32 px, defaults"
    assert lines["encodings.dense"].endswith("bytes a view; hard and soft targets, exactly")
    assert lines["encodings.envelope"].endswith("bytes a view; hard targets, exactly")
    assert "hard and soft targets, under every CKF schedule" in lines["serves"]
    assert lines["license"] == "CC-BY-4.0"
    assert lines["notes"] == "for tests"
    assert lines["views"] == "4 of each sample, enough for 4 epochs without repeating one"


def test_the_policy_is_summarised_by_its_non_default_values(tmp_path: Path) -> None:
    make(tmp_path / "c", policy=ViewPolicy(size=32, flip=0.0, crop_area=(0.5, 1.0)))
    text = summarise(describe(open_cache(tmp_path / "c")))["policy"]
    assert text == "deit-v1, 32 px; non-default: crop_area 0.5/1, flip 0.0"


def test_unfinished_shards_are_abbreviated(tmp_path: Path) -> None:
    writer = CacheWriter.create(tmp_path / "c", manifest(dataset=dataset((1,) * 1024)))
    found = describe(open_cache(tmp_path / "c"))
    assert len(found["shards"]) == 1024
    text = summarise(found)["complete"]
    assert text.startswith("no, 0 of 2048 units; unfinished: train-0000.tar has 0 of 4 views, ")
    assert text.endswith("train-0004.tar has 0 of 4 views, and 1019 more")
    assert summarise(found)["encodings"]["dense"].startswith("no view yet; ")
    assert writer.manifest.views == 4


def test_a_folder_without_a_cache_is_not_described(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="not a teacher cache"):
        describe(open_cache(tmp_path))


def test_sizes_follow_links_and_ignore_cycles_and_dangling_links(tmp_path: Path) -> None:
    make(tmp_path / "cache")
    before = describe(open_cache(tmp_path / "cache"))
    (tmp_path / "cache/dense").rename(tmp_path / "moved")
    (tmp_path / "cache/dense").symlink_to(tmp_path / "moved")
    (tmp_path / "cache/seed/c/again").symlink_to(tmp_path / "cache")
    (tmp_path / "cache/seed/c/nothing").symlink_to(tmp_path / "nothing")
    assert describe(open_cache(tmp_path / "cache")) == before
