"""The student: a timm ViT with class, distillation and dense predictions."""

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
    """Hold a student's logits; (h, w) is the teacher's grid.

    Attributes:
        cls: (B, K), of the class head.
        dist: (B, K), of the distillation head; None: no distillation token.
        dense: (B, K, h, w), of every location; None: no grid was given.
    """

    cls: Tensor
    dist: Tensor | None = None
    dense: Tensor | None = None

    def float(self) -> Heads:
        """Return the same in float32."""
        dist, dense = (None if x is None else x.float() for x in (self.dist, self.dense))
        return Heads(self.cls.float(), dist, dense)

    def logits(self) -> dict[str, Tensor]:
        """Return one (B, K) per head that is there; ``dense`` by its mean over the grid."""
        dense = None if self.dense is None else self.dense.mean(dim=(2, 3))
        heads = {"cls": self.cls, "dist": self.dist, "dense": dense}
        return {name: logits for name, logits in heads.items() if logits is not None}


def inference_logits(heads: Heads, names: Sequence[str]) -> Tensor:
    """Return the mean of the named heads' logits, (B, K): the prediction (arXiv 2307.08500).

    Args:
        names: the heads that were trained, of ``heads.logits()``: ``cls``, ``dist``, ``dense``.
    """
    logits = heads.logits()
    return torch.stack([logits[name] for name in names]).mean(dim=0)


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
LEAST_CROP_PCT = 0.1
"""Images are resized to at most ten times the size of the crop."""


@dataclass(frozen=True)
class Preprocessing:
    """Say how evaluation images are prepared: resized, then the central ``size`` pixels.

    ``crop_pct`` is ``size`` in units of the resized image's shorter side.
    """

    size: int
    crop_pct: float
    interpolation: str

    @property
    def resized(self) -> int:
        """Return the shorter side of the resized image in pixels, as timm rounds it."""
        return int(self.size / self.crop_pct)

    def changed(self, crop_pct: float | None, interpolation: str | None) -> Preprocessing:
        """Return the same with another crop and filter; 0, ``auto`` and None keep its own."""
        given = interpolation if interpolation != "auto" else None
        return replace(
            self, crop_pct=crop_pct or self.crop_pct, interpolation=given or self.interpolation
        )


class Student(nn.Module):
    """Wrap a timm model as ``self.model``, whose state dict is what gets saved: timm loads it.

    Plain ViTs (with or without distillation token, token or average pooling) serve every method;
    any other timm classifier serves method ``none``. Images are normalised with ``mean`` and
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
        """Return the same student around another copy of the network, such as a moving average."""
        student = Student(model, self.name, self.preprocessing.size, self.kwargs)
        student.preprocessing = self.preprocessing
        return student

    def leave_out_distillation_head(self) -> None:
        """Set the distillation head to zero and freeze it, for a method that does not train it.

        timm's own forward averages both heads: with zeros it ranks classes as the class head does.
        """
        if self.has_distillation_token:
            model: Any = self.model
            for parameter in model.head_dist.parameters():
                parameter.requires_grad_(False).zero_()

    def require(self, *, method: str, grid: Grid | None) -> None:
        """Refuse a method or a teacher grid (rows, columns) that this student cannot serve: as no
        plain ViT, or with fewer tokens than the teacher has locations along a side.
        """
        if method != "none" or grid is not None:
            _require_tokens(self.model, grid, self.name)

    def try_out(
        self, images: Tensor, num_classes: int, grid: Grid | None, amp: torch.dtype | None = None
    ) -> None:
        """Refuse a model that fails in a training step; weights and random state stay as they are.

        Args:
            images: (B, 3, size, size) in the run's memory format, on the student's device; any
                values. Few are enough, but as few as the run's own where those are fewer than two.
            grid: as in :meth:`forward`.
            amp: dtype of autocast; None: off.

        Raises:
            StudentError: with the model's own words.
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
        except Exception as problem:  # models are free to fail in any way
            few = "; batch normalisation needs more than one image in every micro-batch"
            raise StudentError(
                "the student fails in its first training step",
                where=self.name,
                found=f"{type(problem).__name__}: {problem}",
                expected=f"a classifier that trains on images of {tuple(images.shape[1:])}",
                action="choose another student, student.kwargs or views.size"
                + (few if len(images) == 1 else ""),
            ) from problem
        finally:
            self.train(training)
            self.zero_grad(set_to_none=True)
            with torch.no_grad():
                for name, value in self.named_buffers():
                    value.copy_(buffers[name])

    def forward(self, x: Tensor, grid: Grid | None = None) -> Heads:
        """Return :func:`dense_logits` of normalised images (B, 3, size, size); of a timm classifier
        that is no plain ViT the class logits alone.
        """
        if self.token_grid is None and grid is None:
            return Heads(self.model(x))
        return dense_logits(self.model, x, grid)


def dense_logits(model: nn.Module, images: Tensor, grid: Grid | None = None) -> Heads:
    """Return the class, distillation and dense logits of a timm ViT, as CSKD trains them.

    Dense logits are the distillation head (without one, the class head) on the patch tokens,
    averaged over the tokens that fall on each location of the teacher's grid (arXiv 2307.08500).
    The head is linear, so the tokens are pooled first: a quarter of the work at 14x14 to 7x7.

    Args:
        model: with or without distillation token, with token or average pooling.
        images: (B, 3, S, S) normalised.
        grid: the teacher's (rows, columns); None: no dense logits. For their mean alone, (1, 1) is
            the cheapest and gives the same.

    Raises:
        StudentError: the model is no plain ViT, or has fewer tokens than the grid locations.
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
            action="leave patch_drop_rate out of student.kwargs, or choose method deit or none",
        )
    pooled = vit.head_drop(pool_tokens(vit.fc_norm(patches), token_grid, grid))
    return Heads(cls, dist, head(pooled).permute(0, 3, 1, 2))


def _token_grid(model: nn.Module) -> Grid | None:
    """(rows, columns) of a plain ViT's patch tokens; None for other models."""
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
    """Return the mean of the tokens that fall on each location: (B, H * W, C) -> (B, h, w, C).

    Equal blocks where the grids divide, else adaptive average pooling, whose blocks overlap.
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
    """Return a student with fresh weights, drawn from torch's global generator as timm draws them.

    Args:
        name: a timm name.
        size: side of the input in pixels, the views'.
        kwargs: for the model's constructor (``patch_size``, ``embed_dim``, ``depth``, ...).
        drop_path: stochastic depth; the paper's recipe has none.

    Raises:
        StudentError: no such model, or arguments it does not take.
    """
    if name.startswith(HUB_PREFIXES):
        raise StudentError(
            "a student is named by its architecture",
            where=name,
            expected="a name that timm itself knows: a student starts with fresh weights, and what "
            "a stranger's file names is not fetched",
            action="name the architecture, with its arguments in student.kwargs",
        )
    arguments = dict(kwargs or {})
    if drop_path > 0.0:
        arguments["drop_path_rate"] = drop_path
    model = create_timm(
        name, num_classes=num_classes, size=size, kwargs=arguments, error=StudentError
    )
    return Student(model, name, size, kwargs)
