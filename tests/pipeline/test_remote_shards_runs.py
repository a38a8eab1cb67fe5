"""Commands give the same results for shards at a URL and on this machine."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cskd_pipeline import open_cache
from cskd_pipeline.cache.manifest import TeacherInfo
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.config.sections import CacheSection
from cskd_pipeline.data.describe import index_shards
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.data.join import join
from cskd_pipeline.data.remote_tar import RemoteTars
from cskd_pipeline.data.replay import replay, spread_views
from cskd_pipeline.data.shards import TarShard
from cskd_pipeline.data.unit_views import Loading
from cskd_pipeline.errors import ShardError
from cskd_pipeline.pipeline.dump import dump_teacher
from cskd_pipeline.pipeline.unit_writer import UnitWriter
from cskd_pipeline.pipeline.write_cache import write_cache
from cskd_pipeline.views.policy import ViewPolicy
from tests.images import write_shards
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.pipeline.test_training import assert_equal, final_state
from tests.serving import keep_copies, serving

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of local copies."""
    return keep_copies(tmp_path / "copies", monkeypatch)


def test_a_dump_from_a_url_equals_one_from_disk(small: World, tmp_path: Path) -> None:
    """With every tar's SHA-256, from a manifest next to the tars."""
    index_shards(small.shards).save(small.shards / "manifest.json")
    with serving(small.shards.parent) as served:
        served.faults = [("0001.tar", "truncate"), ("0002.tar", "reset")]
        dump_teacher(world.dump_recipe(f"{served.url}/shards/manifest.json", tmp_path / "cache"))
    assert world.cache_files(tmp_path / "cache") == world.cache_files(small.cache)
    remote, local = open_cache(tmp_path / "cache"), open_cache(small.cache)
    assert remote.manifest.dataset == local.manifest.dataset
    assert remote.digest() == local.digest()


def dump_zeros(shards: str, cache: Path, seen: Callable[[], object] = lambda: None) -> UnitWriter:
    """Dump one view with a network that returns zeros; call ``seen`` after each batch."""
    teacher = TeacherInfo("zeros", "random", "0" * 64, 5, 32, (0.0,) * 3, (1.0,) * 3, (2, 2))
    section, policy = CacheSection(str(cache), views=1), ViewPolicy(size=32)
    with write_cache(section, shards, teacher, policy, loading=Loading(batch_size=4)) as writer:
        for batch in writer.views():
            writer.put(batch, torch.zeros(len(batch), 5, 2, 2), torch.zeros(len(batch), 5))
            seen()
    return writer


