"""Transfers from untrusted servers: bounded in size and time, and never decompressed.

Compressed responses are neither requested nor accepted. Redirects are followed from one web server
to another, but never to another protocol or from https to http, and credentials (``~/.netrc``, a
token) go to the first server alone. Every wait ends: a server that sends almost nothing for
``CSKD_REMOTE_TIMEOUT`` seconds (default 300) is too slow.

``gs://`` and ``hf://`` URLs resolve to web servers and are read in the same way. An ``s3://`` store
is read by its library, which signs requests and follows redirects itself (between web servers, the
signature for the first alone); its files are read under the same bounds. Listings, sizes, errors
and logins of stores are left to their libraries, and bounded in time only.
"""

from __future__ import annotations

import atexit
import base64
import netrc
import os
import re
import sys
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cskd_pipeline.errors import RemoteError, UsageError

T = TypeVar("T")

SECONDS = "CSKD_REMOTE_TIMEOUT"
_DEFAULT_SECONDS = "300"
TIMEOUT = 60.0  # seconds of silence after which an attempt fails
SLOWEST = 1000  # bytes a second, averaged over CSKD_REMOTE_TIMEOUT
MAX_REDIRECTS = 5
PIECE = 2**20  # bytes; a broken connection loses up to about twice as many that are unread
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_UNCOMPRESSED = ("", "identity")


class StatusError(OSError):
    """An HTTP error status."""

    def __init__(self, status: int, reason: str | None) -> None:
        super().__init__(f"HTTP status {status} {reason or ''}".rstrip())
        self.status = status


class SlowError(Exception):
    """A server that sends almost nothing."""


class Pace:
    """The progress of one file over all attempts, and the time left for it.

    Raises:
        UsageError: ``CSKD_REMOTE_TIMEOUT`` is not a positive number.
    """

    def __init__(self) -> None:
        self.position = 0
        self.version = ""  # of the bytes that have arrived
        self._seconds = _seconds()
        self._since, self._before = time.monotonic(), 0

    def reached(self, position: int) -> None:
        """Record that the first ``position`` bytes have arrived; bytes sent again do not count."""
        self.position = max(self.position, position)

    def left(self) -> float:
        """Return the seconds within which the server has to send more.

        Raises:
            SlowError: time is up, and fewer than ``SLOWEST`` bytes a second arrived.
        """
        left = self._since + self._seconds - time.monotonic()
        if left > 0:
            return left
        arrived = self.position - self._before
        if arrived < SLOWEST * self._seconds:
            raise SlowError(f"{arrived} bytes in {self._seconds:g} seconds")
        self._since, self._before = time.monotonic(), self.position
        return self._seconds


def _seconds() -> float:
    given = os.environ.get(SECONDS) or _DEFAULT_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise UsageError(
            "not a time in seconds",
            where=f"the environment variable {SECONDS}",
            found=given,
            expected="a number above 0",
        )
    return seconds


@dataclass(frozen=True)
class ByteRange:
    """Bytes ``start`` to ``stop - 1`` of a file; to its end if ``stop`` is None."""

    start: int = 0
    stop: int | None = None

    @property
    def header(self) -> dict[str, str]:
        """Return the header that requests the range; none for the complete file."""
        if not self.start and self.stop is None:
            return {}
        return {"Range": f"bytes={self.start}-{'' if self.stop is None else self.stop - 1}"}


@dataclass(frozen=True)
class HttpResponse:
    """The bytes of a file from ``start`` on.

    ``total`` is the file's length, None if unknown; ``version`` the ETag, else the date of the last
    change, else empty; ``part`` whether the server sent just the requested range. ``address`` is
    the URL on another server that redirects led to, if any; it may contain a secret, and expires.
    """

    start: int
    total: int | None
    version: str
    part: bool
    address: str | None
    _read: Callable[[int], Coroutine[Any, Any, bytes]]

    def pieces(self, pace: Pace) -> Iterator[bytes]:
        """Yield the body in pieces of bounded size."""
        while piece := _run(self._read, PIECE, pace=pace):
            yield piece


