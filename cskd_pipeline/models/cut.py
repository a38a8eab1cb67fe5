"""A network cut in two at its last feature map: what comes before it, and a head for one location.

:func:`cut_network` gives every teacher the same two methods, timm's: ``forward_features``, (B, 3,
S, S) -> (B, C, h, w), and ``forward_head``, (B, C, h, w) -> (B, K), which averages over h and w
before anything else. A network that has them is taken as it is, or with its feature maps permuted
where their channels come last. Of any other, the last feature map is looked for: it must be what
is averaged for the linear layer whose output the network returns. Either is proven on random
pixels, or refused with the reason.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cskd_pipeline.errors import TeacherError

CONTRACT = (
    "features -> global average pooling -> linear layer; or forward_features, which gives "
    "(B, C, h, w), and a forward_head that averages them before anything else"
)
_METHODS = ("forward_features", "forward_head")
_TOLERANCE = 1e-3  # relative to the largest value: float32 sums in another order


Maps = dict[tuple[int, ...], Tensor]
"""Feature maps (B, C, h, w) by (C, h, w), in the order in which they were last seen."""


class Cut(NamedTuple):
    """A network with ``forward_features`` and ``forward_head``, and what they were seen to give."""

    network: Any
    num_classes: int
    grid: tuple[int, int]


def cut_network(network: nn.Module, name: str, size: int) -> Cut:
    """Give ``network``, in eval mode, the two methods of a teacher, or refuse it with the reason.

    Args:
        name: of the teacher, for messages.
        size: side of the input in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, size, size, generator=generator)
    missing = [method for method in _METHODS if not callable(getattr(network, method, None))]
    found: Any = _pooled(network, name, missing, x) if missing else network
    features = _features(found, name, x)
    if _channels_last(found, features):
        found, features = ChannelsSecond(found), features.permute(0, 3, 1, 2)
    height, width = features.shape[2:]
    return Cut(found, _prove(found, name, features, generator), (height, width))


def head_per_location(network: Any, features: Tensor) -> Tensor:
    """Apply the network's own head at each location: (B, C, h, w) -> (B, K, h, w).

    For a head that averages and then applies a linear layer this is a 1x1 convolution, and its mean
    over locations are the global logits (arXiv 2307.08500 and the authors' code).
    """
    samples, channels, height, width = features.shape
    locations = features.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1)
    logits = network.forward_head(locations)
    return logits.reshape(samples, height, width, -1).permute(0, 3, 1, 2)


class ChannelsSecond(nn.Module):
    """A network whose feature maps are (B, h, w, C), as timm's Swin and MambaOut have them."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, h, w)."""
        features: Tensor = self.network.forward_features(x)
        return features.permute(0, 3, 1, 2)

    def forward_head(self, features: Tensor) -> Tensor:
        """Return logits (B, K) of (B, C, h, w)."""
        logits: Tensor = self.network.forward_head(features.permute(0, 2, 3, 1))
        return logits