def test_a_dump_from_a_url_starts_before_the_last_tar_is_requested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With space for half of the set, and no tar fetched twice. Resuming gives the same bytes."""
    tars = write_shards(tmp_path / "served/set", (4,) * 8)
    size = max(path.stat().st_size for path in tars)
    monkeypatch.setenv("CSKD_CACHE_GB", str(5 * size / 1e9))
    cache, progress = tmp_path / "cache", list[tuple[bool, bool]]()
    with serving(tmp_path / "served") as served, caplog.at_level("INFO"):
        last = [path.name for path in tars][-1]

        def seen() -> None:
            progress.append((bool(CacheWriter.open(cache).done().any()), None in served.gets(last)))

        dump_zeros(f"{served.url}/set/train-{{0000..0007}}.tar", cache, seen)
        assert (True, False) in progress  # a unit is written before the last tar is requested
        assert [served.gets(path.name).count(None) for path in tars] == [1] * 8
        assert caplog.text.count("8 shards have no SHA-256") == 1
        index_shards(f"{served.url}/set/train-{{0000..0007}}.tar").save(tmp_path / "train.json")
        for spec in (tmp_path / "served/set", tmp_path / "train.json"):
            assert not dump_zeros(str(spec), cache).units  # the same cache, complete
    assert {shard.sha256 for shard in open_cache(cache).manifest.dataset.shards} == {None}


def test_a_dump_resumed_from_a_url_requires_the_tars_of_its_manifest(tmp_path: Path) -> None:
    tars = write_shards(tmp_path / "served/set", (4, 4))
    dump_zeros(str(tmp_path / "served/set"), tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache/digest/c")  # no unit is done
    data, at = tars[1].read_bytes(), int(TarShard(tars[1]).index.offset[0]) + 200
    tars[1].write_bytes(data[:at] + bytes(16) + data[at + 16 :])  # in an image
    refusal = pytest.raises(ShardError, match="wrong SHA-256")
    with serving(tmp_path / "served") as served, refusal:
        dump_zeros(f"{served.url}/set/train-{{0000..0001}}.tar", tmp_path / "cache")


def test_labels_of_tars_without_sha256_are_compared_before_training(
    small: World, tmp_path: Path
) -> None:
    """Neither side states a SHA-256, so nothing else shows that the tars are the same."""
    with serving(small.shards.parent) as served:
        url = f"{served.url}/shards"
        dump_teacher(world.dump_recipe(url, tmp_path / "cache"))
        index_shards(url).save(tmp_path / "train.json")
        cache = open_cache(tmp_path / "cache")
        joined = join(load_dataset(tmp_path / "train.json"), cache)
        assert joined.compared == joined.samples.total


def test_before_training_few_tars_are_fetched_and_headers_are_read_in_parallel(
    small: World, tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers, read = set(), RemoteTars.read

    def record(*arguments: Any) -> bytes:
        readers.add(threading.get_ident())
        return read(*arguments)

    monkeypatch.setattr(RemoteTars, "read", record)
    cache = open_cache(small.cache)
    with serving(small.shards.parent) as served:
        index_shards(f"{served.url}/shards").save(tmp_path / "train.json")  # without SHA-256
        shutil.rmtree(copies)  # another machine
        dataset = load_dataset(tmp_path / "train.json")
        readers.clear()
        joined = join(dataset, cache)
        assert joined.same_shards == 3
        assert readers
        assert threading.get_ident() not in readers  # only threads of a pool
        rows = spread_views(joined, 12, few=2)
        assert len(rows) == len(spread_views(joined, 12)) == 12
        assert len(np.unique(joined.images.locate(rows[:, 1:])[0])) == 2
        assert replay(joined, rows).exact.all()
        fetched = [path for _, path, part in served.requests if path.endswith(".tar") and not part]
        assert len(fetched) == 2
    local = join(load_dataset(small.shards), cache)
    assert len(np.unique(spread_views(local, 12, few=2)[:, 1])) == 3


def train(shards: object, small: World, out: Path, *flags: object) -> int:
    return world.cli(
        *("train", "--shards", shards, "--cache", small.cache, "--out", out),
        *("--student", world.STUDENT, "--method", "cskd", "--epochs", 2, "--batch-size", 16),
        *("--device", "cpu", *world.as_flags(world.train_sets()), *flags),
    )


def evaluate(run: Path, shards: object, capsys: Capture) -> dict[str, Any]:
    capsys.readouterr()
    assert world.cli("evaluate", run, "--shards", shards, "--workers", 2, "--json") == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    del report["seconds"]
    return report


def test_training_and_evaluation_from_urls_equal_those_from_disk(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """With loader processes, interrupted transfers, and space for less than the set."""
    sizes = [path.stat().st_size for path in small.shards.glob("*.tar")]
    block = ("--set", "batch.shuffle_shards=1")
    assert train(small.shards, small, tmp_path / "local", *block, "--workers", 0) == 0
    with serving(small.shards.parent) as served:
        monkeypatch.setenv("CSKD_CACHE_GB", str(1.6 * max(sizes) / 1e9))
        served.faults = [("0001.tar", "truncate"), ("0000.tar", 503), ("0002.tar", "reset")]
        url = f"{served.url}/shards"
        assert train(url, small, tmp_path / "remote", *block, "--workers", 2) == 0
        assert len(served.gets("0000.tar")) > 2  # fetched again after it was evicted
        assert evaluate(tmp_path / "local", small.validation, capsys) | {"checkpoint": ""} == (
            evaluate(tmp_path / "local", f"{served.url}/validation", capsys) | {"checkpoint": ""}
        )
    assert_equal(final_state(tmp_path / "local"), final_state(tmp_path / "remote"))


def test_too_little_space_for_a_batch_is_refused(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    size = max(path.stat().st_size for path in small.shards.glob("*.tar"))
    with serving(small.shards.parent) as served:
        monkeypatch.setenv("CSKD_CACHE_GB", str(1.6 * size / 1e9))
        assert train(f"{served.url}/shards", small, tmp_path / "run", "--workers", 0) == 2
    assert "too small for one batch (3 tars)" in capsys.readouterr().err
