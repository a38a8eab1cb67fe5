"""Build what a training recipe describes: the loss, the student, its loader and its optimizer."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn

from cskd_pipeline.config.sections import DistillSection, OptimSection, TrainRecipe
from cskd_pipeline.data.cached_loader import CachedLoader
from cskd_pipeline.data.training_views import TrainingViews
from cskd_pipeline.distill.losses import DistillationLoss, inference_heads
from cskd_pipeline.errors import RecipeError
from cskd_pipeline.models.student import Student, create_student
from cskd_pipeline.runtime.device import memory_format, worker_count
from cskd_pipeline.runtime.distributed import ALONE, Ranks

LOOKAHEAD = "lookahead_"
"""timm's prefix for an optimizer wrapped in Lookahead."""
FUSED = ("adam", "adamw")
FUSED_ON = ("cuda",)
"""One kernel for all parameters, which skips float16 overflows without a host synchronization."""


def make_loss(distill: DistillSection) -> DistillationLoss:
    """Return the recipe's loss."""
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
    """Return the recipe's student with random weights from its seed; refuse a student that does
    not support the method or the teacher's grid.
    """
    torch.manual_seed(recipe.run.seed)
    student = create_student(
        recipe.student.name,
        num_classes=views.num_classes,
        size=views.policy.size,
        kwargs=recipe.student.kwargs,
        drop_path=recipe.student.drop_path,
    )
    student.preprocessing = student.preprocessing.override(
        recipe.eval.crop_pct, recipe.eval.interpolation
    )
    method = recipe.distill.method
    student.require(method=method, grid=views.grid if method == "cskd" else None)
    if "dist" not in inference_heads(method, student):
        student.freeze_distillation_head()
    return student


def make_loader(
    recipe: TrainRecipe,
    views: TrainingViews,
    student: Student | None = None,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
) -> CachedLoader:
    """Return the recipe's loader, for this rank's part of every batch.

    Args:
        student: its mean and std normalise the images; None: those of the view policy.
    """
    normalisation = student or views.policy
    return CachedLoader(
        views,
        recipe.batch.batch_size,
        accumulation=recipe.batch.accumulation,
        mean=normalisation.mean,
        std=normalisation.std,
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


def make_optimizer(
    model: nn.Module, optim: OptimSection, batch_size: int, device: torch.device
) -> torch.optim.Optimizer:
    """Return an optimizer over the parameters of ``model``, which is on ``device``.

    Args:
        batch_size: images per update; the learning rate is scaled by it.
    """
    name = optim.name.lower().removeprefix(LOOKAHEAD)
    known = [str(one) for one in list_optimizers()]
    if name in known and "_" in name:
        raise RecipeError(
            "timm does not support underscores in an optimizer's name",
            where="optim.name",
            found=optim.name,
            expected="a registered name without underscore, alone or after lookahead_",
            action=f"register it as {name.replace('_', '')}",
        )
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        raise RecipeError(
            "timm has no optimizer of this name",
            where="optim.name",
            found=optim.name,
            expected=f"an optimizer of timm {timm.__version__}, "
            + (f"did you mean {' or '.join(near)}?" if near else "such as adamw, lamb or sgd"),
        )
    if get_optimizer_info(name).second_order:
        raise RecipeError(
            "this optimizer needs second derivatives, which training does not compute",
            where="optim.name",
            found=optim.name,
            action="choose a first-order one, such as adamw",
        )
    fused = optim.name in FUSED and device.type in FUSED_ON
    options: dict[str, Any] = {"fused": True} if fused else {}
    try:
        return create_optimizer_v2(
            model,
            opt=optim.name,
            lr=optim.lr * batch_size / 1024,
            weight_decay=optim.weight_decay,
            betas=tuple(optim.betas),
            **options,
        )
    except Exception as problem:  # optimizers reject values in different ways, or need a package
        default = _default_betas(name)
        raise RecipeError(
            "the optimizer does not accept these values",
            where=f"optim.name = {optim.name}",
            found=f"betas {list(optim.betas)}: {type(problem).__name__}: {problem}",
            expected=None if default is None else f"{len(default)} betas, by default {[*default]}",
            action="set optim.betas, or choose another optimizer",
        ) from problem


def _default_betas(name: str) -> tuple[float, ...] | None:
    """Return the default betas of an optimizer; None if it has none."""
    info = get_optimizer_info(name)
    kind = info.opt_class
    if not info.has_betas or isinstance(kind, str):
        return None
    betas = inspect.signature(kind).parameters["betas"].default
    return tuple(betas) if isinstance(betas, tuple | list) else None
