"""Claims: which process makes which unit of a cache, where processes share only its folder.

A claim is a small file that one process alone can create, on NFS too. Its time of change is its
maker's sign of life. Two processes that make one unit all the same write the same bytes; claims
spare the work, and no result depends on them.
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
_LONGEST = 1000  # characters of a claim
_BEATS = 10  # signs of life in the time after which a process without one is given up


class Claims:
    """The claims of one process on units of the cache in ``root``.

    Args:
        patience: seconds without a sign of life after which another process's claim is taken over.
            The claim of a process of this machine that has ended is taken over at once. Clocks are
            not compared: it counts how long this process has seen no change.
    """

    def __init__(self, root: Path, patience: float) -> None:
        self._root, self._folder, self._patience = root, root / FOLDER, patience
        self._owner = json.dumps({**identify(os.getpid()), "claim": uuid.uuid4().hex})
        self._held: set[Path] = set()
        self._seen: dict[Path, tuple[object, float]] = {}  # others' signs of life, and since when
        self._renewed = time.monotonic()

    def take(self, unit: Unit) -> bool:
        """Claim the unit; False if another process makes it.

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
        """Give a sign of life for all that are held. Call it whenever the work has advanced."""
        if time.monotonic() - self._renewed < self._patience / _BEATS:
            return
        self._renewed = time.monotonic()
        for path in list(self._held):  # the thread that writes units drops them
            with suppress(OSError):
                if _read(path) == self._owner:  # unless it was taken over
                    os.utime(path)

    def drop(self, unit: Unit) -> None:
        """Let go of a unit that is done."""
        self._drop(self._path(unit))

    def drop_all(self) -> None:
        """Let go of what is held, and of the folder if nobody claims anything any more."""
        for path in list(self._held):
            self._drop(path)
        with suppress(OSError):
            self._folder.rmdir()

    def sweep(self) -> None:
        """Remove all claims of a finished cache: those of processes that were killed."""
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
            except FileNotFoundError:  # another process has let go of the last one
                self._folder.mkdir(parents=True, exist_ok=True)
            else:
                break
        with open(descriptor, "w") as file:
            file.write(self._owner)
        return True

    def _take_over(self, path: Path) -> bool:
        """Take a claim over that was given up. One process alone does, where folders have locks."""
        if not self._given_up(path):
            return False
        with exclusive(self._folder):
            if not self._given_up(path):
                return False
            write_text(path, self._owner)
        return True

    def _given_up(self, path: Path) -> bool:
        try:
            changed = path.lstat().st_mtime_ns
        except FileNotFoundError:
            return True
        owner = _read(path)
        if has_ended(owner):
            return True
        now = time.monotonic()
        sign, since = self._seen.get(path, (None, now))
        if sign != (owner, changed):
            self._seen[path] = (owner, changed), now
            return False
        return now - since > self._patience


def _read(path: Path) -> str:
    """Return the beginning of a plain file, else "": the folder may be from elsewhere."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, errors="replace") as file:
            return file.read(_LONGEST)
    return ""
