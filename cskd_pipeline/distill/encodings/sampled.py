"""``sampled``: unbiased draws from the soft target at every ratio r, in about 300 bytes per draw.

``argmax_k(x_k + tau * G_k)`` with independent standard Gumbel noise G is an exact draw from
softmax(x / tau) (Gumbel, 1954; Maddison et al., arXiv 1411.0030). With ``x = r * d + (1 - r) * g``
and the same G for all r, class k is a line in r from ``g_k + tau * G_k`` to ``d_k + tau * G_k``.
The class of a location's highest line at r is thus a draw from softmax(x / tau), and the upper
envelope stores it for every r. At r = 0 all locations are draws from softmax(g / tau), the global
target. The manifest records tau and the number of draws, which the dump fixes. Noise is independent
across draws, locations and views, and is reproducible from the views' seeds.

The loss is the cross entropy with the drawn labels, averaged over draws. Its expectation is the
cross entropy with the soft target: the gradient is that of the KL divergence, and the value larger
by the target's entropy.

Lines are stored as in ``envelope``, with the grids of the draws stacked along the rows.

The noise of draw n, location l (row-major) and class k, for h * w locations and K classes, comes
from word i = (n * h * w + l) * K + k of SplitMix64 (Steele et al., OOPSLA 2014) with the initial
state ``derive_seed("sampled", view seed)``; all integers modulo 2**64::

    z = state + (i + 1) * 0x9E3779B97F4A7C15
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9
    z = (z ^ z >> 27) * 0x94D049BB133111EB
    z = z ^ z >> 31
    u = (2 * (z >> 12) + 1) / 2**53
    noise = round(tau * -log(-log(u)) * 2**16) / 2**16

The integers are the same on every device. Logarithms may differ by some 1e-15 between platforms,
and after rounding to 2**-16 in about one value in 1e9. Sums of noise and float16 logits are
multiples of 2**-24 below 2**17 in magnitude, exact in float64, so
:mod:`cskd_pipeline.distill.ckf` computes their envelope in exact integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from cskd_pipeline.distill.encodings.base import ArraySpec, Encoding, ResponseShape, Rows
from cskd_pipeline.distill.encodings.envelope import (
    lines_of,
    lines_spec,
    packed_lines,
    planes_of,
    unpacked_lines,
)
from cskd_pipeline.errors import UsageError
from cskd_pipeline.views.bits import derive_seed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cskd_pipeline.distill.targets import Targets

LINES = "sampled/lines"

NOISE_UNITS = 65536
"""Noise values are multiples of 1/65536."""
_STEP, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_CHUNK = 1 << 19  # lines per chunk: in float64, with their noise, some 50 MB


class Sampled(Encoding):
    """Lines (B, L, 2, draws * h, w) uint16, in the layout of ``envelope``.

    Args:
        draws: number of draws per location, 1 to 8.
        temperature: tau of the soft targets, 0.01 to 1000; the only supported temperature.

    Raises:
        UsageError: draws or temperature out of range.
    """

    name = "sampled"
    serves = ("soft",)
    exact = False

    def __init__(self, draws: int = 1, temperature: float = 1.0) -> None:
        if not (1 <= draws <= 8 and 0.01 <= temperature <= 1000.0):
            raise UsageError(
                "draws or temperature of the sampled encoding are out of range",
                found=f"{draws} draws at temperature {temperature}",
                expected="1 to 8 draws at a temperature of 0.01 to 1000",
            )
        self.draws, self.temperature = draws, float(temperature)
        self.temperatures = (self.temperature, self.temperature)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sampled) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.draws, self.temperature))

    def to_json(self) -> dict[str, float]:
        """Return the manifest's entry: ``draws`` and ``temperature``."""
        return {"draws": self.draws, "temperature": self.temperature}

    def arrays(self, shape: ResponseShape) -> tuple[ArraySpec, ...]:
        """Return the array of lines, in chunks of a few lines."""
        return (lines_spec(LINES, self._stacked(shape)),)

    def encode(self, spatial: Tensor, global_: Tensor, seeds: np.ndarray) -> dict[str, Tensor]:
        """Return the upper envelope of every location's noisy lines."""
        planes = noisy_envelopes(spatial, global_, seeds, self.draws, self.temperature)
        return {LINES: lines_of(planes)}

    def targets(self, arrays: Mapping[str, Tensor]) -> Targets:
        """Return targets with draws from the soft targets at every r."""
        from cskd_pipeline.distill.targets import SampledTargets

        return SampledTargets(planes_of(arrays[LINES]), self.draws, self.temperature)

    def pack(self, rows: Rows) -> Rows:
        """Move each plane's used crossings to its start."""
        return {LINES: packed_lines(rows[LINES])}

    def unpack(self, rows: Rows, shape: ResponseShape) -> Rows:
        """Move the crossings back to their locations; refuse classes that do not exist."""
        return {LINES: unpacked_lines(rows[LINES], self._stacked(shape))}

    def _stacked(self, shape: ResponseShape) -> ResponseShape:
        return shape._replace(height=self.draws * shape.height)


def gumbel_noise(
    seeds: np.ndarray, first: int, count: int, temperature: float, device: torch.device | str
) -> Tensor:
    """Return tau * G for each view's words ``first`` to ``first + count - 1``, (B, count) float64.

    Args:
        seeds: (B,) uint64, the views' seeds.
    """
    import torch

    states = np.array([derive_seed("sampled", int(seed)) for seed in seeds], np.uint64)
    z = torch.arange(first + 1, first + count + 1, device=device) * _signed(_STEP)
    z = z + torch.from_numpy(states.view(np.int64)).to(device)[:, None]
    z = (z ^ _shifted(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shifted(z, 27)) * _signed(_MIX_2)
    z = _shifted(z ^ _shifted(z, 31), 12)
    uniform = (2 * z + 1).double() * 2.0**-53
    noise = uniform.log_().neg_().log_().mul_(-temperature * NOISE_UNITS)
    return noise.round_().div_(NOISE_UNITS)


def noisy_envelopes(
    spatial: Tensor, global_: Tensor, seeds: np.ndarray, draws: int, temperature: float
) -> Tensor:
    """Return the envelopes of ``draws`` noisy copies of a response, stacked along the rows.

    Args:
        spatial: (B, K, h, w) float16.
        global_: (B, K) float16.
        seeds: (B,) uint64, the views' seeds.

    Returns:
        planes (B, P, draws * h, w) uint16, see :func:`cskd_pipeline.distill.ckf.upper_envelope`.
    """
    import torch

    from cskd_pipeline.distill.ckf import envelope_of_lines, logit_lines

    classes, height, width = spatial.shape[1:]
    size = classes * height * width

    def noisy_lines() -> Iterator[tuple[Tensor, Tensor]]:
        for draw in range(draws):
            start = 0
            for d, g in logit_lines(spatial, global_, torch.float64, _CHUNK):
                part = seeds[start : start + len(d)]
                noise = gumbel_noise(part, draw * size, size, temperature, d.device).view(d.shape)
                yield d.add_(noise), noise.add_(g)
                start += len(d)

    planes = envelope_of_lines(noisy_lines(), height, width).view(torch.int16)
    planes = planes.unflatten(0, (draws, -1)).permute(1, 2, 0, 3, 4)  # (B, P, draws, h, w)
    return planes.flatten(2, 3).view(torch.uint16)


def _signed(word: int) -> int:
    """Return the int64 with the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Return ``z >> bits`` as on unsigned words."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
