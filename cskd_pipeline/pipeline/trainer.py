"""One optimizer update of a training run, and the state that it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.data.training_views import TrainingViews
from cskd_pipeline.distill.ckf import ckf_ratio
from cskd_pipeline.distill.losses import LossParts
from cskd_pipeline.distill.targets import Targets
from cskd_pipeline.pipeline.from_recipe import make_loader, make_loss, make_optimizer, make_student
from cskd_pipeline.runtime.device import AMP, compile_for, place
from cskd_pipeline.runtime.distributed import ALONE, Ranks
from cskd_pipeline.views.bits import derive_seed

PARTS = ("loss", "base", "global", "spatial")
"""Parts of the loss, in the order of :meth:`Trainer.step`'s result and of a state's ``sums``."""


class Trainer:
    """Trainer of a recipe's student: each :meth:`step` is one optimizer update.

    ``update`` counts finished updates, out of ``total_updates``; epoch, learning rate, CKF ratio
    and the order of samples follow from it.

    Args:
        targets: returns the teacher's response to a batch on the device, for example from a live
            teacher; None: reads the cache.

    Raises:
        CskdError: student, loader or optimizer cannot be built, or the student fails a trial step.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        views: TrainingViews,
        device: torch.device,
        ranks: Ranks = ALONE,
        targets: Callable[[Batch], Targets | None] | None = None,
    ) -> None:
        run, schedule = recipe.run, recipe.schedule
        self.recipe, self.device, self.ranks = recipe, device, ranks
        self.student = place(make_student(recipe, views), device, run.channels_last)
        self.loader = make_loader(recipe, views, self.student, device, ranks)
        self.loss, self.targets = make_loss(recipe.distill), targets or views.targets
        self.optimizer = make_optimizer(
            self.student.model, recipe.optim, recipe.batch.batch_size, device
        )
        self.steps_per_epoch = self.loader.plan.steps
        self.total_updates = self.steps_per_epoch * schedule.epochs
        self.lr_schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=self.total_updates,
            lr_min=schedule.min_lr,
            warmup_t=schedule.warmup_epochs * self.steps_per_epoch,
            warmup_lr_init=schedule.warmup_lr,
            t_in_epochs=False,
        )
        self.ema = ModelEmaV3(self.student.model, decay=run.ema) if run.ema > 0 else None
        self.amp = AMP[run.amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.amp == "fp16")
        self.grid = views.grid if self.loss.method == "cskd" else None
        self._try_out()
        self.parallel: DistributedDataParallel | None = None
        if ranks.many:  # averages gradients: equal parts of a batch act as the full batch
            device_ids = [device.index] if device.type == "cuda" else None
            ranks.wait()  # some may have had more data to read
            with ranks.translate_errors():
                self.parallel = DistributedDataParallel(self.student, device_ids=device_ids)
        network = self.parallel or self.student
        self.forward: Any = compile_for(network, device) if run.compile else network
        self.update = 0
        self.forked_at = 0  # epoch of the state that the run was forked from
        self.sums = torch.zeros(len(PARTS), device=device)  # over this epoch's updates so far

    @property
    def epoch(self) -> int:
        """Return the epoch, from 0, of the next update."""
        return self.update // self.steps_per_epoch

    @property
    def progress(self) -> float:
        """Return t, in [0, 1]: epoch / epochs, like the authors, or update / updates.

        In a fork both count from the fork.
        """
        forked, steps = self.forked_at, self.steps_per_epoch
        if self.recipe.distill.step == "update":
            return (self.update - forked * steps) / (self.total_updates - forked * steps)
        return (self.epoch - forked) / (self.recipe.schedule.epochs - forked)

    @property
    def ratio(self) -> float:
        """Return the CKF ratio r of the next update."""
        return ckf_ratio(self.recipe.distill.schedule, self.progress)

    @property
    def lr(self) -> float:
        """Return the learning rate of the last update."""
        return self.optimizer.param_groups[0]["lr"]

    def micro_batches(self) -> Iterator[Batch]:
        """Yield the micro-batches of all remaining updates, until another rank fails."""
        accumulation = self.loader.accumulation
        self.loader.start_at(self.epoch, self.update % self.steps_per_epoch * accumulation)
        left = (self.total_updates - self.update) * accumulation
        return self.ranks.checking(self.loader.batches(left))

    def parts(self, batch: Batch) -> LossParts:
        """Return the loss of one micro-batch on the device."""
        images, labels = self.loader.inputs(batch)
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            heads = self.forward(images, self.grid)
        targets = self.targets(batch)
        return self.loss(heads, labels, targets, self.ratio, self.progress)

    def step(self, batches: Iterator[Batch]) -> Tensor:
        """Run one optimizer update on the next ``accumulation`` micro-batches.

        Returns:
            (4,) the loss and its parts over this rank's samples, on the device; the host does not
            wait for them.

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
        if (limit := self.recipe.optim.clip_grad) > 0:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.student.model)
        self.update += 1
        self.sums += sums
        return sums

    def _try_out(self) -> None:
        """Refuse a student that would fail in its first step, before any work is done."""
        loader, policy = self.loader, self.loader.views.policy
        count = min(2, loader.batch_size // (loader.accumulation * loader.world))
        images = torch.zeros(count, 3, policy.size, policy.size, device=self.device)
        images = images.contiguous(memory_format=loader.memory_format)
        self.student.try_out(images, loader.views.num_classes, self.grid, self.amp)

    @contextmanager
    def _exchanging_gradients(self, last: bool) -> Iterator[None]:
        """Exchange gradients among ranks once per update, in the last micro-batch's backward."""
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
                    with self.ranks.translate_errors():
                        raise
                raise

    def _seed_update(self) -> None:
        """Seed dropout and stochastic depth from (seed, update, rank) alone.

        ``torch.manual_seed`` would do, but formats a stack trace whenever CUDA is not in use.
        """
        rank = (self.ranks.rank,) if self.ranks.rank else ()
        seed = derive_seed("update", self.recipe.run.seed, self.update, *rank) >> 1
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def state(self) -> dict[str, Any]:
        """Return the state for :meth:`restore`: the same for any number of ranks; all call this."""
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
            ValueError, KeyError, RuntimeError: the state does not fit this run.
        """
        update = state["update"]
        if type(update) is not int or not 0 <= update <= self.total_updates:
            raise ValueError(f"update {update!r} of {self.total_updates}")
        forked_at = state.get("forked_at", 0)
        if type(forked_at) is not int or not 0 <= forked_at < self.recipe.schedule.epochs:
            raise ValueError(f"forked after epoch {forked_at!r} of {self.recipe.schedule.epochs}")
        self.update, self.forked_at = update, forked_at
        self.student.model.load_state_dict(state["student"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if it was saved without float16
            self.scaler.load_state_dict(state["scaler"])
        self.sums = state["sums"].to(self.device).reshape(len(PARTS))
