"""The ranks of a job, and their collectives.

A process that torchrun did not start is a job of one. All ranks must call every collective at the
same point; otherwise the job waits until one of them times out.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from cskd_pipeline.errors import RankError, UsageError
from cskd_pipeline.runtime.processes import identify
from cskd_pipeline.runtime.progress import silence
from cskd_pipeline.runtime.signals import Requeue
from cskd_pipeline.runtime.watch import Watch, attempt_store

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """One of ``world`` processes; ``rank`` numbers them in the job, ``local`` on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0
    watch: Watch | None = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Return whether this rank writes files and logs."""
        return self.rank == 0

    @property
    def many(self) -> bool:
        """Return whether there are other ranks."""
        return self.world > 1

    def device(self, chosen: torch.device) -> torch.device:
        """Return this rank's own GPU if ``chosen`` is CUDA without an index, else ``chosen``."""
        if chosen.type == "cuda" and chosen.index is None and self.many:
            return torch.device("cuda", self.local)
        return chosen

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over ranks, on every rank, without waiting for the device."""
        if not self.many:
            return values
        total = values.clone()
        with self.translate_errors():
            dist.all_reduce(total)
        return total / self.world

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's ``value`` (numbers, text, lists and dicts of them), on every rank."""
        if not self.many:
            return [value]
        self._barrier()
        values: list[Any] = [None] * self.world
        with self.translate_errors():
            dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        if not self.many:
            return flag
        flags = torch.tensor([int(flag)])
        with self.translate_errors():
            dist.all_reduce(flags)
        return bool(flags.item())

    def wait(self) -> None:
        """Wait until all ranks reach this point, as long as all are alive."""
        if self.many:
            self._barrier()
            self.any(False)

    def numbers(self, name: str) -> Iterator[int]:
        """Yield 0, 1, 2 and so on, each number to only one rank: the next that requests one.

        No rank waits for another. If the job's store is lost, each rank continues counting on its
        own, and several get the same numbers.
        """
        watch, number = self.watch, -1
        while True:
            number += 1
            if watch is not None:
                count = watch.increment(name)
                if count is None:
                    log.warning("the job's store does not respond: this rank counts on its own")
                    watch = None
                else:
                    number = count - 1
            yield number

    def check(self) -> None:
        """Raise the error of another rank that has failed."""
        if self.watch is not None:
            self.watch.check()

    def checking(self, items: Iterable[T]) -> Iterator[T]:
        """Yield ``items``; raise the error of another rank that has failed."""
        for item in items:
            self.check()
            yield item

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Turn the failure of a collective into a RankError that names the rank and the reason."""
        try:
            yield
        except (dist.DistError, RuntimeError) as error:
            assert self.watch is not None
            # A collective's message, without the advice that follows.
            raise self.watch.diagnose(_first_line(error).partition(". ")[0]) from error

    def _barrier(self) -> None:
        if self.watch is not None:
            self.watch.barrier()


ALONE = Ranks()
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def ranks_from_env(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Return the rank that torchrun's environment variables give this process; start nothing.

    Raises:
        UsageError: the variables are incomplete or contradictory.
    """
    values = {name: environment[name] for name in _NAMES if name in environment}
    own = {name: values[name] for name in ("RANK", "LOCAL_RANK") if name in values}
    if values.get("WORLD_SIZE", "1" if not own else "") == "1" and set(own.values()) <= {"0"}:
        return ALONE
    missing = [name for name in _NAMES if name not in values]
    numbers = {name: values[name] for name in values if name != "MASTER_ADDR"}
    wrong = [name for name, text in numbers.items() if not re.fullmatch(r"[0-9]{1,9}", text)]
    if not (missing or wrong):
        rank, world, local, port = map(int, numbers.values())
        if local <= rank < world and 0 < port < 2**16:
            return Ranks(rank, world, local)
    raise UsageError(
        "the environment variables of torchrun are incomplete or contradictory",
        found=", ".join(f"{name}={text}" for name, text in values.items())
        + (f"; no {', '.join(missing)}" if missing else ""),
        expected="LOCAL_RANK <= RANK < WORLD_SIZE, MASTER_ADDR and MASTER_PORT; or none of them",
        action="start with torchrun, or set all five; for a single process, unset RANK, "
        "WORLD_SIZE and LOCAL_RANK",
    )


def torchrun_job_id(environment: Mapping[str, str] = os.environ) -> str:
    """Return the ID of torchrun's job, which survives restarts of its ranks; "" without torchrun.

    That is its ``--rdzv-id``; without one, the identity of this node's agent.
    """
    name = environment.get("TORCHELASTIC_RUN_ID", "")
    return json.dumps(identify(os.getppid())) if name == "none" else name


@contextmanager
def join_job(patience: float) -> Iterator[Ranks]:
    """Connect this process with the others of its job while the block runs; only the first logs.

    NCCL reduces tensors on GPUs, gloo all others.

    Args:
        patience: seconds without a heartbeat after which a rank times out; a rank that has ended is
            detected within seconds.

    Raises:
        RankError: another rank cannot be reached, or has failed (then its error).
    """
    alone = ranks_from_env()
    if not alone.many:
        yield alone
        return
    limit = timedelta(seconds=patience)
    store = _job_store(alone, limit)
    watch = Watch(alone.rank, alone.world, patience)
    ranks = replace(alone, watch=watch)
    failed = True
    try:
        watch.barrier()
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(ranks.local % torch.cuda.device_count())
        with ranks.translate_errors():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=attempt_store(store),
                rank=ranks.rank,
                world_size=ranks.world,
                timeout=limit,
            )
        with nullcontext() if ranks.first else silence():
            yield ranks
        ranks.wait()  # no rank leaves while another waits for a reply
        failed = False
    except BaseException as error:
        _report_failure(watch, error)
        # Release the objects that own the sockets: closing them wakes the other ranks.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()
        watch.leave(stay=failed)


def _job_store(ranks: Ranks, limit: timedelta) -> dist.Store:
    try:
        store, _, _ = next(rendezvous("env://", ranks.rank, ranks.world, timeout=limit))
    except (dist.DistError, RuntimeError) as error:
        raise RankError(
            "not all ranks of this job have connected",
            where=f"rank {ranks.rank}, {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            found=_first_line(error),
            expected=f"{ranks.world} ranks within {limit.total_seconds():g} s",
            action="check that all were started with the same MASTER_ADDR and MASTER_PORT, and "
            "that they can reach it",
        ) from error
    return store


def _report_failure(watch: Watch, error: BaseException) -> None:
    """Report this rank's error to the others, unless another rank caused it.

    Raises:
        RankError: the other rank's error: torchrun then stops the remaining ranks by SIGTERM.
    """
    cause = None if watch.interrupted else watch.error
    if cause is error:
        return
    if cause is not None and isinstance(error, KeyboardInterrupt | Requeue | RuntimeError):
        raise cause from error
    watch.fail(error)


def _first_line(error: BaseException) -> str:
    """Return the first line of an error of torch without its location in the source."""
    text = str(error) or type(error).__name__
    return re.sub(r"^\[[^]]*\]\s*", "", text.splitlines()[0])
