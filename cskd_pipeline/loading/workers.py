"""Loader processes that end quietly and whose errors arrive as they were raised."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, Generic, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from cskd_pipeline.errors import CskdError, DataError
from cskd_pipeline.interrupt import STOPPING

Item = TypeVar("Item")

_PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent dies


@dataclass(frozen=True)
class _Failed:
    """An error on its way to the parent, as a value: torch would raise its text as another type."""

    error: CskdError


class _Guarded(Dataset[Any]):
    def __init__(self, inner: Dataset[Any]) -> None:
        self.inner = inner

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.inner[index]
        except CskdError as error:
            return _Failed(error)


class _GuardedStream(IterableDataset[Any]):
    def __init__(self, inner: IterableDataset[Any]) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.inner
        except CskdError as error:
            yield _Failed(error)


class Loader(Generic[Item]):
    """Iterates a data set of whole batches, in order, with or without loader processes.

    Args:
        dataset: map-style (``order`` has its indices) or iterable; gives batches, not samples.
        order: indices; None for iterable data sets.
        workers: processes; 0: none.
        pin_memory: for a CUDA device to read from while it computes.
        prefetch: batches that each process may be ahead.
        start_method: ``fork`` or ``spawn``; None: the platform's.
        reused: keep the processes between iterations.

    Raises:
        CskdError: whatever the data set raised, at the place of the batch it belongs to.
        DataError: a process died.
    """

    def __init__(
        self,
        dataset: Dataset[Item],
        order: Iterable[Any] | None = None,
        *,
        workers: int = 0,
        pin_memory: bool = False,
        prefetch: int = 2,
        start_method: str | None = None,
        reused: bool = False,
    ) -> None:
        self._start_method = start_method or multiprocessing.get_start_method()
        self._workers = workers
        self._loader: DataLoader[Any] = DataLoader(
            _GuardedStream(dataset) if isinstance(dataset, IterableDataset) else _Guarded(dataset),
            sampler=cast(Any, order),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=workers,
            pin_memory=pin_memory,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=_start_worker,
            multiprocessing_context=start_method if workers else None,
            persistent_workers=reused and workers > 0,
            generator=torch.Generator(),  # or the loader would draw from the global one
        )

    def __iter__(self) -> Iterator[Item]:
        failed: _Failed | None = None
        try:
            with _interrupts_held(self._start_method) if self._workers else nullcontext():
                items = iter(self._loader)
            for item in items:
                if isinstance(item, _Failed):
                    failed = item
                    break
                yield item
            # Ends the processes. Held by an error's traceback they would outlive it, and take
            # seconds to end.
            del items
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "a loader process died",
                found=str(error).splitlines()[0],
                action="lower the number of workers or the batch size: memory is the usual "
                "reason; in a container, raise --shm-size",
            ) from error
        if failed is not None:
            raise failed.error


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
