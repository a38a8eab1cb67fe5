"""Atomic writes, and checks and locks of output folders."""

import csv
import errno
import fcntl
import io
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cskd_pipeline.errors import OutputError, printable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, an exhausted quota, or a file beyond the size limit."""
LOCK = ".cskd-lock"
NO_LOCKS = "the file system of {} has no locks: a second run in this folder will not be detected"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def translate_os_errors(where: Path | str) -> Iterator[None]:
    """Turn "no space left" and "permission denied" into an OutputError; re-raise other errors."""
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
                "no permission to write", where=error.filename or where, found=error.strerror
            ) from error
        raise


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file next to ``path``, sync it, then rename it.

    A reader, or a run after a crash, sees the old file or the new one, never a partial one.
    """
    path = Path(path)
    with translate_os_errors(path):
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
    """Yield a folder to fill; rename it to ``path`` if the block succeeds, else remove it.

    ``path`` is new, or an empty folder. A reader, or a run after a crash, sees all of it or none.
    """
    path = Path(path).resolve()
    with translate_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        partial.mkdir()
        try:
            yield partial
            for inner in partial.rglob("*"):
                if inner.is_dir():
                    sync_folder(inner)
                else:
                    with open(inner, "rb") as file:
                        os.fsync(file.fileno())
            sync_folder(partial)
            os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync_folder(path.parent)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove partial files of ``name`` that killed writers left. No writer may be active."""
    for partial in folder.glob(f".{name}.*.partial"):
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    atomic_write(path, lambda partial: partial.write_bytes(data))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, document: object) -> None:
    """Write an indented JSON document atomically."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a UTF-8 CSV table with a header atomically; missing values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def require_empty(folder: Path, *, action: str) -> None:
    """Raise an OutputError if ``folder`` contains anything except our lock."""
    _refuse(folder, _names(folder) - {LOCK}, "an empty or new folder", action)


def require_free(folder: Path, names: Collection[str], *, action: str) -> None:
    """Raise an OutputError if ``folder`` contains any of ``names``; other files may stay."""
    _refuse(folder, _names(folder) & {*names}, "a folder without these files", action)


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def _refuse(folder: Path, found: Collection[str], expected: str, action: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError("the output is a file", where=folder, expected="a folder", action=action)
    if found:
        names = sorted(found)
        raise OutputError(
            "the output folder contains other files",
            where=folder,
            found=", ".join(names[:5]) + (" …" if len(names) > 5 else ""),
            expected=expected,
            action=action,
        )


@contextmanager
def sole_writer(folder: Path) -> Iterator[bool]:
    """Lock ``folder``, created if needed, against other processes; a killed one loses its lock.

    Yields:
        False on file systems without locks, where a second writer is not detected.

    Raises:
        OutputError: another process has the lock; names it.
    """
    _refuse(folder, (), "a folder", "choose another --out")
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    with translate_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, locked = _lock(folder / LOCK)
    try:
        yield locked
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # not empty
            for path in created:
                path.rmdir()


def _lock(path: Path) -> tuple[int, bool]:
    """Open and lock a file: a record lock, which forks do not inherit and NFS supports."""
    while True:
        if path.is_symlink():  # writing would overwrite its target
            raise OutputError("the lock is a link", where=path, action="remove the link")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            locked = _try_lock(descriptor, path)
            # The previous owner may have removed the file after we opened it: then try again.
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor, locked
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        owner = printable(os.read(descriptor, 200).decode(errors="replace"))
        raise OutputError(
            "another run is using this folder",
            where=path.parent,
            found=owner or "a process that has just started",
            action="wait until it ends, or stop it; or choose another --out",
        ) from error
    return True
