"""One optimizer update of a training run, and what it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cskd_pipeline.data.batches import Batch
from cskd_pipeline.data.cached_loader import CachedLoader
from cskd_pipeline.distill.ckf import Schedule, ckf_ratio
from cskd_pipeline.distill.losses import DistillationLoss, LossParts
from cskd_pipeline.distill.targets import Targets
from cskd_pipeline.models.student import Student
from cskd_pipeline.runtime.device import AMP, compiled
from cskd_pipeline.runtime.distributed import ALONE, Ranks
from cskd_pipeline.views.bits import derive_seed

PARTS = ("loss", "base", "global", "spatial")


@dataclass(frozen=True)
class Settings:
    """Hold training options other than model, data, loss and optimizer.

    Args:
        epochs: length of the whole run.
        ckf: schedule of the CKF ratio.
        by_update: change the ratio with every update, not with every epoch.
        seed: seeds dropout and stochastic depth.
        amp: ``off``, ``bf16`` or ``fp16``.
        clip_grad: largest global norm of the gradients; 0: no limit.
        compile: run the network through ``torch.compile``.
    """

    epochs: int
    ckf: Schedule = "linear"
    by_update: bool = False
    seed: int = 0
    amp: str = "off"
    clip_grad: float = 0.0
    compile: bool = False


@dataclass(eq=False)
class Trainer:
    """Train a student: each :meth:`step` is one optimizer update.

    ``update`` counts finished updates, of ``total_updates``; all else (epoch, learning rate, CKF
    ratio, order of the samples) follows from it.

    Args:
        student: the network, on its device.
        loader: yields the training batches.
        targets: returns the teacher's response to a batch that lies on the device: the cache's
            (``loader.views.targets``), a live teacher's, or None.
        lr_schedule: sets ``optimizer``'s learning rate, by update.
        ema: moving average of the student's weights, if one is kept.
    """

    student: Student
    loader: CachedLoader
    loss: DistillationLoss
    targets: Callable[[Batch], Targets | None]
    optimizer: torch.optim.Optimizer
    lr_schedule: CosineLRScheduler
    ema: ModelEmaV3 | None
    settings: Settings
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        settings, device = self.settings, torch.device(self.loader.device)
        self.device = device
        self.amp = AMP[settings.amp]
        self.steps_per_epoch = self.loader.plan.steps
        self.total_updates = self.steps_per_epoch * settings.epochs
        self.grid = self.loader.views.grid if self.loss.method == "cskd" else None
        self._try_out()
        self.parallel: DistributedDataParallel | None = None
        if self.ranks.many:  # averages gradients, so that equal parts of a batch act as the whole
            own = [device.index] if device.type == "cuda" else None
            self.ranks.wait()  # some may have had more to read
            with self.ranks.explained():
                self.parallel = DistributedDataParallel(self.student, device_ids=own)
        network = self.parallel or self.student
        self.forward: Any = compiled(network, device) if settings.compile else network
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
        self.update = 0
        self.forked_at = 0  # the epoch, where this run goes on from another's state
        self.sums = torch.zeros(len(PARTS), device=device)  # over this epoch's updates so far

    @property
    def epoch(self) -> int:
        """Return the epoch, from 0, of the next update."""
        return self.update // self.steps_per_epoch

    @property
    def progress(self) -> float:
        """Return t, in [0, 1]: epoch / epochs, as the authors step it, or update / updates.

        In a fork both count from where it began.
        """
        forked, steps = self.forked_at, self.steps_per_epoch
        if self.settings.by_update:
            return (self.update - forked * steps) / (self.total_updates - forked * steps)
        return (self.epoch - forked) / (self.settings.epochs - forked)

    @property
    def ratio(self) -> float:
        """Return the CKF ratio r of the next update."""
        return ckf_ratio(self.settings.ckf, self.progress)

    @property
    def lr(self) -> float:
        """Return the learning rate of the last update."""
        return self.optimizer.param_groups[0]["lr"]

    def micro_batches(self) -> Iterator[Batch]:
        """Yield the micro-batches of all updates that are left, until another rank fails."""
        accumulation = self.loader.accumulation
        self.loader.start_at(self.epoch, self.update % self.steps_per_epoch * accumulation)
        left = (self.total_updates - self.update) * accumulation
        return self.ranks.heeding(self.loader.batches(left))

    def parts(self, batch: Batch) -> LossParts:
        """Return the loss of one micro-batch that lies on the device."""
        images, labels = self.loader.inputs(batch)
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            heads = self.forward(images, self.grid)
        targets = self.targets(batch)
        return self.loss(heads, labels, targets, self.ratio, self.progress)

    def step(self, batches: Iterator[Batch]) -> Tensor:
        """Make one optimizer update from the next ``accumulation`` micro-batches.

        Returns:
            (4,) the loss and its parts over this rank's samples, on the device: nothing here waits
            for it.

        Raises:
            RankError: another rank has ended.
        """
        self._seed_update()
        self.lr_schedule.step_update(self.update)
        self.student.train()
        accumulation = self.loader.accumulation
        sums = torch.zeros(len(PARTS), device=self.device)
        for micro in range(accumulation):
            batch = next(batches).to(self.device)
            with self._exchanging_gradients(micro + 1 == accumulation):
                parts = self.parts(batch)
                self.scaler.scale(parts.total / accumulation).backward()
            sums += parts.detached() / accumulation
        if self.settings.clip_grad > 0:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.student.model)
        self.update += 1
        self.sums += sums
        return sums

    def _try_out(self) -> None:
        """Refuse a student that would fail in its first step, before anything is spent."""
        loader, policy = self.loader, self.loader.views.policy
        count = min(2, loader.batch_size // (loader.accumulation * loader.world))
        few = torch.zeros(count, 3, policy.size, policy.size, device=self.device)
        few = few.contiguous(memory_format=loader.memory_format)
        self.student.try_out(few, loader.views.num_classes, self.grid, self.amp)

    @contextmanager
    def _exchanging_gradients(self, last: bool) -> Iterator[None]:
        """Ranks exchange gradients once an update, with the last micro-batch's backward pass."""
        if self.parallel is None:
            yield
        elif not last:
            with self.parallel.no_sync():
                yield
        else:
            try:
                yield
            except RuntimeError as error:
                if "gloo" in str(error) or "NCCL" in str(error):
                    with self.ranks.explained():
                        raise
                raise

    def _seed_update(self) -> None:
        """Dropout and stochastic depth follow from (seed, update, rank), not from what came before.

        ``torch.manual_seed`` would do, but formats a stack trace where CUDA is not in use.
        """
        whose = (self.ranks.rank,) if self.ranks.rank else ()
        seed = derive_seed("update", self.settings.seed, self.update, *whose) >> 1
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def state(self) -> dict[str, Any]:
        """Return what :meth:`restore` takes, the same for any number of ranks; all call it."""
        return {
            "update": self.update,
            "forked_at": self.forked_at,
            "student": self.student.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": self.ranks.mean(self.sums),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`.

        Raises:
            ValueError, KeyError, RuntimeError: it is no state of such a run.
        """
        update = state["update"]
        if type(update) is not int or not 0 <= update <= self.total_updates:
            raise ValueError(f"update {update!r} of {self.total_updates}")
        forked_at = state.get("forked_at", 0)
        if type(forked_at) is not int or not 0 <= forked_at < self.settings.epochs:
            raise ValueError(f"forked after epoch {forked_at!r} of {self.settings.epochs}")
        self.update, self.forked_at = update, forked_at
        self.student.model.load_state_dict(state["student"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if it was saved without float16
            self.scaler.load_state_dict(state["scaler"])
        self.sums = state["sums"].to(self.device).reshape(len(PARTS))
