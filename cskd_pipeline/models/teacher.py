"""The teacher: any CNN whose head can be applied at each location of its last feature map."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from cskd_pipeline.errors import CskdError, TeacherError, WeightsError
from cskd_pipeline.models.cut import cut_network, head_per_location
from cskd_pipeline.models.timm_models import TeacherSource, build_teacher
from cskd_pipeline.models.weights import load_into, load_state, state_digest
from cskd_pipeline.runtime.device import all_finite, compile_for, memory_format, place

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Logits(NamedTuple):
    """Logits rounded once to float16: what every encoding and every comparison starts from."""

    spatial: Tensor  # (B, K, h, w) float16
    global_: Tensor  # (B, K) float16


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen network and what a cache records of it.

    Attributes:
        model: in eval mode on ``device``; ``backbone`` is its ``forward_features``.
        name: timm's or torchvision's, with the pretrained tag, or ``package.module:factory``.
        source: where the weights come from: ``hub``, ``file``, ``random`` or ``factory``.
        weights_sha256: :func:`~cskd_pipeline.models.weights.state_digest` of all of them.
        size: side of the input in pixels, normalised with ``mean`` and ``std`` ([0, 1] units).
        grid: (rows, columns) of the spatial logits.
        batch_size: views per forward pass, always exactly.
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

        Kernels choose their order of summation by the batch size: with timm's CNNs in float32 on a
        CPU, the same view differs in its last bits, and now and then in float16, between batches
        of 8 and of 16, while within batches of one size neither its index nor its companions
        matter. So the model always sees exactly ``batch_size`` views, the last batch filled up
        with zeros, and its response to a view does not depend on the others of the batch. That
        holds on one machine with one number of threads.

        Args:
            x: (B, 3, size, size) float32, normalised; any B above 0.

        Raises:
            TeacherError: a logit is NaN or infinite, or too large for float16.
        """
        return require_finite(self.unchecked(x), self.name)

    @torch.inference_mode()
    def unchecked(self, x: Tensor) -> Logits:
        """Return the logits of :meth:`respond` unchecked: the host does not wait for the device."""
        pieces = [self._respond(piece) for piece in x.split(self.batch_size)]
        return Logits(*(torch.cat(parts)[: len(x)] for parts in zip(*pieces, strict=True)))

    def _respond(self, x: Tensor) -> Logits:
        """Return the logits of at most ``batch_size`` views, filled up to ``batch_size``."""
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
        return Logits(spatial.half(), global_.half())


def require_finite(logits: Logits, name: str) -> Logits:
    """Return the logits of the teacher ``name``, once the device has them, if all are finite."""
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
    """Load a teacher in eval mode, and show that it gives spatial logits.

    Args:
        size: side of the input in pixels.
        batch_size: views per forward pass; see :meth:`Teacher.respond`.

    Raises:
        TeacherError: no such model, weights out of reach, another class count, no spatial logits,
            or no mean and std; all of them at once where several are wrong.
        WeightsError: a weights file that cannot be read safely or does not fit.
    """
    name = source.name
    state = None if source.weights in ("hub", "random") else load_state(source.weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed)
        network, full_name, origin = build_teacher(source, state, size)
    network = network.float().eval().requires_grad_(False)
    faults: list[CskdError] = []
    if state is not None:
        with _noted(faults):
            load_into(network, state, source.weights)
    with _noted(faults):
        cut = cut_network(network, name, size)
        if source.num_classes not in (None, cut.num_classes):
            raise TeacherError(
                "the teacher's classes are not the data's",
                where=name,
                found=f"{cut.num_classes} classes",
                expected=f"{source.num_classes} classes",
                action="use weights trained on these classes",
            )
    with _noted(faults):
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


def _normalisation(
    network: nn.Module, source: TeacherSource
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std, as given or else as the network states them."""
    config = getattr(network, "pretrained_cfg", None) or {}
    stated = {
        "mean": source.mean or config.get("mean", ()),
        "std": source.std or config.get("std", ()),
    }
    missing = [key for key, values in stated.items() if len(values) != 3]
    if missing:
        raise TeacherError(
            "nothing states how the teacher's images are normalised",
            where=source.name,
            found=f"no {' and no '.join(missing)} of three channels",
            expected="what it was trained with, in [0, 1] units",
            action="state both: --mean R,G,B --std R,G,B (ImageNet's are 0.485,0.456,0.406 and "
            "0.229,0.224,0.225), or teacher.mean and teacher.std in a recipe or --set",
        )
    return tuple(map(float, stated["mean"])), tuple(map(float, stated["std"]))


@contextmanager
def _noted(faults: list[CskdError]) -> Iterator[None]:
    """Go on after a fault of the teacher, to report it with the others."""
    try:
        yield
    except (TeacherError, WeightsError) as error:
        faults.append(error)


def _raise_all(faults: Sequence[CskdError], name: str) -> None:
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise TeacherError(
            "the teacher cannot be used yet",
            where=name,
            expected=f"none of these {len(faults)} problems",
            action="; ".join(dict.fromkeys(fault.action for fault in faults if fault.action)),
            problems=[f"{fault.problem}: {fault.found}" for fault in faults],
        )
