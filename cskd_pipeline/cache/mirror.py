"""Copies of files that lie elsewhere, on this machine, within a bound."""

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
"""Fills an empty file."""

FOLDER, GIGABYTES = "CSKD_CACHE_DIR", "CSKD_CACHE_GB"
_DEFAULT_GIGABYTES = "50"
_LOCKS = "locks"
NOTES = ".npz"
"""The end of names of small files about copies, which outlast these."""
_STRIPES = 256  # files whose names share one wait for each other
HELD_UP = 300.0  # seconds to wait for another process whose copy of a file does not grow
_FRESH = 600.0  # seconds in which a use need not be noted again
_ABANDONED = 86_400.0  # seconds after which a half-written file has no writer any more
_TRIES = 6  # in a row, to open a copy before others remove it


class Mirror:
    """Copies of one cache's files. Any number of processes may share a folder.

    Args:
        folder: holds the copies of all caches, which share the bound.
        name: distinguishes this cache from others.
        limit: bytes, of all copies. A process looks at it after each 64th part that it added, and
            then makes room for eight such parts: up to eight that fetch at once stay below it, and
            n of them exceed it by about (n - 8)/64 at most.
    """

    def __init__(self, folder: Path, name: str, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.root = folder / hashlib.sha256(name.encode()).hexdigest()[:32]
        self._added: int | None = None  # bytes since the last look; None: not looked yet

    @classmethod
    def of(cls, name: str) -> Mirror:
        """Return the copies of the cache ``name`` in the folder that the environment names.

        Raises:
            UsageError: a size that is none.
            OutputError: a folder that others may write to.
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
    def lasting(self) -> int:
        """Return how many bytes of copies there are still after room was made."""
        return self.limit - self.limit // 8

    def find(self, key: str) -> Path | None:
        """Return the copy, noted as used now; None if there is none."""
        path = self.root / key
        try:
            if time.time() - path.stat().st_mtime > _FRESH:
                os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def length(self, key: str) -> int | None:
        """Return the length of the copy in bytes; None if there is none."""
        try:
            return (self.root / key).stat().st_size
        except FileNotFoundError:
            return None

    def opened(self, key: str, fetch: Fetch, opening: Callable[[Path], T | None]) -> T:
        """Return what ``opening`` makes of the copy; fetch it again where that is None.

        Raises:
            RemoteError: copies are removed before they are opened.
        """
        for _ in range(_TRIES):
            self.keep(key, fetch)
            found = opening(self.root / key)
            if found is not None:
                return found
        raise RemoteError(
            "copies of files are removed before they are read",
            where=self.folder,
            action=f"give {GIGABYTES} more gigabytes",
        )

    def keep(self, key: str, fetch: Fetch) -> None:
        """Have the copy, by ``fetch`` if there is none; under its name it is whole.

        One process at a time fetches it; but for one whose copy does not grow (it may be stopped):
        the others make copies of their own after a while, of which the last stays.
        """
        if self.find(key) is not None:
            return
        path = self.root / key
        stripe = int(hashlib.sha256(str(path).encode()).hexdigest(), 16) % _STRIPES
        lock = self.folder / _LOCKS / f"{stripe:02x}"
        with exclusive(lock, HELD_UP, lambda: _grows(path)):
            if self.find(key) is not None:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # nobody can guess
            try:
                with translate_os_errors(partial), open(partial, "x+b") as file:
                    fetch(file)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        self._make_room(path)

    def remove(self, key: str) -> None:
        """Remove the copy, if there is one."""
        (self.root / key).unlink(missing_ok=True)

    def _make_room(self, added: Path) -> None:
        """Remove what was not used for longest, if there is too much."""
        with suppress(FileNotFoundError):  # another process made room
            size = added.stat().st_size
            if self._added is not None and self._added + size < self.limit // 64:
                self._added += size
                return
        self._added = 0
        copies = sorted(self._copies())
        excess = sum(size for _, size, _ in copies) - self.limit
        if excess > 0:
            excess += self.limit - self.lasting  # not again at once
            for _, size, path in copies:
                if excess <= 0 or path == str(added):
                    break
                with suppress(FileNotFoundError):
                    os.unlink(path)
                excess -= size

    def _copies(self) -> Iterator[tuple[float, int, str]]:
        """Last use, bytes and path of every copy; what is being written is left out."""
        now = time.time()
        for folder, folders, names in os.walk(self.folder):
            if folder == str(self.folder) and _LOCKS in folders:
                folders.remove(_LOCKS)
            for name in names:
                path = f"{folder}/{name}"
                if name.endswith(NOTES):
                    continue
                with suppress(FileNotFoundError):
                    status = os.stat(path)
                    if not name.endswith(".partial") or now - status.st_mtime > _ABANDONED:
                        yield status.st_mtime, status.st_size, path


def _grows(path: Path) -> bool:
    """Return whether some process has added to a copy of ``path`` lately."""
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        with suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime < HELD_UP:
                return True
    return False


def _make_private(folder: Path) -> None:
    """Make ``folder`` for this user alone, or refuse one in which others may put files.

    Others may read what is there; copies that they exchange would be taken for the cache's. That
    is refused for a group too: its members share no copies, each needs a folder.
    """
    with translate_os_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    user, problem, action = os.geteuid(), None, ""
    for status in (os.lstat(folder), os.stat(folder)):  # a link's owner may lead elsewhere
        if status.st_uid != user:
            problem = f"owned by user {status.st_uid}, not by {user}"
        elif stat.S_ISDIR(status.st_mode) and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            problem = f"mode {stat.S_IMODE(status.st_mode):o}: others may write to it"
            action = f"chmod go-w {shlex.quote(str(folder))}, or "
    if problem is not None:
        raise OutputError(
            "copies of a cache's files are kept only where nobody else can exchange them",
            where=folder,
            found=problem,
            expected="a folder of your own, to which neither your group nor others may write",
            action=f"{action}set {FOLDER} to another folder",
        )
