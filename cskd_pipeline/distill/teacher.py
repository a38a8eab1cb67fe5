"""The teacher: any CNN whose head can be applied at each location of its last feature map."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data.config import resolve_data_config
from torch import Tensor, nn
from torch.nn.functional import pad

from cskd_pipeline.distill.ckf import all_finite
from cskd_pipeline.distill.models import HUB_PREFIXES, classes_in, create_timm
from cskd_pipeline.distill.weights import load_into, load_state, state_digest
from cskd_pipeline.errors import TeacherError
from cskd_pipeline.machine import memory_format

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Answer(NamedTuple):
    """Logits rounded once to float16: what every encoding and every comparison starts from."""

    spatial: Tensor  # (B, K, h, w) float16
    global_: Tensor  # (B, K) float16


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen network and what a cache must say of it.

    Attributes:
        model: in eval mode on ``device``; ``backbone`` is its ``forward_features``.
        name: timm's, with the pretrained tag, or ``package.module:factory``.
        source: where the weights come from: ``hub``, ``file``, ``random`` or ``factory``.
        weights_sha256: :func:`~cskd_pipeline.distill.weights.state_digest` of all of them.
        size: side of the input in pixels, normalised with ``mean`` and ``std`` ([0, 1] units).
        grid: (rows, columns) of the answer.
        batch_size: views per forward pass, always exactly.
    """

    model: Any = field(repr=False)  # nn.Module with timm's forward_features and forward_head
    backbone: Callable[[Tensor], Tensor] = field(repr=False)
    name: str
    source: str
    weights_sha256: str
    num_classes: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    grid: tuple[int, int]
    precision: str
    batch_size: int
    channels_last: bool
    device: torch.device

    @torch.inference_mode()
    def answer(self, x: Tensor) -> Answer:
        """Spatial and global logits of normalised views.

        Kernels choose their order of summation by the batch size: with timm's CNNs in float32 on a
        CPU, the same view differs in its last bits, and now and then in float16, between batches
        of 8 and of 16, while within batches of one size neither its place nor its companions
        matter. So the model always sees exactly ``batch_size`` views, the last batch filled up
        with zeros, and what it answers for a view does not depend on which others are asked with
        it. That holds on one machine with one number of threads.

        Args:
            x: (B, 3, size, size) float32, normalised; any B above 0.

        Raises:
            TeacherError: a logit is NaN or infinite, or too large for float16.
        """
        return self.checked(self.unchecked(x))

    @torch.inference_mode()
    def unchecked(self, x: Tensor) -> Answer:
        """:meth:`answer` without looking at it: the host does not wait for the device."""
        pieces = [self._answer(piece) for piece in x.split(self.batch_size)]
        return Answer(*(torch.cat(parts)[: len(x)] for parts in zip(*pieces, strict=True)))

    def checked(self, answer: Answer) -> Answer:
        """``answer``, once the device has it.

        Raises:
            TeacherError: a logit is NaN or infinite, or too large for float16.
        """
        if not all_finite(*answer):
            raise TeacherError(
                "the teacher's logits are not finite in float16",
                where=self.name,
                expected="logits between -65504 and 65504",
                action="use precision float32 or bfloat16, and check the weights",
            )
        return answer

    def _answer(self, x: Tensor) -> Answer:
        """At most ``batch_size`` views; always ``batch_size`` answers."""
        x = pad(x, (0, 0, 0, 0, 0, 0, 0, self.batch_size - len(x)))
        x = x.contiguous(memory_format=memory_format(self.channels_last))
        dtype = PRECISIONS[self.precision]
        # cuDNN would round float32 convolutions to TF32, and pick its kernels by racing them.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                features = self.backbone(x)
            features = features.float()
            spatial = head_per_location(self.model, features)
            global_ = self.model.forward_head(features)
        return Answer(spatial.half(), global_.half())


def head_per_location(model: Any, features: Tensor) -> Tensor:
    """The model's own head at each location: (B, C, h, w) -> (B, K, h, w).

    For a head that averages and then applies a linear layer this is a 1x1 convolution, and its mean
    over locations is the global answer (arXiv 2307.08500 and the authors' code).
    """
    samples, channels, height, width = features.shape
    places = features.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1)
    logits = model.forward_head(places)
    return logits.reshape(samples, height, width, -1).permute(0, 3, 1, 2)


