"""The processes of one job, as torchrun starts them: who I am, and what we agree on.

A process that torchrun did not start is a job of one. Every collective here is called by all ranks
at the same place, or the job would wait for ever.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cskd_pipeline.errors import RankError


@dataclass(frozen=True)
class Ranks:
    """``rank`` of ``world`` processes; ``local`` counts them on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """The one that writes files and speaks."""
        return self.rank == 0

    @property
    def many(self) -> bool:
        return self.world > 1

    def device(self, chosen: torch.device) -> torch.device:
        """This rank's own GPU where ``chosen`` names none in particular."""
        if chosen.type == "cuda" and chosen.index is None and self.many:
            return torch.device("cuda", self.local)
        return chosen

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks, on every rank; does not wait for the device."""
        if not self.many:
            return values
        total = values.clone()
        with _explained():
            dist.all_reduce(total)
        return total / self.world

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value`` (numbers, text, lists and dicts of them), on every rank."""
        if not self.many:
            return [value]
        found: list[Any] = [None] * self.world
        with _explained():
            dist.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        if not self.many:
            return flag
        flags = torch.tensor([int(flag)])
        with _explained():
            dist.all_reduce(flags)
        return bool(flags.item())

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.many:
            self.any(False)


ALONE = Ranks()


def launched() -> Ranks:
    """What torchrun's environment says of this process; nothing is started."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in os.environ for name in names):
        return Ranks()
    rank, world, local = (int(os.environ[name]) for name in names)
    return Ranks(rank, world, local)


@contextmanager
def joined(patience: timedelta = timedelta(minutes=30)) -> Iterator[Ranks]:
    """This process among its job's, connected while the block runs.

    Tensors on GPUs are reduced by NCCL, others by gloo.

    Args:
        patience: how long ranks wait for each other where one has more to do; a rank that has ended
            is noticed at once.

    Raises:
        RankError: the others cannot be reached, or one of them has ended.
    """
    ranks = launched()
    if not ranks.many:
        yield ranks
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(ranks.local % torch.cuda.device_count())
    with _explained():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience)
    try:
        yield ranks
        ranks.wait()  # nobody leaves while another still needs an answer
    finally:
        dist.destroy_process_group()


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        raise lost(error) from error


def _reason(error: BaseException) -> str:
    """What the transport says, without the place in its source and its advice."""
    text = str(error) or type(error).__name__
    text = re.sub(r"^\[[^]]*\]\s*", "", text.splitlines()[0])
    return text.partition(". ")[0]


def lost(error: BaseException) -> RankError:
    """What a failed collective means: almost always that another rank has ended."""
    return RankError(
        "the other ranks of this job cannot be reached",
        where=f"rank {launched().rank}",
        found=_reason(error),
        expected=f"{launched().world} ranks at work",
        action="look for the first error among the ranks' messages; then --resume",
    )
