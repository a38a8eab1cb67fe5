"""Shards at a URL read like local ones, whatever goes wrong on the way."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cskd_pipeline.cache import remote_files
from cskd_pipeline.cache.manifest import DatasetManifest
from cskd_pipeline.data import remote_tar
from cskd_pipeline.data.cached_loader import CachedLoader
from cskd_pipeline.data.describe import describe, index_shards
from cskd_pipeline.data.evalset import eval_loader
from cskd_pipeline.data.images import ImageSource
from cskd_pipeline.data.index import Dataset, load_dataset
from cskd_pipeline.data.listing import list_shards
from cskd_pipeline.data.plan import SampleSet
from cskd_pipeline.data.read_ahead import THREAD
from cskd_pipeline.data.remote_tar import RangeFile, RemoteTars, require_room
from cskd_pipeline.data.training_views import TrainingViews
from cskd_pipeline.data.unit_views import UNITS_AHEAD, Loading, unit_batches
from cskd_pipeline.errors import DataError, RemoteError, ShardError, UsageError
from cskd_pipeline.models.student import Preprocessing
from cskd_pipeline.tools.make_shards import make_shards
from cskd_pipeline.views.policy import ViewPolicy
from tests.conftest import COUNTS
from tests.processes import until
from tests.serving import (
    BUCKET,
    REPOSITORY,
    Served,
    keep_copies,
    redirect_hub,
    serving,
    serving_bucket,
)


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of local copies."""
    return keep_copies(tmp_path / "copies", monkeypatch)


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "served/set"))


@pytest.fixture
def served(folder: Path, copies: Path) -> Iterator[Served]:
    with serving(folder.parent) as found:
        yield found


