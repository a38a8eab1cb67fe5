"""A cache on a web server or in an object store reads as its folder, whatever goes wrong."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path

import numpy as np
import pytest

from cskd_pipeline.cache import remote_files, transfers
from cskd_pipeline.cache.folders import RemoteFolder, open_folder
from cskd_pipeline.cache.info import describe
from cskd_pipeline.cache.mirror import Mirror
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.cli import main
from cskd_pipeline.errors import CacheError, MissingPackageError, RemoteError, UsageError
from cskd_pipeline.runtime import progress
from cskd_pipeline.runtime.progress import Meter
from tests.cache.factories import fill, make, manifest
from tests.serving import (
    BUCKET,
    REPOSITORY,
    Served,
    keep_copies,
    redirect_hub,
    serving,
    serving_bucket,
)

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of local copies."""
    monkeypatch.setattr(transfers, "TIMEOUT", 10.0)
    return keep_copies(tmp_path / "copies", monkeypatch)


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "served/cache")
    return tmp_path / "served/cache"


@pytest.fixture
def served(folder: Path, copies: Path) -> Iterator[Served]:
    with serving(folder.parent) as found:
        yield found


@pytest.fixture
def store(folder: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Serve the same files as a bucket."""
    with serving_bucket(folder.parent, monkeypatch) as found:
        yield found


def content(reader: Cache) -> list[np.ndarray]:
    """Return everything in a cache."""
    found = [reader.done()]
    for shard, count in enumerate(reader.counts):
        found += [reader.labels(shard), reader.image_crc32(shard), np.array(reader.keys(shard))]
        for view in range(reader.views):
            found += [reader.seeds(view, shard), reader.view_digests(view, shard)]
            for encoding in reader.encodings:
                found += reader.rows(encoding, view, shard, range(count)).values()
    return found


def assert_same(location: str, folder: Path) -> None:
    pairs = zip(content(open_cache(location)), content(open_cache(folder)), strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)


def of_array(name: str, copies: Path) -> list[Path]:
    """Return the copies of an array's files."""
    return sorted(p for p in copies.rglob("*") if p.is_file() and f"/{name}/c/" in str(p))


def test_a_cache_behind_a_web_server_reads_as_its_folder(served: Served, folder: Path) -> None:
    assert_same(f"{served.url}/cache", folder)
    assert_same(f"{served.url}/cache/", folder)


def test_a_cache_behind_a_web_server_gives_its_zarr_group(served: Served) -> None:
    reader = open_cache(f"{served.url}/cache")
    assert reader.zarr()["label"][0, :3].tolist() == reader.labels(0)[:3].tolist()


def test_a_cache_in_an_object_store_reads_as_its_folder(store: Served, folder: Path) -> None:
    assert_same(f"s3://{BUCKET}/cache", folder)


def test_a_cache_on_the_hub_reads_as_its_folder(
    folder: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logged in, with one request per file, since the hub limits their rate."""
    with serving(folder, "hub") as served:
        redirect_hub(served.url, monkeypatch)
        assert_same(f"hf://datasets/{REPOSITORY}", folder)
    fetched = [path for _, path, _ in served.requests if "/resolve/main/" in path]
    assert len(set(fetched)) == len(fetched) > 50
    for (_, path, _), headers in zip(served.requests, served.headers, strict=True):
        if path in fetched:
            assert headers["authorization"] == "Bearer hf_test"
            assert headers["accept-encoding"] == "identity"
    listed = {
        path.partition("/tree/main/")[2] for _, path, _ in served.requests if "/tree/" in path
    }
    assert listed == {"digest/c", "digest/c/0", "digest/c/1"}


def test_files_are_fetched_once(served: Served, folder: Path) -> None:
    content(open_cache(f"{served.url}/cache"))
    before = len(served.requests)
    content(open_cache(f"{served.url}/cache"))
    assert {path for _, path, _ in served.requests[before:]} == {
        f"/cache/{p.relative_to(folder)}" for p in folder.rglob("zarr.json")
    }


def test_only_files_that_are_read_are_fetched(served: Served) -> None:
    reader = open_cache(f"{served.url}/cache")
    reader.rows("envelope", 0, 1, [0])
    assert not served.gets("/dense/spatial/c/0/1/0/0/0/0")
    assert not [path for _, path, _ in served.requests if "/seed/c/" in path]
    assert len([path for _, path, _ in served.requests if "/envelope/lines/c/" in path]) == 1


def test_unfinished_units_do_not_exist(tmp_path: Path, copies: Path, store: Served) -> None:
    writer = CacheWriter.create(tmp_path / "served/part", manifest())
    fill(writer, writer.todo()[:3])
    expected = open_cache(tmp_path / "served/part").done()
    assert 0 < expected.sum() < expected.size
    with serving(tmp_path / "served") as served:
        np.testing.assert_array_equal(open_cache(f"{served.url}/part").done(), expected)
        fill(writer)
        assert open_cache(f"{served.url}/part").done().all()
    np.testing.assert_array_equal(open_cache(f"s3://{BUCKET}/part").done(), expected | True)


def test_copies_of_a_cache_that_grew_are_kept(served: Served, folder: Path, copies: Path) -> None:
    content(open_cache(f"{served.url}/cache"))
    writer = CacheWriter.open(folder)
    writer.extend(6)
    fill(writer)
    before = len(served.requests)
    assert_same(f"{served.url}/cache", folder)
    requested = {path for method, path, _ in served.requests[before:] if "/dense/spatial/" in path}
    assert requested == {
        *(f"/cache/dense/spatial/c/{view}/{s}/0/0/0/0" for view in (4, 5) for s in range(3)),
        "/cache/dense/spatial/zarr.json",
    }


def test_another_cache_at_the_same_url_is_not_mixed_with_old_copies(
    served: Served, folder: Path, tmp_path: Path
) -> None:
    content(open_cache(f"{served.url}/cache"))
    folder.rename(tmp_path / "old")
    make(folder, root_seed=8, views=2)
    assert_same(f"{served.url}/cache", folder)


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        *(("http", kind) for kind in ("reset", "truncate", "silence", 503, 500, 429)),
        *(("s3", kind) for kind in ("reset", "truncate", 503)),
    ],
)
def test_a_transient_fault_has_no_effect(
    kind: str | int,
    scheme: str,
    folder: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served: Served = request.getfixturevalue("served" if scheme == "http" else "store")
    names = ("cache/zarr.json", "lines/c/0/1/0/0/0/0/0", "label/c/0/0", "key/c/1/0/0")
    served.faults = [(name, kind) for name in names]
    if kind == "silence":
        monkeypatch.setattr(transfers, "TIMEOUT", 0.5)
    url = f"{served.url}/cache" if scheme == "http" else f"s3://{BUCKET}/cache"
    found, local = open_cache(url), open_cache(folder)
    assert found.keys(1) == local.keys(1)
    np.testing.assert_array_equal(found.labels(0), local.labels(0))
    one, other = (reader.rows("envelope", 0, 1, range(3)) for reader in (found, local))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert served.faults == []


def test_an_interrupted_transfer_resumes(served: Served, folder: Path, copies: Path) -> None:
    """From the last byte read; at a break, bytes may be lost that nobody has read yet."""
    size, lost = 24_000_000, 3 * transfers.PIECE
    data = np.random.default_rng(0).bytes(size)
    (folder / "large").write_bytes(data)
    served.faults = [("large", "truncate"), ("large", "reset"), ("large", "truncate")]
    remote_folder = RemoteFolder(f"{served.url}/cache").for_cache("a cache", lambda _: size)
    assert remote_folder.read("large", size) == data
    ranges = served.gets("large")
    starts = [int(r.removeprefix("bytes=").removesuffix("-")) for r in ranges[1:] if r]
    assert len(ranges) == 4
    assert ranges[0] is None
    assert size // 2 - lost <= starts[0] == starts[1] <= size // 2
    sent = starts[1] + (size - starts[1]) // 2
    assert sent - lost <= starts[2] <= sent
    (copy,) = (p for p in copies.rglob("large"))
    assert copy.read_bytes() == data


def test_a_server_without_ranges_sends_the_file_again(
    served: Served, folder: Path, copies: Path
) -> None:
    served.ranges = False
    served.faults = [("dense/spatial/c/0/0/0/0/0/0", "truncate")]
    open_cache(f"{served.url}/cache").rows("dense", 0, 0, [0])
    (copy,) = of_array("dense/spatial", copies)
    assert copy.read_bytes() == (folder / "dense/spatial/c/0/0/0/0/0/0").read_bytes()


@pytest.mark.parametrize("kind", ["truncate", "reset", 503])
def test_a_permanent_fault_is_an_error_and_leaves_no_copy(
    kind: str | int, served: Served, copies: Path
) -> None:
    reader = open_cache(f"{served.url}/cache")
    served.always["label/c/1/0"] = kind
    with pytest.raises(RemoteError, match="cannot be reached") as error:
        reader.labels(1)
    assert error.value.where == f"{served.url}/cache/label/c/1/0"
    assert "6 times" in str(error.value)
    assert len(served.gets("label/c/1/0")) >= 6
    assert not of_array("label", copies)
    served.always.clear()
    assert len(reader.labels(1)) == 3


@pytest.mark.parametrize("status", [401, 403, 410])
def test_a_refusal_is_not_retried(status: int, served: Served) -> None:
    served.always["zarr.json"] = status
    with pytest.raises(RemoteError, match="is denied") as error:
        open_cache(f"{served.url}/cache")
    assert str(status) in str(error.value.found)
    assert len(served.gets()) == 1


def test_an_unreachable_server_is_an_error(copies: Path) -> None:
    with pytest.raises(RemoteError, match="cannot be reached"):
        open_cache("http://127.0.0.1:9/cache")


def test_a_url_without_a_cache_is_an_error(served: Served, store: Served) -> None:
    for location in (f"{served.url}/nothing", f"s3://{BUCKET}/nothing", f"s3://{BUCKET}x/y"):
        with pytest.raises(CacheError, match="not a teacher cache") as error:
            open_cache(location)
        assert str(error.value.where) == f"{location}/zarr.json"


def test_a_missing_file_is_an_error_and_not_retried(served: Served, folder: Path) -> None:
    reader = open_cache(f"{served.url}/cache")
    (folder / "label/c/2/0").unlink()
    with pytest.raises(CacheError, match="damaged") as error:
        reader.labels(2)
    assert "the file is missing" in str(error.value.found)
    assert error.value.where == f"{served.url}/cache/label/c/2/0"


def test_a_damaged_copy_is_fetched_again(served: Served, folder: Path, copies: Path) -> None:
    content(open_cache(f"{served.url}/cache"))
    files = [
        p for n in ("dense/spatial", "envelope/lines", "seed", "key") for p in of_array(n, copies)
    ]
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert_same(f"{served.url}/cache", folder)
    for path in files:
        assert path.read_bytes() == (folder / path.relative_to(path_of(copies))).read_bytes()


def path_of(copies: Path) -> Path:
    (found,) = (p for p in copies.iterdir() if p.name != "locks")
    return found


def test_a_damaged_source_is_an_error_after_one_retry(served: Served, folder: Path) -> None:
    name = "dense/spatial/c/1/2/0/0/0/0"
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 3] ^= 1
    (folder / name).write_bytes(data)
    reader = open_cache(f"{served.url}/cache")
    for _ in range(2):
        with pytest.raises(CacheError, match="damaged") as error:
            reader.rows("dense", 1, 2, range(4))
        assert error.value.where == f"{served.url}/cache/{name}"
        assert len(served.gets(name)) == 2


def test_an_oversized_document_is_not_read_into_memory(served: Served, folder: Path) -> None:
    with open(folder / "zarr.json", "r+b") as file:
        file.truncate(2**28)
    with pytest.raises(CacheError, match="not a teacher cache") as error:
        open_cache(f"{served.url}/cache")
    assert "more than" in str(error.value.found)


# --- copies ---------------------------------------------------------------------------------------


def total(copies: Path) -> int:
    return sum(p.stat().st_size for p in copies.rglob("*") if p.is_file())


def test_copies_stay_below_their_limit_without_effect_on_the_reader(
    served: Served, folder: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    bound = everything // 4
    monkeypatch.setenv("CSKD_CACHE_GB", str(bound / 1e9))
    reader = open_cache(f"{served.url}/cache", memory=0)
    local, most = open_cache(folder), 0
    for _ in range(2):
        for view, shard in np.ndindex(4, 3):
            for encoding in ("dense", "envelope"):
                one = reader.rows(encoding, view, shard, [0])
                other = local.rows(encoding, view, shard, [0])
                for name in one:
                    np.testing.assert_array_equal(one[name], other[name])
                most = max(most, total(copies))
    assert bound // 4 < most <= bound


def add(to: Mirror, key: str, size: int, used: float | None = None) -> None:
    """Add a copy of ``size`` bytes, last used at the given time; None: now."""

    def fetch(file: BufferedRandom) -> None:
        file.write(bytes(size))
        file.flush()
        os.utime(file.fileno(), None if used is None else (used, used))

    assert to.find(key) is None
    to.keep(key, fetch)


def test_the_least_recently_used_copies_are_evicted_first(tmp_path: Path) -> None:
    mirror = Mirror(tmp_path, "a cache", limit=1000)
    for number in range(9):
        add(mirror, f"x/{number}", 100, number)
    assert mirror.find("x/0") is not None  # now the most recently used
    for number in (9, 10):
        add(mirror, f"x/{number}", 100)
    left = {int(p.name) for p in (mirror.root / "x").iterdir()}
    assert {0, 9, 10} <= left
    assert left - {0} == set(range(min(left - {0}), 11))


def test_partial_copies_are_left_to_their_writers(tmp_path: Path) -> None:
    mirror = Mirror(tmp_path, "a cache", limit=100)
    add(mirror, "x/0", 60)
    fresh, old = ((mirror.root / "x/0").with_name(f".{n}.partial") for n in ("fresh", "old"))
    for partial in (fresh, old):
        partial.write_bytes(bytes(60))
    os.utime(old, (0, 0))
    add(mirror, "x/1", 60)
    assert fresh.exists()
    assert not old.exists()


def test_concurrent_readers_fetch_a_file_once(served: Served) -> None:
    def read(_: int) -> list[np.ndarray]:
        return list(open_cache(f"{served.url}/cache").rows("dense", 0, 0, range(5)).values())

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, range(8)))
    assert len(served.gets("dense/spatial/c/0/0/0/0/0/0")) == 1
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_readers_work_in_forked_and_in_other_processes(served: Served, folder: Path) -> None:
    reader = open_cache(f"{served.url}/cache")
    reader.labels(0)
    expected = open_cache(folder).labels(1).tolist()
    end, start = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(start, bytes(reader.labels(1).tolist()))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert list(os.read(end, 100)) == expected
    os.close(end)
    os.close(start)
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).labels(1).tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(reader), capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == str(expected)


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_forked_reader_leaves_its_parents_connections_alone(
    scheme: str, served: Served, store: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finalising them in the child would close the parent's, which a retry then hides; and each
    finaliser would wait for the thread of an event loop that the child lacks.
    """
    from s3fs import S3FileSystem

    parent, closes = os.getpid(), S3FileSystem.close_session

    def close(*arguments: object, **options: object) -> None:
        if os.getpid() != parent:
            os._exit(3)
        closes(*arguments, **options)

    monkeypatch.setattr(S3FileSystem, "close_session", staticmethod(close))
    reader = open_cache(f"{served.url}/cache" if scheme == "http" else f"s3://{BUCKET}/cache")
    reader.rows("dense", 0, 0, [0])
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            reader.labels(1)
            gc.collect()  # inherited objects are part of cycles
            session = transfers._SESSIONS.get(parent)
            os._exit(0 if session is None or not session.closed else 4)
        os._exit(5)
    assert os.waitpid(child, 0)[1] == 0
    for shard in (1, 2):
        reader.rows("dense", 0, shard, [0])
    server = served if scheme == "http" else store
    paths = [path for _, path, _ in server.requests if "/dense/" in path and "/c/" in path]
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize("size", ["0", "-1", "x", "nan", "inf"])
def test_an_invalid_size_is_refused(
    size: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CSKD_CACHE_GB", size)
    with pytest.raises(UsageError, match="not a size in gigabytes"):
        open_cache(f"{served.url}/cache")


# --- locations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc", "memory://x", "ftp://host/x", "ssh://host/x", "pipe://ls", "data://x"),
        *("simplecache::https://host/x", "https://host/x::s3://bucket/y", "zip://a::https://b/c"),
        *("https://me:secret@host/cache", "https://host/cache?token=secret", "https://host/x#y"),
        *("https:///x", "s3://"),
    ],
)
def test_other_urls_are_refused_without_revealing_secrets(url: str) -> None:
    with pytest.raises(UsageError, match="cannot be read from this URL") as error:
        open_folder(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("scheme", ["http", "s3", "gs", "hf"])
def test_a_missing_package_is_named(
    scheme: str, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = remote_files.PACKAGES[scheme]
    import fsspec

    def fails(scheme: str, **options: object) -> None:
        raise ImportError(f"Install {package} to access {scheme}")

    monkeypatch.setattr(fsspec, "filesystem", fails)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(
        MissingPackageError, match="needs " + package.replace(" ", " and ")
    ) as error:
        open_folder(f"{scheme}://place/cache").read("zarr.json", 100)
    assert error.value.action == f"pip install {package}"


def test_the_hub_is_read_by_its_own_package() -> None:
    folder = RemoteFolder("hf://datasets/lab/cache")
    assert type(folder._fs()).__name__ == "HfFileSystem"
    assert folder.where("zarr.json") == "hf://datasets/lab/cache/zarr.json"


@pytest.mark.parametrize("place", ["https://host/cache", "https:/host/cache", "s3://bucket/cache"])
def test_caches_are_not_written_to_urls(place: str, folder: Path, capsys: Capture) -> None:
    for arguments in (["convert", str(folder), place], ["merge", str(folder), "--out", place]):
        assert main(["cache", *arguments]) == 2
        assert "a cache is written to a local folder" in capsys.readouterr().err
    assert main(["cache", "merge", place, "--out", str(folder.parent / "new")]) == 2
    assert "copy this cache here first" in capsys.readouterr().err
    assert not Path("https:").exists()
    assert not Path("s3:").exists()


def test_sizes_are_described_if_the_server_lists_files(
    served: Served, store: Served, folder: Path, capsys: Capture
) -> None:
    local = describe(open_cache(folder))
    listed = describe(open_cache(f"s3://{BUCKET}/cache"))
    assert listed | {"path": None} == local | {"path": None}
    unlisted = describe(open_cache(f"{served.url}/cache"))
    assert unlisted["bytes"] is None
    assert unlisted["teacher_top1"] == local["teacher_top1"]
    assert unlisted["units"] == local["units"]
    assert main(["cache", "info", f"{served.url}/cache"]) == 0
    assert "bytes: unknown (the server lists no files)" in capsys.readouterr().out


def test_a_remote_cache_is_verified_and_converted(
    served: Served, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    url = f"{served.url}/cache"
    assert main(["cache", "verify", url, "--quiet"]) == 0
    assert (
        main(["cache", "convert", url, str(tmp_path / "small"), "--encoding", "envelope", "-q"])
        == 0
    )
    assert open_cache(tmp_path / "small").done().all()
    (folder / "seed/c/1/1/0").unlink()
    capsys.readouterr()
    for path in of_array("seed", tmp_path / "copies"):
        path.unlink()
    assert main(["cache", "verify", url, "--quiet"]) == 1
    assert "structure: seed/c/1/1/0: the file is missing" in capsys.readouterr().err


def test_looking_for_finished_units_shows_progress(served: Served, capsys: Capture) -> None:
    shown: list[tuple[int | None, str, int]] = []

    class Listener:
        @contextmanager
        def show(
            self, total: int | None, unit: str, description: str, done: int
        ) -> Iterator[Meter]:
            meter = Meter(total, unit, done)
            yield meter
            shown.append((total, unit, meter.count))

    progress.listen(Listener())
    open_cache(f"{served.url}/cache")
    assert shown == [(6, "units", 6)]


def test_missing_credentials_are_an_error_at_once(
    store: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(RemoteError, match="is denied") as error:
        open_cache(f"s3://{BUCKET}/cache")
    assert "FSSPEC_S3_ANON=true" in str(error.value.action)
    assert store.requests == []


def test_a_bug_is_not_retried_as_a_network_failure(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "_total", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        open_cache(f"{served.url}/cache")
    assert len(served.requests) == 1
