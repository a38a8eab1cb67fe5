"""A teacher that takes a known time per batch."""

from __future__ import annotations

import time
from typing import ClassVar

import torch
from torch import Tensor, nn

SECONDS = 0.25  # per batch


class Slow(nn.Module):
    pretrained_cfg: ClassVar[dict[str, tuple[float, ...]]] = {
        **{"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    }

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(num_classes, 3, generator=generator) * 4)

    def forward_features(self, x: Tensor) -> Tensor:
        time.sleep(SECONDS)
        return nn.functional.adaptive_avg_pool2d(x, 4)

    def forward_head(self, features: Tensor) -> Tensor:
        return features.mean((2, 3)) @ self.weight.T

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def teacher(num_classes: int = 4) -> nn.Module:
    return Slow(num_classes)
