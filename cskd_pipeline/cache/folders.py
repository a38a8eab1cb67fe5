"""A cache's files by key, in a local folder or at a URL (``https``, ``s3``, ``gs``, ``hf``).

A remote file is copied to this machine on first use, completely, and read from the copy: training
visits the shards in an order that uses a file often for a while and then not for long. Copies are
kept below ``CSKD_CACHE_DIR`` (default ``~/.cache/cskd-pipeline``), up to about ``CSKD_CACHE_GB``
(default 50; see :class:`Mirror`); the least recently used are removed first. Files of finished
units never change, so their copies stay valid; documents are fetched at every opening, since caches
grow.

Only keys that follow from the manifest are requested, and no file may be larger than the manifest
implies; :mod:`cskd_pipeline.cache.remote_files` fetches them. The chunks of a copy are verified
like those of a local file; a damaged copy is fetched again once before an error is raised.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cskd_pipeline.cache import transfers
from cskd_pipeline.cache.chunks import DamageError
from cskd_pipeline.cache.mirror import Mirror
from cskd_pipeline.cache.remote_files import CONNECTIONS, RemoteFiles, is_remote
from cskd_pipeline.errors import UsageError

MAX_FILE_BYTES = 2**32  # far above real files, so that no manifest fills the disk


def require_local(path: Path | str, problem: str, action: str) -> Path:
    """Return the folder; refuse a URL (UsageError), even one that Path shortened to ``https:/``."""
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
    """Open the files of a local or remote cache.

    Raises:
        UsageError: an unsupported URL, or one with more than host and path.
        MissingPackageError: fsspec needs another package for this kind of URL.
    """
    return RemoteFolder(str(location)) if is_remote(location) else Folder(Path(location))


class Folder:
    """The files below ``root`` by key (a path with forward slashes).

    Raises:
        DamageError: a file is missing, not regular, shorter or larger than expected.
    """

    lists: bool
    """True if :meth:`names` can list files; otherwise only :meth:`has` can find them."""
    parallel: int
    """The number of files to read in parallel."""

    def __init__(self, root: Path) -> None:
        self.root, self.lists, self.parallel = root, True, 1

    def for_cache(self, identity: str, max_bytes: Callable[[str], int]) -> Folder:
        """Return the folder of the cache ``identity``.

        Args:
            max_bytes: maximum length of a file, by key.
        """
        return self

    def where(self, key: str) -> Path | str:
        """Return the path or URL of a file, for messages."""
        return self.root / key

    def forget(self, key: str) -> bool:
        """Drop a possibly damaged copy of a file; return whether to read the file again."""
        return False

    def read(self, key: str, limit: int) -> bytes:
        """Read a complete file of at most ``limit`` bytes."""
        descriptor, size = self._open(key)
        try:
            if size > limit:
                raise DamageError(f"{size} bytes, more than the {limit} allowed")
            return _pread(descriptor, 0, size)
        finally:
            os.close(descriptor)

    def read_part(self, key: str, start: int, length: int) -> bytes:
        """Read ``length`` bytes from ``start``; a negative start counts from the end."""
        descriptor, size = self._open(key)
        try:
            return _pread(descriptor, start if start >= 0 else size + start, length)
        finally:
            os.close(descriptor)

    def sha256(self, key: str) -> bytes:
        """Return the SHA-256 of a file."""
        descriptor, _ = self._open(key)
        with open(descriptor, "rb", buffering=0) as file:
            try:
                return hashlib.file_digest(file, "sha256").digest()
            except OSError as error:
                raise DamageError(f"the file cannot be read: {error.strerror}") from error

    def length(self, key: str) -> int:
        """Return the length of a file in bytes."""
        descriptor, size = self._open(key)
        os.close(descriptor)
        return size

    def names(self, key: str) -> list[str]:
        """List the entries of the folder ``key``; none if it is absent."""
        try:
            return os.listdir(self.root / key)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def has(self, key: str) -> bool:
        """Return whether the file exists."""
        return (self.root / key).is_file()

    def sizes(self) -> dict[str, int] | None:
        """Return the length of every file by key; None if files cannot be listed."""
        found: dict[str, int] = {}
        seen: set[tuple[int, int]] = set()  # links may form a cycle
        for folder, folders, names in os.walk(self.root, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            below = os.path.relpath(folder, self.root)
            for name in names:
                with suppress(FileNotFoundError):  # renamed by its writer, or a dangling link
                    size = os.stat(f"{folder}/{name}").st_size
                    found[name if below == "." else f"{below}/{name}"] = size
        return found

    def _open(self, key: str) -> tuple[int, int]:
        try:
            descriptor = os.open(f"{self.root}/{key}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise DamageError("the file is missing") from None
        except OSError as error:
            raise DamageError(f"the file cannot be opened: {error.strerror}") from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise DamageError("not a regular file")
        return descriptor, status.st_size


def _pread(descriptor: int, start: int, length: int) -> bytes:
    try:
        data = os.pread(descriptor, length, start) if start >= 0 else b""
    except OSError as error:
        raise DamageError(f"the file cannot be read: {error.strerror}") from error
    if len(data) != length:
        raise DamageError(f"truncated: {len(data)} of {length} bytes")
    return data


class RemoteFolder(RemoteFiles, Folder):
    """The files below ``url`` by key, through local copies.

    Args:
        url: see :func:`open_folder`.
        mirror: folder of the copies; None until :meth:`for_cache` identifies the cache.
        max_bytes: maximum length of a file, by key.
    """

    def __init__(
        self,
        url: str,
        mirror: Mirror | None = None,
        max_bytes: Callable[[str], int] = lambda key: MAX_FILE_BYTES,
    ) -> None:
        Folder.__init__(self, Path())
        RemoteFiles.__init__(self, url, mirror)
        self._max_bytes = max_bytes
        self._forgotten: set[str] = set()
        self.parallel = CONNECTIONS

    def for_cache(self, identity: str, max_bytes: Callable[[str], int]) -> Folder:
        """Return the folder with local copies of the cache ``identity``."""
        return RemoteFolder(self.url, Mirror.of(f"{self.url} {identity}"), max_bytes)

    def read(self, key: str, limit: int) -> bytes:
        """Read a complete file of at most ``limit`` bytes; documents always from the server."""
        if self._mirror is not None and not key.endswith("zarr.json"):
            return super().read(key, limit)
        return self.document(key, limit)

    def length(self, key: str) -> int:
        """Return the length of the local copy, or of the server's file if there is none."""
        copy = None if self._mirror is None else self._mirror.length(key)
        return self._retry(key, lambda pace: self._length(key, pace)) if copy is None else copy

    def sizes(self) -> dict[str, int] | None:
        """Return the length of every file in an object store; None for a web server."""
        if not self.lists:
            return None

        def request() -> dict[str, int]:
            found = self._fs().find(self.url, detail=True)
            root = len(self._fs()._strip_protocol(self.url)) + 1
            return {name[root:]: int(info["size"]) for name, info in found.items()}

        return self._retry("", lambda pace: transfers.within(pace, request))

    def forget(self, key: str) -> bool:
        """Remove the copy; return True only once per file, so that fetching it again ends."""
        first = key not in self._forgotten
        self._forgotten.add(key)
        if self._mirror is not None:
            self._mirror.remove(key)
        return first

    def has(self, key: str) -> bool:
        """Return whether the file exists; request it only if there is no local copy."""
        try:
            os.close(self._open(key)[0])
        except DamageError:
            return False
        return True

    def _open(self, key: str) -> tuple[int, int]:
        assert self._mirror is not None
        limit = min(self._max_bytes(key), MAX_FILE_BYTES)

        def open_copy(path: Path) -> tuple[int, int] | None:
            try:
                return Folder._open(self, key)
            except DamageError:
                if path.exists():
                    raise
                return None

        return self._mirror.open(key, lambda file: self._fetch(key, file, limit), open_copy)
