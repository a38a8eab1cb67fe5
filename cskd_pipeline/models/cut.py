"""A network cut at its last feature map into a backbone and a head that applies at each location.

:func:`cut_network` gives every teacher timm's two methods: ``forward_features``, (B, 3, S, S) ->
(B, C, h, w), and ``forward_head``, (B, C, h, w) -> (B, K), which first averages over h and w. A
network with both is used as it is, with feature maps permuted if their channels are last. In any
other the last feature map is searched for, whose mean must be the input of the linear layer that
computes the network's output. Either form is proven on random pixels, or refused with the reason.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cskd_pipeline.errors import TeacherError

CONTRACT = (
    "features -> global average pooling -> linear layer; or forward_features, which returns "
    "(B, C, h, w), and a forward_head that first averages them"
)
_METHODS = ("forward_features", "forward_head")
_TOLERANCE = 1e-3  # relative to the largest value, for float32 sums in another order


Maps = dict[tuple[int, ...], Tensor]
"""Feature maps (B, C, h, w) by (C, h, w), in the order of their last use."""


class Cut(NamedTuple):
    """A network with ``forward_features`` and ``forward_head``, and the shape of its logits."""

    network: Any
    num_classes: int
    grid: tuple[int, int]


def cut_network(network: nn.Module, name: str, size: int) -> Cut:
    """Return ``network``, in eval mode, with the two methods of a teacher.

    Args:
        name: the teacher's name, for messages.
        size: side of the input in pixels.

    Raises:
        TeacherError: the network gives no spatial logits.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, size, size, generator=generator)
    missing = [method for method in _METHODS if not callable(getattr(network, method, None))]
    cut: Any = _pooled(network, name, missing, x) if missing else network
    features = _features(cut, name, x)
    if _channels_last(cut, features):
        cut, features = ChannelsFirst(cut), features.permute(0, 3, 1, 2)
    height, width = features.shape[2:]
    return Cut(cut, _prove(cut, name, features, generator), (height, width))


def head_per_location(network: Any, features: Tensor) -> Tensor:
    """Apply the network's own head at each location: (B, C, h, w) -> (B, K, h, w).

    For global average pooling and a linear layer this is a 1x1 convolution, whose mean over
    locations equals the global logits (arXiv 2307.08500 and the authors' code).
    """
    samples, channels, height, width = features.shape
    locations = features.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1)
    logits = network.forward_head(locations)
    return logits.reshape(samples, height, width, -1).permute(0, 3, 1, 2)


class ChannelsFirst(nn.Module):
    """Wrapper that permutes feature maps (B, h, w, C), as of timm's Swin and MambaOut."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward_features(self, x: Tensor) -> Tensor:
        """Return (B, C, h, w)."""
        features: Tensor = self.network.forward_features(x)
        return features.permute(0, 3, 1, 2)

    def forward_head(self, features: Tensor) -> Tensor:
        """Return logits (B, K) of features (B, C, h, w)."""
        logits: Tensor = self.network.forward_head(features.permute(0, 2, 3, 1))
        return logits


class Pooled(nn.Module):
    """Wrapper of a network without ``forward_features`` that pools its last feature map.

    Args:
        network: its ``forward`` returns the logits.
        linear: its last layer, applied to the mean of the feature map.
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
        """Return logits (B, K) of features (B, C, h, w)."""
        logits: Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits


