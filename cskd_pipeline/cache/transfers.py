"""Bytes from elsewhere: bounded in size and time, never inflated, from nowhere unexpected.

Every server is taken for a stranger's. Compressed transfers are not wanted, and are refused where
they come all the same: nothing is ever inflated. Redirects are followed from one web server to
another, never to another protocol nor from https to http, and a login (``~/.netrc``, a token) goes
to the cache's own server alone. Every wait ends: what brings next to nothing for
``CSKD_REMOTE_TIMEOUT`` seconds (default 300) is given up.

``gs://`` and ``hf://`` name web servers, whose responses come the same way. An ``s3://`` store is
read by its library, which signs requests and follows redirects itself (between web servers, the
signature for the first alone); its files are read under the same bounds. Listings, sizes, errors
and logins of stores are left to their libraries, and are bounded in time only.
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
TIMEOUT = 60.0  # seconds of silence after which a try has failed
SLOWEST = 1000  # bytes a second, on average over CSKD_REMOTE_TIMEOUT
REDIRECTS = 5
PIECE = 2**20
_ELSEWHERE = frozenset((301, 302, 303, 307, 308))
_PLAIN = ("", "identity")


class StatusError(OSError):
    """An HTTP status that is an error."""

    def __init__(self, status: int, reason: str | None) -> None:
        super().__init__(f"HTTP status {status} {reason or ''}".rstrip())
        self.status = status


class SlowError(Exception):
    """A server that brings next to nothing."""


class Pace:
    """The pace at which a file arrives, over all tries for it.

    Raises:
        UsageError: an environment variable that is no time.
    """

    def __init__(self) -> None:
        self.position = 0
        self.version = ""  # of the file of which there are bytes already
        self._seconds = _seconds()
        self._since, self._before = time.monotonic(), 0

    def reached(self, position: int) -> None:
        """Note that the file's first ``position`` bytes are here; what comes again is no news."""
        self.position = max(self.position, position)

    def left(self) -> float:
        """Return how many seconds a server may take that brings nothing more.

        Raises:
            SlowError: it took them all, and brought less than ``SLOWEST``.
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
    """Name bytes ``start`` to ``stop - 1`` of a file; to its end for None."""

    start: int = 0
    stop: int | None = None

    @property
    def header(self) -> dict[str, str]:
        """Return the header that requests it; none for the whole file."""
        if not self.start and self.stop is None:
            return {}
        return {"Range": f"bytes={self.start}-{'' if self.stop is None else self.stop - 1}"}


@dataclass(frozen=True)
class HttpResponse:
    """The bytes of a file from ``start`` on.

    ``total`` is the file's length, if it is known; ``version`` the ETag, or the date of the last
    change, or empty; ``part`` says that the server has heeded a range. ``address`` is where on
    another server redirects led to, which may hold a secret and is good for a while; None without
    any.
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
    url: str, wanted: ByteRange, where: str, pace: Pace, login: dict[str, str] | None = None
) -> Iterator[HttpResponse]:
    """Request a part of a file of a web server.

    Args:
        where: names the file in errors; ``url`` may hold a secret.
        login: headers for this server alone; None: what ``~/.netrc`` has for it.

    Raises:
        FileNotFoundError: there is none.
        StatusError, OSError: no response, or none that can be used.
        RemoteError: a compressed response, or a redirect that is not followed.
    """
    import yarl
    from fsspec import asyn

    response = _run(_get, url, wanted, where, login, pace=pace)
    try:
        part = response.status == 206
        begin = wanted.start if part else 0  # a server that knows no ranges sends all of it again
        total = _total(response.headers, begin, part)
        version = response.headers.get("ETag") or response.headers.get("Last-Modified", "")
        moved = response.url.origin() != yarl.URL(url).origin()
        address = str(response.url) if moved else None
        yield HttpResponse(begin, total, version, part, address, response.content.read)
    finally:
        asyn.get_loop().call_soon_threadsafe(response.close)


@contextmanager
def from_s3(
    fs: Any, path: str, wanted: ByteRange, where: str, pace: Pace
) -> Iterator[HttpResponse]:
    """Request a part of a file of an object store that s3fs speaks to."""
    bucket, key, _ = fs.split_path(path)
    request = {"Bucket": bucket, "Key": key, **wanted.header}
    found = within(pace, lambda: fs.call_s3("get_object", **request))
    body = found["Body"]
    try:
        # What some clients leave behind of how they uploaded; the bytes are the file's.
        _require_plain(found.get("ContentEncoding", "").replace("aws-chunked", ""), where)
        headers = {"Content-Range": found.get("ContentRange", "")}
        headers["Content-Length"] = str(found["ContentLength"])
        part = bool(wanted.header)
        total, version = _total(headers, wanted.start, part), found.get("ETag", "")
        yield HttpResponse(wanted.start, total, version, part, None, body.read)
    finally:
        fs.loop.call_soon_threadsafe(body.close)


