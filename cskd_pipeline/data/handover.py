"""Transfer of a batch from a loader process: arrays in shared memory, the rest as a pickle.

The memory is an anonymous file (``memfd``), which uses no space in ``/dev/shm``: containers have 64
MB there by default, less than one batch of the paper's recipes. The file descriptor is sent through
a socket pair created before the processes start, which needs no path in ``TMPDIR`` and no
handshake. The loader process itself packs the batch, so that a failure arrives as an error instead
of the batch; torch's queues share memory in a thread that drops failed items.

Only data from this process's own loader processes is unpickled: their queue and sockets have no
name that another process could open.
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

_INLINE_BYTES = 2**16  # maximum size of arrays sent inside the message
_ALIGNMENT = 64
_SECONDS = 60.0  # timeout for a descriptor, which is sent before its message

_KEYS = itertools.count()
_RECEIVING: dict[int, list[socket.socket]] = {}


class Handover:
    """The parent's sockets to the loader processes that it is about to start.

    ``ahead``: maximum number of batches at a time, including the parent's.
    """

    def __init__(self, workers: int, ahead: int) -> None:
        pairs = [socket.socketpair() for _ in range(workers)]
        self._key = next(_KEYS)
        _RECEIVING[self._key] = [receiving for receiving, _ in pairs]
        for receiving in _RECEIVING[self._key]:
            receiving.settimeout(_SECONDS)
        sending = [sending for _, sending in pairs]
        self.sender = Sender(self._key, sending, ahead, memory_limit())

    def close(self) -> None:
        """Close all sockets."""
        for end in (*_RECEIVING.pop(self._key), *self.sender.sockets):
            end.close()


@dataclass(frozen=True)
class Sender:
    """The loader processes' ends of the sockets, by worker number."""

    key: int
    sockets: list[socket.socket]
    ahead: int
    memory: int  # maximum bytes of all batches together

    def pack(self, worker: int, item: Any) -> Parcel:
        """Pack ``item``, sending its arrays and tensors to the parent through shared memory.

        Raises:
            DataError: no memory or no descriptor for the arrays, or too little memory for
                ``ahead`` batches of this size.
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
                expected=f"less than {self.memory / 2**20:.0f} MiB, the memory limit",
                action="use fewer workers, smaller batches, or no workers (--workers 0); in a "
                "container, raise its limit (--memory)",
            )
        try:
            self._send(worker, spans, views, total)
        except (OSError, MemoryError) as error:
            raise _transfer_error(error, total) from error
        return Parcel(self.key, worker, message.getvalue(), spans, total, None)

    def _send(
        self, worker: int, spans: list[tuple[int, int]], views: Sequence[memoryview], total: int
    ) -> None:
        descriptor = _anonymous_file()
        try:
            os.ftruncate(descriptor, total)
            for (start, _), view in zip(spans, views, strict=True):
                done = 0
                while done < len(view):  # Linux writes at most 2 GiB at a time
                    done += os.pwrite(descriptor, view[done:], start + done)
            socket.send_fds(self.sockets[worker], [b"."], [descriptor])
        finally:
            os.close(descriptor)


class Parcel(NamedTuple):
    """A packed item, which unpickles in the parent as the item itself."""

    key: int
    worker: int
    message: bytes
    spans: list[tuple[int, int]]
    total: int
    inline: bytes | None

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, tuple(self)


@dataclass(frozen=True)
class Failed:
    """An error sent as a value: raised in a loader process, torch would change its type."""

    error: BaseException


def _unpack(*fields: Any) -> Any:
    """Return the item, or a :class:`Failed`: an exception would end torch's threads."""
    parcel = Parcel(*fields)
    try:
        if parcel.inline is None:
            memory = memoryview(_receive(_RECEIVING[parcel.key][parcel.worker], parcel.total))
        else:
            memory = memoryview(bytearray(parcel.inline))
        buffers = [memory[start : start + size] for start, size in parcel.spans]
        return pickle.loads(parcel.message, buffers=buffers)
    except (OSError, MemoryError) as error:
        return Failed(_transfer_error(error, parcel.total))
    except Exception as error:
        return Failed(error)


def _receive(end: socket.socket, total: int) -> mmap.mmap:
    _, descriptors, _, _ = socket.recv_fds(end, 1, 1)
    if not descriptors:  # discarded by the system, as this process has reached its limit
        raise OSError("Too many open files")
    try:
        return mmap.mmap(descriptors[0], total)
    finally:
        os.close(descriptors[0])


def _anonymous_file() -> int:
    """Return the descriptor of an anonymous file in memory, or on disk without memfd support."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("batch", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _transfer_error(error: BaseException, total: int) -> DataError:
    return DataError(
        "a loader process cannot send a batch",
        found=getattr(error, "strerror", None) or str(error) or type(error).__name__,
        expected=f"{total / 2**20:.0f} MiB of free memory and one more open file",
        action="use fewer workers, smaller batches, or no workers (--workers 0); or allow more "
        "memory or open files (ulimit -n)",
    )


class _Pickler(pickle.Pickler):
    """Pickler that turns tensors into numpy arrays, whose bytes stay out of the message."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented
