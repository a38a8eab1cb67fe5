"""Writing so that a kill or a power cut leaves a file whole or absent, and two writers apart."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cskd_pipeline.errors import OutputError
from cskd_pipeline.runtime import atomic


class DurableFolder:
    """Files below ``root``, by key. After :meth:`flush`, what was written survives a power cut.

    Args:
        held: no other process writes these files: what killed writers left of them is removed.
    """

    def __init__(self, root: Path, held: bool) -> None:
        self.root, self._held = root, held
        self._touched: set[Path] = set()

    def write(self, key: str, data: bytes) -> None:
        """Replace the file, whole or not at all.

        Raises:
            OutputError: no space left, no permission, or a link that leads out of the folder.
        """
        path = inside(self.root, key)
        if self._held:
            atomic.sweep(path.parent, path.name)
        atomic.write_bytes(path, data)
        self._touched.update(path.relative_to(self.root).parents)

    def flush(self) -> None:
        """Sync every folder in which a file or folder may be new since the last time."""
        for folder in self._touched:
            atomic.sync_folder(self.root / folder)
        self._touched.clear()


def inside(root: Path, key: str) -> Path:
    """Return the file ``key`` below ``root``, for writing; refuse one whose folder is not.

    A cache from elsewhere may have links for folders; what is written would land behind them.
    """
    path = root / key
    folder = path.parent.resolve()
    if not folder.is_relative_to(root.resolve()):
        raise OutputError(
            "a folder of the cache is a link that leads out of it",
            where=path.parent,
            found=folder,
            expected=f"a folder below {root}",
            action="put the folder itself there; links of files are fine",
        )
    return path


HELD = 300.0  # seconds after which a holder is taken for one that was stopped


@contextmanager
def exclusive(
    folder: Path, seconds: float | None = None, busy: Callable[[], bool] = lambda: False
) -> Iterator[bool]:
    """Hold ``folder``, made if need be, against other processes; a killed holder lets go.

    False on file systems without locks on folders (some network ones), which let everyone in:
    there, two writers of one unit at once are not kept apart. Also False when another has
    held it for ``seconds`` and is not ``busy``.

    Raises:
        OutputError: without ``seconds``, another has held it for minutes: it may be stopped.
    """
    with atomic.translate_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    held = False
    try:
        with suppress(OSError):
            held = _locked(descriptor, HELD if seconds is None else seconds, busy)
            if not held and seconds is None:
                raise OutputError(
                    "another process holds a part of the cache and does not let go of it",
                    where=folder,
                    found=f"held for {HELD:g} seconds",
                    expected="a unit's files are written in seconds",
                    action="see whether a process that writes this cache was stopped: continue or "
                    "kill it, then run the same command again; finished units are kept",
                )
        yield held
    finally:
        if held:  # closing alone would leave it to processes that were forked meanwhile
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _locked(descriptor: int, seconds: float, busy: Callable[[], bool]) -> bool:
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
