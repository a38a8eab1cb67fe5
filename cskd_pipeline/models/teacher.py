"""The teacher: any CNN whose head can be applied at each location of its last feature map."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from cskd_pipeline.config.sections import TORCHVISION, is_factory
from cskd_pipeline.errors import CskdError, TeacherError, WeightsError
from cskd_pipeline.models.cut import cut_network, head_per_location
from cskd_pipeline.models.timm_models import class_count, create_timm, create_torchvision
from cskd_pipeline.models.weights import load_into, load_state, state_digest
from cskd_pipeline.runtime.device import all_finite, compile_for, memory_format, place

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TeacherSource:
    """A teacher as a recipe's ``[teacher]`` describes it, for data of ``num_classes``.

    Args:
        name: a timm name, ``torchvision:NAME``, or ``package.module:factory``: a callable that
            returns a network for :func:`~cskd_pipeline.models.cut.cut_network`. It is called with
            ``kwargs``, and with ``num_classes`` if known and accepted.
        weights: ``hub`` (timm's or torchvision's pretrained weights; a factory's network as
            returned), ``random``, or a file.
        num_classes: the data's class count; None: the weights file's or the model's own.
        kwargs: arguments of the model's constructor.
        mean, std: per channel in [0, 1] units; empty: from the network's ``pretrained_cfg``.
        precision: autocast dtype of the backbone: float32, bfloat16 or float16.
        seed: seed of random weights.
    """

    name: str
    weights: str | Path = "hub"
    num_classes: int | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    precision: str = "float32"
    seed: int = 0


class Logits(NamedTuple):
    """Logits rounded once to float16: the common input of all encodings and comparisons."""

    spatial: Tensor  # (B, K, h, w) float16
    global_: Tensor  # (B, K) float16


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen network and the facts that a cache records about it.

    Attributes:
        model: the network in eval mode on ``device``; ``backbone`` is its ``forward_features``.
        name: timm or torchvision name with the pretrained tag, or ``package.module:factory``.
        source: origin of the weights: ``hub``, ``file``, ``random`` or ``factory``.
        weights_sha256: :func:`~cskd_pipeline.models.weights.state_digest` of the state dict.
        size: side of the input in pixels, normalised with ``mean`` and ``std`` ([0, 1] units).
        grid: (rows, columns) of the spatial logits.
        batch_size: exact number of views in every forward pass.
    """

    model: Any = field(repr=False)  # nn.Module with forward_features and forward_head
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
    def respond(self, x: Tensor) -> Logits:
        """Return the spatial and global logits of normalised views.

        Kernels choose their order of summation by the batch size: for timm's CNNs in float32 on a
        CPU, batches of 8 and of 16 give one view logits that differ in the last bits, sometimes
        even in float16. At a fixed batch size neither a view's index nor the other views matter.
        So every forward pass has exactly ``batch_size`` views, the last one padded with zeros, and
        a view's response does not depend on its batch (on one machine, with one thread count).

        Args:
            x: (B, 3, size, size) float32, normalised; B of 1 or more.

        Raises:
            TeacherError: a logit is NaN or infinite, or too large for float16.
        """
        return require_finite(self.unchecked(x), self.name)

    @torch.inference_mode()
    def unchecked(self, x: Tensor) -> Logits:
        """Return the logits of :meth:`respond` without its check, and thus without a host sync."""
        pieces = [self._respond(piece) for piece in x.split(self.batch_size)]
        return Logits(*(torch.cat(parts)[: len(x)] for parts in zip(*pieces, strict=True)))

    def _respond(self, x: Tensor) -> Logits:
        """Return ``batch_size`` rows of logits for at most that many views, padded with zeros."""
        x = pad(x, (0, 0, 0, 0, 0, 0, 0, self.batch_size - len(x)))
        x = x.contiguous(memory_format=memory_format(self.channels_last))
        dtype = PRECISIONS[self.precision]
        # By default cuDNN rounds float32 convolutions to TF32 and may benchmark its kernels.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                features = self.backbone(x)
            features = features.float()
            spatial = head_per_location(self.model, features)
            global_ = self.model.forward_head(features)
        return Logits(spatial.half(), global_.half())


def require_finite(logits: Logits, name: str) -> Logits:
    """Return the logits of the teacher ``name``, or raise ``TeacherError`` if any is not finite."""
    if not all_finite(*logits):
        raise TeacherError(
            "the teacher's logits are not finite in float16",
            where=name,
            expected="logits between -65504 and 65504",
            action="use precision float32 or bfloat16, and check the weights",
        )
    return logits


