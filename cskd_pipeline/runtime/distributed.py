"""A process among those of its job, and what all of them agree on.

A process that torchrun did not start is a job of one. Every collective here is called by all ranks
at the same point, or the job would wait until one of them is given up.
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

from cskd_pipeline.errors import CskdError, RankError, UsageError
from cskd_pipeline.runtime.processes import identify
from cskd_pipeline.runtime.progress import silence
from cskd_pipeline.runtime.signals import Requeue
from cskd_pipeline.runtime.watch import Watch, of_this_attempt

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """``rank`` of ``world`` processes; ``local`` counts them on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0
    watch: Watch | None = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Return whether this is the rank that writes files and logs."""
        return self.rank == 0

    @property
    def many(self) -> bool:
        """Return whether there are other ranks."""
        return self.world > 1

    def device(self, chosen: torch.device) -> torch.device:
        """Return this rank's own GPU where ``chosen`` names none in particular."""
        if chosen.type == "cuda" and chosen.index is None and self.many:
            return torch.device("cuda", self.local)
        return chosen

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over ranks, on every rank; do not wait for the device."""
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
        self._meet()
        found: list[Any] = [None] * self.world
        with self.translate_errors():
            dist.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on some rank."""
        if not self.many:
            return flag
        flags = torch.tensor([int(flag)])
        with self.translate_errors():
            dist.all_reduce(flags)
        return bool(flags.item())

    def wait(self) -> None:
        """Wait until all ranks are here, for as long as all live."""
        if self.many:
            self._meet()
            self.any(False)

    def numbers(self, name: str) -> Iterator[int]:
        """Yield 0, 1, 2 and so on, each to one rank alone: to whichever is the next to continue.

        No rank waits for another. If the job's store is lost, each counts on by itself, and several
        get the same numbers.
        """
        watch, number = self.watch, -1
        while True:
            number += 1
            if watch is not None:
                counted = watch.count(name)
                if counted is None:
                    log.warning("the job's store does not respond: this rank counts on by itself")
                    watch = None
                else:
                    number = counted - 1
            yield number

    def check(self) -> None:
        """Raise the error of another rank that has failed."""
        if self.watch is not None:
            self.watch.check()

    def checking(self, items: Iterable[T]) -> Iterator[T]:
        """Pass ``items`` on until another rank has failed."""
        for item in items:
            self.check()
            yield item

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Make a RankError of a collective that fails inside: which rank it was, and why."""
        try:
            yield
        except (dist.DistError, RuntimeError) as error:
            raise self._lost(error) from error

    def _meet(self) -> None:
        if self.watch is not None:
            self.watch.meet()

    def _lost(self, error: BaseException) -> CskdError:
        assert self.watch is not None
        return self.watch.verdict(_reason(error))


ALONE = Ranks()
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def ranks_from_env(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Return the rank that torchrun's environment gives this process; start nothing.

    Raises:
        UsageError: it says half of it, or what cannot be.
    """
    values = {name: environment[name] for name in _NAMES if name in environment}
    mine = {name: values[name] for name in ("RANK", "LOCAL_RANK") if name in values}
    if values.get("WORLD_SIZE", "1" if not mine else "") == "1" and set(mine.values()) <= {"0"}:
        return ALONE
    missing = [name for name in _NAMES if name not in values]
    numbers = {name: values[name] for name in values if name != "MASTER_ADDR"}
    wrong = [name for name, text in numbers.items() if not re.fullmatch(r"[0-9]{1,9}", text)]
    if not (missing or wrong):
        rank, world, local, port = map(int, numbers.values())
        if local <= rank < world and 0 < port < 2**16:
            return Ranks(rank, world, local)
    raise UsageError(
        "the environment names a rank of a job, but not as torchrun does",
        found=", ".join(f"{name}={text}" for name, text in values.items())
        + (f"; without {', '.join(missing)}" if missing else ""),
        expected="LOCAL_RANK <= RANK < WORLD_SIZE, MASTER_ADDR and MASTER_PORT; or none of them",
        action="start with torchrun, or set all five; for a job of one process, unset RANK, "
        "WORLD_SIZE and LOCAL_RANK",
    )


def torchrun_job_id(environment: Mapping[str, str] = os.environ) -> str:
    """Return what names torchrun's job, the same each time it starts its ranks again; or "".

    That is its ``--rdzv-id``; without one, the agent of this node.
    """
    name = environment.get("TORCHELASTIC_RUN_ID", "")
    return json.dumps(identify(os.getppid())) if name == "none" else name


@contextmanager
def join_job(patience: float) -> Iterator[Ranks]:
    """Connect this process with the others of its job while the block runs; only the first logs.

    Tensors on GPUs are reduced by NCCL, others by gloo.

    Args:
        patience: seconds that a rank may be silent; one that has ended is noticed within seconds.

    Raises:
        RankError: another rank cannot be reached, or has failed; its error, in that case.
    """
    alone = ranks_from_env()
    if not alone.many:
        yield alone
        return
    limit = timedelta(seconds=patience)
    store = _meeting_point(alone, limit)
    watch = Watch(alone.rank, alone.world, patience)
    ranks = replace(alone, watch=watch)
    failed = True
    try:
        watch.meet()
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(ranks.local % torch.cuda.device_count())
        with ranks.translate_errors():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=of_this_attempt(store),
                rank=ranks.rank,
                world_size=ranks.world,
                timeout=limit,
            )
        with nullcontext() if ranks.first else silence():
            yield ranks
        ranks.wait()  # nobody leaves while another still waits for a reply
        failed = False
    except BaseException as error:
        _pass_on(watch, error)
        # Lets go of what holds the sockets, whose end wakes the others.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()
        watch.leave(stay=failed)


def _meeting_point(ranks: Ranks, limit: timedelta) -> dist.Store:
    try:
        store, _, _ = next(rendezvous("env://", ranks.rank, ranks.world, timeout=limit))
    except (dist.DistError, RuntimeError) as error:
        raise RankError(
            "not all ranks of this job have come",
            where=f"rank {ranks.rank}, {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            found=_said(error),
            expected=f"{ranks.world} ranks within {limit.total_seconds():g} s",
            action="see whether all were started, with one MASTER_ADDR and MASTER_PORT, and "
            "whether they can reach it",
        ) from error
    return store


def _pass_on(watch: Watch, error: BaseException) -> None:
    """Pass this rank's error on, unless it is another's.

    Raises:
        RankError: the other's, where this rank's is what came of it: torchrun ends by SIGTERM those
            that are left.
    """
    theirs = None if watch.interrupted else watch.error
    if theirs is error:
        return
    if theirs is not None and isinstance(error, KeyboardInterrupt | Requeue | RuntimeError):
        raise theirs from error
    watch.fail(error)


def _reason(error: BaseException) -> str:
    """Return a collective's message without the line in its source and without its advice."""
    return _said(error).partition(". ")[0]


def _said(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return re.sub(r"^\[[^]]*\]\s*", "", text.splitlines()[0])
