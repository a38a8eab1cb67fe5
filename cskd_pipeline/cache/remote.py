"""A cache read where it lies: ``https://``, ``s3://``, ``gs://``, ``hf://``, through fsspec.

A file is copied to this machine when it is first needed, whole, and read from there: training goes
through the shards in an order that needs a file often for a while and then not for long. Copies are
kept below ``CSKD_CACHE_DIR`` (default ``~/.cache/cskd-pipeline``), about ``CSKD_CACHE_GB`` of them
(default 50; see :class:`Mirror`), those that were not used for longest removed first. Files of
finished units never change, so copies stay good; documents are read anew at every opening, since
caches grow.

Transfers that break are taken up where they broke. What arrives is checked as any cache is, by the
checksum of every chunk; a copy that fails is fetched once more before that is an error. Only keys
that follow from the manifest are asked for.
"""

from __future__ import annotations

import io
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from cskd_pipeline.cache.chunks import DamageError, Folder
from cskd_pipeline.cache.mirror import Mirror
from cskd_pipeline.errors import CskdError, MissingPackageError, RemoteError, UsageError
from cskd_pipeline.files import explained_os_errors
from cskd_pipeline.progress import Progress, silent

PACKAGES = {
    **{"https": "aiohttp", "http": "aiohttp", "s3": "s3fs", "gs": "gcsfs"},
    "hf": "huggingface_hub",
}
"""The schemes that may be read, and what fsspec needs for each."""
TRIES = 6  # in a row, of what may be otherwise the next time
WAIT = 0.5  # seconds before the second try; about twice as many before each further one
TIMEOUT = 60.0  # seconds of silence after which a try has failed
CONNECTIONS = 32  # at once, to find out what is there
MAX_FILE_BYTES = 2**32  # far above honest ones, so that no server fills the disk
_PIECE = 2**20
_REQUEST = 2**24  # of an object store, which is asked for one range after the other
_FINAL = frozenset(range(400, 500)) - {404, 408, 425, 429}  # answers that asking again won't change
_LOGIN = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError")  # botocore's
# What no network does: our own mistakes, or a library's.
_BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError)

# File systems of a process that was forked. Their connections and epoll are the parent's: finalised
# here they would close under it, and leave it waiting for answers until it gives up.
_LEFT_TO_THE_PARENT: list[Any] = []

T = TypeVar("T")


def is_remote(location: object) -> bool:
    return "://" in str(location)


