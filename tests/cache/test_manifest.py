"""Manifests round-trip, report every problem at once and refuse hostile documents."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from cskd_pipeline.cache.manifest import (
    CacheManifest,
    DatasetManifest,
    ShardInfo,
    keys_sha256,
    library_versions,
    utc_now,
)
from cskd_pipeline.errors import ManifestError
from cskd_pipeline.runtime import resources, schemas
from cskd_pipeline.views.policy import ViewPolicy
from tests.cache.factories import dataset, manifest, teacher


def cache_document() -> dict[str, Any]:
    return copy.deepcopy(manifest().to_json())


def problems(document: object) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        CacheManifest.from_json(document)
    return caught.value.problems


def changed(path: str, value: object) -> dict[str, Any]:
    """Return a valid document with one field set; ``path`` is dotted, with list indices."""
    document = cache_document()
    *folders, name = (int(part) if part.isdecimal() else part for part in path.split("."))
    parent: Any = document
    for folder in folders:
        parent = parent[folder]
    parent[name] = value
    return document


@pytest.mark.parametrize("name", ["dataset", "cache"])
def test_the_schemas_are_valid_json_schema(name: str) -> None:
    document = json.loads((resources.manifests() / f"{name}.schema.json").read_text())
    Draft202012Validator.check_schema(document)


def test_manifests_round_trip_through_json() -> None:
    for original in (
        manifest(),
        manifest(other_versions=({"torch": "2.8"},), notes="ä\n", license="CC0"),
    ):
        assert CacheManifest.from_json(json.loads(json.dumps(original.to_json()))) == original
    for data in (dataset(), replace(dataset(), class_names=None)):
        assert DatasetManifest.from_json(json.loads(json.dumps(data.to_json()))) == data


def test_a_saved_dataset_manifest_can_be_loaded(tmp_path: Path) -> None:
    dataset().save(tmp_path / "manifest.json")
    assert DatasetManifest.load(tmp_path / "manifest.json") == dataset()


def test_every_problem_is_reported_at_once() -> None:
    document = cache_document()
    del document["teacher"]["grid"]
    document["surprise"] = 1
    document["views"] = "ten"
    document["dataset"]["shards"][1]["sha256"] = "zz"
    document["dataset"]["shards"][2]["count"] = 0
    document["encodings"] = []
    found = problems(document)
    assert len(found) == 6
    assert "$.teacher.grid: found nothing, expected a value" in found
    assert '$.views: found "ten", expected integer' in found
    assert "$.dataset.shards[2].count: found 0, expected at least 1" in found
    assert "$.encodings: found a list of 0, expected at least 1 entries" in found
    assert any(line.startswith("$.surprise: found an unknown field") for line in found)
    assert any(line.startswith('$.dataset.shards[1].sha256: found "zz"') for line in found)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("format_version", 3, "$.format_version: found 3, expected 2"),
        ("format", "zip", '$.format: found "zip", expected "cskd-cache"'),
        ("views", 5, "$.views: found 5, expected a multiple of view_block = 2"),
        ("teacher.num_classes", 9, "$.teacher.num_classes: found 9"),
        ("teacher.size", 64, "$.teacher.size: found 64, expected policy.size = 32"),
        ("teacher.precision", "int8", "$.teacher.precision"),
        ("teacher.top1", 81.3, "$.teacher.top1: found 81.3, expected at most 1"),
        ("policy.version", "deit-v9", "$.policy: found version 'deit-v9' is unknown"),
        ("policy.sharpen", 1.0, "$.policy: found sharpen"),
        ("policy.mean", [0.5], "$.policy"),
        ("root_seed", -1, "$.root_seed"),
        ("root_seed", True, "$.root_seed: found true, expected integer"),
        ("created", "yesterday", "$.created"),
        ("encodings", ["dense", "dense"], "$.encodings: found a list of 2, expected unique"),
        ("encodings", ["../x"], "$.encodings[0]"),
        ("dataset.class_names", ["a"], "$.dataset.class_names: found 1 names"),
        ("dataset.shards.1.name", "../up.tar", "$.dataset.shards[1].name"),
        ("dataset.shards.1.name", "/etc/passwd", "$.dataset.shards[1].name"),
        ("dataset.shards.1.name", "a/./b.tar", "$.dataset.shards[1].name"),
        ("dataset.shards.1.name", "pipe:curl x", "$.dataset.shards[1].name"),
        ("dataset.shards.1.name", "a\\b.tar", "$.dataset.shards[1].name"),
        ("dataset.shards.1.name", "\x1b[2J.tar", "$.dataset.shards[1].name"),
        ("dataset.shards.1.name", "train-0000.tar", "found that of shards[0]"),
        ("dataset.shards.1.keys_sha256", dataset().shard_ids[0], "found that of shards[0]"),
    ],
)  # fmt: skip
def test_an_invalid_field_is_named(path: str, value: object, expected: str) -> None:
    found = problems(changed(path, value))
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize("value", [None, 3, "text", [], [1, [2]], {"format": "cskd-cache"}])
def test_json_that_is_not_a_manifest_is_refused(value: object) -> None:
    assert problems(value)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN}', b"[1e999]", b"[-Infinity]",
     b"[" + b"9" * 5000 + b"]"],
    ids=["empty", "truncated", "not text", "deep", "nan", "overflow", "infinity", "long number"],
)  # fmt: skip
def test_invalid_json_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(data)
    with pytest.raises(ManifestError, match="expected a JSON document") as caught:
        DatasetManifest.load(path)
    assert caught.value.where == path


def test_an_oversized_document_is_refused_before_parsing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset().save(tmp_path / "manifest.json")
    monkeypatch.setattr(schemas, "MAX_BYTES", 100)
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(ManifestError, match="larger document"):
        DatasetManifest.load(tmp_path / "manifest.json")


def test_problems_of_a_huge_document_are_bounded() -> None:
    found = problems(changed("encodings", [1] * 100_000))
    assert len(found) == schemas.MAX_PROBLEMS


def test_conflicting_fields_are_listed() -> None:
    last = ShardInfo.of("z.tar", ["k"], 9, "0" * 64)
    other = manifest(
        dataset=replace(dataset(), shards=(*dataset().shards[:2], last)),
        teacher=teacher(weights_sha256="cd" * 32),
        policy=ViewPolicy(size=32, flip=0.25),
        encodings=("dense",),
        root_seed=8,
    )  # fmt: skip
    found = {at: (mine, theirs) for at, mine, theirs in manifest().conflicts(other)}
    assert found["teacher.weights_sha256"] == ("ab" * 32, "cd" * 32)
    assert found["policy.flip"] == (0.5, 0.25)
    assert found["root_seed"] == (7, 8)
    assert found["encodings"] == (["dense", "envelope"], ["dense"])
    assert found["dataset.shards[2].sha256"] == ("2".zfill(64), "0" * 64)
    assert not any("shards[0]" in at for at in found)


def test_fields_that_may_differ_are_ignored() -> None:
    other = manifest(
        views=8, view_block=4, notes="n", license="l", created="2030-01-01T00:00:00Z",
        versions={"torch": "9"}, teacher=teacher(source="another", top1=0.8),
    )  # fmt: skip
    assert manifest().conflicts(other) == []
    shards = tuple(replace(shard, name=f"moved/{shard.name}") for shard in dataset().shards)
    renamed = DatasetManifest("another", dataset().num_classes, shards)
    assert manifest().conflicts(manifest(dataset=renamed)) == []


def test_versions_that_determine_pixels_or_logits_are_compared() -> None:
    original = manifest()
    assert original.version_differences({**original.versions, "python": "3.14", "zarr": "9"}) == []
    newer = {**original.versions, "pillow": "13.0.0"}
    assert original.version_differences(newer) == ["pillow: 12.0.0 and 13.0.0"]
    assert replace(original, other_versions=(newer,)).version_differences(newer) == []


def test_keys_are_hashed_with_terminators() -> None:
    # The schema's definition, computed by hand.
    assert keys_sha256(["ab", "ü"]) == hashlib.sha256(b"ab\0\xc3\xbc\0").hexdigest()
    assert keys_sha256(["ab", "c"]) != keys_sha256(["a", "bc"])
    assert keys_sha256(["a", "b"]) != keys_sha256(["b", "a"])
    info = ShardInfo.of("s.tar", ["ab", "üx"], 10, "0" * 64)
    assert (info.count, info.key_bytes) == (2, 3)


def test_the_digest_does_not_depend_on_the_order_of_fields() -> None:
    document = manifest().to_json()
    backwards = dict(reversed(document.items()))
    assert schemas.sha256(backwards) == manifest().digest()
    assert schemas.sha256({"b": [1.5, "ä"], "a": None}) == (
        hashlib.sha256(b'{"a":null,"b":[1.5,"\\u00e4"]}').hexdigest()
    )


def test_current_versions_and_time_match_the_schema() -> None:
    original = manifest(versions=library_versions(), created=utc_now())
    assert CacheManifest.from_json(original.to_json()) == original
    assert {"python", "machine", "pillow", "numpy", "torch"} <= set(original.versions)
