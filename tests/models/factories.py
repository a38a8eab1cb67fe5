"""Small teachers for the name ``tests.models.factories:FUNCTION``."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

not_callable = "a string"


class Net(nn.Module):
    """Two strided convolutions and a given head; a location covers 16 x 16 pixels."""

    pretrained_cfg: ClassVar[dict[str, tuple[float, ...]]] = {
        **{"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    }

    def __init__(self, head: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 8, 4, 4))
        self.head = head
        self.scale = scale
        self.seen: list[tuple[torch.dtype, torch.dtype, bool, bool, tuple[int, ...]]] = []

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x)


class Watched(Net):
    """A network that records the settings in which each part runs."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__(head)
        self.backbone_runs: list[tuple[torch.dtype, int, bool]] = []
        self.head_runs: list[tuple[torch.dtype, bool]] = []

    def forward_features(self, x: Tensor) -> Tensor:
        features = super().forward_features(x)
        self.backbone_runs.append((features.dtype, len(x), torch.backends.cudnn.allow_tf32))
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        logits = super().forward_head(x)
        self.head_runs.append((logits.dtype, torch.backends.cudnn.allow_tf32))
        return logits


def _pooled(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers)


def pooled(num_classes: int = 5) -> nn.Module:
    net = Net(_pooled(nn.Linear(8, num_classes)))
    net.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}  # type: ignore[misc]
    return net


def watched(num_classes: int = 5) -> nn.Module:
    return Watched(_pooled(nn.Linear(8, num_classes)))


def vgg_that_pools(num_classes: int = 5) -> nn.Module:
    return Net(_pooled(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, num_classes)))


def loud(num_classes: int = 5) -> nn.Module:
    return Net(_pooled(nn.Linear(8, num_classes)), scale=1e9)


def flattening(num_classes: int = 5) -> nn.Module:
    return Net(nn.Sequential(nn.Flatten(), nn.Linear(8 * 4 * 4, num_classes)))


def large_kernel(num_classes: int = 5) -> nn.Module:
    """A head that resizes its input to 4x4 and depends on positions, like timm's VGG."""
    stretch = nn.AdaptiveAvgPool2d(4)
    return Net(nn.Sequential(stretch, nn.Conv2d(8, num_classes, 4), nn.Flatten()))


class Positions(nn.Module):
    """Attention pooling with position embeddings, as in CLIP's ResNets."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 16, 8))
        self.attention = nn.MultiheadAttention(8, 1, batch_first=True)
        self.out = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.positions[:, : tokens.shape[1]]
        query = tokens.mean(dim=1, keepdim=True)
        return self.out(self.attention(query, tokens, tokens)[0][:, 0])


def attention_pooled(num_classes: int = 5) -> nn.Module:
    return Net(Positions(num_classes))


def headless(num_classes: int = 5) -> nn.Module:
    return nn.Conv2d(3, num_classes, 1)


def broken(num_classes: int = 5) -> nn.Module:
    raise ValueError("the disk is upside down")


def no_module(num_classes: int = 5) -> object:
    return {"classes": num_classes}