@contextmanager
def from_web(
    url: str, requested: ByteRange, where: str, pace: Pace, login: dict[str, str] | None = None
) -> Iterator[HttpResponse]:
    """Request a range of a file from a web server.

    Args:
        where: the file's name in errors; ``url`` may contain a secret.
        login: headers for this server alone; None: from ``~/.netrc``.

    Raises:
        FileNotFoundError: no such file.
        StatusError, OSError: no response, or an unusable one.
        RemoteError: a compressed response, or a redirect that is not allowed.
    """
    import yarl
    from fsspec import asyn

    response = _run(_get, url, requested, where, login, pace=pace)
    try:
        part = response.status == 206
        start = requested.start if part else 0  # without ranges, a server sends the complete file
        total = _total(response.headers, start, part)
        version = response.headers.get("ETag") or response.headers.get("Last-Modified", "")
        moved = response.url.origin() != yarl.URL(url).origin()
        address = str(response.url) if moved else None
        yield HttpResponse(start, total, version, part, address, response.content.read)
    finally:
        asyn.get_loop().call_soon_threadsafe(response.close)


@contextmanager
def from_s3(
    fs: Any, path: str, requested: ByteRange, where: str, pace: Pace
) -> Iterator[HttpResponse]:
    """Request a range of a file from an object store, through s3fs."""
    bucket, key, _ = fs.split_path(path)
    request = {"Bucket": bucket, "Key": key, **requested.header}
    response = within(pace, lambda: fs.call_s3("get_object", **request))
    body = response["Body"]
    try:
        # Some clients leave the encoding of their upload; the stored bytes are the file's.
        _require_uncompressed(response.get("ContentEncoding", "").replace("aws-chunked", ""), where)
        headers = {"Content-Range": response.get("ContentRange", "")}
        headers["Content-Length"] = str(response["ContentLength"])
        part = bool(requested.header)
        total, version = _total(headers, requested.start, part), response.get("ETag", "")
        yield HttpResponse(requested.start, total, version, part, None, body.read)
    finally:
        fs.loop.call_soon_threadsafe(body.close)


