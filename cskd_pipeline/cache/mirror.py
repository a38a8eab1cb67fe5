"""Local copies of remote files, bounded in total size."""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BufferedRandom
from pathlib import Path
from typing import TypeVar

from cskd_pipeline.cache.durable import exclusive
from cskd_pipeline.errors import OutputError, RemoteError, UsageError
from cskd_pipeline.runtime.atomic import translate_os_errors

T = TypeVar("T")
Fetch = Callable[[BufferedRandom], object]
"""Writes a file's content into an empty file."""

FOLDER, GIGABYTES = "CSKD_CACHE_DIR", "CSKD_CACHE_GB"
_DEFAULT_GIGABYTES = "50"
_LOCKS = "locks"
INDEX_SUFFIX = ".npz"
"""Suffix of tar indices, which are stored next to the copies and never evicted."""
_STRIPES = 256  # locks; files whose names hash alike share one
STALLED = 300.0  # seconds without growth after which a copy no longer blocks other processes
_FRESH = 600.0  # seconds before a use is recorded again
_ABANDONED = 86_400.0  # seconds after which a partial file has no writer any more
_TRIES = 6  # consecutive attempts to open a copy before other processes evict it


class Mirror:
    """Local copies of one cache's files. Any number of processes may share a folder.

    Args:
        folder: folder with the copies of all caches, which share the limit.
        name: identity of this cache.
        limit: total bytes of all copies. A process checks it after each 64th that it adds, and then
            evicts eight such parts: up to eight processes fetching at once stay below the limit,
            n of them exceed it by about (n - 8)/64 at most.
    """

    def __init__(self, folder: Path, name: str, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.root = folder / hashlib.sha256(name.encode()).hexdigest()[:32]
        self._added: int | None = None  # bytes since the last check; None: not checked yet

    @classmethod
    def of(cls, name: str) -> Mirror:
        """Return the copies of the cache ``name`` in the folder that the environment sets.

        Raises:
            UsageError: ``CSKD_CACHE_GB`` is not a positive number.
            OutputError: other users may write to the folder.
        """
        default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cskd-pipeline"
        folder = Path(os.environ.get(FOLDER) or default).expanduser()
        _make_private(folder)
        size = os.environ.get(GIGABYTES) or _DEFAULT_GIGABYTES
        try:
            limit = int(float(size) * 10**9)
        except (ValueError, OverflowError):
            limit = 0
        if limit <= 0:
            raise UsageError(
                "not a size in gigabytes",
                where=f"the environment variable {GIGABYTES}",
                found=size,
                expected="a number above 0",
            )
        return cls(folder, name, limit)

    @property
    def capacity(self) -> int:
        """Return how many bytes of copies remain after an eviction."""
        return self.limit - self.limit // 8

    def find(self, key: str) -> Path | None:
        """Return the copy and record its use; None if absent."""
        path = self.root / key
        try:
            if time.time() - path.stat().st_mtime > _FRESH:
                os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def length(self, key: str) -> int | None:
        """Return the length of the copy in bytes; None if absent."""
        try:
            return (self.root / key).stat().st_size
        except FileNotFoundError:
            return None

    def open(self, key: str, fetch: Fetch, open_copy: Callable[[Path], T | None]) -> T:
        """Return what ``open_copy`` returns for the copy; fetch the copy again while that is None.

        Raises:
            RemoteError: copies are evicted before they are opened.
        """
        for _ in range(_TRIES):
            self.keep(key, fetch)
            opened = open_copy(self.root / key)
            if opened is not None:
                return opened
        raise RemoteError(
            "local copies of files are evicted before they are read",
            where=self.folder,
            action=f"increase {GIGABYTES}",
        )

    def keep(self, key: str, fetch: Fetch) -> None:
        """Ensure that the copy exists; ``fetch`` writes it if absent, and it appears atomically.

        One process fetches it while others wait. Once its partial copy stops growing (the process
        may be stopped), the others fetch copies of their own, of which the last stays.
        """
        if self.find(key) is not None:
            return
        path = self.root / key
        stripe = int(hashlib.sha256(str(path).encode()).hexdigest(), 16) % _STRIPES
        lock = self.folder / _LOCKS / f"{stripe:02x}"
        with exclusive(lock, STALLED, lambda: _is_growing(path)):
            if self.find(key) is not None:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # unpredictable
            try:
                with translate_os_errors(partial), open(partial, "x+b") as file:
                    fetch(file)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        self._evict(path)

    def remove(self, key: str) -> None:
        """Remove the copy, if there is one."""
        (self.root / key).unlink(missing_ok=True)

    def _evict(self, added: Path) -> None:
        """Evict the least recently used copies if the total exceeds the limit."""
        with suppress(FileNotFoundError):  # another process evicted it
            size = added.stat().st_size
            if self._added is not None and self._added + size < self.limit // 64:
                self._added += size
                return
        self._added = 0
        copies = sorted(self._copies())
        excess = sum(size for _, size, _ in copies) - self.limit
        if excess > 0:
            excess += self.limit - self.capacity  # so that the next eviction is not due at once
            for _, size, path in copies:
                if excess <= 0 or path == str(added):
                    break
                with suppress(FileNotFoundError):
                    os.unlink(path)
                excess -= size

    def _copies(self) -> Iterator[tuple[float, int, str]]:
        """Yield last use, bytes and path of every copy, except those being written."""
        now = time.time()
        for folder, folders, names in os.walk(self.folder):
            if folder == str(self.folder) and _LOCKS in folders:
                folders.remove(_LOCKS)
            for name in names:
                path = f"{folder}/{name}"
                if name.endswith(INDEX_SUFFIX):
                    continue
                with suppress(FileNotFoundError):
                    status = os.stat(path)
                    if not name.endswith(".partial") or now - status.st_mtime > _ABANDONED:
                        yield status.st_mtime, status.st_size, path


def _is_growing(path: Path) -> bool:
    """Return whether a process has recently written to a partial copy of ``path``."""
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        with suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime < STALLED:
                return True
    return False


def _make_private(folder: Path) -> None:
    """Create ``folder`` for this user alone; refuse one to which others may write.

    Others may read it, but files that they put there would be taken for the cache's. Group write
    access is refused too: members of a group cannot share copies, each needs a folder.
    """
    with translate_os_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    user, problem, action = os.geteuid(), None, ""
    for status in (os.lstat(folder), os.stat(folder)):  # a link's owner may redirect it
        if status.st_uid != user:
            problem = f"owned by user {status.st_uid}, not by {user}"
        elif stat.S_ISDIR(status.st_mode) and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            problem = f"mode {stat.S_IMODE(status.st_mode):o}: others may write to it"
            action = f"chmod go-w {shlex.quote(str(folder))}, or "
    if problem is not None:
        raise OutputError(
            "other users could replace the local copies of remote files",
            where=folder,
            found=problem,
            expected="a folder of your own, without write access for group or others",
            action=f"{action}set {FOLDER} to another folder",
        )