def require_local(path: Path | str, problem: str, action: str) -> Path:
    """Raises: UsageError, a URL, also one that a path made ``https:/`` of."""
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
    """The files of a cache, on this machine or elsewhere.

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

    Raises:
        RemoteError: the server refuses, or cannot be reached.
        DamageError: a file that is missing, or larger than it may be.
    """

    def __init__(self, url: str, mirror: Mirror | None = None) -> None:
        super().__init__(Path() if mirror is None else mirror.root)
        self.url, self.scheme = _checked(url)
        self._mirror = mirror
        self._opened: tuple[int, Any] | None = None
        self._forgotten: set[str] = set()
        self.lists = self.scheme not in ("https", "http")  # object stores do, web servers do not
        self.at_once = CONNECTIONS

    def settled(self, identity: str) -> Folder:
        return RemoteFolder(self.url, Mirror.of(f"{self.url} {identity}"))

    def where(self, key: str) -> str:
        return f"{self.url}/{key}"

    def read(self, key: str, limit: int) -> bytes:
        if self._mirror is not None and not key.endswith("zarr.json"):
            return super().read(key, limit)
        file = io.BytesIO()
        self._fetch(key, file, limit)
        return file.getvalue()

    def length(self, key: str) -> int:
        kept = None if self._mirror is None else self._mirror.length(key)
        return self._insisting(key, lambda: self._length(key)) if kept is None else kept

    def names(self, key: str) -> list[str]:
        def ask() -> list[str]:
            fs = self._fs()
            fs.invalidate_cache()
            return [str(name).rsplit("/", 1)[-1] for name in fs.ls(self.where(key), detail=False)]

        try:
            return self._insisting(key, ask)
        except DamageError:  # there is none
            return []

    def there(self, keys: Sequence[str], progress: Progress = silent) -> list[bool]:
        """Asks for each; what was there once is not asked for again."""
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
        if not self.lists:
            return None

        def ask() -> dict[str, int]:
            found = self._fs().find(self.url, detail=True)
            root = len(self._fs()._strip_protocol(self.url)) + 1
            return {name[root:]: int(info["size"]) for name, info in found.items()}

        return self._insisting("", ask)

    def forget(self, key: str) -> bool:
        """Once for each file: a server whose file is damaged would be asked forever."""
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
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with open(partial, "w+b") as file:
                self._fetch(key, file, MAX_FILE_BYTES)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _fetch(self, key: str, file: IO[bytes], limit: int) -> None:
        self._insisting(key, lambda: self._go_on(key, file, limit), file.tell)

    def _go_on(self, key: str, file: IO[bytes], limit: int) -> None:
        """Fetch what ``file`` lacks."""
        with self._stream(key, file.tell()) as (start, pieces, total):
            file.seek(start)
            file.truncate()
            for piece in pieces:
                if file.tell() + len(piece) > limit:
                    raise DamageError(f"more than the {limit} bytes it may have")
                with explained_os_errors(self.root):
                    file.write(piece)
        if total is not None and file.tell() != total:
            raise OSError(f"{file.tell()} bytes arrived where {total} should")

    @contextmanager
    def _stream(self, key: str, start: int) -> Iterator[tuple[int, Iterator[bytes], int | None]]:
        """Where the bytes begin that come, these bytes, and the file's length if it is known."""
        if self.lists:
            file = self._fs().open(self.where(key), "rb", block_size=_REQUEST, cache_type="none")
            file.seek(start)
            total: int | None = file.size
        else:
            file = self._get(key, f"bytes={start}-" if start else None)
            start, total = _extent(file.r, start)
        step = _REQUEST if self.lists else _PIECE
        try:
            yield start, iter(lambda: file.read(step), b""), total
        finally:
            file.close()

    def _length(self, key: str) -> int:
        if self.lists:
            return int(self._fs().info(self.where(key))["size"])
        file = self._get(key, None)
        try:
            total = _extent(file.r, 0)[1]
        finally:
            file.close()
        if total is None:
            raise OSError("the server does not tell the file's length")
        return total

    def _get(self, key: str, range_: str | None) -> Any:
        """fsspec's stream of an answer; its own look at a file takes every failure for a missing
        one, hence the size that keeps it from looking.
        """
        headers = {"Accept-Encoding": "identity"} | ({} if range_ is None else {"Range": range_})
        return self._fs().open(self.where(key), "rb", block_size=0, size=1, headers=headers)

    def _insisting(
        self, key: str, ask: Callable[[], T], progress: Callable[[], int] = lambda: 0
    ) -> T:
        """What ``ask`` returns, tried again while failures may pass or ``progress`` grows."""
        failures, reached = 0, progress()
        while True:
            try:
                return ask()
            except FileNotFoundError:
                raise DamageError("the file is missing") from None
            except (DamageError, CskdError, *_BUGS):
                raise
            except Exception as error:
                failures = failures + 1 if progress() <= reached else 1
                reached = progress()
                status = getattr(error, "status", None)
                login = isinstance(error, PermissionError) or type(error).__name__ in _LOGIN
                if status in _FINAL or login:
                    raise self._refused(key, error) from error
                if failures >= TRIES:
                    raise self._unreachable(key, error) from error
            apart = 0.75 + os.getpid() % 32 / 64  # so that many processes do not come back at once
            time.sleep(WAIT * 2 ** (failures - 1) * apart)

    def _refused(self, key: str, error: Exception) -> RemoteError:
        return RemoteError(
            "the cache may not be read",
            where=self.where(key),
            found=_told(error),
            action="look whether the URL is right: some stores answer so for what is not there; "
            "log in as the store's own tools want it (a token, a profile, ~/.netrc)"
            + ("; for an open bucket set FSSPEC_S3_ANON=true" if self.scheme == "s3" else ""),
        )

    def _unreachable(self, key: str, error: Exception) -> RemoteError:
        return RemoteError(
            "the cache cannot be reached",
            where=self.where(key),
            found=f"{_told(error)}, {TRIES} times",
            action="run the same command again later: what arrived is kept; or copy the cache's "
            "folder to this machine",
        )

    def _fs(self) -> Any:
        """fsspec's file system: of this process, since connections do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            if self._opened is not None:
                _LEFT_TO_THE_PARENT.append(self._opened)
            self._opened = os.getpid(), self._connect()
        return self._opened[1]

    def _connect(self) -> Any:
        import fsspec

        try:
            # Its own memory of connections and listings would outlive what they were true of.
            return fsspec.filesystem(
                self.scheme, skip_instance_cache=True, use_listings_cache=False, **self._options()
            )
        except ImportError as error:
            package = PACKAGES[self.scheme]
            raise MissingPackageError(
                f"reading {self.scheme}:// needs the package {package}",
                where=self.url,
                found=str(error),
                action=f"pip install {package}",
            ) from error

    def _options(self) -> dict[str, Any]:
        if self.scheme == "s3":
            timeouts = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT}
            return {"config_kwargs": timeouts}
        if self.lists:
            return {}
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


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


def _extent(response: Any, start: int) -> tuple[int, int | None]:
    """Where an HTTP answer's bytes begin, and how long the file is."""
    length = response.headers.get("Content-Length")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        length = None  # of the compressed form
    if response.status != 206:
        start = 0  # the server knows no ranges: all of it again
    elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        raise OSError(f"another range than asked for: {response.headers.get('Content-Range')}")
    return start, None if length is None else start + int(length)


def _told(error: Exception) -> str:
    """On one line; some errors have no words, and aiohttp's repeat the URL."""
    status = getattr(error, "status", None)
    if status is not None:
        return f"HTTP status {status} {getattr(error, 'message', '')}".rstrip()
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
