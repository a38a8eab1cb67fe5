"""Files of caches and shards at a URL: ``https://``, ``s3://``, ``gs://``, ``hf://``.

An interrupted transfer resumes where it broke, unless the file has changed meanwhile;
:mod:`cskd_pipeline.cache.transfers` bounds its size and time. Local copies are kept in a
:class:`Mirror`.

fsspec connects to stores and lists them. Its caching (``filecache``, ``simplecache``) is not used:
measured with 2026.9, it failed at the first interrupted transfer, and inflated a response of 49 kB
to 50 MB in memory.
"""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from cskd_pipeline.cache import transfers
from cskd_pipeline.cache.chunks import DamageError
from cskd_pipeline.cache.mirror import Mirror
from cskd_pipeline.cache.transfers import ByteRange, Pace
from cskd_pipeline.errors import CskdError, MissingPackageError, RemoteError, UsageError
from cskd_pipeline.runtime.atomic import translate_os_errors

PACKAGES = {
    **{"https": "aiohttp", "http": "aiohttp", "s3": "s3fs", "gs": "gcsfs"},
    "hf": "huggingface_hub aiohttp",
}
"""The supported URL schemes, each with the packages it needs."""
TRIES = 6  # consecutive attempts at a request that may succeed later
WAIT = 0.5  # seconds before the second attempt, about doubled before each further one
CONNECTIONS = 32  # concurrent requests when looking for files
# Statuses that another request won't change.
_FINAL = frozenset(range(400, 500)) - {404, 408, 425, 429}
_LOGIN = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError")  # botocore's
# Not raised by a network: bugs of ours, or of a library.
_BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError)

_CONNECTING: dict[int, threading.Lock] = {}  # by process: a forked one needs its own

T = TypeVar("T")


def is_remote(location: object) -> bool:
    """Return whether ``location`` is a URL."""
    return "://" in str(location)