def load_teacher(
    name: str,
    *,
    weights: str | Path = "hub",
    num_classes: int | None = None,
    size: int,
    precision: str = "float32",
    batch_size: int = 64,
    channels_last: bool = True,
    compile: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    kwargs: Mapping[str, Any] | None = None,
) -> Teacher:
    """A teacher in eval mode, shown to give spatial logits.

    Args:
        name: a timm name, or ``package.module:factory``: a callable (of ``num_classes`` where that
            is known, and ``kwargs``) that returns a module with timm's ``forward_features`` and
            ``forward_head``; a ``pretrained_cfg`` dict on it may give ``mean`` and ``std``.
        weights: ``hub`` (timm's pretrained; a factory's as it made them), ``random``, or a file.
        num_classes: of the data; None takes the file's or the model's own.
        size: side of the input in pixels.
        precision: of the backbone under autocast; the head is float32 always.
        batch_size: views per forward pass; see :meth:`Teacher.answer`.
        seed: of random weights; torch's global generator is left as it was.

    Raises:
        TeacherError: no such model, weights out of reach, another class count, or no spatial
        logits.
        WeightsError: a weights file that cannot be read safely or does not fit.
    """
    if precision not in PRECISIONS:
        raise TeacherError(
            "unknown precision", where=name, found=precision, expected=", ".join(PRECISIONS)
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built, source = _build(name, weights, num_classes, size, kwargs or {})
    model: Any = built.float().eval().requires_grad_(False)
    classes, grid = _probe(model, name, size)
    if num_classes not in (None, classes):
        raise TeacherError(
            "the teacher's classes are not the data's",
            where=name,
            found=f"{classes} classes",
            expected=f"{num_classes} classes",
            action="use weights trained on these classes",
        )
    data = resolve_data_config({}, model=model)
    config = getattr(model, "pretrained_cfg", None) or {}
    tag = config.get("tag") if source == "hub" else None
    digest = state_digest(model.state_dict())
    model = model.to(device, memory_format=memory_format(channels_last))
    return Teacher(
        model=model,
        backbone=torch.compile(model.forward_features) if compile else model.forward_features,
        name=f"{config['architecture']}.{tag}" if tag else name,
        source=source,
        weights_sha256=digest,
        num_classes=classes,
        size=size,
        mean=data["mean"],
        std=data["std"],
        grid=grid,
        precision=precision,
        batch_size=batch_size,
        channels_last=channels_last,
        device=torch.device(device),
    )


def _build(
    name: str, weights: str | Path, num_classes: int | None, size: int, kwargs: Mapping[str, Any]
) -> tuple[nn.Module, str]:
    """The model with its weights, and where they come from."""
    state = None if weights in ("hub", "random") else load_state(weights)
    if ":" in name and not name.startswith(HUB_PREFIXES):
        model = _call_factory(name, num_classes, kwargs)
        source = "random" if weights == "random" else "factory"
    elif weights == "hub":
        model = create_timm(
            name, num_classes=None, size=size, kwargs=kwargs, error=TeacherError, pretrained=True
        )
        source = "hub"
    else:
        if state is not None:
            num_classes = classes_in(state, name) or num_classes
        model = create_timm(
            name, num_classes=num_classes, size=size, kwargs=kwargs, error=TeacherError
        )
        source = "random"
    if state is not None:
        load_into(model, state, weights)
        source = "file"
    return model, source


def _call_factory(name: str, num_classes: int | None, kwargs: Mapping[str, Any]) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    arguments = dict(kwargs) if num_classes is None else {**kwargs, "num_classes": num_classes}
    try:
        model = getattr(importlib.import_module(module_name), attribute)(**arguments)
    except Exception as error:  # the user's own code can fail in any way
        raise TeacherError(
            "the teacher's factory does not work",
            where=name,
            found=f"{type(error).__name__}: {error}",
            expected=f"an importable package.module:factory, callable with {arguments}",
            action="check PYTHONPATH and the two names",
        ) from error
    if not isinstance(model, nn.Module):
        raise TeacherError(
            "the teacher's factory gives no torch module", where=name, found=type(model).__name__
        )
    return model


def _probe(model: Any, name: str, size: int) -> tuple[int, tuple[int, int]]:
    """Class count and grid, after showing on random features that the head works per location.

    Raises:
        TeacherError: with the reason why this model has no spatial logits.
    """
    generator = torch.Generator().manual_seed(0)
    features = _features(model, name, torch.randn(1, 3, size, size, generator=generator))
    channels, height, width = features.shape[1:]
    features = torch.randn(2, channels, height, width, generator=generator)
    moved = features.flatten(2)[:, :, torch.randperm(height * width, generator=generator)]
    with torch.inference_mode():
        try:
            whole = model.forward_head(features)
            shuffled = model.forward_head(moved.view_as(features))
            spatial = head_per_location(model, features)
        except Exception as error:  # heads are free to fail in any way
            raise _refusal(name, f"its head fails: {type(error).__name__} {error}") from error
    if whole.ndim != 2 or spatial.shape != (2, whole.shape[1], height, width):
        raise _refusal(name, f"its head gives {tuple(whole.shape)} for 2 feature maps")
    if (whole - shuffled).abs().max() > 1e-3 * whole.abs().max():
        raise _refusal(name, "its head depends on where features are: it does not just pool them")
    return whole.shape[1], (height, width)


def _features(model: Any, name: str, x: Tensor) -> Tensor:
    """The feature map (B, C, h, w) of one view, or the reason why there is none."""
    for method in ("forward_features", "forward_head"):
        if not callable(getattr(model, method, None)):
            raise _refusal(name, f"it has no {method}")
    try:
        with torch.inference_mode():
            features = model.forward_features(x)
    except Exception as error:  # an input size that a model cannot take fails anywhere inside it
        problem = f"it fails at {x.shape[-1]} px: {type(error).__name__} {error}"
        raise _refusal(name, problem) from error
    if not isinstance(features, Tensor):
        raise _refusal(name, f"its features are a {type(features).__name__}")
    width = getattr(model, "num_features", None)
    if features.ndim == 3:
        raise _refusal(name, f"its features are tokens {tuple(features.shape)}, as a ViT's")
    if features.ndim != 4 or (width == features.shape[3] and width != features.shape[1]):
        raise _refusal(name, f"its features are {tuple(features.shape)}, channels not second")
    return features


def _refusal(name: str, reason: str) -> TeacherError:
    return TeacherError(
        "this model gives no spatial logits",
        where=name,
        found=reason,
        expected="features (B, C, h, w) and a head that pools them before anything else",
        action="use a CNN such as regnety_160.deit_in1k, resnet50 or convnext_tiny",
    )