class _Watch(TorchFunctionMode):
    """Record in ``maps`` the feature maps passed to any torch function: the last of each shape, or
    of ``shape`` only.

    The last feature map of its shape is the one that is pooled, after the activation and any other
    layer or function.
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
                    self.maps.pop(shape, None)  # keeps the order of last use
                    self.maps[shape] = value
        return func(*args, **kwargs)


def _pooled(network: nn.Module, name: str, missing: Sequence[str], x: Tensor) -> Pooled:
    """Wrap a network that ends in global average pooling and a linear layer; refuse any other."""
    without = f"it has no {' and no '.join(missing)}, and"
    maps: Maps = {}
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    hooks = [
        layer.register_forward_hook(lambda layer, args, out: calls.append((layer, args[0], out)))
        for layer in layers
    ]
    try:
        with torch.inference_mode(), _Watch(maps):
            logits = network(x)
    except Exception as error:  # an unsupported input size can fail anywhere in a model
        raise _forward_failed(name, x, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise _refusal(name, f"{without} its forward returns {shape}, not logits (B, K)")
    heads = [(layer, pooled) for layer, pooled, out in calls if _close(out, logits)]
    if not heads:
        raise _refusal(name, f"{without} its output is not that of a linear layer")
    linear, pooled = heads[-1]
    width = linear.in_features
    fitting = [m for (channels, *grid), m in maps.items() if channels == width and grid != [1, 1]]
    if not fitting:
        raise _refusal(
            name,
            f"{without} its last linear layer follows no feature map of {width} channels and more "
            f"than one location at {x.shape[-1]} px",
        )
    if not _close(fitting[-1].mean(dim=(2, 3)), pooled):
        raise _refusal(name, f"{without} its linear layer's input is not the mean of a feature map")
    return Pooled(network, linear, tuple(fitting[-1].shape[1:]))


def _features(network: Any, name: str, x: Tensor) -> Tensor:
    """Return the network's feature map of ``x``: (B, C, h, w) or (B, h, w, C)."""
    try:
        with torch.inference_mode():
            features = network.forward_features(x)
    except Exception as error:  # as above
        raise _forward_failed(name, x, error) from error
    if not isinstance(features, Tensor):
        raise _refusal(name, f"its features are a {type(features).__name__}")
    if features.ndim == 3:
        raise _refusal(name, f"its features are tokens {tuple(features.shape)}, like a ViT's")
    if features.ndim != 4:
        raise _refusal(name, f"its features are {tuple(features.shape)}, not (B, C, h, w)")
    return features


def _channels_last(network: Any, features: Tensor) -> bool:
    """Return whether a feature map is (B, h, w, C), by timm's ``num_features`` and format."""
    channels, layout = (getattr(network, name, None) for name in ("num_features", "output_fmt"))
    return channels == features.shape[3] and (channels != features.shape[1] or layout == "NHWC")


def _prove(network: Any, name: str, features: Tensor, generator: torch.Generator) -> int:
    """Prove on random features that the head applies at each location; return the class count."""
    channels, height, width = features.shape[1:]
    features = torch.randn(2, channels, height, width, generator=generator)
    moved = features.flatten(2)[:, :, torch.randperm(height * width, generator=generator)]
    with torch.inference_mode():
        try:
            logits = network.forward_head(features)
            shuffled = network.forward_head(moved.view_as(features))
            spatial = head_per_location(network, features)
        except Exception as error:  # a head can raise anything
            raise _refusal(name, f"its head fails: {type(error).__name__}: {error}") from error
    if logits.ndim != 2 or spatial.shape != (2, logits.shape[1], height, width):
        raise _refusal(name, f"its head returns {tuple(logits.shape)} for 2 feature maps")
    if not _close(shuffled, logits):
        raise _refusal(name, "its head depends on the order of locations: it does not just pool")
    return int(logits.shape[1])


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _forward_failed(name: str, x: Tensor, error: Exception) -> TeacherError:
    return _refusal(name, f"it fails at {x.shape[-1]} px: {type(error).__name__}: {error}")


def _refusal(name: str, reason: str) -> TeacherError:
    return TeacherError(
        "this model gives no spatial logits",
        where=name,
        found=reason,
        expected=CONTRACT,
        action="use a CNN such as regnety_160.deit_in1k, resnet50 or convnext_tiny, or add these "
        "methods to yours: see dump-teacher --help",
    )
