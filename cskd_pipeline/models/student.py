"""The student: a timm ViT with class, distillation and dense logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from timm.data.config import resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from cskd_pipeline.config.sections import HUB_PREFIXES
from cskd_pipeline.errors import StudentError
from cskd_pipeline.models.timm_models import create_timm

Grid = tuple[int, int]


class Heads(NamedTuple):
    """A student's logits; (h, w) is the teacher's grid.

    Attributes:
        cls: (B, K), class head.
        dist: (B, K), distillation head; None: no distillation token.
        dense: (B, K, h, w), one distribution per location; None: no grid was given.
    """

    cls: Tensor
    dist: Tensor | None = None
    dense: Tensor | None = None

    def float(self) -> Heads:
        """Return the logits in float32."""
        dist, dense = (None if x is None else x.float() for x in (self.dist, self.dense))
        return Heads(self.cls.float(), dist, dense)

    def logits(self) -> dict[str, Tensor]:
        """Return (B, K) logits per existing head; ``dense`` is averaged over the grid."""
        dense = None if self.dense is None else self.dense.mean(dim=(2, 3))
        heads = {"cls": self.cls, "dist": self.dist, "dense": dense}
        return {name: logits for name, logits in heads.items() if logits is not None}


def inference_logits(heads: Heads, names: Sequence[str]) -> Tensor:
    """Return the prediction, (B, K): the mean of the named heads' logits (arXiv 2307.08500).

    Args:
        names: the trained heads: ``cls``, ``dist``, ``dense``.
    """
    logits = heads.logits()
    return torch.stack([logits[name] for name in names]).mean(dim=0)


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
MIN_CROP_PCT = 0.1
"""Lower limit of ``crop_pct``: images are resized to at most ten times the crop."""


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of evaluation images: resize, then crop the central ``size`` pixels.

    ``crop_pct`` is ``size`` as a fraction of the resized image's shorter side.
    """

    size: int
    crop_pct: float
    interpolation: str

    @property
    def resized(self) -> int:
        """Return the shorter side of the resized image in pixels, as timm rounds it."""
        return int(self.size / self.crop_pct)

    def override(self, crop_pct: float | None, interpolation: str | None) -> Preprocessing:
        """Return a copy with another crop and filter; 0, ``auto`` and None keep the current."""
        if interpolation in (None, "auto"):
            interpolation = self.interpolation
        return replace(self, crop_pct=crop_pct or self.crop_pct, interpolation=interpolation)


