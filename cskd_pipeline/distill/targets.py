"""The teacher's response to a batch, however it is stored."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from cskd_pipeline.distill import ckf
from cskd_pipeline.errors import CacheError


class Targets(Protocol):
    """The teacher's response to a batch, in the forms that the losses need.

    A subclass raises ``CacheError`` for each method that it does not define.
    """

    def hard_global(self) -> Tensor:
        """Return argmax g, (B,) int64; ties go to the lowest index."""
        raise _unserved(self, "hard targets")

    def hard_spatial(self, r: float) -> Tensor:
        """Return argmax of the fused response at r, (B, h, w) int64; ties as in ``ckf``."""
        raise _unserved(self, "hard targets")

    def global_log_probabilities(self, temperature: float) -> Tensor:
        """Return log softmax of g / temperature, (B, K) float32."""
        raise _unserved(self, "soft-target probabilities")

    def spatial_log_probabilities(self, r: float, temperature: float) -> Tensor:
        """Return log softmax of (r * d + (1 - r) * g) / temperature, (B, K, h, w) float32."""
        raise _unserved(self, "soft-target probabilities")


@dataclass(frozen=True)
class LogitTargets(Targets):
    """Logits of a live teacher or of a dense encoding; they support every loss.

    Args:
        spatial: d (B, K, h, w), float16 from the teacher, or float32 decoded from 8-bit codes.
        global_: g (B, K), of the same dtype.
    """

    spatial: Tensor
    global_: Tensor

    def hard_global(self) -> Tensor:
        """Return argmax g: (B,) int64."""
        return ckf.hard_global_labels(self.global_)

    def hard_spatial(self, r: float) -> Tensor:
        """Return the class on top of the fused response at r: (B, h, w) int64."""
        return ckf.hard_labels(self.spatial, self.global_, r)

    def global_log_probabilities(self, temperature: float) -> Tensor:
        """Return log softmax of g / temperature, float32."""
        return log_softmax(self.global_.float() / temperature, dim=1)

    def spatial_log_probabilities(self, r: float, temperature: float) -> Tensor:
        """Return log softmax of the fused response / temperature, float32."""
        return log_softmax(ckf.fuse(self.spatial, self.global_, r) / temperature, dim=1)


@dataclass(frozen=True)
class EnvelopeTargets(Targets):
    """Hard labels at every r, from the envelope encoding; soft losses are not supported.

    Args:
        planes: (B, P, h, w) uint16, see :func:`cskd_pipeline.distill.ckf.upper_envelope`.
        global_label: argmax g, (B,), any integer type.
    """

    planes: Tensor
    global_label: Tensor

    def hard_global(self) -> Tensor:
        """Return argmax g: (B,) int64."""
        return self.global_label.to(torch.int64)

    def hard_spatial(self, r: float) -> Tensor:
        """Return the class on top of the fused response at r: (B, h, w) int64."""
        return ckf.envelope_labels(self.planes, r)


@dataclass(frozen=True)
class SampledTargets(Targets):
    """Classes drawn from the soft targets at every r, at one temperature; for soft losses only.

    Args:
        planes: (B, P, draws * h, w) uint16, from ``encodings.sampled.noisy_envelopes``.
        draws: number of draws per location.
        temperature: tau of the sampled distributions.
    """

    planes: Tensor
    draws: int
    temperature: float

    def drawn_global(self, temperature: float) -> Tensor:
        """Return classes drawn from softmax(g / tau), (B, draws * h * w) int64: those at r = 0.

        Raises:
            CacheError: ``temperature`` is not the draws' tau.
        """
        self._require(temperature)
        return self.planes[:, 0].flatten(1).to(torch.int64)

    def drawn_spatial(self, r: float, temperature: float) -> Tensor:
        """Return classes drawn from softmax of the fused response / tau, (B, draws, h, w) int64.

        Raises:
            CacheError: ``temperature`` is not the draws' tau.
        """
        self._require(temperature)
        return ckf.envelope_labels(self.planes, r).unflatten(1, (self.draws, -1))

    def _require(self, temperature: float) -> None:
        if temperature != self.temperature:
            raise CacheError(
                "the sampled encoding does not support this temperature",
                found=f"distill.temperature = {temperature}",
                expected=f"{self.temperature}, the temperature of its draws",
                action=f"set distill.temperature to {self.temperature}, or convert a cache with "
                "the encoding dense: cache convert --encoding sampled "
                f"--sampled-temperature {temperature}",
            )


def labels_draws_or_logs(
    targets: Targets, serves: Collection[str], temperature: float, ratios: Sequence[float]
) -> list[Tensor]:
    """Return the spatial response at each of ``ratios``, then the global response.

    As hard labels if ``serves`` includes them, else as draws, else as log-probabilities.
    """
    if "hard" in serves:
        return [*map(targets.hard_spatial, ratios), targets.hard_global()]
    if isinstance(targets, SampledTargets):
        spatial = [targets.drawn_spatial(r, temperature) for r in ratios]
        return [*spatial, targets.drawn_global(temperature)]
    spatial = [targets.spatial_log_probabilities(r, temperature) for r in ratios]
    return [*spatial, targets.global_log_probabilities(temperature)]


def _unserved(targets: Targets, needed: str) -> CacheError:
    if needed == "hard targets":
        encodings, kind = "dense or envelope", "soft"
    else:
        encodings, kind = "dense, dense-q8 or topk; sampled has draws instead", "hard"
    encoding = f"of {type(targets).__name__}"
    if isinstance(targets, EnvelopeTargets):
        encoding = "envelope"
    elif isinstance(targets, SampledTargets):
        encoding, kind = "sampled", "soft"  # soft losses use its draws, not probabilities
    return CacheError(
        f"the encoding {encoding} does not support {needed}",
        found=f"targets for {kind} losses only",
        expected=f"the encoding {encodings}",
        action=f"set distill.global_kind and distill.spatial_kind to {kind}, or use a cache with "
        "one of these encodings",
    )
