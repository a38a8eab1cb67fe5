"""The parts that a training recipe names: the loss, the student, and its trainer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

from cskd_pipeline.config.sections import DistillSection, TrainRecipe
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.data.cached_loader import CachedLoader
from cskd_pipeline.data.training_views import TrainingViews
from cskd_pipeline.distill.losses import DistillationLoss, inference_heads
from cskd_pipeline.distill.targets import Targets
from cskd_pipeline.models.student import Student, create_student
from cskd_pipeline.pipeline.optimizer import make_optimizer
from cskd_pipeline.pipeline.trainer import Settings, Trainer
from cskd_pipeline.runtime.device import memory_format, place, worker_count
from cskd_pipeline.runtime.distributed import ALONE, Ranks


def make_loss(distill: DistillSection) -> DistillationLoss:
    """Return the loss of a recipe."""
    return DistillationLoss(
        method=distill.method,
        global_kind=distill.global_kind,
        spatial_kind=distill.spatial_kind,
        alpha=distill.alpha,
        spatial_weight=distill.spatial_weight,
        temperature=distill.temperature,
        scaling=distill.scaling,
    )


def make_student(recipe: TrainRecipe, views: TrainingViews) -> Student:
    """Return a recipe's student with fresh weights, drawn from its seed.

    Raises:
        StudentError: no such model, or one that does not serve the method or the teacher's grid.
    """
    torch.manual_seed(recipe.run.seed)
    student = create_student(
        recipe.student.name,
        num_classes=views.num_classes,
        size=views.policy.size,
        kwargs=recipe.student.kwargs,
        drop_path=recipe.student.drop_path,
    )
    student.preprocessing = student.preprocessing.changed(
        recipe.eval.crop_pct, recipe.eval.interpolation
    )
    method = recipe.distill.method
    student.require(method=method, grid=views.grid if method == "cskd" else None)
    if "dist" not in inference_heads(method, student):
        student.leave_out_distillation_head()
    return student


def make_loader(
    recipe: TrainRecipe,
    views: TrainingViews,
    student: Student | None = None,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
) -> CachedLoader:
    """Return a recipe's loader of this rank's part of every batch.

    Args:
        student: whose mean and std the images are normalised with; None: the policy's own.

    Raises:
        CskdError: see :class:`CachedLoader`.
    """
    network = student or views.policy
    return CachedLoader(
        views,
        recipe.batch.batch_size,
        accumulation=recipe.batch.accumulation,
        mean=network.mean,
        std=network.std,
        smoothing=recipe.optim.smoothing,
        repeats=recipe.batch.repeats,
        seed=recipe.run.seed,
        shuffle_shards=recipe.batch.shuffle_shards,
        rank=ranks.rank,
        world=ranks.world,
        workers=worker_count(recipe.run.workers),
        device=device,
        memory_format=memory_format(recipe.run.channels_last),
    )


def make_trainer(
    recipe: TrainRecipe,
    views: TrainingViews,
    device: torch.device,
    ranks: Ranks = ALONE,
    targets: Callable[[Batch], Targets | None] | None = None,
) -> Trainer:
    """Return a recipe's trainer before its first update.

    Args:
        targets: the teacher's response to a batch, such as a live teacher's; None: the cache's.

    Raises:
        CskdError: student, batch and optimizer cannot be made, or the student fails in a step.
    """
    student = make_student(recipe, views)
    place(student, device, recipe.run.channels_last)
    loader = make_loader(recipe, views, student, device, ranks)
    optimizer = make_optimizer(student.model, recipe.optim, recipe.batch.batch_size, device)
    steps, schedule, distill = loader.plan.steps, recipe.schedule, recipe.distill
    settings = Settings(
        epochs=schedule.epochs,
        ckf=distill.schedule,
        by_update=distill.step == "update",
        seed=recipe.run.seed,
        amp=recipe.run.amp,
        clip_grad=recipe.optim.clip_grad,
        compile=recipe.run.compile,
    )
    lr_schedule = CosineLRScheduler(
        optimizer,
        t_initial=steps * schedule.epochs,
        lr_min=schedule.min_lr,
        warmup_t=schedule.warmup_epochs * steps,
        warmup_lr_init=schedule.warmup_lr,
        t_in_epochs=False,
    )
    ema = ModelEmaV3(student.model, decay=recipe.run.ema) if recipe.run.ema > 0 else None
    loss, targets = make_loss(distill), targets or views.targets
    return Trainer(student, loader, loss, targets, optimizer, lr_schedule, ema, settings, ranks)