def within(pace: Pace, call: Callable[[], T]) -> T:
    """Return what a store's library returns, in a thread that is left behind after a while."""
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
    """Return what a coroutine returns, on fsspec's event loop; its wait is bounded."""
    from fsspec import asyn

    seconds = min(TIMEOUT, pace.left())
    try:
        found: T = asyn.sync(asyn.get_loop(), call, *arguments, timeout=seconds)
    except TimeoutError as error:
        raise TimeoutError(f"no response within {seconds:.3g} seconds") from error
    return found


async def _get(url: str, wanted: ByteRange, where: str, login: dict[str, str] | None) -> Any:
    """Return a response's head: the file, or an error. Redirects are followed here."""
    import yarl

    here = yarl.URL(url)
    own = here.origin()
    if login is None:
        login = _netrc(here.host or "")
    for _ in range(REDIRECTS + 1):
        headers = {"Accept-Encoding": "identity"} | wanted.header
        if here.origin() == own:
            headers |= login
        response = await _session().get(
            here, headers=headers, allow_redirects=False, proxy=_proxy(here), read_bufsize=PIECE
        )
        try:
            if response.status not in _ELSEWHERE:
                return _checked(response, where)
            here = _followed(here, response.headers.get("Location", ""), where)
        except BaseException:
            response.close()
            raise
        response.release()
    raise _refused(where, f"more than {REDIRECTS} redirects, one after the other")


def _checked(response: Any, where: str) -> Any:
    if response.status == 404:
        raise FileNotFoundError
    if response.status not in (200, 206):
        raise StatusError(response.status, response.reason)
    _require_plain(response.headers.get("Content-Encoding", ""), where)
    return response


def _followed(here: Any, location: str, where: str) -> Any:
    """Return the target of a redirect, if it may be followed."""
    import yarl

    try:
        found = here.join(yarl.URL(location))
    except ValueError:
        raise _refused(where, "to what is no URL") from None
    shown = f"{found.scheme}://{found.host or ''}"  # the rest may hold a secret
    if not location or not found.host:
        raise _refused(where, "to nowhere")
    if found.scheme not in ("https", here.scheme):
        raise _refused(where, f"from {here.scheme}:// to {shown}")
    if found.user is not None or found.password is not None:
        raise _refused(where, f"with a name or password, to {shown}")
    return found


def _refused(where: str, found: str) -> RemoteError:
    return RemoteError(
        "the server redirects to where it should not",
        where=where,
        found=f"a redirect {found}",
        expected="the file, or a redirect to another web server, not from https to http",
        action="give the URL under which the files lie themselves, or tell who publishes it",
    )


def _require_plain(encoding: str, where: str) -> None:
    if encoding.strip().strip(",").lower() not in _PLAIN:
        raise RemoteError(
            "the server sends the file compressed, though that was not wanted",
            where=where,
            found=f"Content-Encoding: {encoding}",
            expected="the file as it is, of which a small response cannot unfold to a large one",
            action="switch compression off for these files at the server (their metadata, in an "
            "object store), or copy the files to this machine by other means",
        )


def _total(headers: Any, start: int, part: bool) -> int | None:
    """Return the whole file's length, from a response that has to begin at ``start``."""
    if part:
        stated = headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", stated)
        if found is None or int(found[1]) != start:
            raise OSError(f"another range than the one from byte {start} on: {stated or 'none'}")
        return None if found[2] == "*" else int(found[2])
    length = headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _netrc(host: str) -> dict[str, str]:
    """The header that logs in to ``host``, as ``~/.netrc`` says."""
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        found = netrc.netrc(path).authenticators(host)
    except FileNotFoundError:
        return {}
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "a file of logins cannot be read",
            where=path,
            found=str(error),
            action="correct it, or set NETRC=/dev/null to do without",
        ) from None
    if found is None:
        return {}
    login = f"{found[0]}:{found[2] or ''}".encode()
    return {"Authorization": f"Basic {base64.b64encode(login).decode()}"}


def _proxy(url: Any) -> str | None:
    """The proxy for ``url``, as the environment says."""
    if urllib.request.proxy_bypass(url.host):
        return None
    return urllib.request.getproxies().get(url.scheme)


# --- forks ----------------------------------------------------------------------------------------
#
# A process that was forked has its parent's connections and event loop, but not the thread that
# serves them. Finalised there, they would close under the parent, and the finaliser would wait for
# the thread that is not there, a second for each. So they are kept, and never used.

_SESSIONS: dict[int, Any] = {}  # by process
_MADE: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # equal ones too
_OF_THE_PARENT: list[Any] = []


def keep_over_forks(fs: T) -> T:
    """Never finalise ``fs``, one of fsspec's file systems, in processes that are forked later."""
    _MADE[id(fs)] = fs
    return fs


def _after_fork() -> None:
    _OF_THE_PARENT.extend(_MADE.values())
    _MADE.clear()
    if "fsspec.asyn" in sys.modules:
        from fsspec import asyn

        asyn.reset_lock()  # another thread may have held it


os.register_at_fork(after_in_child=_after_fork)


def _session() -> Any:
    """This process's connections to web servers; only ever called on the event loop."""
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