@pytest.fixture
def store(folder: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Serve the same files as a bucket."""
    with serving_bucket(folder.parent, monkeypatch) as found:
        yield found


def pattern(served: Served) -> str:
    return f"{served.url}/set/train-{{0000..0003}}.tar"


def assert_same(remote: Dataset, local: Dataset) -> None:
    assert (remote.counts, remote.shard_ids) == (local.counts, local.shard_ids)
    assert (remote.class_names, remote.name) == (local.class_names, local.name)
    for one, other in zip(remote.shards, local.shards, strict=True):
        for field in ("keys", "label", "offset", "size"):
            np.testing.assert_array_equal(getattr(one.index, field), getattr(other.index, field))
        assert list(one.read_images(range(len(one)))) == list(other.read_images(range(len(other))))


def tars(copies: Path) -> list[Path]:
    return sorted(copies.rglob("*.tar"))


def fresh(copies: Path) -> None:
    shutil.rmtree(copies, ignore_errors=True)
    remote_tar._tars_in.cache_clear()


def test_shards_behind_a_web_server_read_as_their_folder(served: Served, folder: Path) -> None:
    assert_same(load_dataset(pattern(served)), load_dataset(folder))


def test_shards_of_a_server_without_ranges_are_fetched_completely(
    served: Served, folder: Path, copies: Path
) -> None:
    served.ranges = False
    remote = load_dataset(pattern(served))
    assert len(tars(copies)) == len(COUNTS)
    assert_same(remote, load_dataset(folder))


@pytest.mark.parametrize(
    "spec", ["set/", "set/train-*.tar,", "set/{train-0000,train-{0001..0003}}.tar"]
)
def test_shards_in_an_object_store_read_as_their_folder(
    store: Served, folder: Path, spec: str
) -> None:
    assert_same(load_dataset(f"s3://{BUCKET}/{spec}"), load_dataset(folder))


def test_a_comma_list_may_mix_urls_and_files(served: Served, folder: Path) -> None:
    found, _ = list_shards(f"{served.url}/set/train-0001.tar,{folder}/train-0000.tar")
    assert [str(path) for path in found] == [
        f"{served.url}/set/train-0001.tar",
        f"{folder}/train-0000.tar",
    ]


def test_headers_are_read_by_ranges_and_no_image_is_fetched(tmp_path: Path, copies: Path) -> None:
    images = tmp_path / "images"
    for name in ("a", "b"):
        (images / name).mkdir(parents=True)
        for number in range(4):
            data = np.random.default_rng(number).bytes(300_000)
            (images / name / f"{name}{number}.jpg").write_bytes(b"\xff\xd8\xff" + data)
    make_shards(images, tmp_path / "served/set", shard_size=4)
    with serving(tmp_path / "served") as served:
        info = index_shards(f"{served.url}/set")
        bodies = [r for r in served.gets(".tar") if r is not None]
        sizes = [int(r[6:].split("-")[1]) - int(r[6:].split("-")[0]) + 1 for r in bodies]
        assert served.gets(".tar").count(None) == 0
    assert sum(sizes) < 0.1 * sum(shard.bytes for shard in info.shards)
    assert not tars(copies)
    local = index_shards(tmp_path / "served/set")
    assert info.location == f"{served.url}/set"
    assert [replace(s, sha256=None) for s in local.shards] == list(info.shards)


def test_headers_are_requested_once_on_a_machine(served: Served) -> None:
    load_dataset(pattern(served))
    before = len(served.requests)
    load_dataset(pattern(served))
    again = [r for _, path, r in served.requests[before:] if path.endswith(".tar")]
    assert set(again) == {"bytes=0-0"}  # do they still exist unchanged?


def test_a_manifest_on_this_machine_leads_to_the_url(
    served: Served, folder: Path, tmp_path: Path
) -> None:
    manifest = index_shards(pattern(served))
    manifest.save(tmp_path / "train.json")
    assert DatasetManifest.load(tmp_path / "train.json") == manifest
    remote = load_dataset(tmp_path / "train.json")
    assert_same(remote, load_dataset(folder))
    assert describe(remote) == replace(manifest, location=None)  # what a dump writes


def test_a_manifest_next_to_the_shards_is_used(served: Served, folder: Path) -> None:
    index_shards(folder).save(folder / "manifest.json")
    remote = load_dataset(f"{served.url}/set/manifest.json")
    assert not [r for r in served.gets(".tar") if r != "bytes=0-0"]
    assert_same(remote, load_dataset(folder))


def test_a_tar_that_does_not_match_its_manifest_is_refused(
    served: Served, folder: Path, copies: Path
) -> None:
    index_shards(folder).save(folder / "manifest.json")
    path = folder / "train-0000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1  # in an image
    path.write_bytes(data)
    remote = load_dataset(f"{served.url}/set/manifest.json")
    with pytest.raises(ShardError, match="wrong SHA-256") as caught:
        next(remote.shards[0].read_images([0]))
    assert caught.value.expected == remote.shards[0].info.sha256  # type: ignore[union-attr]
    assert not tars(copies)


@pytest.mark.parametrize("fault", ["reset", "truncate", 503, 500])
def test_transient_failures_have_no_effect(served: Served, folder: Path, fault: str | int) -> None:
    served.faults = [("0000.tar", fault)] * 3 + [("0002.tar", fault)] * 2
    assert_same(load_dataset(pattern(served)), load_dataset(folder))


def test_permanent_failures_are_errors(served: Served) -> None:
    dataset = load_dataset(pattern(served))
    served.always["0001.tar"] = 503
    with pytest.raises(RemoteError, match="the shards cannot be reached"):
        next(dataset.shards[1].read_images([0]))
    served.always["0001.tar"] = 403
    with pytest.raises(RemoteError, match="access to the shards is denied"):
        load_dataset(pattern(served))


def test_all_missing_shards_are_listed(served: Served) -> None:
    with pytest.raises(DataError, match="2 of 6 shards are missing") as caught:
        load_dataset(f"{served.url}/set/train-{{0000..0005}}.tar")
    assert [line.rpartition("/")[2] for line in caught.value.problems] == [
        "train-0004.tar",
        "train-0005.tar",
    ]


def change(path: Path) -> None:
    """Replace bytes without changing the length."""
    data = path.read_bytes()
    path.write_bytes(data[:600] + bytes(16) + data[616:])


@pytest.mark.parametrize("etags", [True, False])
def test_a_tar_that_changed_since_its_headers_were_read_is_refused(
    served: Served, folder: Path, copies: Path, etags: bool
) -> None:
    served.etags = etags
    os.utime(folder / "train-0000.tar", (0, 0))
    dataset = load_dataset(pattern(served))
    change(folder / "train-0000.tar")
    with pytest.raises(ShardError, match="the tar changed while in use"):
        next(dataset.shards[0].read_images([0]))
    assert not tars(copies)


def test_a_tar_that_changes_during_its_transfer_is_not_mixed(
    served: Served, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load_dataset(pattern(served))
    served.faults = [("0000.tar", "truncate")]
    original = remote_files.time.sleep

    def later(seconds: float) -> None:
        change(folder / "train-0000.tar")
        original(seconds)

    monkeypatch.setattr(remote_files.time, "sleep", later)
    with pytest.raises(ShardError, match="changed while in use"):
        next(dataset.shards[0].read_images([0]))


def test_the_next_command_reads_the_changed_tar(served: Served, folder: Path) -> None:
    next(load_dataset(pattern(served)).shards[0].read_images([0]))
    data = (folder / "train-0002.tar").read_bytes()
    (folder / "train-0000.tar").write_bytes(data)
    (folder / "train-0002.tar").unlink()
    spec = f"{served.url}/set/train-0000.tar"
    assert load_dataset(spec).counts == (COUNTS[2],)


def test_headers_of_a_wrong_tar_are_not_reused(served: Served, folder: Path) -> None:
    """Not even once the tar of the manifest is restored."""
    index_shards(folder).save(folder / "manifest.json")
    path, spec = folder / "train-0000.tar", f"{served.url}/set/manifest.json"
    described, labels = path.read_bytes(), load_dataset(folder).shards[0].index.label.tolist()
    with tarfile.open(path) as tar:
        start = next(m.offset_data for m in tar if m.name.endswith(".cls"))
    path.write_bytes(described[:start] + bytes([described[start] ^ 1]) + described[start + 1 :])
    assert load_dataset(spec).shards[0].index.label.tolist() != labels
    path.write_bytes(described)
    assert load_dataset(spec).shards[0].index.label.tolist() == labels


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no zip", b"\x93NUMPY", None])
def test_a_damaged_index_is_written_again(
    served: Served, folder: Path, copies: Path, content: bytes | None, caplog: Any
) -> None:
    load_dataset(pattern(served))
    indices = list(copies.rglob("*.npz"))
    assert len(indices) == len(COUNTS)
    for index in indices:
        data = index.read_bytes()
        index.write_bytes(data[: len(data) // 2] if content is None else content)
    for damaged in (len(COUNTS), 0):
        caplog.clear()
        assert_same(load_dataset(pattern(served)), load_dataset(folder))
        assert caplog.text.count("the index is damaged, writing it again") == damaged


def test_copies_are_shared_and_an_evicted_one_is_fetched_again(
    served: Served, folder: Path, copies: Path
) -> None:
    dataset = load_dataset(pattern(served))
    image = next(dataset.shards[0].read_images([3]))
    assert next(load_dataset(pattern(served)).shards[0].read_images([3])) == image
    assert served.gets("0000.tar").count(None) == 1
    for path in tars(copies):
        path.unlink()
    assert next(dataset.shards[0].read_images([3])) == image
    assert served.gets("0000.tar").count(None) == 2


def test_copies_stay_within_a_limit_below_the_size_of_the_set(
    served: Served, folder: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.tar"))]
    limit = 2 * max(sizes)
    monkeypatch.setenv("CSKD_CACHE_GB", str(limit / 1e9))
    assert sum(sizes) > limit
    remote, local = load_dataset(pattern(served)), load_dataset(folder)
    for _ in range(3):
        assert_same(remote, local)
        assert sum(path.stat().st_size for path in tars(copies)) <= limit


def test_a_limit_below_a_tar_or_a_batch_is_refused(
    served: Served, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load_dataset(pattern(served))
    paths = [shard.path for shard in dataset.shards]
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.tar"))]
    size = max(sizes)
    monkeypatch.setenv("CSKD_CACHE_GB", str(1.2 * size / 1e9))
    require_room(paths, 1, "one batch")
    with pytest.raises(UsageError, match="too small for one batch") as caught:
        require_room(paths, 16, "one batch")
    assert "CSKD_CACHE_GB" in str(caught.value.action)
    monkeypatch.setenv("CSKD_CACHE_GB", str(0.5 * size / 1e9))
    with pytest.raises(UsageError, match="too small for one tar"):
        next(dataset.shards[sizes.index(max(sizes))].read_images([0]))


def training(dataset: Dataset) -> Iterator[object]:
    views = TrainingViews.of_dataset(dataset, ViewPolicy(size=32), 0)
    return CachedLoader(views, 4, repeats=1, shuffle_shards=1).batches()


def evaluation(dataset: Dataset) -> Iterator[object]:
    preprocessing = Preprocessing(32, 1.0, "bilinear")
    return iter(eval_loader(dataset, preprocessing, batch_size=4))


def comparison(dataset: Dataset) -> Iterator[object]:
    return ImageSource(dataset.shards).crc32(SampleSet.of(dataset).all_samples())


@pytest.mark.parametrize("reader", [training, evaluation, comparison])
def test_tars_are_fetched_before_they_are_read(
    served: Served, copies: Path, reader: Callable[[Dataset], Iterator[object]]
) -> None:
    """An item uses at most two tars."""
    items = reader(load_dataset(pattern(served)))
    next(items)
    until(lambda: len(tars(copies)) >= 3)
    items.close()  # type: ignore[attr-defined]  # of a generator


def test_a_dump_fetches_the_tars_of_the_next_units(served: Served, copies: Path) -> None:
    """Of the few units that it has claimed."""
    dataset = load_dataset(pattern(served))
    units = [(shard, range(1)) for shard in range(len(COUNTS))]
    batches = unit_batches(dataset, units, ViewPolicy(size=32), 0, Loading(batch_size=4))
    assert next(batches).index[0, 1] == 0
    until(lambda: len(tars(copies)) >= 1 + UNITS_AHEAD)
    assert len(tars(copies)) == 1 + UNITS_AHEAD < len(COUNTS)
    assert sum(len(batch) for batch in batches) == dataset.samples - 4
    batches.close()  # type: ignore[attr-defined]


def test_repeated_reading_leaks_no_descriptors_or_threads(
    served: Served, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is below the size of the set, so every round fetches every tar."""
    sizes = [path.stat().st_size for path in folder.glob("*.tar")]
    monkeypatch.setenv("CSKD_CACHE_GB", str(2 * max(sizes) / 1e9))
    dataset = load_dataset(pattern(served))
    images = ImageSource(dataset.shards)

    def in_use() -> tuple[int, int]:
        """Count descriptors and threads once reading ahead has ended."""
        until(lambda: all(t.name != THREAD for t in threading.enumerate()))
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    found = []
    for _ in range(6):
        assert len(list(images.crc32(SampleSet.of(dataset).all_samples()))) == dataset.samples
        found.append(in_use())
    assert max(found[3:]) <= max(found[:3])
    assert len(served.gets("0000.tar")) > 6


def test_a_killed_fetch_leaves_no_copy(served: Served, folder: Path, copies: Path) -> None:
    served.always["0000.tar"] = "trickle"
    other = RemoteTars(f"{served.url}/set").find("train-0001.tar")
    data = (folder / "train-0000.tar").read_bytes()
    url, version = other.url.replace("0001", "0000"), f'"{hashlib.md5(data).hexdigest()}"'
    tar = replace(other, url=url, size=len(data), version=version)
    code = "from cskd_pipeline.data.remote_tar import RemoteTar\n" + f"{tar!r}.fetch()"
    process = subprocess.Popen([sys.executable, "-c", code])
    while not list(copies.rglob("*.partial")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    served.always.clear()
    assert not tars(copies)
    with tar.open() as file:
        assert file.read() == data


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("pipe:cat x.tar", DataError, "is not supported"),
        ("ftp://host/x.tar", UsageError, "shards cannot be read from this URL"),
        ("https://user:word@host/x.tar", UsageError, "a name or password"),
        ("https://host/x.tar?token=1", UsageError, "a query, a fragment, or no host"),
        ("https://host/a-*.tar", DataError, "does not list"),
        ("s3://bucket/*/a.tar", DataError, "only the last part"),
    ],
)
def test_an_invalid_url_of_shards_is_refused(
    spec: str, error: type[Exception], message: str, copies: Path
) -> None:
    with pytest.raises(error, match=message):
        list_shards(spec)


