"""Claims on units of a cache, for processes that share only its folder.

A claim is a small file that only one process can create, on NFS too. Its modification time is its
owner's heartbeat. Two processes that compute one unit anyway write the same bytes: claims save
work, and no result depends on them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

from cskd_pipeline.cache.durable import exclusive, inside
from cskd_pipeline.cache.units import Unit
from cskd_pipeline.runtime.atomic import translate_os_errors, write_text
from cskd_pipeline.runtime.processes import has_ended, identify

FOLDER = ".claims"
_LONGEST = 1000  # maximum characters of a claim
_BEATS = 10  # heartbeats within ``patience``
_NAMELESS = 10.0  # seconds that a claim may be empty: its owner is about to write it, or dead


class Claims:
    """The claims of one process on units of the cache in ``root``.

    Args:
        patience: seconds without a heartbeat after which another process's claim is taken over,
            measured from the last change that this process saw: clocks are not compared. The claim
            of a process of this machine that has ended is taken over at once, and an empty claim
            after at most 10 seconds.
    """

    def __init__(self, root: Path, patience: float) -> None:
        self._root, self._folder, self._patience = root, root / FOLDER, patience
        self._owner = json.dumps({**identify(os.getpid()), "claim": uuid.uuid4().hex})
        self._held: set[Path] = set()
        self._seen: dict[Path, tuple[object, float]] = {}  # others' heartbeats, and when seen
        self._renewed = time.monotonic()

    def take(self, unit: Unit) -> bool:
        """Claim the unit; return False if another process has claimed it.

        Raises:
            OutputError: no space, or no permission.
        """
        path = self._path(unit)
        with translate_os_errors(path):
            if not self._create(path) and not self._take_over(path):
                return False
        self._held.add(path)
        self.renew()
        return True

    def renew(self) -> None:
        """Send a heartbeat for all held claims. Call it whenever the work has advanced."""
        if time.monotonic() - self._renewed < self._patience / _BEATS:
            return
        self._renewed = time.monotonic()
        for path in list(self._held):  # the thread that writes units drops claims
            with suppress(OSError):
                if _read(path) == self._owner:  # unless it was taken over
                    os.utime(path)

    def drop(self, unit: Unit) -> None:
        """Release the claim on a finished unit."""
        self._drop(self._path(unit))

    def drop_all(self) -> None:
        """Release all held claims, and remove the folder if no process has any left."""
        for path in list(self._held):
            self._drop(path)
        with suppress(OSError):
            self._folder.rmdir()

    def sweep(self) -> None:
        """Remove all claims from a finished cache, left by killed processes."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, unit: Unit) -> Path:
        return inside(self._root, f"{FOLDER}/{unit.block}.{unit.shard}")

    def _drop(self, path: Path) -> None:
        with suppress(OSError):
            if _read(path) == self._owner:
                path.unlink()
        self._held.discard(path)

    def _create(self, path: Path) -> bool:
        while True:
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            except FileNotFoundError:  # another process has dropped the last claim
                self._folder.mkdir(parents=True, exist_ok=True)
            else:
                break
        with open(descriptor, "w") as file:
            file.write(self._owner)
        return True

    def _take_over(self, path: Path) -> bool:
        """Take over an abandoned claim; only one process does, given locks on folders."""
        if not self._abandoned(path):
            return False
        with exclusive(self._folder):
            if not self._abandoned(path):
                return False
            write_text(path, self._owner)
        return True

    def _abandoned(self, path: Path) -> bool:
        try:
            changed = path.lstat().st_mtime_ns
        except FileNotFoundError:
            return True
        owner = _read(path)
        if has_ended(owner):
            return True
        now = time.monotonic()
        heartbeat, since = self._seen.get(path, (None, now))
        if heartbeat != (owner, changed):
            self._seen[path] = (owner, changed), now
            return False
        return now - since > (self._patience if owner else min(self._patience, _NAMELESS))


def _read(path: Path) -> str:
    """Return the beginning of a plain file, else "": the folder may be a stranger's."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, errors="replace") as file:
            return file.read(_LONGEST)
    return ""
