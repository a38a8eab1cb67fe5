"""A cache's files by key, in a folder or where they lie: ``https://``, ``s3://``, ``gs://``, ``hf://``.

A file elsewhere is copied to this machine when it is first needed, whole, and read from there:
training goes through the shards in an order that needs a file often for a while and then not for
long. Copies are kept below ``CSKD_CACHE_DIR`` (default ``~/.cache/cskd-pipeline``), about
``CSKD_CACHE_GB`` of them (default 50; see :class:`Mirror`), those that were not used for longest
removed first. Files of finished units never change, so copies stay good; documents are read anew at
every opening, since caches grow.

Only keys that follow from the manifest are requested, and no file may be larger than the manifest
implies; :mod:`cskd_pipeline.cache.remote_files` makes the copies. What arrives is checked as any
cache is, by the checksum of every chunk; a copy that fails is fetched once more before that is an
error.
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

MAX_FILE_BYTES = 2**32  # far above honest ones, so that no manifest fills the disk


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
        UsageError: a URL of another kind, or with more in it than host and path.
        MissingPackageError: fsspec cannot read this kind without another package.
    """
    return RemoteFolder(str(location)) if is_remote(location) else Folder(Path(location))


class Folder:
    """The files below ``root``, by key (a path with forward slashes).

    Raises:
        DamageError: a file that is missing, no plain file, shorter or larger than expected.
    """

    lists: bool
    """:meth:`names` lists what there is; where it cannot, :meth:`has` finds it."""
    at_once: int
    """The number of files that are best read at a time."""

    def __init__(self, root: Path) -> None:
        self.root, self.lists, self.at_once = root, True, 1

    def for_cache(self, identity: str, most: Callable[[str], int]) -> Folder:
        """Return the same folder, now that it is known which cache's files these are.

        Args:
            most: the most bytes that a file may have, by its key.
        """
        return self

    def where(self, key: str) -> Path | str:
        """Return where a file is, for messages."""
        return self.root / key

    def forget(self, key: str) -> bool:
        """Let go of what may be a bad copy of a file; whether to read it anew makes sense."""
        return False

    def read(self, key: str, limit: int) -> bytes:
        """Read the whole file, of at most ``limit`` bytes."""
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
        """Return the SHA-256 of the whole file."""
        descriptor, _ = self._open(key)
        with open(descriptor, "rb", buffering=0) as file:
            try:
                return hashlib.file_digest(file, "sha256").digest()
            except OSError as error:
                raise DamageError(f"the file cannot be read: {error.strerror}") from error

    def length(self, key: str) -> int:
        """Return the length of the file in bytes."""
        descriptor, size = self._open(key)
        os.close(descriptor)
        return size

    def names(self, key: str) -> list[str]:
        """List what the folder ``key`` holds; nothing where there is none."""
        try:
            return os.listdir(self.root / key)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def has(self, key: str) -> bool:
        """Return whether there is this file."""
        return (self.root / key).is_file()

    def sizes(self) -> dict[str, int] | None:
        """Return the length of every file, by key; None where files are not listed."""
        found: dict[str, int] = {}
        seen: set[tuple[int, int]] = set()  # a link may lead back
        for folder, folders, names in os.walk(self.root, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            below = os.path.relpath(folder, self.root)
            for name in names:
                with suppress(FileNotFoundError):  # renamed by its writer; a link to nothing
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
            raise DamageError("not a plain file")
        return descriptor, status.st_size


def _pread(descriptor: int, start: int, length: int) -> bytes:
    try:
        data = os.pread(descriptor, length, start) if start >= 0 else b""
    except OSError as error:
        raise DamageError(f"the file cannot be read: {error.strerror}") from error
    if len(data) != length:
        raise DamageError(f"cut short: {len(data)} bytes where {length} should be")
    return data


class RemoteFolder(RemoteFiles, Folder):
    """The files below ``url``, by key, through copies on this machine.

    Args:
        url: see :func:`open_folder`.
        mirror: holds the copies; None until :meth:`for_cache` knows of which cache.
        most: the most bytes that a file may have, by its key.
    """

    def __init__(
        self,
        url: str,
        mirror: Mirror | None = None,
        most: Callable[[str], int] = lambda key: MAX_FILE_BYTES,
    ) -> None:
        Folder.__init__(self, Path())
        RemoteFiles.__init__(self, url, mirror)
        self._most = most
        self._forgotten: set[str] = set()
        self.at_once = CONNECTIONS

    def for_cache(self, identity: str, most: Callable[[str], int]) -> Folder:
        """Return the folder with copies of the cache ``identity``."""
        return RemoteFolder(self.url, Mirror.of(f"{self.url} {identity}"), most)

    def read(self, key: str, limit: int) -> bytes:
        """Read the whole file, of at most ``limit`` bytes; documents always from the server."""
        if self._mirror is not None and not key.endswith("zarr.json"):
            return super().read(key, limit)
        return self.document(key, limit)

    def length(self, key: str) -> int:
        """Return the length of the copy, or, without one, of the server's file."""
        kept = None if self._mirror is None else self._mirror.length(key)
        return self._retry(key, lambda pace: self._length(key, pace)) if kept is None else kept

    def sizes(self) -> dict[str, int] | None:
        """Return the length of every file of an object store; None of a web server."""
        if not self.lists:
            return None

        def request() -> dict[str, int]:
            found = self._fs().find(self.url, detail=True)
            root = len(self._fs()._strip_protocol(self.url)) + 1
            return {name[root:]: int(info["size"]) for name, info in found.items()}

        return self._retry("", lambda pace: transfers.within(pace, request))

    def forget(self, key: str) -> bool:
        """Remove the copy; True once for each file: a damaged one is not requested for ever."""
        first = key not in self._forgotten
        self._forgotten.add(key)
        if self._mirror is not None:
            self._mirror.remove(key)
        return first

    def has(self, key: str) -> bool:
        """Request the file; what was there once is not requested again."""
        try:
            os.close(self._open(key)[0])
        except DamageError:
            return False
        return True

    def _open(self, key: str) -> tuple[int, int]:
        assert self._mirror is not None
        most = min(self._most(key), MAX_FILE_BYTES)

        def opening(path: Path) -> tuple[int, int] | None:
            try:
                return Folder._open(self, key)
            except DamageError:
                if path.exists():
                    raise
                return None

        return self._mirror.open(key, lambda file: self._fetch(key, file, most), opening)
