"""Writing so that a kill or a power cut leaves a file whole or absent, and two writers apart."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cskd_pipeline import files


class DurableFolder:
    """Files below ``root``, by key. After :meth:`flush`, what was written survives a power cut."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._touched: set[Path] = set()

    def write(self, key: str, data: bytes) -> None:
        """Replace the file, whole or not at all.

        Raises:
            OutputError: no space left, or no permission.
        """
        path = self.root / key
        files.atomic_write(path, lambda partial: partial.write_bytes(data))
        self._touched.update(path.relative_to(self.root).parents)

    def flush(self) -> None:
        """Sync every folder in which a file or folder may be new since the last time."""
        for folder in self._touched:
            files.sync_folder(self.root / folder)
        self._touched.clear()


@contextmanager
def exclusive(folder: Path) -> Iterator[bool]:
    """Hold ``folder``, made if need be, against other processes; a killed holder lets go.

    False on file systems without locks on folders (some network ones), which let everyone in:
    there, two writers of one unit at once are not kept apart.
    """
    with files.explained_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        held = False
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            held = True
        yield held
    finally:
        os.close(descriptor)


def sweep(path: Path) -> None:
    """Remove what writers of ``path`` left beside it when killed. No other may be writing it."""
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        partial.unlink(missing_ok=True)
