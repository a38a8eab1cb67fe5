"""A cache read where it lies: ``https://``, ``s3://``, ``gs://``, ``hf://``.

A file is copied to this machine when it is first needed, whole, and read from there: training goes
through the shards in an order that needs a file often for a while and then not for long. Copies are
kept below ``CSKD_CACHE_DIR`` (default ``~/.cache/cskd-pipeline``), about ``CSKD_CACHE_GB`` of them
(default 50; see :class:`Mirror`), those that were not used for longest removed first. Files of
finished units never change, so copies stay good; documents are read anew at every opening, since
caches grow.

Only keys that follow from the manifest are requested, and no file may be larger than the manifest
implies; :mod:`cskd_pipeline.cache.remote_files` makes the copies. What arrives is checked as any
cache is, by the checksum of every chunk; a copy that fails is fetched once more before that is an
error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cskd_pipeline.cache import transfers
from cskd_pipeline.cache.chunks import DamageError, Folder
from cskd_pipeline.cache.mirror import Mirror
from cskd_pipeline.cache.remote_files import CONNECTIONS, TRIES, RemoteFiles, is_remote
from cskd_pipeline.errors import RemoteError, UsageError
from cskd_pipeline.runtime.progress import progress

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


class RemoteFolder(RemoteFiles, Folder):
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
        Folder.__init__(self, Path())
        RemoteFiles.__init__(self, url, mirror)
        self._most = most
        self._forgotten: set[str] = set()
        self.at_once = CONNECTIONS

    def settled(self, identity: str, most: Callable[[str], int]) -> Folder:
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
        return self._insisting(key, lambda pace: self._length(key, pace)) if kept is None else kept

    def there(self, keys: Sequence[str]) -> list[bool]:
        """Request each file; what was there once is not requested again."""
        found = []
        with (
            progress(len(keys), "units", "looking for finished units") as meter,
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
            self._keep(key, lambda file: self._fetch(key, file, self._most_bytes(key)))
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

    def _most_bytes(self, key: str) -> int:
        return min(self._most(key), MAX_FILE_BYTES)
