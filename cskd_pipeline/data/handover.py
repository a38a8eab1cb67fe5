"""A batch on its way out of a loader process: its arrays in shared memory, the rest as a pickle.

The memory is a file without a name (``memfd``) and takes no room in ``/dev/shm``, of which
containers have 64 MB by default, less than one batch of a paper's recipe. Its descriptor goes
through a socket that parent and process have from the start: no path in ``TMPDIR`` is needed and
nobody is waited for. All of it happens where the batch was made, so that what fails arrives as
an error instead of the batch; torch's queues would share memory in a thread that drops what fails.

Only what this process's own loader processes send is unpickled: their queue and sockets have no
name that anyone else could open.
"""

from __future__ import annotations

import io
import itertools
import mmap
import os
import pickle
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cskd_pipeline.errors import DataError
from cskd_pipeline.runtime.device import memory_limit

_INLINE_BYTES = 2**16  # up to here arrays travel inside the message
_ALIGNMENT = 64
_SECONDS = 60.0  # for a descriptor to arrive that was sent before

_KEYS = itertools.count()
_RECEIVING: dict[int, list[socket.socket]] = {}


class Handover:
    """A parent's sockets to the loader processes that it is about to start.

    There may be ``ahead`` batches at a time, the parent's own among them.
    """

    def __init__(self, workers: int, ahead: int) -> None:
        pairs = [socket.socketpair() for _ in range(workers)]
        self._key = next(_KEYS)
        _RECEIVING[self._key] = [mine for mine, _ in pairs]
        for mine in _RECEIVING[self._key]:
            mine.settimeout(_SECONDS)
        theirs = [theirs for _, theirs in pairs]
        self.sender = Sender(self._key, theirs, ahead, memory_limit())

    def close(self) -> None:
        """Receive nothing more."""
        for end in (*_RECEIVING.pop(self._key), *self.sender.sockets):
            end.close()


@dataclass(frozen=True)
class Sender:
    """The processes' ends, by worker number."""

    key: int
    sockets: list[socket.socket]
    ahead: int
    memory: int  # bytes that there can be at most

    def pack(self, worker: int, item: Any) -> Parcel:
        """Put the arrays and tensors of ``item`` where the parent finds them.

        Raises:
            DataError: there is no memory, or no descriptor, for them; or there will be none once
                the processes are as far ahead as they may be, which the first batch shows.
        """
        buffers: list[pickle.PickleBuffer] = []
        message = io.BytesIO()
        _Pickler(message, protocol=5, buffer_callback=buffers.append).dump(item)
        views = [buffer.raw() for buffer in buffers]
        sizes = [view.nbytes for view in views]
        *starts, total = itertools.accumulate(map(_padded, sizes), initial=0)
        spans = list(zip(starts, sizes, strict=True))
        if total <= _INLINE_BYTES:
            inline = bytearray(total)
            for (start, size), view in zip(spans, views, strict=True):
                inline[start : start + size] = view
            return Parcel(self.key, worker, message.getvalue(), spans, total, bytes(inline))
        if total * self.ahead > self.memory:
            raise DataError(
                "the batches of the loader processes will not fit in memory",
                found=f"{self.ahead} batches of {total / 2**20:.1f} MiB",
                expected=f"less than {self.memory / 2**20:.0f} MiB, which is all that this process "
                "may use",
                action="use fewer workers, smaller batches, or no workers (--workers 0); in a "
                "container, raise its limit (--memory)",
            )
        try:
            self._send(worker, spans, views, total)
        except (OSError, MemoryError) as error:
            raise _no_room(error, total) from error
        return Parcel(self.key, worker, message.getvalue(), spans, total, None)

    def _send(
        self, worker: int, spans: list[tuple[int, int]], views: Sequence[memoryview], total: int
    ) -> None:
        descriptor = _nameless_file()
        try:
            os.ftruncate(descriptor, total)
            for (start, _), view in zip(spans, views, strict=True):
                done = 0
                while done < len(view):  # Linux writes 2 GiB at a time
                    done += os.pwrite(descriptor, view[done:], start + done)
            socket.send_fds(self.sockets[worker], [b"."], [descriptor])
        finally:
            os.close(descriptor)


class Parcel(NamedTuple):
    """A packed item; what arrives of it in the parent is the item itself."""

    key: int
    worker: int
    message: bytes
    spans: list[tuple[int, int]]
    total: int
    inline: bytes | None

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, tuple(self)


@dataclass(frozen=True)
class Failed:
    """An error on its way to the parent, as a value: torch would raise its text as another type."""

    error: BaseException


def _unpacked(*fields: Any) -> Any:
    """Return the item, or a :class:`Failed`: an error here would end torch's own threads."""
    parcel = Parcel(*fields)
    try:
        if parcel.inline is None:
            whole = memoryview(_received(_RECEIVING[parcel.key][parcel.worker], parcel.total))
        else:
            whole = memoryview(bytearray(parcel.inline))
        buffers = [whole[start : start + size] for start, size in parcel.spans]
        return pickle.loads(parcel.message, buffers=buffers)
    except (OSError, MemoryError) as error:
        return Failed(_no_room(error, parcel.total))
    except Exception as error:
        return Failed(error)


def _received(end: socket.socket, total: int) -> mmap.mmap:
    _, descriptors, _, _ = socket.recv_fds(end, 1, 1)
    if not descriptors:  # this process may open no more, and the system has closed it
        raise OSError("Too many open files")
    try:
        return mmap.mmap(descriptors[0], total)
    finally:
        os.close(descriptors[0])


def _nameless_file() -> int:
    """The descriptor of a file in memory, or, where the system has none such, on disk."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("batch", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _no_room(error: BaseException, total: int) -> DataError:
    return DataError(
        "a batch cannot be handed over by the loader process that made it",
        found=getattr(error, "strerror", None) or str(error) or type(error).__name__,
        expected=f"{total / 2**20:.0f} MiB of memory for it, and one more open file",
        action="use fewer workers, smaller batches, or no workers (--workers 0); or allow more "
        "memory or open files (ulimit -n)",
    )


class _Pickler(pickle.Pickler):
    """Tensors as numpy arrays, whose bytes stay out of the message."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented
