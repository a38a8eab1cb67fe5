"""Untrusted servers cannot exceed the bounds on size, time and redirects."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import io
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from io import BufferedRandom
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cskd_pipeline.cache import durable, mirror, remote_files, transfers
from cskd_pipeline.cache.chunks import DamageError, StoredArray, encode_file
from cskd_pipeline.cache.folders import RemoteFolder
from cskd_pipeline.cache.mirror import Mirror
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cli import main
from cskd_pipeline.errors import CacheError, OutputError, RemoteError, UsageError
from tests.serving import BUCKET, Served, keep_copies, serving, serving_bucket

Capture = pytest.CaptureFixture[str]
LARGE = 2**27


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return keep_copies(tmp_path / "copies", monkeypatch)


@pytest.fixture
def served(tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Serve a file of 1,000 bytes."""
    monkeypatch.setenv("NETRC", os.devnull)
    (tmp_path / "served").mkdir()
    (tmp_path / "served/file").write_bytes(CONTENT)
    with serving(tmp_path / "served") as found:
        yield found


@pytest.fixture
def store(tmp_path: Path, served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with serving_bucket(tmp_path / "served", monkeypatch) as found:
        yield found


CONTENT = bytes(range(250)) * 4


def read(url: str, limit: int = 1000) -> bytes:
    return RemoteFolder(url).read("file", limit)


# --- size -----------------------------------------------------------------------------------------


def bomb() -> bytes:
    """Return data that inflates to ``LARGE`` bytes, 200 times its size."""
    return gzip.compress(bytes(LARGE), compresslevel=1)


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_compressed_response_is_neither_requested_nor_accepted(
    scheme: str, served: Served, store: Served
) -> None:
    server = served if scheme == "http" else store
    headers = {"Content-Encoding": "gzip", "Content-Length": "13"}
    server.replies["file"] = (200, headers, b"not even gzip")
    with pytest.raises(RemoteError, match="compressed") as error:
        read(served.url if scheme == "http" else f"s3://{BUCKET}")
    assert "disable compression" in str(error.value.action)
    assert error.value.found == "Content-Encoding: gzip"
    assert {headers["accept-encoding"] for headers in server.headers} == {"identity"}
    assert len(server.gets("file")) == 1
    if scheme == "http":  # nothing is inflated before the check either
        assert not transfers._SESSIONS[os.getpid()].auto_decompress


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
def test_a_response_marked_as_uncompressed_is_read(encoding: str, served: Served) -> None:
    headers = {"Content-Encoding": encoding, "Content-Length": "1000"}
    served.replies["file"] = (200, headers, CONTENT)
    assert read(served.url) == CONTENT


def test_info_about_a_compression_bomb_stays_small(
    served: Served, tmp_path: Path, copies: Path
) -> None:
    """Memory is measured in a process of its own."""
    data = bomb()
    headers = {"Content-Encoding": "gzip", "Content-Length": str(len(data))}
    served.replies["zarr.json"] = (200, headers, data)
    code = f"""
        import resource, sys
        from cskd_pipeline.cache.reader import open_cache
        from cskd_pipeline.errors import RemoteError
        import fsspec, aiohttp
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            open_cache({f"{served.url}/cache"!r})
        except RemoteError as error:
            assert "compressed" in str(error)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < LARGE // 4


def test_a_file_above_its_limit_is_refused(served: Served, store: Served) -> None:
    """Before a byte is read if the server reports the length, else at the first byte too many."""
    for url in (served.url, f"s3://{BUCKET}"):
        assert read(url, 1000) == CONTENT
        with pytest.raises(DamageError, match="1000 bytes, more than the 999 allowed"):
            read(url, 999)
    served.replies["file"] = (200, {}, CONTENT)  # no length: it ends with the connection
    assert read(served.url, 1000) == CONTENT
    with pytest.raises(DamageError, match="more than the 999 bytes allowed"):
        read(served.url, 999)


def test_bytes_beyond_the_reported_length_are_ignored(served: Served) -> None:
    served.replies["file"] = (200, {"Content-Length": "1000"}, CONTENT + bytes(5_000_000))
    with suppress(RemoteError):  # invalid HTTP, if they arrive together
        assert read(served.url, 10_000_000) == CONTENT


def test_invalid_http_is_reported_on_one_line(served: Served) -> None:
    served.replies["file"] = (200, {"Content-Length": "x\r\n\r\ny"}, CONTENT)
    with pytest.raises(RemoteError, match="cannot be reached") as error:
        read(served.url)
    assert len(str(error.value).splitlines()) == 4
    assert "400" in str(error.value.found)


def test_no_copy_is_larger_than_the_manifest_implies(
    finished: Path, served: Served, copies: Path
) -> None:
    reader = open_cache(finished)
    (served.root / "cache").symlink_to(finished)
    url = f"{served.url}/cache"
    key = reader.store.arrays["label"].key(1)
    bound = open_cache(url).store.arrays["label"].max_file_bytes
    assert bound < 2000
    served.replies[key] = (200, {}, bytes(2**20))
    with pytest.raises(CacheError, match="damaged") as error:
        open_cache(url).labels(1)
    assert f"more than the {bound} bytes allowed" in str(error.value.found)
    assert not [p for p in copies.rglob("*") if "label" in str(p) and p.is_file()]


def test_every_file_of_a_cache_is_within_its_limit(finished: Path) -> None:
    store = open_cache(finished).store
    sizes = store.folder.sizes()
    assert sizes is not None
    bounds = {key: store._max_bytes(key) for key in sizes}
    assert all(sizes[key] <= bounds[key] for key in sizes)


def test_the_limit_of_a_file_is_its_incompressible_size() -> None:
    one = StoredArray(
        "x", "uint16", ("view", "shard", "offset", "class"), (4, 3, 60, 500), (1, 1, 64, 500), 0,
        chunk_shape=(1, 1, 16, 500),
    )  # fmt: skip
    noise = np.random.default_rng(0).integers(1, 2**16, one.file_shape, np.uint16)
    assert 0 <= one.max_file_bytes - len(encode_file(one, noise)) <= 4 * 1200
    unchunked = dataclasses.replace(one, chunk_shape=None)
    assert 0 <= unchunked.max_file_bytes - len(encode_file(unchunked, noise)) <= 2000


# --- ranges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stated",
    ["bytes 400-999/1000", "bytes 0-999/1000", "bytes 600-999/1000", "bytes */1000", "500-999", ""],
)
@pytest.mark.parametrize("start", [0, 500])
def test_a_range_that_was_not_requested_is_refused(stated: str, start: int, served: Served) -> None:
    """It would leave a gap or repeat bytes."""
    headers = {"Content-Length": "500"} | ({"Content-Range": stated} if stated else {})
    served.replies["file"] = (206, headers, CONTENT[500:])
    if (stated, start) == ("bytes 0-999/1000", 0):
        pytest.skip("the right one")
    with (
        pytest.raises(OSError, match=f"requested bytes from {start} on, received"),
        transfers.from_web(f"{served.url}/file", transfers.ByteRange(start), "x", transfers.Pace()),
    ):
        pass


def test_a_server_without_ranges_restarts_the_file(served: Served) -> None:
    served.ranges = False
    with transfers.from_web(
        f"{served.url}/file", transfers.ByteRange(500), "x", transfers.Pace()
    ) as response:
        assert (response.start, response.total) == (0, 1000)
    file = io.BytesIO()
    file.write(b"x" * 1200)  # longer than the served file
    RemoteFolder(served.url)._fetch("file", file, 1300)
    assert file.getvalue() == CONTENT


def test_the_rest_of_a_range_that_ends_early_is_requested(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"Content-Length": "300", "Content-Range": "bytes 0-299/1000"}
    served.replies["file"] = (206, headers, CONTENT[:300])
    folder = RemoteFolder(served.url)
    append = folder._append

    def append_once(*arguments: Any) -> None:
        try:
            append(*arguments)
        finally:
            served.replies.clear()

    monkeypatch.setattr(folder, "_append", append_once)
    assert folder.read("file", 1000) == CONTENT
    assert served.gets("file") == [None, "bytes=300-"]


def test_a_file_that_became_shorter_is_fetched_from_the_start(served: Served) -> None:
    """The requested range starts beyond the end of the file."""
    file = io.BytesIO()
    file.write(bytes(1200))
    RemoteFolder(served.url)._fetch("file", file, 1300)
    assert file.getvalue() == CONTENT
    assert served.gets("file") == ["bytes=1200-", None]
    served.always["file"] = 416
    with pytest.raises(RemoteError, match="is denied"):  # already at the start
        read(served.url)
    assert len(served.requests) == 3


def test_a_wrong_reported_length_is_an_error(served: Served) -> None:
    served.replies["file"] = (
        206, {"Content-Range": "bytes 0-999/2000", "Content-Length": "1000"}, CONTENT
    )  # fmt: skip
    with pytest.raises(RemoteError, match="cannot be reached"):
        read(served.url, 3000)


# --- redirects ------------------------------------------------------------------------------------


def to(location: str, status: int = 302) -> tuple[int, dict[str, str], bytes]:
    return status, {"Location": location, "Content-Length": "0"}, b""


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_web_server_is_followed(
    status: int, served: Served, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/moved").write_bytes(CONTENT)
    with serving(tmp_path / "other") as other:
        served.replies["file"] = to(f"{other.url}/moved", status)
        assert read(served.url) == CONTENT
        assert len(other.gets("moved")) == 1


def test_a_redirect_keeps_the_range(served: Served) -> None:
    (served.root / "moved").write_bytes(CONTENT)
    served.replies["file"] = to("/moved")
    pace = transfers.Pace()
    with transfers.from_web(f"{served.url}/file", transfers.ByteRange(500), "x", pace) as response:
        assert (response.start, response.total) == (500, 1000)
        assert b"".join(response.pieces(pace)) == CONTENT[500:]
    assert served.gets("moved") == ["bytes=500-"]


@pytest.mark.parametrize(
    ("location", "found"),
    [
        *((f"{scheme}://host/file?secret", scheme) for scheme in ("ftp", "file", "gopher", "data")),
        ("file:///etc/passwd?secret", "without a host"),
        ("http://me:secret@127.0.0.1/file", "with a name or password"),
        ("", "without a host"),
        ("http://[::/", "invalid URL"),
        ("/file", "more than 5 redirects"),
    ],
)
def test_other_redirects_are_refused_at_once(location: str, found: str, served: Served) -> None:
    served.replies["file"] = to(location)
    with pytest.raises(RemoteError, match="redirect that is not allowed") as error:
        read(served.url)
    assert found in str(error.value.found)
    assert "secret" not in str(error.value)
    assert error.value.where == f"{served.url}/file"
    assert len(served.requests) == (6 if location == "/file" else 1)


def test_https_does_not_redirect_to_http() -> None:
    import yarl

    here = yarl.URL("https://host/file")
    with pytest.raises(RemoteError, match="redirect") as error:
        transfers._redirected(here, "http://host/file", "x")
    assert error.value.found == "a redirect from https:// to http://host"
    assert str(transfers._redirected(here, "//other/file", "x")) == "https://other/file"
    assert str(transfers._redirected(yarl.URL("http://a/b"), "https://c/d", "x")) == "https://c/d"


def test_credentials_are_sent_to_the_first_server_only(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if ``~/.netrc`` has a login for the other; cookies are never kept."""
    logins = tmp_path / "netrc"
    logins.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(logins))
    basic = "Basic " + base64.b64encode(b"me:secret").decode()
    (served.root / "moved").write_bytes(CONTENT)
    served.replies["file"] = to("/moved")
    assert read(served.url) == CONTENT
    assert [headers["authorization"] for headers in served.headers] == [basic, basic]
    with serving(served.root) as other:  # another port on the same host is another server
        served.replies["file"] = (
            302, {"Location": f"{other.url}/moved", "Set-Cookie": "a=b", "Content-Length": "0"}, b""
        )  # fmt: skip
        assert read(served.url) == CONTENT
        assert read(served.url) == CONTENT
        for headers in other.headers:
            assert not {"authorization", "cookie"} & set(headers)
    assert not any("cookie" in headers for headers in served.headers)


