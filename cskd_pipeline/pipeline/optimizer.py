"""Optimizers by name, of those in timm's registry, where a program may add its own."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn

from cskd_pipeline.config.sections import OptimSection
from cskd_pipeline.errors import RecipeError

LOOKAHEAD = "lookahead_"
"""In front of a name: timm's average of slow weights around that optimizer."""
FUSED = ("adam", "adamw")
FUSED_ON = ("cuda",)
"""One kernel for all parameters, which also skips float16's overflows without asking the host."""


def make_optimizer(
    model: nn.Module, optim: OptimSection, batch_size: int, device: torch.device
) -> torch.optim.Optimizer:
    """Return an optimizer over the parameters of ``model``, which lies on ``device``.

    Args:
        batch_size: of an update, by which the learning rate is scaled.

    Raises:
        RecipeError: an unknown name, one that needs more than gradients, or values it does not
            take.
    """
    name = optim.name.lower().removeprefix(LOOKAHEAD)
    known = [str(one) for one in list_optimizers()]
    if name in known and "_" in name:
        raise RecipeError(
            "timm cannot make an optimizer whose name has an underscore",
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
            expected=f"one that timm {timm.__version__} has, "
            + (f"did you mean {' or '.join(near)}?" if near else "such as adamw, lamb or sgd"),
        )
    if get_optimizer_info(name).second_order:
        raise RecipeError(
            "this optimizer needs second derivatives, which training does not compute",
            where="optim.name",
            found=optim.name,
            action="choose one that needs gradients alone, such as adamw",
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
    except Exception as problem:  # each checks its values in its own way, or needs a package
        usual = _usual_betas(name)
        raise RecipeError(
            "the optimizer cannot be made with these values",
            where=f"optim.name = {optim.name}",
            found=f"betas {list(optim.betas)}: {type(problem).__name__}: {problem}",
            expected=None if usual is None else f"{len(usual)} betas, its own are {list(usual)}",
            action="set optim.betas, or choose another optimizer",
        ) from problem


def _usual_betas(name: str) -> tuple[float, ...] | None:
    """The betas that an optimizer has where none are given."""
    info = get_optimizer_info(name)
    kind = info.opt_class
    if not info.has_betas or isinstance(kind, str):
        return None
    betas = inspect.signature(kind).parameters["betas"].default
    return tuple(betas) if isinstance(betas, tuple | list) else None
