"""What a recipe and its data make of a student, and the state that updates change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cskd_pipeline.cache.manifest import utc_now
from cskd_pipeline.config import TrainRecipe, deciding, result_digest
from cskd_pipeline.data.assemble import assemble, normalise
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.distill.ckf import ckf_ratio
from cskd_pipeline.distill.losses import DistillationLoss, LossParts, inference_heads, mixed_targets
from cskd_pipeline.errors import WeightsError
from cskd_pipeline.models.header import StudentCard
from cskd_pipeline.models.student import create_student
from cskd_pipeline.models.train_state import FORMAT
from cskd_pipeline.pipeline.finetune import Started, read_source, start_from
from cskd_pipeline.pipeline.optimizer import make_optimizer
from cskd_pipeline.pipeline.resuming import (
    Change,
    changed_keys,
    require_same_data,
    require_within,
    told,
)
from cskd_pipeline.pipeline.training_data import TrainingData
from cskd_pipeline.runtime.classes import Classes
from cskd_pipeline.runtime.device import AMP, compiled, memory_format, place
from cskd_pipeline.runtime.distributed import ALONE, Ranks
from cskd_pipeline.views.bits import derive_seed

PARTS = ("loss", "base", "global", "spatial")


class Run:
    """A training run: what its recipe makes of it, and the state that updates change.

    ``update`` counts finished optimizer updates; all other position (epoch, step, learning rate,
    CKF ratio, sample order) follows from it.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        data: TrainingData,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe = recipe
        self.data = data
        self.device = device
        self.ranks = ranks
        self.amp = AMP[recipe.run.amp]
        self.steps = data.steps_per_epoch
        self.updates = self.steps * recipe.schedule.epochs
        self.grid = data.grid if recipe.distill.method == "cskd" else None
        self.loss = DistillationLoss(
            method=recipe.distill.method,
            global_kind=recipe.distill.global_kind,
            spatial_kind=recipe.distill.spatial_kind,
            alpha=recipe.distill.alpha,
            spatial_weight=recipe.distill.spatial_weight,
            temperature=recipe.distill.temperature,
            scaling=recipe.distill.scaling,
        )
        torch.manual_seed(recipe.run.seed)
        self.student = create_student(
            recipe.student.name,
            num_classes=data.num_classes,
            size=data.policy.size,
            kwargs=recipe.student.kwargs,
            drop_path=recipe.student.drop_path,
        )
        self.student.preprocessing = self.student.preprocessing.changed(
            recipe.eval.crop_pct, recipe.eval.interpolation
        )
        self.student.require(method=recipe.distill.method, grid=self.grid)
        self.heads = inference_heads(recipe.distill.method, self.student)
        if "dist" not in self.heads:
            self.student.leave_out_distillation_head()
        self.format = memory_format(recipe.run.channels_last)
        place(self.student, device, recipe.run.channels_last)
        least = min(2, recipe.batch.batch_size // (recipe.batch.accumulation * ranks.world))
        few = torch.zeros(least, 3, data.policy.size, data.policy.size, device=device)
        few = few.contiguous(memory_format=self.format)
        self.student.try_out(few, data.num_classes, self.grid, self.amp)
        self.parallel: DistributedDataParallel | None = None
        if ranks.many:  # averages gradients, so that equal parts of a batch act as the whole
            own = [device.index] if device.type == "cuda" else None
            ranks.wait()  # some may have had more to read
            with ranks.explained():
                self.parallel = DistributedDataParallel(self.student, device_ids=own)
        network = self.parallel or self.student
        self.forward: Any = compiled(network, device) if recipe.run.compile else network
        self.optimizer = make_optimizer(self.student.model, recipe, device)
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=self.updates,
            lr_min=recipe.schedule.min_lr,
            warmup_t=recipe.schedule.warmup_epochs * self.steps,
            warmup_lr_init=recipe.schedule.warmup_lr,
            t_in_epochs=False,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.run.amp == "fp16")
        self.ema = (
            ModelEmaV3(self.student.model, decay=recipe.run.ema) if recipe.run.ema > 0 else None
        )
        self.update = 0
        self.sums = torch.zeros(len(PARTS), device=device)  # of this epoch's updates so far
        self.rows: list[dict[str, float | int | None]] = []
        self.pending: dict[str, float | int | None] | None = None  # row of an epoch to be evaluated
        self.best: dict[str, Any] = {}
        self.changes: list[Change] = []  # of the recipe, where the run was resumed with another
        self.init: dict[str, str] | None = None  # weights the run started from: from and sha256

    def start_from(self, path: str) -> Started:
        """Begin with the weights at ``path`` instead of fresh ones.

        Raises:
            WeightsError: they do not fit, or are others on another rank.
            ClassesError: they are of the same classes, numbered or spelled otherwise.
        """
        started = start_from(
            read_source(Path(path)), self.student, self.data.classes, self.data.guard
        )
        if len(set(self.ranks.gather(started.sha256))) > 1:
            raise WeightsError("the ranks found different weights to start from", where=path)
        if self.ema is not None:
            self.ema.module.load_state_dict(self.student.model.state_dict())
        self.init = {"from": path, "sha256": started.sha256}
        return started

    # -- position ------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        return self.update // self.steps

    def ratio(self) -> float:
        """r of this update (DESIGN: t = epoch/epochs as the authors step it, or update/updates)."""
        distill = self.recipe.distill
        by_epoch = self.epoch / self.recipe.schedule.epochs
        t = by_epoch if distill.step == "epoch" else self.update / self.updates
        return ckf_ratio(distill.schedule, t)

    def positions(self) -> Iterator[tuple[int, int, int]]:
        """(epoch, step, micro-batch) of everything that is left."""
        for update in range(self.update, self.updates):
            for micro in range(self.recipe.batch.accumulation):
                yield update // self.steps, update % self.steps, micro

    # -- one update ----------------------------------------------------------------------------

    def parts(self, batch: Batch, ratio: float) -> LossParts:
        """The loss of one micro-batch that lies on the device."""
        labels = mixed_targets(
            batch.label,
            batch.partner_label,
            batch.lam,
            self.data.num_classes,
            self.recipe.optim.smoothing,
        )
        images = normalise(assemble(batch, self.data.policy), self.student.mean, self.student.std)
        images = images.contiguous(memory_format=self.format)
        autocast = torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()
        with autocast:
            heads = self.forward(images, self.grid)
        return self.loss(heads.float(), labels, self.data.targets(batch), ratio)

    def step(self, micro_batches: Iterator[Batch]) -> Tensor:
        """One optimizer update over the next ``accumulation`` micro-batches.

        Returns:
            (4,) the loss and its parts over this rank's samples, on the device: nothing here waits
            for it.

        Raises:
            RankError: another rank has ended.
        """
        self._seed_update()
        self.schedule.step_update(self.update)
        ratio = self.ratio()
        accumulation = self.recipe.batch.accumulation
        self.student.train()
        sums = torch.zeros(len(PARTS), device=self.device)
        for micro in range(accumulation):
            batch = next(micro_batches).to(self.device)
            with self._exchanging_gradients(micro + 1 == accumulation):
                parts = self.parts(batch, ratio)
                self.scaler.scale(parts.total / accumulation).backward()
            sums += parts.detached() / accumulation
        if self.recipe.optim.clip_grad > 0:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.optim.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.student.model)
        self.update += 1
        self.sums += sums
        return sums

    @contextmanager
    def _exchanging_gradients(self, last: bool) -> Iterator[None]:
        """Ranks exchange gradients once an update, with the last micro-batch's backward pass."""
        if self.parallel is None:
            yield
            return
        with nullcontext() if last else self.parallel.no_sync():
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
        seed = derive_seed("update", self.recipe.run.seed, self.update, *whose) >> 1
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    # -- state ---------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs, the same whatever the number of ranks; all ranks ask."""
        return {
            "format": FORMAT,
            "recipe": deciding(self.recipe),
            "changes": self.changes,
            "data": self.data.identity,
            "init": self.init,
            "class_names": self.data.class_names,
            "accepted_classes": list(self.data.guard.accepted),
            "update": self.update,
            "student": self.student.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": self.ranks.mean(self.sums),
            "pending": self.pending,
            "rows": self.rows,
            "best": self.best,
        }

    def restore(self, state: dict[str, Any], where: Path) -> None:
        """Go on from :meth:`state`; what its recipe has changed since is added to ``changes``.

        Raises:
            OutputError: the state is of another recipe or of other data, or past this recipe's end.
            ClassesError: the data's classes had other names, or another order.
            WeightsError: its values are not those of a run.
        """
        try:
            changed = changed_keys(state["recipe"], self.recipe, where)
            require_same_data(state["data"], self.data.identity, where)
            require_within(state["update"], self.steps, self.recipe.schedule.epochs, where)
            self._take(state)
            if changed:
                self.changes.append({"time": utc_now(), "update": self.update, "changed": changed})
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise WeightsError(
                "the training state does not fit the run",
                where=where,
                found=f"{type(error).__name__}: {error}".splitlines()[0],
                action="start again in a new output folder; the students beside it are still good",
            ) from error

    def _take(self, state: dict[str, Any]) -> None:
        update, rows, best = state["update"], state["rows"], state["best"]
        init, pending, changes = state["init"], state["pending"], state["changes"]
        accepted = state["accepted_classes"]
        names = [*(state["class_names"] or ()), *accepted]
        if type(update) is not int or not 0 <= update <= self.updates:
            raise ValueError(f"update {update!r} of {self.updates}")
        if not all(isinstance(row, dict) for row in [*rows, best, pending or {}, *changes]):
            raise ValueError("rows that are none")
        if not all(type(name) is str for name in names):
            raise ValueError("class names that are no text")
        if init is not None and [type(init[name]) for name in ("from", "sha256")] != [str, str]:
            raise ValueError("a start that is none")
        count = self.data.num_classes
        of = Classes("the run to resume", self.recipe.run.out, count, state["class_names"])
        self.data.guard.compare(self.data.classes, of)
        for line in accepted:
            self.data.guard.note(line)
        told(changes)  # as whoever made them would
        self.update = update
        self.student.model.load_state_dict(state["student"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty without float16, as one may go on
            self.scaler.load_state_dict(state["scaler"])
        self.sums = state["sums"].to(self.device).reshape(len(PARTS))
        self.rows, self.best, self.init = rows, best, init
        self.pending, self.changes = pending, list(changes)

    def card(self, weights: str, top1: float | None) -> StudentCard:
        cache = self.data.cache
        manifest = None if cache is None else cache.manifest
        return StudentCard(
            model=self.recipe.student.name,
            num_classes=self.data.num_classes,
            size=self.data.policy.size,
            heads=self.heads,
            method=self.recipe.distill.method,
            kwargs=dict(self.recipe.student.kwargs),
            grid=self.grid,
            crop_pct=self.student.preprocessing.crop_pct,
            interpolation=self.student.preprocessing.interpolation,
            weights=weights,
            epoch=self.epoch,
            top1=top1,
            class_names=self.data.class_names,
            accepted_classes=tuple(self.data.guard.accepted),
            dataset=self.data.name,
            teacher=None if manifest is None else manifest.teacher.name,
            recipe_sha256=result_digest(self.recipe),
            cache_sha256=self.data.cache_digest,
            init_sha256=None if self.init is None else self.init["sha256"],
            recipe_changes=tuple(told(self.changes)),
        )