class RemoteFiles:
    """The files below ``url``, by key.

    Args:
        url: URL of a folder.
        mirror: local copies; None keeps none.
        of: what the files belong to, in messages: ``cache`` or ``shards``.

    Raises:
        UsageError: an unsupported scheme, or a URL with more than host and path.
        RemoteError: the server denies access, cannot be reached, is too slow, or breaks the rules.
        DamageError: a file is missing, or larger than allowed.
    """

    def __init__(self, url: str, mirror: Mirror | None = None, of: str = "cache") -> None:
        require_url(url, of)
        self.url, self.scheme = url.rstrip("/"), urlsplit(url).scheme
        self._mirror, self._of = mirror, of
        self.root = Path() if mirror is None else mirror.root
        self._opened: tuple[int, Any] | None = None
        self._web = self.scheme in ("https", "http")
        self.lists = not self._web  # object stores do, web servers do not

    def where(self, key: str) -> str:
        """Return the file's URL."""
        return f"{self.url}/{key}"

    def names(self, key: str) -> list[str]:
        """List the names in the folder ``key`` of an object store."""

        def request() -> list[str]:
            fs = self._fs()
            fs.invalidate_cache()
            return [str(name).rsplit("/", 1)[-1] for name in fs.ls(self.where(key), detail=False)]

        try:
            return self._retry(key, lambda pace: transfers.within(pace, request))
        except DamageError:  # no such folder
            return []

    def document(self, key: str, limit: int) -> bytes:
        """Read a file of at most ``limit`` bytes from the server, without keeping a copy."""
        file = io.BytesIO()
        self._fetch(key, file, limit)
        return file.getvalue()

    def _fetch(self, key: str, file: IO[bytes], limit: int) -> str:
        """Fetch a file of at most ``limit`` bytes, and return its version."""
        return self._retry(key, lambda pace: self._resume(key, file, limit, pace))

    def _resume(self, key: str, file: IO[bytes], limit: int, pace: Pace) -> str:
        """Fetch the rest of ``file``; start over if the server's file is not longer."""
        try:
            self._append(key, file, limit, pace)
        except transfers.StatusError as error:
            if error.status != 416 or not file.tell():
                raise
            file.seek(0)
            file.truncate()
            raise OSError(str(error)) from error
        return pace.version

    def _append(self, key: str, file: IO[bytes], limit: int, pace: Pace) -> None:
        with self._response(key, file.tell(), pace) as response:
            versions = {response.version, pace.version} - {""}  # not all servers state one
            if response.start and len(versions) > 1:
                file.seek(0)
                raise OSError("the file changed during the transfer")
            pace.version = response.version
            file.seek(response.start)
            file.truncate()
            if response.total is not None and response.total > limit:
                raise DamageError(f"{response.total} bytes, more than the {limit} allowed")
            for piece in response.pieces(pace):
                if file.tell() + len(piece) > limit:
                    raise DamageError(f"more than the {limit} bytes allowed")
                with translate_os_errors(self.root):
                    file.write(piece)
                pace.reached(file.tell())
        if response.total is not None and file.tell() != response.total:
            raise OSError(f"{file.tell()} of {response.total} bytes arrived")

    def _response(
        self, key: str, start: int, pace: Pace, stop: int | None = None
    ) -> AbstractContextManager[transfers.HttpResponse]:
        where = self.where(key)
        part = ByteRange(start, stop)
        if self._web:
            return transfers.from_web(where, part, where, pace)
        if self.scheme == "s3":
            return transfers.from_s3(transfers.within(pace, self._fs), where, part, where, pace)
        url, login = transfers.within(pace, lambda: self._web_address(where))
        return transfers.from_web(url, part, where, pace, login)

    def _web_address(self, path: str) -> tuple[str, dict[str, str]]:
        """Return the web address of a file in a store, and the headers that log in."""
        fs = self._fs()
        login: dict[str, str] = {}
        if self.scheme == "gs":
            fs.credentials.apply(login)
            return fs.url(path), login
        from huggingface_hub import hf_hub_url

        # The hub's package exports it without saying so to type checkers.
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        found = fs.resolve_path(path)  # fs.url would also list each file's folder
        kind = {"repo_type": found.repo_type, "revision": found.revision, "endpoint": fs.endpoint}
        url = hf_hub_url(found.repo_id, found.path_in_repo, **kind)
        return url, build_hf_headers(token=fs.token)

    def _length(self, key: str, pace: Pace) -> int:
        if not self._web:
            return transfers.within(pace, lambda: int(self._fs().info(self.where(key))["size"]))
        with self._response(key, 0, pace) as response:
            if response.total is None:
                raise OSError("the server does not report the file's length")
            return response.total

    def _retry(self, key: str, request: Callable[[Pace], T]) -> T:
        """Return the result of ``request``, retried while failures may pass or bytes arrive."""
        failures, reached, pace = 0, 0, Pace()
        while True:
            try:
                return request(pace)
            except FileNotFoundError:
                raise DamageError("the file is missing") from None
            except ImportError as error:
                raise self._missing_package(error) from error
            except transfers.SlowError as error:
                raise self._slow(key, error) from error
            except (DamageError, CskdError, *_BUGS):
                raise
            except Exception as error:
                failures = failures + 1 if pace.position <= reached else 1
                reached = pace.position
                login = isinstance(error, PermissionError) or type(error).__name__ in _LOGIN
                if login or _status(error) in _FINAL:
                    raise self._refused(key, error) from error
                if failures >= TRIES:
                    raise self._unreachable(key, error) from error
            jitter = 0.75 + os.getpid() % 32 / 64  # so that processes do not all retry at once
            time.sleep(WAIT * 2 ** (failures - 1) * jitter)

    def is_refusal(self, error: RemoteError) -> bool:
        """Return whether access to a file is denied; at some stores, also whether it is absent."""
        cause = error.__cause__
        return isinstance(cause, Exception) and (
            isinstance(cause, PermissionError) or _status(cause) in (401, 403)
        )

    def _refused(self, key: str, error: Exception) -> RemoteError:
        return RemoteError(
            f"access to the {self._of} is denied",
            where=self.where(key),
            found=_one_line(error),
            action="check the URL, since some stores deny access to absent files; log in "
            "with the store's own tools (a token, a profile, ~/.netrc)"
            + ("; for a public bucket set FSSPEC_S3_ANON=true" if self.scheme == "s3" else ""),
        )

    def _unreachable(self, key: str, error: Exception) -> RemoteError:
        return RemoteError(
            f"the {self._of} cannot be reached",
            where=self.where(key),
            found=f"{_one_line(error)}, {TRIES} times",
            action="run the same command again later (complete files are kept), or copy "
            f"the {self._of} to this machine",
        )

    def _slow(self, key: str, error: Exception) -> RemoteError:
        return RemoteError(
            "the server is too slow",
            where=self.where(key),
            found=str(error),
            expected=f"at least {transfers.SLOWEST} bytes a second",
            action=f"run the same command again later, copy the {self._of} to this machine, or "
            f"allow more time: {transfers.SECONDS}=1200",
        )

    def _fs(self) -> Any:
        """Return this process's fsspec file system: connections do not survive a fork."""
        process = os.getpid()
        with _CONNECTING.setdefault(process, threading.Lock()):
            if self._opened is None or self._opened[0] != process:
                self._opened = process, transfers.keep_across_forks(self._connect())
            return self._opened[1]

    def _connect(self) -> Any:
        import fsspec

        options: dict[str, Any] = {}
        if self.scheme == "s3":
            seconds = transfers.TIMEOUT
            options["config_kwargs"] = {"connect_timeout": seconds, "read_timeout": seconds}
        # fsspec would otherwise cache connections and listings beyond their validity.
        return fsspec.filesystem(
            self.scheme, skip_instance_cache=True, use_listings_cache=False, **options
        )

    def _missing_package(self, error: ImportError) -> MissingPackageError:
        package = PACKAGES[self.scheme]
        return MissingPackageError(
            f"reading {self.scheme}:// needs {package.replace(' ', ' and ')}",
            where=self.url,
            found=str(error),
            action=f"pip install {package}",
        )


def require_url(url: str, of: str) -> None:
    """Refuse a URL from which ``of`` (``cache`` or ``shards``) cannot be read."""
    parts = urlsplit(url)
    problem = None
    if parts.scheme not in PACKAGES or "::" in url:
        problem = f"a {parts.scheme}:// URL" if "::" not in url else "a chain of URLs"
    elif "@" in parts.netloc:
        problem = "a name or password, which recipes and messages would reveal"
    elif parts.query or parts.fragment or not parts.netloc:
        problem = "a query, a fragment, or no host"
    if problem:
        raise UsageError(
            f"{'a ' if of == 'cache' else ''}{of} cannot be read from this URL",
            found=problem,
            expected=f"{', '.join(f'{scheme}://' for scheme in PACKAGES)}, then host and folder",
            action=f"give a local folder, or a URL such as https://host/{of}, s3://bucket/{of} or "
            f"hf://datasets/lab/{of}",
        )


def _status(error: Exception) -> int | None:
    """Return the HTTP status of an error; the hub's library has it in the response."""
    if isinstance(error, transfers.StatusError):
        return error.status
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _one_line(error: Exception) -> str:
    """Return an error on one line: aiohttp quotes responses that are not HTTP in full."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