def load_teacher(
    source: TeacherSource,
    *,
    size: int,
    batch_size: int = 64,
    channels_last: bool = True,
    compile: bool = False,
    device: torch.device | str = "cpu",
) -> Teacher:
    """Load a teacher in eval mode and prove that it gives spatial logits.

    Args:
        size: side of the input in pixels.
        batch_size: views per forward pass; see :meth:`Teacher.respond`.

    Raises:
        TeacherError: no such model, weights that cannot be downloaded, another class count, no
            spatial logits, no mean and std; several of these problems together.
        WeightsError: a weights file that cannot be read safely or does not fit.
    """
    name = source.name
    state = None if source.weights in ("hub", "random") else load_state(source.weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed)
        network, full_name, origin = _build(source, state, size)
    network = network.float().eval().requires_grad_(False)
    faults: list[CskdError] = []
    if state is not None:
        with _collecting(faults):
            load_into(network, state, source.weights)
    with _collecting(faults):
        cut = cut_network(network, name, size)
        if source.num_classes not in (None, cut.num_classes):
            raise TeacherError(
                "the teacher's class count is not the data's",
                where=name,
                found=f"{cut.num_classes} classes",
                expected=f"{source.num_classes} classes",
                action="use weights trained on these classes",
            )
    with _collecting(faults):
        mean, std = _normalisation(network, source)
    _raise_all(faults, name)
    weights_sha256 = state_digest(network.state_dict())
    model = place(cut.network, device, channels_last)
    return Teacher(
        model=model,
        backbone=compile_for(model.forward_features, device) if compile else model.forward_features,
        name=full_name,
        source=origin,
        weights_sha256=weights_sha256,
        num_classes=cut.num_classes,
        size=size,
        mean=mean,
        std=std,
        grid=cut.grid,
        precision=source.precision,
        batch_size=batch_size,
        channels_last=channels_last,
        device=torch.device(device),
    )


def _build(
    source: TeacherSource, state: Mapping[str, Tensor] | None, size: int
) -> tuple[nn.Module, str, str]:
    """Build the network of ``source``; the caller loads ``state``, read from its weights file.

    Returns:
        The network, its full name, and the origin of its weights: ``hub``, ``file``, ``random`` or
        ``factory``.
    """
    name, kwargs, num_classes = source.name, source.kwargs, source.num_classes
    is_hub = source.weights == "hub"
    origin = "hub" if is_hub else "random" if state is None else "file"
    if is_factory(name):
        return _call_factory(name, num_classes, kwargs), name, "factory" if is_hub else origin
    if name.startswith(TORCHVISION):
        classes = _linear_rows(state or {}) or num_classes
        network = create_torchvision(name, classes, kwargs, pretrained=is_hub)
    else:
        classes = class_count(state or {}, name) or num_classes
        network = create_timm(
            name,
            num_classes=None if is_hub else classes,
            size=size,
            kwargs=kwargs,
            error=TeacherError,
            pretrained=is_hub,
        )
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    tag = config.get("tag") if is_hub else None
    return network, f"{config['architecture']}.{tag}" if tag else name, origin


def _call_factory(name: str, num_classes: int | None, kwargs: Mapping[str, Any]) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    arguments = dict(kwargs)
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        if num_classes is not None and _accepts(factory, "num_classes"):
            arguments["num_classes"] = num_classes
        network = factory(**arguments)
    except Exception as error:  # user code can raise anything
        raise TeacherError(
            "the teacher's factory failed",
            where=name,
            found=f"{type(error).__name__}: {error}",
            expected=f"an importable package.module:factory, callable with {arguments}",
            action="check PYTHONPATH and both names; set arguments with --set teacher.kwargs={...}",
        ) from error
    if not isinstance(network, nn.Module):
        raise TeacherError(
            "the teacher's factory did not return a torch module",
            where=name,
            found=type(network).__name__,
        )
    return network


def _accepts(factory: Callable[..., Any], argument: str) -> bool:
    parameters = inspect.signature(factory).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def _linear_rows(state: Mapping[str, Tensor]) -> int | None:
    """Return the rows of a state dict's last matrix: the class count if a linear layer is last."""
    matrices = [tensor for tensor in state.values() if tensor.ndim == 2]
    return len(matrices[-1]) if matrices else None


def _normalisation(
    network: nn.Module, source: TeacherSource
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std from ``source``, else from the network's ``pretrained_cfg``."""
    config = getattr(network, "pretrained_cfg", None) or {}
    stated = {
        "mean": source.mean or config.get("mean", ()),
        "std": source.std or config.get("std", ()),
    }
    missing = [key for key, values in stated.items() if len(values) != 3]
    if missing:
        raise TeacherError(
            "the normalisation of the teacher's images is unknown",
            where=source.name,
            found=f"no {' and no '.join(missing)} of three channels",
            expected="mean and std that it was trained with, in [0, 1] units",
            action="set both: --mean R,G,B --std R,G,B (ImageNet's are 0.485,0.456,0.406 and "
            "0.229,0.224,0.225), or teacher.mean and teacher.std in a recipe or with --set",
        )
    return tuple(map(float, stated["mean"])), tuple(map(float, stated["std"]))


@contextmanager
def _collecting(faults: list[CskdError]) -> Iterator[None]:
    """Append an error about the teacher to ``faults``, to report all of them at once."""
    try:
        yield
    except (TeacherError, WeightsError) as error:
        faults.append(error)


def _raise_all(faults: Sequence[CskdError], name: str) -> None:
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise TeacherError(
            f"the teacher has {len(faults)} problems",
            where=name,
            action="; ".join(dict.fromkeys(fault.action for fault in faults if fault.action)),
            problems=[f"{fault.problem}: {fault.found}" for fault in faults],
        )
