"""Loader processes that end quietly and whose errors arrive as they were raised."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cskd_pipeline.data.handover import Failed, Handover, Sender
from cskd_pipeline.errors import CskdError, DataError
from cskd_pipeline.runtime.signals import STOPPING

Item = TypeVar("Item")

PATIENCE = 600.0
"""Seconds without a batch from any loader process, after which all are given up: far more than
any batch takes.
"""
_AHEAD = 2  # batches that each process may be ahead
_PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent dies


class _Guarded(Dataset[Any]):
    """Items packed where they were made, so that an error arrives instead of them."""

    sender: Sender  # of the processes that are about to start

    def __init__(self, inner: Dataset[Any]) -> None:
        self.inner = inner

    def __getitem__(self, index: Any) -> Any:
        try:
            item = self.inner[index]
        except Exception as error:
            item = _failed(error)
        process = get_worker_info()
        if process is None:
            return item
        try:
            return self.sender.pack(process.id, item)
        except DataError as error:
            return self.sender.pack(process.id, Failed(error))


def _failed(error: Exception) -> Failed:
    """One of our errors as a value; others are raised on, for torch to send type and traceback."""
    if isinstance(error, CskdError):
        return Failed(error)
    try:
        pickle.dumps(type(error))
    except Exception:  # a type made on the fly: torch's queue would drop it
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    raise error


class Loader(Generic[Item]):
    """Iterates a data set of whole batches, in order, with or without loader processes.

    Args:
        dataset: gives batches, not samples.
        order: its indices, each taken from here when a process can start on it.
        workers: processes; 0: none.
        pin_memory: for a CUDA device to read from while it computes.
        start_method: ``fork`` or ``spawn``; None: the platform's.

    Raises:
        CskdError: whatever the data set raised, where its batch would have come.
        DataError: a process died, fell silent, or cannot hand a batch over.
    """

    def __init__(
        self,
        dataset: Dataset[Item],
        order: Iterable[Any],
        *,
        workers: int = 0,
        pin_memory: bool = False,
        start_method: str | None = None,
    ) -> None:
        self._start_method = start_method or multiprocessing.get_start_method()
        self._workers = workers
        self._ahead = _AHEAD * workers + 1
        self._guarded = _Guarded(dataset)
        self._loader: DataLoader[Any] = DataLoader(
            self._guarded,
            sampler=cast(Any, order),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=workers,
            pin_memory=pin_memory,
            prefetch_factor=_AHEAD if workers else None,
            worker_init_fn=_start_worker,
            multiprocessing_context=start_method if workers else None,
            timeout=PATIENCE if workers else 0,
            generator=torch.Generator(),  # or the loader would draw from the global one
        )

    def __iter__(self) -> Iterator[Item]:
        return self.items()

    def items(self, started: Callable[[], object] = lambda: None) -> Iterator[Item]:
        """Yield all items; call ``started`` once the processes are there, before the first."""
        handover = Handover(self._workers, self._ahead)
        self._guarded.sender = handover.sender
        failed: Failed | None = None
        items: Iterator[Any] | None = None
        others = set(multiprocessing.active_children())
        processes: set[BaseProcess] = set()
        try:
            items = self._start()
            processes = set(multiprocessing.active_children()) - others
            started()
            for item in items:
                if isinstance(item, Failed):
                    failed = item
                    break
                yield item
        except RuntimeError as error:
            failed = Failed(_explained(error))
        finally:
            _wake(processes)
            handover.close()
        # Ends the processes. Held by an error's traceback they would outlive it, and take seconds
        # to end.
        items = None
        if failed is not None:
            raise failed.error

    def _start(self) -> Iterator[Any]:
        if not self._workers:
            return iter(self._loader)
        try:
            with _interrupts_held(self._start_method):
                return iter(self._loader)
        except OSError as error:
            if error.filename is not None:  # of a file that the order of batches comes from
                raise
            raise DataError(
                "the loader processes cannot be started",
                found=error.strerror,
                expected="processes, and room for a few small files in /dev/shm, where Linux has "
                "its semaphores",
                action="use fewer workers, or none (--workers 0); in a container, a larger "
                "--shm-size, and a /dev/shm that can be written",
            ) from error


def _explained(error: RuntimeError) -> DataError:
    """Turn torch's error about its processes into one for a user; raise any other on."""
    found = str(error).splitlines()[0] if str(error) else ""
    if found.startswith("DataLoader worker (pid"):
        return DataError(
            "a loader process died",
            found=found,
            action="lower the number of workers or the batch size: memory is the usual reason; in "
            "a container, raise its limit (--memory)",
        )
    if found.startswith("DataLoader timed out"):
        return DataError(
            "no loader process has delivered anything for a long time",
            found=found,
            action="see whether the processes are stopped (state T in ps), and whether the shards "
            "can be read (ls of their folder); then run the same command again",
        )
    raise error


def _wake(processes: Iterable[BaseProcess]) -> None:
    """Let stopped processes go on, or they could not be ended: SIGTERM would wait."""
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGCONT)


def _unchanged(item: Item) -> Item:
    return item


@contextmanager
def _interrupts_held(start_method: str) -> Iterator[None]:
    """Processes started inside begin with the signals that stop a command held back.

    A terminal, Slurm and timeout send them to every process of a group; only the parent acts on
    them, and ends the others.
    """
    if start_method != "fork":
        resource_tracker.ensure_running()  # its start would let go of what is held
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    for number in STOPPING:  # also for start methods that reset what is held
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    os.setpgid(0, 0)  # SIGTERM is seen only if it is the parent's own, who ends a process by it
    if hasattr(signal, "sigtimedwait"):
        signal.sigtimedwait({signal.SIGTERM}, 0)  # one that came before that
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if sys.platform == "linux":
        # Of a parent that was killed torch's own watch learns late, or never while a pipe is full.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