def within(pace: Pace, call: Callable[[], T]) -> T:
    """Return the result of a store's library, from a thread that is abandoned if too slow."""
    result: Future[T] = Future()

    def work() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    seconds = pace.left()
    threading.Thread(target=work, daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError:
        if result.done():
            raise
        raise TimeoutError(f"no response within {seconds:.3g} seconds") from None


def _run(call: Callable[..., Coroutine[Any, Any, T]], *arguments: object, pace: Pace) -> T:
    """Return the result of a coroutine on fsspec's event loop, within bounded time."""
    from fsspec import asyn

    seconds = min(TIMEOUT, pace.left())
    try:
        result: T = asyn.sync(asyn.get_loop(), call, *arguments, timeout=seconds)
    except TimeoutError as error:
        raise TimeoutError(f"no response within {seconds:.3g} seconds") from error
    return result


async def _get(url: str, requested: ByteRange, where: str, login: dict[str, str] | None) -> Any:
    """Return the response with the file's headers, after redirects; raise if there is no file."""
    import yarl

    target = yarl.URL(url)
    first = target.origin()
    if login is None:
        login = _netrc(target.host or "")
    for _ in range(MAX_REDIRECTS + 1):
        headers = {"Accept-Encoding": "identity"} | requested.header
        if target.origin() == first:
            headers |= login
        response = await _session().get(
            target, headers=headers, allow_redirects=False, proxy=_proxy(target), read_bufsize=PIECE
        )
        try:
            if response.status not in _REDIRECTS:
                _check(response, where)
                return response
            target = _redirected(target, response.headers.get("Location", ""), where)
        except BaseException:
            response.close()
            raise
        response.release()
    raise _refused(where, f"more than {MAX_REDIRECTS} redirects in a row")


def _check(response: Any, where: str) -> None:
    if response.status == 404:
        raise FileNotFoundError
    if response.status not in (200, 206):
        raise StatusError(response.status, response.reason)
    _require_uncompressed(response.headers.get("Content-Encoding", ""), where)


def _redirected(source: Any, location: str, where: str) -> Any:
    """Return the target of a redirect; refuse one that is not allowed."""
    import yarl

    try:
        target = source.join(yarl.URL(location))
    except ValueError:
        raise _refused(where, "a redirect to an invalid URL") from None
    shown = f"{target.scheme}://{target.host or ''}"  # the rest may contain a secret
    if not location or not target.host:
        raise _refused(where, "a redirect without a host")
    if target.scheme not in ("https", source.scheme):
        raise _refused(where, f"a redirect from {source.scheme}:// to {shown}")
    if target.user is not None or target.password is not None:
        raise _refused(where, f"a redirect with a name or password, to {shown}")
    return target


def _refused(where: str, found: str) -> RemoteError:
    return RemoteError(
        "the server sends a redirect that is not allowed",
        where=where,
        found=found,
        expected="the file, or a redirect to another web server, not from https to http",
        action="give the files' final URL, or inform their publisher",
    )


def _require_uncompressed(encoding: str, where: str) -> None:
    if encoding.strip().strip(",").lower() not in _UNCOMPRESSED:
        raise RemoteError(
            "the server sends the file compressed, which was not requested",
            where=where,
            found=f"Content-Encoding: {encoding}",
            expected="the file as stored: a small compressed response could inflate to a huge one",
            action="disable compression of these files on the server (in their metadata, in an "
            "object store), or copy the files to this machine by other means",
        )


def _total(headers: Any, start: int, part: bool) -> int | None:
    """Return the complete file's length; refuse a response that does not begin at ``start``."""
    if part:
        stated = headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", stated)
        if found is None or int(found[1]) != start:
            raise OSError(f"requested bytes from {start} on, received {stated or 'no range'}")
        return None if found[2] == "*" else int(found[2])
    length = headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _netrc(host: str) -> dict[str, str]:
    """Return the header that logs in to ``host``, from ``~/.netrc``."""
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        found = netrc.netrc(path).authenticators(host)
    except FileNotFoundError:
        return {}
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "the netrc file cannot be read",
            where=path,
            found=str(error),
            action="correct it, or set NETRC=/dev/null to ignore it",
        ) from None
    if found is None:
        return {}
    login = f"{found[0]}:{found[2] or ''}".encode()
    return {"Authorization": f"Basic {base64.b64encode(login).decode()}"}


def _proxy(url: Any) -> str | None:
    """Return the proxy for ``url`` set in the environment, if any."""
    if urllib.request.proxy_bypass(url.host):
        return None
    return urllib.request.getproxies().get(url.scheme)


# --- forks ----------------------------------------------------------------------------------------
#
# A forked process inherits its parent's connections and event loop, but not the thread of the loop.
# Finalising them there would close the parent's connections, and wait a second each for the missing
# thread. So the child keeps them alive, unused.

_SESSIONS: dict[int, Any] = {}  # by process
_FILE_SYSTEMS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # by id
_INHERITED: list[Any] = []


def keep_across_forks(fs: T) -> T:
    """Return ``fs``, an fsspec file system that processes forked later must not finalise."""
    _FILE_SYSTEMS[id(fs)] = fs
    return fs


def _after_fork() -> None:
    _INHERITED.extend(_FILE_SYSTEMS.values())
    _FILE_SYSTEMS.clear()
    if "fsspec.asyn" in sys.modules:
        from fsspec import asyn

        asyn.reset_lock()  # another thread may have held it


os.register_at_fork(after_in_child=_after_fork)


def _session() -> Any:
    """Return this process's connections to web servers; call it on the event loop only."""
    import aiohttp

    pid = os.getpid()
    if pid not in _SESSIONS:
        _SESSIONS[pid] = aiohttp.ClientSession(
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),  # _run bounds every wait
        )
        atexit.register(_close, pid)
    return _SESSIONS[pid]


def _close(pid: int) -> None:
    if pid == os.getpid():
        _run(_SESSIONS[pid].close, pace=Pace())