@pytest.mark.parametrize("spec", ["set", "set/*.tar", "set/train-{0000..0003}.tar"])
def test_shards_on_the_hub_read_as_their_folder_and_have_its_sha256(
    folder: Path, copies: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    """Through its own file system; the manifest needs no byte of an image."""
    with serving(folder.parent, "hub") as served:
        redirect_hub(served.url, monkeypatch)
        manifest = index_shards(f"hf://datasets/{REPOSITORY}/{spec}")
        assert manifest.location == f"hf://datasets/{REPOSITORY}/set"
        assert manifest.shards == index_shards(folder).shards
        assert None not in served.gets(".tar")
        assert_same(load_dataset(f"hf://datasets/{REPOSITORY}/{spec}"), load_dataset(folder))
        requests = zip(served.requests, served.headers, strict=True)
        logins = {h.get("authorization") for (_, path, _), h in requests if REPOSITORY in path}
        assert logins == {"Bearer hf_test"}


def test_a_tar_with_another_sha256_on_the_hub_is_refused_at_once(
    folder: Path, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(folder.parent, "hub") as served:
        redirect_hub(served.url, monkeypatch)
        index_shards(f"hf://datasets/{REPOSITORY}/set").save(tmp_path / "train.json")
        change(folder / "train-0000.tar")
        fresh(copies)
        before = len(served.gets(".tar"))
        with pytest.raises(ShardError, match="wrong SHA-256") as caught:
            load_dataset(tmp_path / "train.json")
        assert str(caught.value.where).endswith("train-0000.tar")
        assert len(served.gets(".tar")) == before


def test_headers_are_requested_from_the_target_of_redirects(served: Served, folder: Path) -> None:
    """Until the target refuses, since signed URLs expire; then through the redirect again."""
    size = (folder / "train-0000.tar").stat().st_size
    with serving(folder.parent) as front:
        target = {"Location": f"{served.url}/set/train-0000.tar", "Content-Length": "0"}
        front.replies["0000.tar"] = (302, target, b"")
        tars = RemoteTars(f"{front.url}/set")
        tar = tars.find("train-0000.tar")
        read = RangeFile(size, lambda part: tars.read(tar, part)).read_at
        data = (folder / "train-0000.tar").read_bytes()
        assert read(512, 0) == data[:512]
        assert read(512, 20_000) == data[20_000:20_512]
        assert len(front.gets("0000.tar")) == 2  # for the length, and the first headers
        served.faults = [("0000.tar", 403)]
        assert read(512, 10_000) == data[10_000:10_512]
        assert len(front.gets("0000.tar")) == 3


def test_ranges_grow_while_reads_are_close_together() -> None:
    data = bytes(range(256)) * 4096
    parts: list[tuple[int, int]] = []

    def fetch(part: Any) -> bytes:
        parts.append((part.start, part.stop))
        return data[part.start : part.stop]

    file = RangeFile(len(data), fetch)
    assert file.read(512) == data[:512]
    assert file.read_at(10, 100) == data[100:110]
    assert len(parts) == 1
    for offset in range(0, 100_000, 1000):
        assert file.read_at(512, offset) == data[offset : offset + 512]
    assert len(parts) < 10
    assert file.read_at(512, 500_000) == data[500_000:500_512]
    assert parts[-1][1] - parts[-1][0] == 4096
    assert file.read_at(10**9, len(data) - 5) == data[-5:]
