"""Soft answers in kilobytes: the classes that matter, and the tail's mass at every CKF ratio.

Legend: B samples, K classes, h x w the teacher's grid; ``spatial`` d (B, K, h, w), ``global_`` g
(B, K), float16; r the CKF ratio, tau the temperature.

What is usual, to keep the k largest probabilities and divide by their sum, is biased: it says that
the rest is impossible, where with 1,000 classes and augmented images the rest holds a quarter of
the mass. Here one set of k classes serves all locations and every r, and the tail keeps its mass:

    fused / tau = a * d + b * g        with a = r / tau and b = (1 - r) / tau, a + b <= 1
    L(a, b) = log of the sum over the tail of exp(a * d + b * g)

L is smooth and convex. It is stored at the corners of the triangle 0 <= a, b, a + b <= 1 and at the
middles of its sides; between them the quadratic through these six values stands for it. At
tau = 1 it is exact for r = 0, 1/2 and 1, and for tau = 2 for r = 0 and 1. Inside the tail,
classes share the mass by their global logits, in steps of 1/2, of which a location follows a part
of its own (``slope``, the regression of its logits on the global ones).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from cskd_pipeline.errors import CacheError

UNUSED = 255
"""No code reaches it."""
_FINE = 8.0  # codes per unit of logit, of kept classes
_COARSE = 2.0  # and of the global logits of all classes
_LOWEST = -1000.0  # below the largest; impossible is impossible, and float16 masses stay finite


class TopKArrays(NamedTuple):
    """What is kept of a batch: logits are codes, counted down from the largest of their location.

    Args:
        classes: (B, k) uint16, the kept ones, the most probable first.
        spatial: (B, k, h, w) uint8, d of the kept classes in steps of 1/8.
        global_: (B, k) uint8, g of the kept classes in steps of 1/8.
        coarse: (B, K) uint8, g of all classes in steps of 1/2; None without a tail.
        tail: (B, 4, h, w) float16: slope, L(1, 0), L(1/2, 0), L(1/2, 1/2); None without a tail.
        tail_global: (B, 2) float16: L(0, 1), L(0, 1/2); None without a tail.
    """

    classes: Tensor
    spatial: Tensor
    global_: Tensor
    coarse: Tensor | None = None
    tail: Tensor | None = None
    tail_global: Tensor | None = None


def compress(spatial: Tensor, global_: Tensor, kept: int) -> TopKArrays:
    """Keep the ``kept`` classes with most probability over all places and the global response."""
    d, g = spatial.float(), global_.float()
    score = d.softmax(dim=1).mean(dim=(2, 3)) + g.softmax(dim=1)
    score.scatter_add_(1, g.argmax(dim=1, keepdim=True), torch.full_like(score[:, :1], 2.0))
    order = score.sort(dim=1, descending=True, stable=True).indices
    classes = order[:, :kept]
    d, g = _below_largest(d), _below_largest(g)
    head = TopKArrays(
        classes.to(torch.uint16),
        _codes(d.gather(1, _at_places(classes, d)), _FINE),
        _codes(g.gather(1, classes), _FINE),
    )
    if kept >= d.shape[1]:
        return head
    coarse = _codes(g, _COARSE)
    rest = order[:, kept:]
    d, g = d.gather(1, _at_places(rest, d)), g.gather(1, rest)
    slope = _slope(d, -coarse.gather(1, rest).float() / _COARSE)
    halves = d / 2 + g[:, :, None, None] / 2
    tail = [slope, d.logsumexp(1), (d / 2).logsumexp(1), halves.logsumexp(1)]
    tail_global = [g.logsumexp(1), (g / 2).logsumexp(1)]
    return head._replace(
        coarse=coarse,
        tail=torch.stack(tail, dim=1).half(),
        tail_global=torch.stack(tail_global, dim=1).half(),
    )


@dataclass(frozen=True)
class TopKTargets:
    """Log-probabilities over all K classes from :class:`TopKArrays`, at temperatures from 1 on."""

    kept: TopKArrays

    def hard_global(self) -> Tensor:
        """Approximate: :meth:`global_log_probabilities`'s largest."""
        return self.global_log_probabilities(1.0).argmax(dim=1)

    def hard_spatial(self, r: float) -> Tensor:
        """Approximate: :meth:`spatial_log_probabilities`'s largest."""
        return self.spatial_log_probabilities(r, 1.0).argmax(dim=1)

    def global_log_probabilities(self, temperature: float) -> Tensor:
        _require_tail(temperature)
        kept, b = self.kept, 1.0 / temperature
        logits = -kept.global_.float() * (b / _FINE)
        if kept.coarse is None or kept.tail_global is None:
            return self._over_all_classes(logits, None)
        at_one, at_half = kept.tail_global.float().unbind(dim=1)
        mass = _quadratic(0.0, b, self._tail_size, at_one, at_half)
        return self._over_all_classes(logits, -kept.coarse.float() * (b / _COARSE), mass)

    def spatial_log_probabilities(self, r: float, temperature: float) -> Tensor:
        _require_tail(temperature)
        kept, a, b = self.kept, r / temperature, (1.0 - r) / temperature
        g = kept.global_.float()[:, :, None, None]
        logits = -(a * kept.spatial.float() + b * g) / _FINE
        if kept.coarse is None or kept.tail is None or kept.tail_global is None:
            return self._over_all_classes(logits, None)
        slope, *spatial = kept.tail.float().unbind(dim=1)
        global_ = kept.tail_global.float()[:, :, None, None].unbind(dim=1)
        mass = _quadratic(a, b, self._tail_size, *global_, *spatial)
        shape = (a * slope + b)[:, None] * -kept.coarse.float()[:, :, None, None]
        return self._over_all_classes(logits, shape / _COARSE, mass)

    @property
    def _tail_size(self) -> int:
        assert self.kept.coarse is not None
        return self.kept.coarse.shape[1] - self.kept.classes.shape[1]

    def _over_all_classes(
        self, logits: Tensor, tail: Tensor | None, mass: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities (B, K, ...) from those of the kept classes and of the tail.

        Args:
            logits: (B, k, ...).
            tail: (B, K, ...), up to a number per location; what it says of kept classes is not
                used.
            mass: (B, ...), log of the tail's sum in the units of ``logits``.
        """
        classes = self.kept.classes.to(torch.int64)
        index = _at_places(classes, logits)
        if tail is None or mass is None:
            return log_softmax(torch.empty_like(logits).scatter_(1, index, logits), dim=1)
        tail = tail.scatter(1, index, -math.inf)
        tail = tail + (mass - tail.logsumexp(dim=1))[:, None]
        return log_softmax(tail.scatter_(1, index, logits), dim=1)


def _quadratic(
    a: float,
    b: float,
    size: int,
    at_b: Tensor,
    at_half_b: Tensor,
    at_a: Tensor | float = 0.0,
    at_half_a: Tensor | float = 0.0,
    at_halves: Tensor | float = 0.0,
) -> Tensor:
    """L(a, b) by the quadratic through its six values; L(0, 0) is log ``size``.

    These are the shape functions of the six-node triangle (finite elements' P2).
    """
    c = 1.0 - a - b
    return (
        c * (2 * c - 1) * math.log(size)
        + b * (2 * b - 1) * at_b
        + 4 * b * c * at_half_b
        + a * (2 * a - 1) * at_a
        + 4 * a * c * at_half_a
        + 4 * a * b * at_halves
    )


def _below_largest(logits: Tensor) -> Tensor:
    return (logits - logits.amax(dim=1, keepdim=True)).clamp(min=_LOWEST)


def _codes(logits: Tensor, per_unit: float) -> Tensor:
    return (-logits * per_unit).round().clamp(max=UNUSED - 1).to(torch.uint8)


def _slope(d: Tensor, g: Tensor) -> Tensor:
    """Of the regression of d (B, n, h, w) on g (B, n) over n: (B, h, w); 0 where g is constant."""
    g = g - g.mean(dim=1, keepdim=True)
    covariance = torch.einsum("bnhw,bn->bhw", d, g)
    return covariance / g.square().sum(dim=1).clamp(min=1e-6)[:, None, None]


def _at_places(classes: Tensor, like: Tensor) -> Tensor:
    """(B, n) as an index along dimension 1 of ``like``."""
    index = classes.reshape(*classes.shape, *[1] * (like.ndim - 2))
    return index.expand(*classes.shape, *like.shape[2:])


def _require_tail(temperature: float) -> None:
    if temperature < 1.0:
        raise CacheError(
            "the topk encoding cannot serve this temperature",
            found=f"distill.temperature = {temperature:g}",
            expected="1 or more: the tail's mass is known there",
            action="use a cache with the encoding dense or dense-q8",
        )