def test_a_token_does_not_follow_a_redirect(served: Served, tmp_path: Path) -> None:
    """The hub's files, for example, are on other servers."""
    token = {"authorization": "Bearer secret"}
    with serving(served.root) as other:
        served.replies["moved"] = to(f"{other.url}/file")
        url, pace = f"{served.url}/moved", transfers.Pace()
        with transfers.from_web(url, transfers.ByteRange(), "x", pace, token) as response:
            assert b"".join(response.pieces(pace)) == CONTENT
        assert served.headers[0]["authorization"] == "Bearer secret"
        assert "authorization" not in other.headers[0]


def test_google_storage_is_read_over_its_web_address(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Store:
        def url(self, path: str) -> str:
            assert path == "gs://lab/cache/file"
            return f"{served.url}/file"

        credentials = SimpleNamespace(
            apply=lambda headers: headers.update(authorization="Bearer secret")
        )

    folder = RemoteFolder("gs://lab/cache")
    monkeypatch.setattr(folder, "_fs", Store)
    assert folder.read("file", 1000) == CONTENT
    assert served.headers[0]["authorization"] == "Bearer secret"
    assert served.headers[0]["accept-encoding"] == "identity"


def test_a_refusal_by_a_stores_library_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = RemoteFolder("hf://lab/cache"), []

    class Refusal(OSError):
        response = SimpleNamespace(status_code=401)

    def refuses() -> None:
        calls.append(1)
        raise Refusal("no token")

    monkeypatch.setattr(folder, "_fs", refuses)
    with pytest.raises(RemoteError, match="is denied"):
        folder.read("file", 1000)
    assert calls == [1]


def test_an_unreadable_netrc_file_is_an_error(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UsageError, match="netrc file"):
        read(served.url)


def test_the_proxy_in_the_environment_is_used(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", served.url)
    assert read("http://cache.invalid") == CONTENT
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert read(served.url) == CONTENT


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trickle", "trickle head", "silence"])
def test_a_server_that_sends_almost_nothing_is_too_slow(
    kind: str, served: Served, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("CSKD_REMOTE_TIMEOUT", "0.3")
    served.always["zarr.json"] = kind
    (served.root / "zarr.json").write_bytes(CONTENT)
    assert main(["cache", "info", served.url]) == 1
    message = capsys.readouterr().err
    assert "the server is too slow" in message
    assert "bytes in 0.3 seconds" in message
    assert "CSKD_REMOTE_TIMEOUT" in message


def test_an_attempt_fails_after_a_minute_of_silence(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "TIMEOUT", 0.1)
    served.always["file"] = "trickle head"
    with pytest.raises(RemoteError, match="cannot be reached") as error:
        read(served.url)
    assert "no response within 0.1 seconds, 6 times" in str(error.value.found)


def test_a_transfer_that_keeps_breaking_after_one_byte_is_too_slow(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt makes progress, so six failures in a row never occur."""
    monkeypatch.setenv("CSKD_REMOTE_TIMEOUT", "0.3")
    monkeypatch.setattr(remote_files, "WAIT", 0.02)  # 300 attempts take longer than 0.3 seconds
    folder = RemoteFolder(served.url)

    def a_byte(key: str, file: object, limit: int, pace: transfers.Pace) -> None:
        pace.left()
        pace.reached(pace.position + 1)
        raise ConnectionResetError

    monkeypatch.setattr(folder, "_resume", a_byte)
    with pytest.raises(RemoteError, match="too slow"):
        folder.read("file", 1000)


def test_a_pace_is_too_slow_below_a_thousand_bytes_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(transfers.time, "monotonic", lambda: now[0])
    enough, one_less = transfers.Pace(), transfers.Pace()
    now[0] = 300.0
    enough.reached(299_000)
    enough.reached(300_000)
    enough.reached(1000)  # a server without ranges restarts
    one_less.reached(299_999)
    one_less.reached(299_999)
    assert enough.left() == 300
    with pytest.raises(transfers.SlowError, match="299999 bytes in 300 seconds"):
        one_less.left()


def test_six_failures_in_a_row_without_progress_are_an_error(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, positions = RemoteFolder(served.url), [10, 10, 10, 20, 20, 20, 20, 20, 20]
    left = list(positions)

    def fail_at(key: str, file: object, limit: int, pace: transfers.Pace) -> None:
        pace.reached(left.pop(0))
        raise ConnectionResetError

    monkeypatch.setattr(folder, "_resume", fail_at)
    with pytest.raises(RemoteError, match="cannot be reached"):
        folder.read("file", 1000)
    assert left == []


def test_a_transfer_at_the_slowest_pace_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(transfers.time, "monotonic", lambda: now[0])
    pace = transfers.Pace()
    for minute in range(1, 61):
        now[0] = minute * 60.0
        pace.reached(minute * 60 * transfers.SLOWEST)
        assert 0 < pace.left() <= 300
    now[0] += 299  # nothing more arrives, however much did before
    assert pace.left() <= 300
    now[0] += 301
    with pytest.raises(transfers.SlowError):
        pace.left()


def test_a_store_whose_library_hangs_is_too_slow(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CSKD_REMOTE_TIMEOUT", "0.3")
    folder, ever = RemoteFolder(f"s3://{BUCKET}"), threading.Event()

    class Silent:
        def invalidate_cache(self) -> None:
            pass

        def ls(self, *_: object, **__: object) -> list[str]:
            ever.wait()
            return []

        find = info = ls

    monkeypatch.setattr(folder, "_fs", Silent)
    for call in (lambda: folder.names("done/c"), folder.sizes, lambda: folder.length("x")):
        with pytest.raises(RemoteError, match="too slow"):
            call()
    ever.set()


@pytest.mark.parametrize("seconds", ["0", "-1", "x", "nan", "inf", "1e300"])
def test_an_invalid_timeout_is_refused(
    seconds: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CSKD_REMOTE_TIMEOUT", seconds)
    with pytest.raises(UsageError, match="not a time in seconds"):
        read(served.url)
    assert served.requests == []


def test_the_wait_between_attempts_doubles(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote_files.time, "sleep", waits.append)
    monkeypatch.setattr(remote_files, "WAIT", 0.5)
    served.always["file"] = 503
    with pytest.raises(RemoteError, match="cannot be reached"):
        read(served.url)
    assert len(served.requests) == 6
    assert [b / a for a, b in pairwise(waits)] == [2.0] * 4
    assert 0.25 < waits[0] < 0.75


# --- folder of copies -----------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_folder_of_copies_is_private(served: Served, copies: Path) -> None:
    before = os.umask(0)
    try:
        folder = RemoteFolder(served.url).for_cache("a cache", lambda _: 1000)
        folder.read("file", 1000)
    finally:
        os.umask(before)
    assert mode(copies) == 0o700


@pytest.mark.parametrize("wrong", [0o777, 0o770, 0o720, 0o702, 0o1777])
def test_a_folder_of_copies_that_others_may_write_to_is_refused(
    wrong: int, served: Served, copies: Path, capsys: Capture
) -> None:
    copies.mkdir()
    copies.chmod(wrong)
    with pytest.raises(OutputError, match="other users could replace") as error:
        Mirror.of("a cache")
    assert f"chmod go-w {copies}" in str(error.value.action)
    assert "CSKD_CACHE_DIR" in str(error.value.action)
    assert not list(copies.iterdir())
    copies.chmod(wrong & ~0o022)
    Mirror.of("a cache")
    assert mode(copies) == wrong & ~0o022


@pytest.mark.parametrize("which", ["folder", "link"])
def test_a_folder_of_copies_of_another_user_is_refused(
    which: str, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user may have created it first, in a shared folder."""
    (tmp_path / "mine").mkdir(mode=0o700)
    copies.symlink_to(tmp_path / "mine")
    Mirror.of("a cache")  # a link owned by this user
    look = os.lstat if which == "link" else os.stat

    def foreign(path: Path, **options: object) -> os.stat_result:
        found = list(look(path))
        found[4] = os.geteuid() + 1
        return os.stat_result(found)

    monkeypatch.setattr(mirror.os, look.__name__, foreign)
    with pytest.raises(OutputError, match="other users could replace") as error:
        Mirror.of("a cache")
    assert f"owned by user {os.geteuid() + 1}" in str(error.value.found)


def test_copies_are_not_written_through_existing_links(
    served: Served, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RemoteFolder(served.url).for_cache("a cache", lambda _: 1000)
    monkeypatch.setattr(mirror.uuid, "uuid4", lambda: SimpleNamespace(hex="known"))
    folder.root.mkdir()
    (tmp_path / "target").write_text("mine")
    (folder.root / ".file.known.partial").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        folder.read("file", 1000)
    assert (tmp_path / "target").read_text() == "mine"


def test_a_process_blocked_by_a_stopped_one_fetches_its_own_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "STALLED", 0.05)
    one = Mirror(tmp_path, "a cache", limit=1000)
    ready, start = os.pipe()
    child = os.fork()
    if child == 0:
        one.keep("x", lambda _: (os.write(start, b"x"), signal.pause()))
        os._exit(0)
    try:
        os.read(ready, 1)
        os.kill(child, signal.SIGSTOP)
        [old] = one.root.glob(".x.*.partial")  # of the stopped process
        os.utime(old, (0, 0))
        assert not mirror._is_growing(one.root / "x")
        one.keep("x", lambda file: file.write(b"1"))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (one.root / "x").read_bytes() == b"1"


def test_a_process_keeps_waiting_for_a_copy_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "STALLED", 1.0)
    one = Mirror(tmp_path, "a cache", limit=1000)
    ready = threading.Event()

    def grow(file: BufferedRandom) -> None:
        for _ in range(50):
            file.write(b"x")
            file.flush()
            ready.set()
            time.sleep(0.03)

    other = threading.Thread(target=one.keep, args=("x", grow))
    other.start()
    ready.wait()
    one.keep("x", lambda file: file.write(b"another"))
    assert (one.root / "x").stat().st_size == 50
    other.join()


def test_a_lock_is_released_although_a_forked_process_inherited_it(tmp_path: Path) -> None:
    ready, start = os.pipe()
    with durable.exclusive(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            os.close(start)
            os.read(ready, 1)
            os._exit(0)
    with durable.exclusive(tmp_path / "lock", 0.05) as held:
        assert held
    os.close(start)
    os.waitpid(child, 0)
    os.close(ready)


# --- eviction -------------------------------------------------------------------------------------


CLOCK = count()


def add(to: Mirror, key: str, size: int) -> None:
    def fetch(file: BufferedRandom) -> None:
        file.write(bytes(size))
        file.flush()
        os.utime(file.fileno(), (now := next(CLOCK), now))

    assert to.find(key) is None
    to.keep(key, fetch)


def kept(one: Mirror) -> set[int]:
    return {int(p.name) for p in one.root.rglob("*") if p.is_file()}


def test_an_eighth_is_evicted_once_the_limit_is_exceeded(tmp_path: Path) -> None:
    one = Mirror(tmp_path, "a cache", limit=800)
    for number in range(8):
        add(one, str(number), 100)
    assert kept(one) == set(range(8))  # exactly the limit
    add(one, "8", 13)
    assert kept(one) == set(range(2, 9))  # the excess of 13, and 100 more


def test_a_copy_just_added_stays_however_large(tmp_path: Path) -> None:
    one = Mirror(tmp_path, "a cache", limit=100)
    add(one, "0", 60)
    add(one, "1", 500)
    assert kept(one) == {1}


def test_copies_of_other_caches_count_and_are_evicted(tmp_path: Path) -> None:
    one, other = (Mirror(tmp_path, name, limit=640) for name in ("one", "other"))
    add(one, "0", 600)
    add(other, "1", 100)
    assert kept(one) == set()
    assert kept(other) == {1}


def test_copies_are_counted_after_each_64th_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Mirror(tmp_path, "a cache", limit=6400)
    scans: list[int] = []
    counted = one._copies

    def counting() -> Iterator[tuple[float, int, str]]:
        scans.append(1)
        return counted()

    monkeypatch.setattr(one, "_copies", counting)
    add(one, "0", 10)
    assert len(scans) == 1  # the first: other caches may fill the folder
    for number in range(1, 4):
        add(one, str(number), 33)
    assert len(scans) == 1
    add(one, "4", 1)
    assert len(scans) == 2
    add(one, "5", 99)
    assert len(scans) == 2
    add(one, "6", 100)
    assert len(scans) == 3


def test_a_use_is_recorded_at_most_every_few_minutes(tmp_path: Path) -> None:
    one = Mirror(tmp_path, "a cache", limit=100)
    add(one, "0", 1)
    path = one.find("0")
    assert path is not None
    recorded = path.stat().st_mtime_ns
    assert recorded > 10**18
    one.find("0")
    assert path.stat().st_mtime_ns == recorded