class Pooled(nn.Module):
    """A network that averages its last feature map for a linear layer, however it is written.

    Args:
        network: whose ``forward`` gives the logits.
        linear: its last layer.
        shape: (C, h, w) of the feature map.
    """

    def __init__(self, network: nn.Module, linear: nn.Linear, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.linear, self.shape = network, linear, shape

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, h, w)."""
        maps: Maps = {}
        with _Watch(maps, self.shape):
            self.network(x)
        return maps[self.shape]

    def forward_head(self, features: Tensor) -> Tensor:
        """Return logits (B, K) of (B, C, h, w)."""
        logits: Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits


class _Watch(TorchFunctionMode):
    """Puts feature maps that are handed to any of torch's functions into ``maps``: of each shape,
    or of the wanted one, the last.

    The last one of its shape is what was pooled, after the activation and whatever else was done to
    it, be that by a layer or by a function.
    """

    def __init__(self, maps: Maps, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.maps, self.shape = maps, shape

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim == 4:
                shape = tuple(value.shape[1:])
                if not isinstance(value, nn.Parameter) and self.shape in (None, shape):
                    self.maps.pop(shape, None)  # so that the last one stands last
                    self.maps[shape] = value
        return func(*args, **kwargs)


def _pooled(network: nn.Module, name: str, missing: Sequence[str], x: Tensor) -> Pooled:
    """``network`` with both methods, if it ends in global average pooling and a linear layer."""
    without = f"it has no {' and no '.join(missing)}, and"
    seen: Maps = {}
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    hooks = [
        layer.register_forward_hook(lambda layer, given, out: calls.append((layer, given[0], out)))
        for layer in layers
    ]
    try:
        with torch.inference_mode(), _Watch(seen):
            logits = network(x)
    except Exception as error:  # an input size that a model cannot take fails anywhere inside it
        raise _fails(name, x, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise _refusal(name, f"{without} its forward gives {shape}, not logits (B, K)")
    heads = [(layer, given) for layer, given, out in calls if _close(out, logits)]
    if not heads:
        raise _refusal(name, f"{without} what it returns is no linear layer's output")
    linear, given = heads[-1]
    width = linear.in_features
    maps = [m for (channels, *sides), m in seen.items() if channels == width and sides != [1, 1]]
    if not maps:
        raise _refusal(
            name,
            f"{without} no feature map of {width} channels and more than one "
            f"location at {x.shape[-1]} px comes before its last linear layer",
        )
    if not _close(maps[-1].mean(dim=(2, 3)), given):
        raise _refusal(
            name, f"{without} its last linear layer does not get the mean of a feature map"
        )
    return Pooled(network, linear, tuple(maps[-1].shape[1:]))


def _features(network: Any, name: str, x: Tensor) -> Tensor:
    """The feature map of one view, as the network gives it: (B, C, h, w) or (B, h, w, C)."""
    try:
        with torch.inference_mode():
            features = network.forward_features(x)
    except Exception as error:  # as above
        raise _fails(name, x, error) from error
    if not isinstance(features, Tensor):
        raise _refusal(name, f"its features are a {type(features).__name__}")
    if features.ndim == 3:
        raise _refusal(name, f"its features are tokens {tuple(features.shape)}, as a ViT's")
    if features.ndim != 4:
        raise _refusal(name, f"its features are {tuple(features.shape)}, not (B, C, h, w)")
    return features


def _channels_last(network: Any, features: Tensor) -> bool:
    """Return whether a feature map is (B, h, w, C), by the width that timm's networks state."""
    width, stated = (getattr(network, name, None) for name in ("num_features", "output_fmt"))
    return width == features.shape[3] and (width != features.shape[1] or stated == "NHWC")


def _prove(network: Any, name: str, features: Tensor, generator: torch.Generator) -> int:
    """The class count, after showing on random features that the head works at each location."""
    channels, height, width = features.shape[1:]
    features = torch.randn(2, channels, height, width, generator=generator)
    moved = features.flatten(2)[:, :, torch.randperm(height * width, generator=generator)]
    with torch.inference_mode():
        try:
            whole = network.forward_head(features)
            shuffled = network.forward_head(moved.view_as(features))
            spatial = head_per_location(network, features)
        except Exception as error:  # heads are free to fail in any way
            raise _refusal(name, f"its head fails: {type(error).__name__} {error}") from error
    if whole.ndim != 2 or spatial.shape != (2, whole.shape[1], height, width):
        raise _refusal(name, f"its head gives {tuple(whole.shape)} for 2 feature maps")
    if not _close(shuffled, whole):
        raise _refusal(name, "its head depends on where features are: it does not just pool them")
    return int(whole.shape[1])


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _fails(name: str, x: Tensor, error: Exception) -> TeacherError:
    return _refusal(name, f"it fails at {x.shape[-1]} px: {type(error).__name__} {error}")


def _refusal(name: str, reason: str) -> TeacherError:
    return TeacherError(
        "this model gives no spatial logits",
        where=name,
        found=reason,
        expected=CONTRACT,
        action="use a CNN such as regnety_160.deit_in1k, resnet50 or convnext_tiny, or give yours "
        "these methods: dump-teacher --help shows how",
    )
