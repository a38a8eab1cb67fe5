"""What the teacher said, whichever way it was stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from cskd_pipeline.distill import ckf
from cskd_pipeline.errors import CacheError


class Targets(Protocol):
    """A batch of the teacher's answers, as the losses ask for them."""

    def hard_global(self) -> Tensor:
        """argmax g, the lowest index among equals: (B,) int64."""
        ...

    def hard_spatial(self, r: float) -> Tensor:
        """The class on top of the fused response at r: (B, h, w) int64."""
        ...

    def global_log_probabilities(self, temperature: float) -> Tensor:
        """log softmax of g / temperature: (B, K) float32."""
        ...

    def spatial_log_probabilities(self, r: float, temperature: float) -> Tensor:
        """log softmax of (r * d + (1 - r) * g) / temperature: (B, K, h, w) float32."""
        ...


@dataclass(frozen=True)
class LogitTargets:
    """From logits: a live teacher's, or a dense encoding's; serves everything.

    Args:
        spatial: (B, K, h, w), float16 as the teacher gave them, or float32 restored from codes.
        global_: (B, K) likewise.
    """

    spatial: Tensor
    global_: Tensor

    def hard_global(self) -> Tensor:
        return ckf.hard_global_labels(self.global_)

    def hard_spatial(self, r: float) -> Tensor:
        return ckf.hard_labels(self.spatial, self.global_, r)

    def global_log_probabilities(self, temperature: float) -> Tensor:
        return log_softmax(self.global_.float() / temperature, dim=1)

    def spatial_log_probabilities(self, r: float, temperature: float) -> Tensor:
        return log_softmax(ckf.fuse(self.spatial, self.global_, r) / temperature, dim=1)


@dataclass(frozen=True)
class EnvelopeTargets:
    """From the envelope encoding: the same hard labels at every r, and nothing for soft losses.

    Args:
        planes: (B, P, h, w) uint16, see :func:`cskd_pipeline.distill.ckf.upper_envelope`.
        global_label: (B,), any integer type.
    """

    planes: Tensor
    global_label: Tensor

    def hard_global(self) -> Tensor:
        return self.global_label.to(torch.int64)

    def hard_spatial(self, r: float) -> Tensor:
        return ckf.envelope_labels(self.planes, r)

    def global_log_probabilities(self, temperature: float) -> Tensor:
        raise self._no_logits()

    def spatial_log_probabilities(self, r: float, temperature: float) -> Tensor:
        raise self._no_logits()

    @staticmethod
    def _no_logits() -> CacheError:
        return CacheError(
            "soft distillation needs the teacher's logits",
            found="the envelope encoding, which holds hard labels only",
            expected="the encoding dense, dense-q8 or topk",
            action="set distill.global_kind and distill.spatial_kind to hard, or use a cache "
            "dumped with one of these encodings",
        )
