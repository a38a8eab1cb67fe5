"""Publishing adds correct files for the Hub and leaves the cache unchanged."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest

from cskd_pipeline.cache.info import describe
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.cli import main
from cskd_pipeline.distill.targets import SampledTargets
from cskd_pipeline.errors import CacheError, MissingPackageError, OutputError, UsageError, printable
from cskd_pipeline.runtime import atomic
from cskd_pipeline.tools.publish.publish_cache import PublishOptions, publish
from cskd_pipeline.tools.report.labels import draw_rows
from cskd_pipeline.views.mixing import draw_mix, matching
from tests.cache.factories import COUNTS, VIEWS, dataset, fill, make, manifest, teacher, tree
from tests.cache.test_card import EVIL

Capture = pytest.CaptureFixture[str]
FILES = {"README.md", "croissant.json", "preview.parquet", "SHA256SUMS"}
OPTIONS = PublishOptions("hf://datasets/lab/toy", "cc-by-4.0", samples=20)


class Published(NamedTuple):
    path: Path
    report: dict[str, Any]


@pytest.fixture(scope="module")
def published(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Published:
    path = tmp_path_factory.mktemp("published") / "cache"
    shutil.copytree(finished, path)
    return Published(path, publish(path, OPTIONS))


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "cache")
    return tmp_path / "cache"


def rows_of(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path / "preview.parquet").to_pylist()
    return found


# --- the unchanged cache --------------------------------------------------------------------------


def test_publishing_leaves_the_cache_unchanged(published: Published, finished: Path) -> None:
    before, after = tree(finished), tree(published.path)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == FILES
    one, other = (describe(open_cache(path)) for path in (finished, published.path))
    assert {**one, "path": ""} == {**other, "path": ""}
    assert published.report["digest"] == one["digest"]
    open_cache(f"{published.path}@sha256:{one['digest']}")


def test_cache_commands_ignore_the_published_files(
    published: Published, tmp_path: Path, capsys: Capture
) -> None:
    path = str(published.path)
    for words in (
        ["verify", path],
        ["info", path],
        ["convert", path, str(tmp_path / "small"), "--encoding", "envelope"],
        ["merge", path, "--out", str(tmp_path / "merged")],
    ):
        assert main(["cache", *words, "--quiet"]) == 0
    for name in ("small", "merged"):
        assert not FILES & {p.name for p in (tmp_path / name).iterdir()}
    assert open_cache(tmp_path / "merged").digest() == published.report["digest"]


def test_the_upload_command_is_printed(copied: Path, capsys: Capture) -> None:
    words = ["cache", "publish", str(copied), "--samples", "1", "--json"]
    assert main(words) == 0
    assert "upload" not in json.loads(capsys.readouterr().out)
    assert main([*words, "--location", "hf://datasets/lab/toy"]) == 0
    upload = json.loads(capsys.readouterr().out)["upload"]
    assert upload == f"hf upload lab/toy {copied} --repo-type dataset"


def test_exceeding_the_hubs_file_limit_is_warned_about(
    copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish(copied, replace(OPTIONS, samples=1))
    assert not caplog.messages
    monkeypatch.setattr("cskd_pipeline.cache.units.HUB_FILES", 20)
    publish(copied, replace(OPTIONS, samples=1))
    assert "more than the 20 per repository that the Hub recommends" in caplog.text
    assert "reduce them with cache convert --view-block 0" in caplog.text


# --- the preview ----------------------------------------------------------------------------------


def test_the_preview_matches_the_cache(published: Published) -> None:
    cache, rows = open_cache(published.path), rows_of(published.path)
    assert len(rows) == published.report["views"] == 20
    policy, root_seed = cache.manifest.policy, cache.manifest.root_seed
    assert policy.mixes
    for row in rows:
        view, pair = row["view"], [(row["view"], row["key"])]
        shard, offset = cache.find([row["key"]])[0].tolist()
        names, labels = cache.manifest.dataset.class_names or (), cache.labels(shard)
        assert row["label"] == labels[offset]
        assert row["class_name"] == names[row["label"]]
        count, seeds = cache.counts[shard], cache.seeds(view, shard).tolist()
        other = matching(root_seed, cache.shard_ids[shard], count, view, policy)[offset]
        share = draw_mix(seeds[offset], seeds[other], policy).lam
        assert row["share"] == pytest.approx(share)
        assert row["partner_label"] == labels[offset if share == 1 else other]
        targets = cache.targets(pair, "envelope")
        assert row["teacher_label"] == int(targets.hard_global())
        assert row["teacher_class_name"] == names[row["teacher_label"]]
        agreement = (targets.hard_spatial(1.0) == row["label"]).float().mean()
        assert row["agreement"] == pytest.approx(float(agreement))
        logits = cache.targets(pair, "dense", kinds=("soft",)).global_log_probabilities(1.0)
        expected = float(logits[0, row["teacher_label"]].exp())
        assert row["teacher_probability"] == pytest.approx(expected)


def test_preview_rows_are_drawn_by_seed_without_repetition(finished: Path) -> None:
    cache, total = open_cache(finished), VIEWS * sum(COUNTS)
    one, again, other = (draw_rows(cache, 20, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert one.tolist() != other.tolist()
    for count in (1, 20, total, 10 * total):
        rows = draw_rows(cache, count, 0)
        assert len({tuple(row) for row in rows.tolist()}) == len(rows) == min(count, total)
    assert sorted({view for view, _, _ in one.tolist()}) == list(range(VIEWS))


def test_the_preview_of_an_unfinished_cache_omits_unknown_values(tmp_path: Path) -> None:
    unnamed = manifest(encodings=("envelope",), dataset=replace(dataset(), class_names=None))
    writer = CacheWriter.create(tmp_path / "cache", unnamed)
    with pytest.raises(CacheError, match="the cache has no finished unit"):
        publish(tmp_path / "cache", PublishOptions())
    fill(writer, writer.todo()[:1])
    report = publish(tmp_path / "cache", PublishOptions())
    rows = rows_of(tmp_path / "cache")
    assert len(rows) == 2 * COUNTS[0]
    assert report["digest"] is None
    assert {row["view"] for row in rows} == {0, 1}
    assert {row["teacher_probability"] for row in rows} == {None}
    assert {row["class_name"] for row in rows} == {row["teacher_class_name"] for row in rows}
    assert {row["class_name"] for row in rows} == {None}


@pytest.mark.parametrize("encoding", ["topk", "sampled"])
def test_approximate_labels_are_marked_as_such(
    encoding: str, finished: Path, tmp_path: Path
) -> None:
    words = [str(finished), str(tmp_path / "cache"), "--encoding", encoding, "--quiet"]
    assert main(["cache", "convert", *words]) == 0
    publish(tmp_path / "cache", OPTIONS)
    cache = open_cache(tmp_path / "cache")
    for row in rows_of(tmp_path / "cache"):
        targets = cache.targets([(row["view"], row["key"])], kinds=("soft",))
        if isinstance(targets, SampledTargets):
            draws = targets.drawn_global(1.0)[0].tolist()
            assert draws.count(row["teacher_label"]) == max(map(draws.count, draws))
            assert row["teacher_probability"] is None
        else:
            top, label = targets.global_log_probabilities(1.0)[0].exp().max(0)
            assert row["teacher_label"] == int(label)
            assert row["teacher_probability"] == pytest.approx(float(top))
    text = (tmp_path / "cache/README.md").read_text()
    assert "labels are approximations" in text
    described = {"topk": "approximately", "sampled": "by unbiased draws, 1 per location"}
    assert f"| {encoding} | soft targets, {described[encoding]} |" in text


def test_the_datasets_library_opens_the_preview(published: Published, tmp_path: Path) -> None:
    import datasets

    found = datasets.load_dataset(str(published.path), cache_dir=str(tmp_path))
    assert list(found) == ["preview"]
    assert found["preview"].to_list() == rows_of(published.path)
    assert found["preview"].features["teacher_label"].dtype == "int32"


# --- digests and Croissant ------------------------------------------------------------------------


def test_every_cache_file_has_its_checksum(published: Published) -> None:
    files = tree(published.path)
    lines = files["SHA256SUMS"].decode().splitlines()
    expected = {
        name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name not in FILES
    }
    assert lines == [f"{expected[name]}  {name}" for name in sorted(expected)]


def test_checksums_are_those_recorded_and_not_of_damaged_files(copied: Path) -> None:
    one = PublishOptions(samples=1)
    publish(copied, one)
    before = (copied / "SHA256SUMS").read_text()
    view, _, _ = draw_rows(open_cache(copied), 1, one.seed)[0].tolist()
    damaged = copied / f"dense/spatial/c/{VIEWS - 1 - view}/0/0/0/0/0"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    publish(copied, one)
    assert (copied / "SHA256SUMS").read_text() == before


def test_the_croissant_metadata_is_valid_and_loads_the_preview(published: Published) -> None:
    import mlcroissant

    found = mlcroissant.Dataset(published.path / "croissant.json")
    issues = found.metadata.ctx.issues
    assert not issues.errors
    assert all("schema.org/version" in warning for warning in issues.warnings)
    assert found.metadata.url == "https://huggingface.co/datasets/lab/toy"
    assert found.metadata.license == ["cc-by-4.0"]
    files = tree(published.path)
    listed = [part for part in found.metadata.distribution if hasattr(part, "sha256")]
    assert {part.id for part in listed} == {"zarr.json", "preview.parquet", "SHA256SUMS"}
    for part in listed:
        assert part.sha256 == hashlib.sha256(files[part.content_url]).hexdigest()
    for record, row in zip(found.records("preview"), rows_of(published.path), strict=True):
        values = {name.removeprefix("preview/"): value for name, value in record.items()}
        texts = {n: v.decode() if isinstance(v, bytes) else v for n, v in values.items()}
        assert texts == pytest.approx(row)


# --- hostile text, foreign files ------------------------------------------------------------------


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    names = tuple(f"{EVIL}{k}" for k in range(dataset().num_classes))
    cache = tmp_path / "cache"
    changed = replace(dataset(), name=EVIL, class_names=names)
    make(cache, dataset=changed, teacher=teacher(name=EVIL), license=EVIL)
    publish(cache, PublishOptions(samples=2))
    text = (cache / "croissant.json").read_text()
    assert "<" not in text
    document = json.loads(text)
    assert document["name"] == printable(f"Teacher cache: {EVIL} on {EVIL}")
    assert document["license"] == printable(EVIL)
    for row in rows_of(cache):
        assert row["class_name"] == printable(names[row["label"]], 80)


def test_foreign_files_are_kept(copied: Path) -> None:
    for name in FILES:
        (copied / name).write_text("mine")
        with pytest.raises(OutputError, match="not written by this command"):
            publish(copied, OPTIONS)
        assert FILES & {p.name for p in copied.iterdir()} == {name}
        assert (copied / name).read_text() == "mine"
        (copied / name).unlink()


def test_an_interrupted_publish_can_be_rerun(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stop in range(1, len(FILES)):
        written: list[Path] = []

        def write(path: Path, data: bytes, at: int = stop, seen: list[Path] = written) -> None:
            if len(seen) == at:
                raise KeyboardInterrupt
            seen.append(path)
            path.write_bytes(data)

        with monkeypatch.context() as patch:
            patch.setattr(atomic, "write_bytes", write)
            with pytest.raises(KeyboardInterrupt):
                publish(copied, OPTIONS)
        assert open_cache(copied).done().all()
    publish(copied, OPTIONS)
    assert {p.name for p in copied.iterdir()} >= FILES


def test_unpublishable_caches_are_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for location in ("hf://lab/toy", "hf://datasets/lab", "hf://datasets/lab/toy/part", "hf:/x"):
        with pytest.raises(UsageError, match="not the location of a data set on the Hub"):
            publish(copied, PublishOptions(location))
    with pytest.raises(UsageError, match="only a local cache"):
        publish(Path("https://host/cache"), PublishOptions())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackageError) as error:
        publish(copied, PublishOptions())
    assert error.value.action == "pip install 'cskd-pipeline[hub]'"
    assert not FILES & {p.name for p in copied.iterdir()}


def test_a_second_license_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "cache", license="MIT")
    with pytest.raises(UsageError, match="another license"):
        publish(tmp_path / "cache", OPTIONS)
    assert publish(tmp_path / "cache", PublishOptions(license="MIT"))["license"] == "MIT"


def test_thumbnail_flags_must_be_combined(copied: Path, capsys: Capture) -> None:
    for flags in (["--thumbnails"], ["--shards", "x"], ["--thumbnails", "--split", "train"]):
        assert main(["cache", "publish", str(copied), *flags]) == 2
    assert "--shards SHARDS" in capsys.readouterr().err
