"""The teacher's response to a batch, whichever way it was stored."""

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
    """Give the teacher's response to a batch in the forms that the losses need.

    A class that inherits from this one refuses, with a ``CacheError``, what it does not define.
    """

    def hard_global(self) -> Tensor:
        """Return argmax g, the lowest index among equals: (B,) int64."""
        raise _unserved(self, "hard targets")

    def hard_spatial(self, r: float) -> Tensor:
        """Return the class on top of the fused response at r: (B, h, w) int64."""
        raise _unserved(self, "hard targets")

    def global_log_probabilities(self, temperature: float) -> Tensor:
        """Return log softmax of g / temperature: (B, K) float32."""
        raise _unserved(self, "soft targets' probabilities")

    def spatial_log_probabilities(self, r: float, temperature: float) -> Tensor:
        """Return log softmax of (r * d + (1 - r) * g) / temperature: (B, K, h, w) float32."""
        raise _unserved(self, "soft targets' probabilities")


@dataclass(frozen=True)
class LogitTargets(Targets):
    """Hold logits, a live teacher's or a dense encoding's: they serve every loss.

    Args:
        spatial: (B, K, h, w), float16 as the teacher gave them, or float32 restored from codes.
        global_: (B, K) likewise.
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
    """Hold the envelope encoding: the same hard labels at every r, and nothing for soft losses.

    Args:
        planes: (B, P, h, w) uint16, see :func:`cskd_pipeline.distill.ckf.upper_envelope`.
        global_label: (B,), any integer type.
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
    """Hold draws of the soft targets at every r, of one temperature: for soft losses alone.

    Args:
        planes: (B, P, draws * h, w) uint16, of ``encodings.sampled.noisy_envelopes``.
        draws: of each location.
        temperature: tau of the targets that they were drawn from.
    """

    planes: Tensor
    draws: int
    temperature: float

    def drawn_global(self, temperature: float) -> Tensor:
        """Return classes drawn from softmax(g / tau), those at r = 0: (B, draws * h * w) int64.

        Raises:
            CacheError: another temperature than the draws'.
        """
        self._require(temperature)
        return self.planes[:, 0].flatten(1).to(torch.int64)

    def drawn_spatial(self, r: float, temperature: float) -> Tensor:
        """Return classes drawn from softmax(fused(r) / tau): (B, draws, h, w) int64.

        Raises:
            CacheError: another temperature than the draws'.
        """
        self._require(temperature)
        return ckf.envelope_labels(self.planes, r).unflatten(1, (self.draws, -1))

    def _require(self, temperature: float) -> None:
        if temperature != self.temperature:
            raise CacheError(
                "the sampled encoding cannot serve this temperature",
                found=f"distill.temperature = {temperature}",
                expected=f"{self.temperature}, which its draws were made at",
                action=f"set distill.temperature to {self.temperature}, or make another cache "
                "from one with dense: cache convert --encoding sampled "
                f"--sampled-temperature {temperature}",
            )


def labels_draws_or_logs(
    targets: Targets, serves: Collection[str], temperature: float, ratios: Sequence[float]
) -> list[Tensor]:
    """Return the response at each of ``ratios``, then the global one, as its encoding has it.

    Hard labels where it ``serves`` them, else draws, else log probabilities at ``temperature``.
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
        able, kind = "dense or envelope", "soft"
    else:
        able, kind = "dense, dense-q8 or topk; sampled has draws from them", "hard"
    encoding = f"of {type(targets).__name__}"
    if isinstance(targets, EnvelopeTargets):
        encoding = "envelope"
    elif isinstance(targets, SampledTargets):
        encoding, kind = "sampled", "soft"  # whose losses need draws alone
    return CacheError(
        f"the encoding {encoding} cannot serve {needed}",
        found=f"targets for {kind} losses alone",
        expected=f"the encoding {able}",
        action=f"set distill.global_kind and distill.spatial_kind to {kind}, or use a cache dumped "
        "with such an encoding",
    )
