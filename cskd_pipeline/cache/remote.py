"""A cache read where it lies: ``https://``, ``s3://``, ``gs://``, ``hf://``.

A file is copied to this machine when it is first needed, whole, and read from there: training goes
through the shards in an order that needs a file often for a while and then not for long. Copies are
kept below ``CSKD_CACHE_DIR`` (default ``~/.cache/cskd-pipeline``), about ``CSKD_CACHE_GB`` of them
(default 50; see :class:`Mirror`), those that were not used for longest removed first. Files of
finished units never change, so copies stay good; documents are read anew at every opening, since
caches grow.

Only keys that follow from the manifest are requested, and no file may be larger than the manifest
implies; :mod:`cskd_pipeline.cache.transfers` has the other bounds. Transfers that break are taken
up where they broke. What arrives is checked as any cache is, by the checksum of every chunk; a copy
that fails is fetched once more before that is an error.

fsspec connects to stores and lists them. Its caching (``filecache``, ``simplecache``) is not used:
measured with 2026.9, it gave up at the first transfer that broke, and inflated a response of 49 kB
to 50 MB in memory.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from cskd_pipeline.cache import transfers
from cskd_pipeline.cache.chunks import DamageError, Folder
from cskd_pipeline.cache.mirror import Mirror, partial_of
from cskd_pipeline.cache.transfers import Pace
from cskd_pipeline.errors import CskdError, MissingPackageError, RemoteError, UsageError
from cskd_pipeline.runtime.atomic import explained_os_errors
from cskd_pipeline.runtime.progress import progress

PACKAGES = {
    **{"https": "aiohttp", "http": "aiohttp", "s3": "s3fs", "gs": "gcsfs"},
    "hf": "huggingface_hub aiohttp",
}
"""The schemes that may be read, and the packages that each needs."""
TRIES = 6  # in a row, of what may be otherwise the next time
WAIT = 0.5  # seconds before the second try; about twice as many before each further one
CONNECTIONS = 32  # at once, to find out what is there
MAX_FILE_BYTES = 2**32  # far above honest ones, so that no manifest fills the disk
_FINAL = frozenset(range(400, 500)) - {
    404,
    408,
    425,
    429,
}  # statuses that another request won't change
_LOGIN = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError")  # botocore's
# What no network does: our own mistakes, or a library's.
_BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError)

T = TypeVar("T")


def is_remote(location: object) -> bool:
    """Say that ``location`` is a URL."""
    return "://" in str(location)


def require_local(path: Path | str, problem: str, action: str) -> Path:
    """Return the folder; refuse a URL (UsageError), also one that a path made ``https:/`` of."""
    if re.match("[a-z][a-z0-9]+:/", str(path)):
        raise UsageError(
            problem,
            where=path,
            found="a URL",
            expected="a folder on this machine",
            action=action,
        )
    return Path(path)


def open_folder(location: Path | str) -> Folder:
    """Open the files of a cache, on this machine or elsewhere.

    Raises:
        UsageError: a URL of another kind, or with more in it than a place.
        MissingPackageError: fsspec cannot read this kind without another package.
    """
    return RemoteFolder(str(location)) if is_remote(location) else Folder(Path(location))


class RemoteFolder(Folder):
    """The files below ``url``, by key, through copies on this machine.

    Args:
        url: see :func:`open_folder`.
        mirror: holds the copies; None until :meth:`settled` knows of which cache.
        most: the most bytes that a file may have, by its key.

    Raises:
        RemoteError: the server refuses, or cannot be reached, or sends what it should not.
        DamageError: a file that is missing, or larger than it may be.
    """

    def __init__(
        self,
        url: str,
        mirror: Mirror | None = None,
        most: Callable[[str], int] = lambda key: MAX_FILE_BYTES,
    ) -> None:
        super().__init__(Path() if mirror is None else mirror.root)
        self.url, self.scheme = _checked(url)
        self._mirror, self._most = mirror, most
        self._opened: tuple[int, Any] | None = None
        self._forgotten: set[str] = set()
        self._web = self.scheme in ("https", "http")
        self.lists = not self._web  # object stores do, web servers do not
        self.at_once = CONNECTIONS

    def settled(self, identity: str, most: Callable[[str], int]) -> Folder:
        """Return the folder with copies of the cache ``identity``."""
        return RemoteFolder(self.url, Mirror.of(f"{self.url} {identity}"), most)

    def where(self, key: str) -> str:
        """Return the file's URL."""
        return f"{self.url}/{key}"

    def read(self, key: str, limit: int) -> bytes:
        """Read the whole file, of at most ``limit`` bytes; documents always from the server."""
        if self._mirror is not None and not key.endswith("zarr.json"):
            return super().read(key, limit)
        file = io.BytesIO()
        self._fetch(key, file, limit)
        return file.getvalue()

    def length(self, key: str) -> int:
        """Return the length of the copy, or, without one, of the server's file."""
        kept = None if self._mirror is None else self._mirror.length(key)
        return self._insisting(key, lambda pace: self._length(key, pace)) if kept is None else kept

    def names(self, key: str) -> list[str]:
        """List what the folder ``key`` of an object store holds."""

        def request() -> list[str]:
            fs = self._fs()
            fs.invalidate_cache()
            return [str(name).rsplit("/", 1)[-1] for name in fs.ls(self.where(key), detail=False)]

        try:
            return self._insisting(key, lambda pace: transfers.within(pace, request))
        except DamageError:  # there is none
            return []

    def there(self, keys: Sequence[str]) -> list[bool]:
        """Request each file; what was there once is not requested again."""
        found = []
        with (
            progress(len(keys), "units", "asking which are finished") as meter,
            ThreadPoolExecutor(CONNECTIONS) as pool,
        ):
            for there in pool.map(self._is_there, keys):
                found.append(there)
                meter.advance()
        return found

    def sizes(self) -> dict[str, int] | None:
        """Return the length of every file of an object store; None of a web server."""
        if not self.lists:
            return None

        def request() -> dict[str, int]:
            found = self._fs().find(self.url, detail=True)
            root = len(self._fs()._strip_protocol(self.url)) + 1
            return {name[root:]: int(info["size"]) for name, info in found.items()}

        return self._insisting("", lambda pace: transfers.within(pace, request))

    def forget(self, key: str) -> bool:
        """Remove the copy; True once for each file: a damaged one is not requested for ever."""
        first = key not in self._forgotten
        self._forgotten.add(key)
        if self._mirror is not None:
            self._mirror.remove(key)
        return first

    def _is_there(self, key: str) -> bool:
        try:
            os.close(self._open(key)[0])
        except DamageError:
            return False
        return True

    def _open(self, key: str) -> tuple[int, int]:
        assert self._mirror is not None
        for _ in range(TRIES):
            if self._mirror.find(key) is None:
                with self._mirror.adding(key) as (path, missing):
                    if missing:
                        self._copy(key, path)
            try:
                return super()._open(key)
            except DamageError:
                if self._mirror.length(key) is not None:
                    raise
        raise RemoteError(
            "copies of the cache's files are removed before they are read",
            where=self._mirror.folder,
            action="give CSKD_CACHE_GB more gigabytes",
        )

    def _copy(self, key: str, path: Path) -> None:
        """Fetch a file; under its name it is whole."""
        partial = partial_of(path)
        try:
            with explained_os_errors(partial), open(partial, "x+b") as file:
                self._fetch(key, file, min(self._most(key), MAX_FILE_BYTES))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _fetch(self, key: str, file: IO[bytes], limit: int) -> None:
        self._insisting(key, lambda pace: self._go_on(key, file, limit, pace))

    def _go_on(self, key: str, file: IO[bytes], limit: int, pace: Pace) -> None:
        """Fetch what ``file`` lacks; all of it, where the server's is not longer."""
        try:
            self._go_on_from(key, file, limit, pace)
        except transfers.StatusError as error:
            if error.status != 416 or not file.tell():
                raise
            file.seek(0)
            file.truncate()
            raise OSError(str(error)) from error

    def _go_on_from(self, key: str, file: IO[bytes], limit: int, pace: Pace) -> None:
        with self._response(key, file.tell(), pace) as response:
            file.seek(response.start)
            file.truncate()
            if response.total is not None and response.total > limit:
                raise DamageError(f"{response.total} bytes, more than the {limit} it may have")
            for piece in response.pieces(pace):
                if file.tell() + len(piece) > limit:
                    raise DamageError(f"more than the {limit} bytes it may have")
                with explained_os_errors(self.root):
                    file.write(piece)
                pace.reached(file.tell())
        if response.total is not None and file.tell() != response.total:
            raise OSError(f"{file.tell()} bytes arrived where {response.total} should")

    def _response(
        self, key: str, start: int, pace: Pace
    ) -> AbstractContextManager[transfers.HttpResponse]:
        where = self.where(key)
        if self._web:
            return transfers.from_web(where, start, where, pace)
        if self.scheme == "s3":
            return transfers.from_s3(transfers.within(pace, self._fs), where, start, where, pace)
        url, login = transfers.within(pace, lambda: self._linked(where))
        return transfers.from_web(url, start, where, pace, login)

    def _linked(self, path: str) -> tuple[str, dict[str, str]]:
        """The web address of a file in a store, and the headers that log in there."""
        fs = self._fs()
        login: dict[str, str] = {}
        if self.scheme == "gs":
            fs.credentials.apply(login)
        else:
            # The hub's package exports it without saying so to type checkers.
            from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

            login = build_hf_headers(token=fs.token)
        return fs.url(path), login

    def _length(self, key: str, pace: Pace) -> int:
        if not self._web:
            return transfers.within(pace, lambda: int(self._fs().info(self.where(key))["size"]))
        with self._response(key, 0, pace) as response:
            if response.total is None:
                raise OSError("the server does not tell the file's length")
            return response.total

    def _insisting(self, key: str, request: Callable[[Pace], T]) -> T:
        """Return the result of ``request``, tried again while failures may pass or bytes arrive."""
        failures, reached, pace = 0, 0, Pace()
        while True:
            try:
                return request(pace)
            except FileNotFoundError:
                raise DamageError("the file is missing") from None
            except ImportError as error:
                raise self._lacks_package(error) from error
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
            apart = 0.75 + os.getpid() % 32 / 64  # so that many processes do not come back at once
            time.sleep(WAIT * 2 ** (failures - 1) * apart)

    def _refused(self, key: str, error: Exception) -> RemoteError:
        return RemoteError(
            "the cache may not be read",
            where=self.where(key),
            found=_one_line(error),
            action="look whether the URL is right: some stores respond so for what is not there; "
            "log in as the store's own tools want it (a token, a profile, ~/.netrc)"
            + ("; for an open bucket set FSSPEC_S3_ANON=true" if self.scheme == "s3" else ""),
        )

    def _unreachable(self, key: str, error: Exception) -> RemoteError:
        return RemoteError(
            "the cache cannot be reached",
            where=self.where(key),
            found=f"{_one_line(error)}, {TRIES} times",
            action="run the same command again later: what arrived is kept; or copy the cache's "
            "folder to this machine",
        )

    def _slow(self, key: str, error: Exception) -> RemoteError:
        return RemoteError(
            "the server brings next to nothing",
            where=self.where(key),
            found=str(error),
            expected=f"at least {transfers.SLOWEST} bytes a second",
            action="run the same command again later, copy the cache's folder to this machine, or "
            f"wait longer for bytes: {transfers.SECONDS}=1200",
        )

    def _fs(self) -> Any:
        """fsspec's file system: of this process, since connections do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), transfers.keep_over_forks(self._connect())
        return self._opened[1]

    def _connect(self) -> Any:
        import fsspec

        options: dict[str, Any] = {}
        if self.scheme == "s3":
            seconds = transfers.TIMEOUT
            options["config_kwargs"] = {"connect_timeout": seconds, "read_timeout": seconds}
        # Its own memory of connections and listings would outlive what they were true of.
        return fsspec.filesystem(
            self.scheme, skip_instance_cache=True, use_listings_cache=False, **options
        )

    def _lacks_package(self, error: ImportError) -> MissingPackageError:
        package = PACKAGES[self.scheme]
        return MissingPackageError(
            f"reading {self.scheme}:// needs {package.replace(' ', ' and ')}",
            where=self.url,
            found=str(error),
            action=f"pip install {package}",
        )


def _checked(url: str) -> tuple[str, str]:
    """The URL without its last slashes, and its scheme."""
    parts = urlsplit(url)
    problem = None
    if parts.scheme not in PACKAGES or "::" in url:
        problem = f"a {parts.scheme}:// URL" if "::" not in url else "a chain of URLs"
    elif "@" in parts.netloc:
        problem = "a name or password, which recipes and messages would repeat"
    elif parts.query or parts.fragment or not parts.netloc:
        problem = "no plain place"
    if problem:
        raise UsageError(
            "a cache cannot be read from this URL",
            found=problem,
            expected=f"{', '.join(f'{scheme}://' for scheme in PACKAGES)} and a folder",
            action="give a folder, or a URL such as https://host/cache, s3://bucket/cache or "
            "hf://datasets/lab/cache",
        )
    return url.rstrip("/"), parts.scheme


def _status(error: Exception) -> int | None:
    """The HTTP status that an error is about; the hub's library has it in the response."""
    if isinstance(error, transfers.StatusError):
        return error.status
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _one_line(error: Exception) -> str:
    """On one line: of what is no HTTP, aiohttp quotes all."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