class Student(nn.Module):
    """A timm model as ``self.model``, whose state dict is saved in timm's own names.

    Plain ViTs (with or without distillation token, token or average pooling) support every method;
    any other timm classifier supports the method ``none``. Images are normalised with ``mean`` and
    ``std``, in [0, 1] units.
    """

    def __init__(
        self, model: nn.Module, name: str, size: int, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.kwargs = dict(kwargs or {})
        data = resolve_data_config({}, model=model)
        self.mean, self.std = tuple(data["mean"]), tuple(data["std"])
        self.preprocessing = Preprocessing(size, data["crop_pct"], data["interpolation"])
        self.token_grid = _token_grid(model)
        self.has_distillation_token = _has_distillation_token(model)

    def with_model(self, model: nn.Module) -> Student:
        """Return this student with another copy of the network, such as a moving average."""
        student = Student(model, self.name, self.preprocessing.size, self.kwargs)
        student.preprocessing = self.preprocessing
        return student

    def freeze_distillation_head(self) -> None:
        """Set the distillation head to zero and freeze it, for a method that does not train it.

        timm's forward averages both heads, so with zeros its ranking is that of the class head.
        """
        if self.has_distillation_token:
            model: Any = self.model
            for parameter in model.head_dist.parameters():
                parameter.requires_grad_(False).zero_()

    def require(self, *, method: str, grid: Grid | None) -> None:
        """Refuse a method or a teacher grid (rows, columns) that this student does not support.

        Both need a plain ViT, the grid also at least as many tokens as locations along each side.
        """
        if method != "none" or grid is not None:
            _require_tokens(self.model, grid, self.name)

    def try_out(
        self, images: Tensor, num_classes: int, grid: Grid | None, amp: torch.dtype | None = None
    ) -> None:
        """Refuse a model that fails in a training step; weights and random state are unchanged.

        Args:
            images: (B, 3, size, size), any values, in the run's memory format, on the student's
                device. Two are enough; a run with micro-batches of one image passes one.
            grid: as in :meth:`forward`.
            amp: autocast dtype; None: off.

        Raises:
            StudentError: the step failed, with the model's message.
        """
        buffers = {name: value.clone() for name, value in self.named_buffers()}
        cuda = [images.device] if images.device.type == "cuda" else []
        training = self.training
        try:
            with torch.random.fork_rng(devices=cuda):
                with torch.autocast(images.device.type, amp, enabled=amp is not None):
                    heads = self.train()(images, grid)
                logits = heads.float().logits()
                shapes = {name: tuple(values.shape) for name, values in logits.items()}
                if set(shapes.values()) != {(len(images), num_classes)}:
                    raise ValueError(f"logits {shapes}, expected {(len(images), num_classes)}")
                torch.stack(list(logits.values())).sum().backward()
        except StudentError:
            raise
        except Exception as error:  # a model can raise anything
            hint = "; batch normalisation needs more than one image in every micro-batch"
            raise StudentError(
                "the student fails in its first training step",
                where=self.name,
                found=f"{type(error).__name__}: {error}",
                expected=f"a classifier that trains on images of {tuple(images.shape[1:])}",
                action="choose another student, student.kwargs or views.size"
                + (hint if len(images) == 1 else ""),
            ) from error
        finally:
            self.train(training)
            self.zero_grad(set_to_none=True)
            with torch.no_grad():
                for name, value in self.named_buffers():
                    value.copy_(buffers[name])

    def forward(self, x: Tensor, grid: Grid | None = None) -> Heads:
        """Return :func:`dense_logits` of normalised images (B, 3, size, size), or the class logits
        alone if the model is not a plain ViT.
        """
        if self.token_grid is None and grid is None:
            return Heads(self.model(x))
        return dense_logits(self.model, x, grid)


def dense_logits(model: nn.Module, images: Tensor, grid: Grid | None = None) -> Heads:
    """Return the class, distillation and dense logits of a timm ViT.

    Dense logits are the output of the distillation head (or, without one, the class head) on the
    patch tokens, averaged within each location of the teacher's grid (arXiv 2307.08500). The head
    is linear, so the tokens are pooled first: a quarter of the work from 14x14 to 7x7.

    Args:
        model: with or without distillation token, with token or average pooling.
        images: (B, 3, S, S) normalised.
        grid: the teacher's (rows, columns); None: no dense logits. If only their mean is needed,
            (1, 1) is the cheapest grid.

    Raises:
        StudentError: the model is not a plain ViT, or has fewer tokens than the grid has locations.
    """
    vit: Any = model
    name = type(model).__name__
    token_grid = _require_tokens(model, grid, name)
    tokens = vit.forward_features(images)  # (B, prefix + H * W, C), after the final norm
    if _has_distillation_token(model):
        head = vit.head_dist
        cls, dist = vit.head(vit.head_drop(tokens[:, 0])), head(vit.head_drop(tokens[:, 1]))
    else:
        head = vit.head
        cls, dist = vit.forward_head(tokens), None
    if grid is None:
        return Heads(cls, dist)
    patches = tokens[:, vit.num_prefix_tokens :]
    if patches.shape[1] != token_grid[0] * token_grid[1]:
        raise StudentError(
            "the student does not keep a token for every patch",
            where=name,
            found=f"{patches.shape[1]} patch tokens",
            expected="{}x{}, one for every patch".format(*token_grid),
            action="remove patch_drop_rate from student.kwargs, or choose method deit or none",
        )
    pooled = vit.head_drop(pool_tokens(vit.fc_norm(patches), token_grid, grid))
    return Heads(cls, dist, head(pooled).permute(0, 3, 1, 2))


def _token_grid(model: nn.Module) -> Grid | None:
    """Return (rows, columns) of a plain ViT's patch tokens; None for other models."""
    if not isinstance(model, VisionTransformer) or model.global_pool not in ("token", "avg"):
        return None
    patch_embed: Any = model.patch_embed
    return tuple(patch_embed.grid_size)


def _has_distillation_token(model: nn.Module) -> bool:
    return _token_grid(model) is not None and hasattr(model, "head_dist")


def _require_tokens(model: nn.Module, grid: Grid | None, name: str) -> Grid:
    token_grid = _token_grid(model)
    if token_grid is None:
        raise StudentError(
            "this student has no patch tokens to distill to",
            where=name,
            found=type(model).__name__,
            expected="a plain ViT with token or average pooling, such as "
            "deit_tiny_distilled_patch16_224",
            action="choose such a student, or method none",
        )
    if grid is not None and any(t < g for t, g in zip(token_grid, grid, strict=True)):
        raise StudentError(
            "the student's grid is coarser than the teacher's",
            where=name,
            found="{}x{} tokens".format(*token_grid),
            expected="at least {}x{}".format(*grid),
            action="choose a student with smaller patches, or a teacher with a larger stride",
        )
    return token_grid


def pool_tokens(tokens: Tensor, token_grid: Grid, grid: Grid) -> Tensor:
    """Return the mean of each location's tokens: (B, H * W, C) -> (B, h, w, C).

    Blocks are equal if (h, w) divides (H, W), else those of adaptive pooling, which overlap.
    """
    (rows, columns), (height, width) = token_grid, grid
    tokens = tokens.unflatten(1, (rows, columns))
    if rows % height == 0 and columns % width == 0:
        blocks = tokens.unflatten(2, (width, -1)).unflatten(1, (height, -1))
        return blocks.mean(dim=(2, 4))
    return adaptive_avg_pool2d(tokens.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)


def create_student(
    name: str,
    *,
    num_classes: int,
    size: int,
    kwargs: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
) -> Student:
    """Return a student with timm's random initial weights, from torch's global generator.

    Args:
        name: a timm name.
        size: side of the views in pixels.
        kwargs: arguments of the model's constructor (``patch_size``, ``embed_dim``, ...).
        drop_path: stochastic depth rate; the paper's recipe has none.

    Raises:
        StudentError: no such model, or arguments that it does not accept.
    """
    if name.startswith(HUB_PREFIXES):
        raise StudentError(
            "a student cannot be loaded from a hub",
            where=name,
            expected="a name in timm itself: students start from random weights, and no hub is "
            "contacted on behalf of a student's file",
            action="give the architecture's name, and its arguments in student.kwargs",
        )
    arguments = dict(kwargs or {})
    if drop_path > 0.0:
        arguments["drop_path_rate"] = drop_path
    model = create_timm(
        name, num_classes=num_classes, size=size, kwargs=arguments, error=StudentError
    )
    return Student(model, name, size, kwargs)
