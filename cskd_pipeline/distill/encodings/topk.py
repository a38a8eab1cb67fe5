"""``topk``: the most probable classes and the mass of the tail, for soft losses, in 2 kB per view.

Symbols: B samples, K classes, h x w locations; ``spatial`` d (B, K, h, w), ``global_`` g (B, K),
float16; CKF ratio r; temperature tau >= 1.

The usual top-k, the k largest probabilities divided by their sum, is biased: it gives no mass to
the other classes (the tail), which have a quarter of it for 1,000 classes and augmented images.
Here one set of k classes covers all locations and every r, and the tail keeps its mass::

    (r * d + (1 - r) * g) / tau = a * d + b * g    for a = r / tau, b = (1 - r) / tau, a + b <= 1
    L(a, b) = log(sum over tail classes k of exp(a * d_k + b * g_k))

L is smooth and convex. Its values at the corners and edge midpoints of the triangle a, b >= 0,
a + b <= 1 are stored (L(0, 0) is known), and the quadratic through these six interpolates it. For
tau = 1 it is thus exact at r = 0, 1/2 and 1, for tau = 2 at r = 0 and 1, up to float16. Within the
tail, class k gets a share proportional to ``exp((a * slope + b) * g_k)``, with g_k rounded to 1/2
and ``slope`` the regression coefficient of a location's tail logits on the global ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cskd_pipeline.distill.encodings.base import ArraySpec, Encoding, ResponseShape, Rows
from cskd_pipeline.errors import CacheError

if TYPE_CHECKING:
    from torch import Tensor

    from cskd_pipeline.distill.targets import Targets

CLASSES = "topk/classes"
SPATIAL = "topk/spatial"
GLOBAL = "topk/global"
COARSE = "topk/coarse"
TAIL = "topk/tail"
TAIL_GLOBAL = "topk/tail_global"

UNUSED = 255
"""Fill value; codes end at 254."""
_LEVEL = 8
_FINE = 8.0  # codes per unit of logit, for kept classes
_COARSE = 2.0  # codes per unit of logit, for the global logits of all classes
_LOWEST = -1000.0  # limit of logits relative to the largest; keeps float16 masses finite


class TopK(Encoding):
    """k = min(K, 24) kept classes for all locations and every r, and the mass of the tail.

    A row has these arrays; a code is the distance below the location's largest logit, in steps:

    - ``topk/classes`` (k,) uint16: kept classes, the most probable first
    - ``topk/spatial`` (k, h, w) uint8: d of the kept classes in steps of 1/8
    - ``topk/global`` (k,) uint8: g of the kept classes in steps of 1/8
    - ``topk/coarse`` (K,) uint8: g of all classes in steps of 1/2
    - ``topk/tail`` (4, h, w) float16: slope, L(1, 0), L(1/2, 0), L(1/2, 1/2)
    - ``topk/tail_global`` (2,) float16: L(0, 1), L(0, 1/2)

    A teacher of at most 24 classes has no tail, so the last three arrays are absent and rounding to
    1/8 is the only loss.
    """

    name = "topk"
    serves = ("soft",)
    exact = False
    temperatures = (1.0, math.inf)

    def __init__(self, kept: int = 24) -> None:
        self.kept = kept

    def arrays(self, shape: ResponseShape) -> tuple[ArraySpec, ...]:
        """Return the six arrays (three without a tail), one chunk per view of a tar shard."""
        shape.require_numbered(self.name)

        def spec(
            name: str, dtype: str, axes: tuple[str, ...], tail: tuple[int, ...], fill: float
        ) -> ArraySpec:
            return ArraySpec(name, dtype, axes, tail, fill=fill, level=_LEVEL, tail_chunk=tail)

        kept, grid, cell = min(self.kept, shape.classes), tuple(shape[1:]), ("row", "column")
        head = (
            spec(CLASSES, "uint16", ("kept",), (kept,), 65535),
            spec(SPATIAL, "uint8", ("kept", *cell), (kept, *grid), UNUSED),
            spec(GLOBAL, "uint8", ("kept",), (kept,), UNUSED),
        )
        if kept == shape.classes:
            return head
        nan = float("nan")
        return (
            *head,
            spec(COARSE, "uint8", ("class",), (shape.classes,), UNUSED),
            spec(TAIL, "float16", ("slope_and_masses", *cell), (4, *grid), nan),
            spec(TAIL_GLOBAL, "float16", ("masses",), (2,), nan),
        )

    def encode(self, spatial: Tensor, global_: Tensor, seeds: np.ndarray) -> dict[str, Tensor]:
        """Keep the global label and the classes of largest mean spatial plus global probability."""
        import torch

        d, g = spatial.float(), global_.float()
        score = d.softmax(dim=1).mean(dim=(2, 3)) + g.softmax(dim=1)
        score.scatter_add_(1, g.argmax(dim=1, keepdim=True), torch.full_like(score[:, :1], 2.0))
        order = score.sort(dim=1, descending=True, stable=True).indices
        classes, rest = order[:, : self.kept], order[:, self.kept :]
        d, g = _below_largest(d), _below_largest(g)
        head = {
            CLASSES: classes.to(torch.uint16),
            SPATIAL: _codes(d.gather(1, _at_locations(classes, d)), _FINE),
            GLOBAL: _codes(g.gather(1, classes), _FINE),
        }
        if not rest.shape[1]:
            return head
        coarse = _codes(g, _COARSE)
        d, g = d.gather(1, _at_locations(rest, d)), g.gather(1, rest)
        slope = _slope(d, -coarse.gather(1, rest).float() / _COARSE)
        halves = d / 2 + g[:, :, None, None] / 2
        tail = [slope, d.logsumexp(1), (d / 2).logsumexp(1), halves.logsumexp(1)]
        tail_global = [g.logsumexp(1), (g / 2).logsumexp(1)]
        return {
            **head,
            COARSE: coarse,
            TAIL: torch.stack(tail, dim=1).half(),
            TAIL_GLOBAL: torch.stack(tail_global, dim=1).half(),
        }

    def targets(self, arrays: Mapping[str, Tensor]) -> Targets:
        """Return :class:`TopKTargets`."""
        return TopKTargets(arrays)

    def unpack(self, rows: Rows, shape: ResponseShape) -> Rows:
        """Return the rows; refuse classes that do not exist and masses that are not finite."""
        shape.require_classes(rows[CLASSES])
        for name in (TAIL, TAIL_GLOBAL):
            if name in rows and not np.isfinite(rows[name]).all():
                raise ValueError(f"{name} contains NaN or infinite values")
        return rows


@dataclass(frozen=True)
class TopKTargets:
    """Log-probabilities over all K classes, from rows of :class:`TopK`, for temperatures from 1 up.

    Args:
        rows: array name -> (B, ...).
    """

    rows: Mapping[str, Tensor]

    def hard_global(self) -> Tensor:
        """Return argmax of :meth:`global_log_probabilities`, approximate, (B,) int64."""
        return self.global_log_probabilities(1.0).argmax(dim=1)

    def hard_spatial(self, r: float) -> Tensor:
        """Return argmax of :meth:`spatial_log_probabilities`, approximate, (B, h, w) int64."""
        return self.spatial_log_probabilities(r, 1.0).argmax(dim=1)

    def global_log_probabilities(self, temperature: float) -> Tensor:
        """Return log softmax of g / temperature, approximate, (B, K) float32."""
        _require_tail(temperature)
        b = 1.0 / temperature
        logits = -self.rows[GLOBAL].float() * (b / _FINE)
        if COARSE not in self.rows:
            return self._over_all_classes(logits, None)
        at_one, at_half = self.rows[TAIL_GLOBAL].float().unbind(dim=1)
        mass = _quadratic(0.0, b, self._tail_size, at_one, at_half)
        return self._over_all_classes(logits, -self.rows[COARSE].float() * (b / _COARSE), mass)

    def spatial_log_probabilities(self, r: float, temperature: float) -> Tensor:
        """Return log softmax of fused logits / temperature, approximate, (B, K, h, w) float32."""
        _require_tail(temperature)
        a, b = r / temperature, (1.0 - r) / temperature
        g = self.rows[GLOBAL].float()[:, :, None, None]
        logits = -(a * self.rows[SPATIAL].float() + b * g) / _FINE
        if COARSE not in self.rows:
            return self._over_all_classes(logits, None)
        slope, *spatial = self.rows[TAIL].float().unbind(dim=1)
        global_ = self.rows[TAIL_GLOBAL].float()[:, :, None, None].unbind(dim=1)
        mass = _quadratic(a, b, self._tail_size, *global_, *spatial)
        tail = (a * slope + b)[:, None] * -self.rows[COARSE].float()[:, :, None, None]
        return self._over_all_classes(logits, tail / _COARSE, mass)

    @property
    def _tail_size(self) -> int:
        return self.rows[COARSE].shape[1] - self.rows[CLASSES].shape[1]

    def _over_all_classes(
        self, logits: Tensor, tail: Tensor | None, mass: Tensor | None = None
    ) -> Tensor:
        """Return log-probabilities (B, K, ...) from logits of the kept classes and of the tail.

        Args:
            logits: (B, k, ...).
            tail: (B, K, ...), up to a constant per location; values of kept classes are ignored.
            mass: L (B, ...), log of the tail's sum of exp, with the same zero as ``logits``.
        """
        index = _at_locations(self.rows[CLASSES].long(), logits)
        if tail is None or mass is None:
            return logits.new_empty(logits.shape).scatter_(1, index, logits).log_softmax(dim=1)
        tail = tail.scatter(1, index, -math.inf)
        tail = tail + (mass - tail.logsumexp(dim=1))[:, None]
        return tail.scatter_(1, index, logits).log_softmax(dim=1)


def _quadratic(a: float, b: float, size: int, *at: Tensor) -> Tensor:
    """Return L(a, b) from the quadratic through its six values; L(0, 0) is log ``size``.

    The weights are the shape functions of the six-node triangle (the P2 finite element).

    Args:
        at: L(0, 1) and L(0, 1/2), then L(1, 0), L(1/2, 0) and L(1/2, 1/2), optional if a is 0.
    """
    c = 1.0 - a - b
    weights = (b * (2 * b - 1), 4 * b * c, a * (2 * a - 1), 4 * a * c, 4 * a * b)
    total = c * (2 * c - 1) * math.log(size) + weights[0] * at[0]
    for weight, value in zip(weights[1:], at[1:], strict=False):
        total = total + weight * value
    return total


def _below_largest(logits: Tensor) -> Tensor:
    return (logits - logits.amax(dim=1, keepdim=True)).clamp(min=_LOWEST)


def _codes(logits: Tensor, per_unit: float) -> Tensor:
    return (-logits * per_unit).round().clamp(max=UNUSED - 1).byte()


def _slope(d: Tensor, g: Tensor) -> Tensor:
    """Return the regression slope (B, h, w) of d (B, n, h, w) on g (B, n); 0 for constant g."""
    import torch

    g = g - g.mean(dim=1, keepdim=True)
    covariance = torch.einsum("bnhw,bn->bhw", d, g)
    return covariance / g.square().sum(dim=1).clamp(min=1e-6)[:, None, None]


def _at_locations(classes: Tensor, like: Tensor) -> Tensor:
    """Expand class indices (B, n) to index dimension 1 of ``like`` (B, K, ...): (B, n, ...)."""
    index = classes.reshape(*classes.shape, *[1] * (like.ndim - 2))
    return index.expand(*classes.shape, *like.shape[2:])


def _require_tail(temperature: float) -> None:
    if temperature < 1.0:
        raise CacheError(
            "the topk encoding does not support this temperature",
            found=f"distill.temperature = {temperature}",
            expected="1 or more, for which it stores the tail's mass",
            action="use a cache with the encoding dense or dense-q8",
        )
