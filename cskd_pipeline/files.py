"""Writes that happen whole or not at all, and folders that are ours before we write to them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cskd_pipeline.errors import OutputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk, the user's share of it, or the largest file that it (or a limit) allows."""


@contextmanager
def explained_os_errors(where: Path | str) -> Iterator[None]:
    """Turn "no space left" and "permission denied" into an :class:`OutputError`.

    Raises:
        OutputError: for ENOSPC, EDQUOT, EFBIG, EACCES, EPERM and EROFS; other OS errors pass
            unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise OutputError(
                "no space left while writing",
                where=error.filename or where,
                found=error.strerror,
                action="free some space and run the same command again: finished parts are kept",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(
                "writing is not permitted", where=error.filename or where, found=error.strerror
            ) from error
        raise


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, make it durable, then rename it.

    A reader, or a run after a crash, sees the old file or the new one, never a part.
    """
    path = Path(path)
    with explained_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            write(partial)
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` when the block ends well, and else is removed.

    ``path`` is new, or an empty folder. A reader, or a run after a crash, sees all of it or none.
    """
    path = Path(path).resolve()
    with explained_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        partial.mkdir()
        try:
            yield partial
            for inner in partial.rglob("*"):
                if inner.is_dir():
                    sync_folder(inner)
                else:
                    with open(inner, "rb") as opened:
                        os.fsync(opened.fileno())
            sync_folder(partial)
            os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync_folder(path.parent)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what writers of ``name`` in ``folder`` left when killed. No other may be writing."""
    for partial in folder.glob(f".{name}.*.partial"):
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, document: object) -> None:
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def require_empty(folder: Path, *, action: str) -> None:
    """Refuse a folder that holds anything.

    Raises:
        OutputError: ``folder`` exists and is not an empty folder.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError("the output is a file", where=folder, expected="a folder", action=action)
    if folder.is_dir():
        names = sorted(entry.name for entry in folder.iterdir())
        if names:
            raise OutputError(
                "the output folder holds something else",
                where=folder,
                found=", ".join(names[:5]) + (" …" if len(names) > 5 else ""),
                expected="an empty or new folder",
                action=action,
            )
