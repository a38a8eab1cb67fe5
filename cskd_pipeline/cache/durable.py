"""Writes to a cache that survive kills and power cuts, and locks between its writers."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cskd_pipeline.errors import OutputError
from cskd_pipeline.runtime import atomic


class DurableFolder:
    """The files below ``root``, by key; once flushed, they survive a power cut.

    Args:
        held: whether no other process can be writing these files, so that the partial files of
            killed writers may be removed.
    """

    def __init__(self, root: Path, held: bool) -> None:
        self.root, self._held = root, held
        self._touched: set[Path] = set()

    def write(self, key: str, data: bytes) -> None:
        """Replace a file atomically.

        Raises:
            OutputError: no space left, no permission, or a link that leads out of the folder.
        """
        path = inside(self.root, key)
        if self._held:
            atomic.sweep(path.parent, path.name)
        atomic.write_bytes(path, data)
        self._touched.update(path.relative_to(self.root).parents)

    def flush(self) -> None:
        """Sync every folder that may have new entries since the last flush."""
        for folder in self._touched:
            atomic.sync_folder(self.root / folder)
        self._touched.clear()


def inside(root: Path, key: str) -> Path:
    """Return the path of ``key`` below ``root`` for writing; refuse a folder outside ``root``.

    A downloaded cache may contain links to folders, which would redirect the writes.
    """
    path = root / key
    folder = path.parent.resolve()
    if not folder.is_relative_to(root.resolve()):
        raise OutputError(
            "a folder of the cache is a link that leads out of it",
            where=path.parent,
            found=folder,
            expected=f"a folder below {root}",
            action="replace the link with the folder itself; links to files are fine",
        )
    return path


LOCK_TIMEOUT = 300.0  # seconds after which a lock's holder is assumed to be stopped


@contextmanager
def exclusive(
    folder: Path, seconds: float | None = None, busy: Callable[[], bool] = lambda: False
) -> Iterator[bool]:
    """Lock ``folder``, created if necessary, against other processes; a kill releases the lock.

    Yields:
        False if the file system has no locks on folders (some network ones), where two writers of
        one unit do not exclude each other, or if another process has held the lock for ``seconds``
        and is not ``busy``.

    Raises:
        OutputError: without ``seconds``, another process has held the lock for minutes.
    """
    with atomic.translate_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    held = False
    try:
        with suppress(OSError):
            held = _lock(descriptor, LOCK_TIMEOUT if seconds is None else seconds, busy)
            if not held and seconds is None:
                raise OutputError(
                    "another process has locked a part of the cache and does not release it",
                    where=folder,
                    found=f"locked for {LOCK_TIMEOUT:g} seconds",
                    expected="a few seconds, while a unit's files are written",
                    action="check whether a process that writes this cache is stopped: continue or "
                    "kill it, then run the same command again; finished units are kept",
                )
        yield held
    finally:
        if held:  # closing alone would leave the lock to forked processes
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(descriptor: int, seconds: float, busy: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                if not busy():
                    return False
                until = time.monotonic() + seconds
            time.sleep(min(0.05, seconds))
        else:
            return True
