"""Networks without forward_features, for the name ``tests.models.plain:FUNCTION``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class Plain(nn.Module):
    """A strided convolution, a ``pool`` to (B, 8), and a linear layer."""

    def __init__(
        self, pool: Callable[[Tensor], Tensor], classes: int = 5, stride: tuple[int, int] = (16, 16)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, stride, stride)
        self.fc = nn.Linear(8, classes)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pool(self.conv(x)))
        return logits


def _global(x: Tensor) -> Tensor:
    return functional.adaptive_avg_pool2d(x, 1).flatten(1)


def pool_layer(num_classes: int = 5) -> nn.Module:
    layers = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Dropout())
    return Plain(layers, num_classes)


def pool_function(num_classes: int = 5) -> nn.Module:
    """As in the common CIFAR ResNets."""
    return Plain(lambda x: functional.avg_pool2d(x, x.shape[2]).view(x.shape[0], -1), num_classes)


def mean_method(num_classes: int = 5) -> nn.Module:
    return Plain(lambda x: x.mean([2, 3]), num_classes)


def relu_function(num_classes: int = 5) -> nn.Module:
    """The feature map is the output of a function, not of a layer."""
    return Plain(lambda x: _global(functional.relu(x)), num_classes)


def relu_in_place(num_classes: int = 5) -> nn.Module:
    return Plain(lambda x: _global(functional.relu(x, inplace=True)), num_classes)


def oblong(num_classes: int = 5) -> nn.Module:
    """A grid of two rows and four columns at 64 px."""
    return Plain(_global, num_classes, (32, 16))


def every_pixel(num_classes: int = 5) -> nn.Module:
    """A location per pixel."""
    return Plain(_global, num_classes, (1, 1))


class TwoHeads(Plain):
    """A network whose last linear layer is not the one whose output it returns."""

    def __init__(self, classes: int) -> None:
        super().__init__(_global, classes)
        self.auxiliary = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        self.auxiliary(self.pool(self.conv(x)))
        return logits


def two_heads(num_classes: int = 5) -> nn.Module:
    return TwoHeads(num_classes)


def fixed() -> nn.Module:
    return Plain(_global)


def forwarding(**kwargs: Any) -> nn.Module:
    return pool_layer(**kwargs)


# Networks that are refused


def max_pooled(num_classes: int = 5) -> nn.Module:
    return Plain(lambda x: x.amax(dim=(2, 3)), num_classes)


def one_location(num_classes: int = 5) -> nn.Module:
    return Plain(lambda x: x.flatten(1), num_classes, (64, 64))


class Softened(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(dim=1)


def softened(num_classes: int = 5) -> nn.Module:
    return Softened(_global, num_classes)


def convolutional(num_classes: int = 5) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, num_classes, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def map_out(num_classes: int = 5) -> nn.Module:
    return nn.Conv2d(3, num_classes, 1)
