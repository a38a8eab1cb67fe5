"""Gumbel noise that is a pure function of a view's seed, and the envelopes of noisy lines.

``argmax_k(x_k + tau * G_k)`` with independent standard Gumbel noise G is an exact draw from
softmax(x / tau) (Gumbel, 1954; Maddison et al., arXiv 1411.0030). With ``x = r * d + (1 - r) * g``
and one noise for all r, class k is a line in r from ``g_k + tau * G_k`` to ``d_k + tau * G_k``: the
upper envelope of these lines is a draw from the soft target at every r.

The noise of draw n, location l (row by row) and class k of h * w locations and K classes is made of
word i = (n * h * w + l) * K + k of SplitMix64 (Steele et al., OOPSLA 2014), whose state begins as
``derive_seed("sampled", view seed)``; all integers modulo 2**64::

    z = state + (i + 1) * 0x9E3779B97F4A7C15
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9
    z = (z ^ z >> 27) * 0x94D049BB133111EB
    z = z ^ z >> 31
    u = (2 * (z >> 12) + 1) / 2**53
    noise = round(tau * -log(-log(u)) * 2**16) / 2**16

Integers are the same on every device; a platform's logarithms, which may differ by some 1e-15, are
rounded to 1.5e-5, and then differ for about one value in 1e9. Sums of the noise and float16 logits
are multiples of 2**-24 below 2**17, exact in float64, so that :mod:`cskd_pipeline.distill.ckf` goes
on in integers.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cskd_pipeline.distill.ckf import envelope_of_lines, logit_lines
from cskd_pipeline.views.bits import derive_seed

NOISE_UNITS = 65536
"""Noise is a multiple of 1/65536."""
_STEP, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_CHUNK = 1 << 19  # lines handled at once: in float64, with their noise, some 50 MB


def gumbel_noise(
    seeds: np.ndarray, first: int, count: int, temperature: float, device: torch.device | str
) -> Tensor:
    """Return tau * G of words ``first`` to ``first + count`` of each view, (B, count) float64.

    Args:
        seeds: (B,) uint64, the views'.
    """
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
    """Return the envelopes of ``draws`` noisy copies of a response, one grid below the other.

    Args:
        spatial: (B, K, h, w) float16.
        global_: (B, K) float16.
        seeds: (B,) uint64, the views'.

    Returns:
        planes (B, P, draws * h, w) uint16, see :func:`cskd_pipeline.distill.ckf.upper_envelope`.

    Raises:
        TeacherError: a logit is NaN or infinite.
    """
    classes, height, width = spatial.shape[1:]
    size = classes * height * width

    def noisy_lines() -> Iterator[tuple[Tensor, Tensor]]:
        for draw in range(draws):
            start = 0
            for d, g in logit_lines(spatial, global_, torch.float64, _CHUNK):
                own = seeds[start : start + len(d)]
                noise = gumbel_noise(own, draw * size, size, temperature, d.device).view(d.shape)
                yield d.add_(noise), noise.add_(g)
                start += len(d)

    planes = envelope_of_lines(noisy_lines(), height, width).view(torch.int16)
    each = planes.unflatten(0, (draws, -1)).permute(1, 2, 0, 3, 4)  # (B, P, draws, h, w)
    return each.flatten(2, 3).view(torch.uint16)


def _signed(word: int) -> int:
    """The int64 with these 64 bits."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(z: Tensor, bits: int) -> Tensor:
    """``z >> bits`` as of unsigned words."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
