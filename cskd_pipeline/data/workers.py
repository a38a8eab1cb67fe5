"""Loader processes that exit quietly and whose errors arrive as they were raised."""

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
"""Seconds to wait for a batch from any loader process, far more than a batch takes."""
_AHEAD = 2  # batches that each process may be ahead
_PR_SET_PDEATHSIG = 1  # prctl(2) option: signal for a process whose parent dies


class _PackedDataset(Dataset[Any]):
    """Data set that packs its items, or an error instead, in the loader process."""

    sender: Sender  # set before the processes start

    def __init__(self, inner: Dataset[Any]) -> None:
        self.inner = inner

    def __getitem__(self, index: Any) -> Any:
        try:
            item = self.inner[index]
        except Exception as error:
            item = _as_failed(error)
        process = get_worker_info()
        if process is None:
            return item
        try:
            return self.sender.pack(process.id, item)
        except DataError as error:
            return self.sender.pack(process.id, Failed(error))


def _as_failed(error: Exception) -> Failed:
    """Wrap a :class:`CskdError`; re-raise others, for torch to send their type and traceback."""
    if isinstance(error, CskdError):
        return Failed(error)
    try:
        pickle.dumps(type(error))
    except Exception:  # a local type: torch's queue would drop it
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    raise error


class Loader(Generic[Item]):
    """Iterable over a data set of batches, in order, with or without loader processes.

    Args:
        dataset: data set whose items are batches, not samples.
        order: indices of the items, each taken when a process can start on it.
        workers: number of loader processes; 0: load in this process.
        pin_memory: put batches into pinned memory, for asynchronous copies to a CUDA device.
        start_method: ``fork`` or ``spawn``; None: the platform's default.

    Raises:
        CskdError: raised by the data set, in place of the failed batch.
        DataError: a process died, timed out, or cannot send a batch.
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
        self._dataset = _PackedDataset(dataset)
        self._loader: DataLoader[Any] = DataLoader(
            self._dataset,
            sampler=cast(Any, order),
            batch_size=None,
            collate_fn=_identity,
            num_workers=workers,
            pin_memory=pin_memory,
            prefetch_factor=_AHEAD if workers else None,
            worker_init_fn=_start_worker,
            multiprocessing_context=start_method if workers else None,
            timeout=PATIENCE if workers else 0,
            generator=torch.Generator(),  # leaves the global generator alone
        )

    def __iter__(self) -> Iterator[Item]:
        return self.items()

    def items(self, started: Callable[[], object] = lambda: None) -> Iterator[Item]:
        """Yield all items; call ``started`` after the processes have started."""
        handover = Handover(self._workers, self._ahead)
        self._dataset.sender = handover.sender
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
            failed = Failed(_process_error(error))
        finally:
            _resume(processes)
            handover.close()
        items = None  # ends the processes now: a traceback that refers to them would keep them
        if failed is not None:
            raise failed.error

    def _start(self) -> Iterator[Any]:
        if not self._workers:
            return iter(self._loader)
        try:
            with _stop_signals_blocked(self._start_method):
                return iter(self._loader)
        except OSError as error:
            if error.filename is not None:  # raised by the iterable of indices, not by a fork
                raise
            raise DataError(
                "the loader processes cannot be started",
                found=error.strerror,
                expected="room for more processes, and for semaphores in a writable /dev/shm",
                action="use fewer workers, or none (--workers 0); in a container, mount a writable "
                "/dev/shm and raise --shm-size",
            ) from error


def _process_error(error: RuntimeError) -> DataError:
    """Convert torch's errors about its processes for the user; re-raise any other."""
    found = str(error).splitlines()[0] if str(error) else ""
    if found.startswith("DataLoader worker (pid"):
        return DataError(
            "a loader process died",
            found=found,
            action="use fewer workers or smaller batches (the usual cause is too little memory); "
            "in a container, raise its limit (--memory)",
        )
    if found.startswith("DataLoader timed out"):
        return DataError(
            "the loader processes timed out",
            found=found,
            action="check that the processes are not stopped (state T in ps) and that the shards "
            "can be read (ls of their folder), then run the same command again",
        )
    raise error


def _resume(processes: Iterable[BaseProcess]) -> None:
    """Continue stopped processes, which could not handle SIGTERM otherwise."""
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGCONT)


def _identity(item: Item) -> Item:
    return item


@contextmanager
def _stop_signals_blocked(start_method: str) -> Iterator[None]:
    """Block the signals that stop a command, so that processes started inside inherit the mask.

    Terminals, Slurm and timeout send them to every process of a group, but only the parent must act
    on them: it ends the others.
    """
    if start_method != "fork":
        resource_tracker.ensure_running()  # its start would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    for number in STOPPING:  # also for start methods that reset the signal mask
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    os.setpgid(0, 0)  # from now on only the parent, to end this process, sends it SIGTERM
    if hasattr(signal, "sigtimedwait"):
        signal.sigtimedwait({signal.SIGTERM}, 0)  # discards an earlier one
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if sys.platform == "linux":
        # torch's watchdog notices a killed parent late, or never while a pipe is full.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
