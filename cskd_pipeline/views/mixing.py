"""Partners: pairs of views, and the parameters of their mixing."""

import math
from dataclasses import dataclass

import numpy as np

from cskd_pipeline.views.bits import BitStream, derive_seed
from cskd_pipeline.views.draw import Box
from cskd_pipeline.views.policy import ViewPolicy

NO_BOX = Box(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Mix:
    """The mixing of both members of a pair; ``lam`` is the share of a member's own pixels.

    CutMix replaces ``box`` by the partner's pixels; mixup is ``lam * own + (1 - lam) * partner``.
    """

    cutmix: bool
    lam: float
    box: Box


UNMIXED = Mix(cutmix=False, lam=1.0, box=NO_BOX)


def matching(
    root_seed: int, shard_id: str, count: int, view: int, policy: ViewPolicy
) -> np.ndarray:
    """Return the partner of each sample of a tar shard in ``view``, (count,) int64 offsets.

    Each window of ``policy.window`` consecutive samples is sorted by one random word per sample and
    paired in that order. A sample left over, and every sample without mixing, is its own partner.
    The matching is its own inverse, and the same for ``policy.repeats`` consecutive views.

    Args:
        shard_id: SHA-256 of the shard's keys in order.
    """
    samples = np.arange(count)
    if not policy.mixes:
        return samples
    bits = BitStream(derive_seed("matching", root_seed, shard_id, view // policy.repeats))
    window = samples // policy.window
    order = np.lexsort((bits.raw(count), window))  # each window keeps its range of positions
    position = samples % policy.window
    other = np.where(position % 2 == 0, samples + 1, samples - 1)
    alone = (other >= count) | (window[np.minimum(other, count - 1)] != window)
    other = np.where(alone, samples, other)
    partner = np.empty(count, np.int64)
    partner[order] = order[other]
    return partner


def draw_mix(seed_a: int, seed_b: int, policy: ViewPolicy) -> Mix:
    """Draw the mixing of a pair from its two view seeds, in either order.

    The distribution is that of timm's ``Mixup`` in pair mode: with probability ``mix`` a pair is
    mixed, by CutMix with probability ``cutmix_switch`` if both kinds are enabled. CutMix's ``lam``
    is that of the clipped box.
    """
    if seed_a == seed_b or not policy.mixes:
        return UNMIXED
    bits = BitStream(derive_seed("mix", min(seed_a, seed_b), max(seed_a, seed_b)))
    if not bits.chance(policy.mix):
        return UNMIXED
    switched = bits.chance(policy.cutmix_switch)
    cutmix = policy.cutmix_alpha > 0 and (policy.mixup_alpha == 0 or switched)
    alpha = policy.cutmix_alpha if cutmix else policy.mixup_alpha
    lam = bits.beta(alpha, alpha)
    if not cutmix:
        return Mix(cutmix=False, lam=lam, box=NO_BOX)
    box = _cut_box(bits, lam, policy.size)
    return Mix(cutmix=True, lam=1.0 - box.height * box.width / policy.size**2, box=box)


def _cut_box(bits: BitStream, lam: float, side: int) -> Box:
    """Draw a box of area ``1 - lam`` and uniform centre, clipped to the view (CutMix, eq. 2)."""
    cut = int(side * math.sqrt(1.0 - lam))
    before, after = cut // 2, cut - cut // 2
    row, column = bits.below(side), bits.below(side)
    top, left = max(0, row - before), max(0, column - before)
    return Box(top, left, min(side, row + after) - top, min(side, column + after) - left)
