"""Claim 1 of the design: a cache's targets equal the live teacher's."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from cskd_pipeline.cache.reader import open_cache
from tests.pipeline.conftest import World
from tests.pipeline.live import LiveResponse, live_responses

RATIOS = [Fraction(i, 20) for i in range(21)]
HALF_QUANTUM = Fraction(1, 2 * 65535)


@pytest.fixture(scope="module")
def live(small: World) -> list[LiveResponse]:
    return list(live_responses(small.shards, small.cache))


def test_a_dense_cache_has_the_live_teachers_float16_logits(
    small: World, live: list[LiveResponse]
) -> None:
    reader = open_cache(small.cache)
    for response in live:
        rows = reader.rows("dense", response.view, response.shard, np.arange(len(response.global_)))
        assert np.array_equal(rows["dense/spatial"], response.spatial)
        assert np.array_equal(rows["dense/global"], response.global_)


@pytest.mark.parametrize("encoding", ["dense", "envelope"])
def test_cached_hard_labels_are_the_live_argmax_at_every_location_and_ratio(
    small: World, live: list[LiveResponse], encoding: str
) -> None:
    reader = open_cache(small.cache)
    compared = 0
    for response in live:
        n = len(response.global_)
        rows = reader.rows(encoding, response.view, response.shard, np.arange(n))
        tensors = {name: torch.from_numpy(values) for name, values in rows.items()}
        targets = reader.encodings[encoding].targets(tensors)
        for r in RATIOS:
            labels = targets.hard_spatial(float(r)).numpy()
            expected, near = _argmax(response, r)
            assert np.array_equal(labels[~near], expected[~near]), (
                response.view,
                response.shard,
                r,
            )
            compared += int((~near).sum())
        assert np.array_equal(targets.hard_global().numpy(), response.global_.argmax(1))
    assert compared > 0.99 * len(RATIOS) * sum(a.spatial[:, 0].size for a in live)


def _argmax(response: LiveResponse, r: Fraction) -> tuple[np.ndarray, np.ndarray]:
    """Return labels by exact integer arithmetic, and where a crossing is within half a quantum.

    float16 logits are integers in units of 2**-24, so ``r = p/q`` makes the fused response an
    integer in units of 2**-24 / q. A label changes within half a quantum of r where the label at
    the interval's ends differs; at r = 0 and r = 1 nothing may differ.
    """
    exact = _labels(response, r)
    if r in (0, 1):
        return exact, np.zeros_like(exact, bool)
    low, high = (_labels(response, r + step) for step in (-HALF_QUANTUM, HALF_QUANTUM))
    return exact, (low != exact) | (high != exact)


def _labels(response: LiveResponse, r: Fraction) -> np.ndarray:
    d = (response.spatial.astype(np.float64) * 2**24).astype(np.int64)
    g = (response.global_.astype(np.float64) * 2**24).astype(np.int64)[:, :, None, None]
    g = np.broadcast_to(g, d.shape)
    fused = r.numerator * d + (r.denominator - r.numerator) * g
    classes = np.broadcast_to(np.arange(d.shape[1])[None, :, None, None], d.shape)
    # lexsort's last key counts most: fused, then global, then spatial, then the lower index.
    order = np.lexsort((-classes, d, g, fused), axis=1)
    return order[:, -1]
