"""The kept classes and the tail's mass: probabilities that are right, not merely renormalised."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cskd_pipeline.distill.encodings.topk import (
    CLASSES,
    COARSE,
    SPATIAL,
    TAIL,
    TAIL_GLOBAL,
    TopK,
    TopKTargets,
)
from cskd_pipeline.distill.targets import LogitTargets
from cskd_pipeline.errors import CacheError

SEEDS = np.zeros(0, np.uint64)  # not used


def logits(classes: int, seed: int = 0, samples: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return CNN-like logits: similar neighbours, a few dominant classes, many plausible ones."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(samples, classes, 1, 1, generator=generator) * 2
    own = torch.randn(samples, classes, 3, 3, generator=generator)
    peak = torch.zeros(samples, classes, 1, 1)
    peak[:, :3] = 6.0
    spatial = shared + own + peak
    return spatial.half(), spatial.mean((2, 3)).half()


def probabilities(spatial: torch.Tensor, global_: torch.Tensor, r: float, tau: float) -> np.ndarray:
    """(B, K, h, w) float64, by numpy."""
    d, g = spatial.double().numpy(), global_.double().numpy()[:, :, None, None]
    values = np.exp((r * d + (1 - r) * g) / tau)
    return values / values.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("tau", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("r", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_kept_classes_and_the_tail_have_their_mass(r: float, tau: float) -> None:
    spatial, global_ = logits(200)
    kept = TopK().encode(spatial, global_, SEEDS)
    found = TopKTargets(kept).spatial_log_probabilities(r, tau).double().exp().numpy()
    exact = probabilities(spatial, global_, r, tau)
    np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-5)
    index = kept[CLASSES].long()[:, :, None, None].expand(-1, -1, 3, 3).numpy()
    mine = np.take_along_axis(found, index, 1)
    theirs = np.take_along_axis(exact, index, 1)
    # Codes are within 1/16 of each fused logit; relative to the largest, within 1/8.
    np.testing.assert_allclose(mine, theirs, rtol=0.14, atol=1e-6)
    assert 0.02 < 1 - theirs.sum(1).mean() < 0.95  # the tail is not negligible
    np.testing.assert_allclose(mine.sum(1), theirs.sum(1), rtol=0.06)


def test_renormalised_top_k_would_be_far_off() -> None:
    """The reason for storing the mass: plain top-k at the same k."""
    spatial, global_ = logits(1000)
    kept = TopK().encode(spatial, global_, SEEDS)
    exact = probabilities(spatial, global_, 1.0, 1.0)
    index = kept[CLASSES].long()[:, :, None, None].expand(-1, -1, 3, 3).numpy()
    theirs = np.take_along_axis(exact, index, 1)
    renormalised = theirs / theirs.sum(1, keepdims=True)
    found = TopKTargets(kept).spatial_log_probabilities(1.0, 1.0).double().exp().numpy()
    ours = np.take_along_axis(found, index, 1)
    assert np.abs(ours - theirs).mean() < np.abs(renormalised - theirs).mean() / 10


def test_the_global_distribution_is_kept_for_every_class() -> None:
    spatial, global_ = logits(500)
    targets = TopKTargets(TopK().encode(spatial, global_, SEEDS))
    for tau in (1.0, 2.0, 4.0):
        exact = LogitTargets(spatial, global_).global_log_probabilities(tau)
        found = targets.global_log_probabilities(tau)
        # Steps of 1/2: within 1/4 of a logit, plus the rounding of the largest one.
        assert float((found - exact).abs().max()) < 0.45 / tau
        assert float((exact.exp() * (exact - found)).sum(1).max()) < 0.01


def test_without_a_tail_nothing_but_rounding_is_lost() -> None:
    spatial, global_ = logits(10)
    kept = TopK().encode(spatial, global_, SEEDS)
    assert not {COARSE, TAIL, TAIL_GLOBAL} & set(kept)
    assert kept[CLASSES].shape == (4, 10)
    targets = TopKTargets(kept)
    exact = LogitTargets(spatial, global_)
    for r in (0.0, 0.4, 1.0):
        found = targets.spatial_log_probabilities(r, 1.0)
        expected = exact.spatial_log_probabilities(r, 1.0)
        assert float((expected.exp() * (expected - found)).sum(1).max()) < 2e-3
    found = targets.global_log_probabilities(1.0)
    assert float((found - exact.global_log_probabilities(1.0)).abs().max()) < 0.13


def test_kept_classes_are_ranked_by_their_probability_over_all_locations() -> None:
    spatial, global_ = logits(50)
    kept = TopK(5).encode(spatial, global_, SEEDS)
    d, g = spatial.double().numpy(), global_.double().numpy()
    score = probabilities(spatial, global_, 1.0, 1.0).mean((2, 3))
    score += np.exp(g) / np.exp(g).sum(1, keepdims=True)
    score[np.arange(4), g.argmax(1)] += 2  # the global label always comes first
    assert np.array_equal(kept[CLASSES].long().numpy(), np.argsort(-score, axis=1)[:, :5])
    assert d.shape[1] == 50
    expected = (d.max(1, keepdims=True) - d) * 8
    index = kept[CLASSES].long()[:, :, None, None].expand(-1, -1, 3, 3).numpy()
    expected = np.clip(np.round(np.take_along_axis(expected, index, 1)), 0, 254)
    assert np.array_equal(kept[SPATIAL].numpy(), expected.astype(np.uint8))


def test_the_masses_are_those_of_the_tail() -> None:
    spatial, global_ = logits(40)
    kept = TopK(8).encode(spatial, global_, SEEDS)
    d, g = spatial.double().numpy(), global_.double().numpy()
    d, g = d - d.max(1, keepdims=True), g - g.max(1, keepdims=True)
    for sample in range(4):
        rest = np.setdiff1d(np.arange(40), kept[CLASSES][sample].long().numpy())
        tail, tail_g = d[sample, rest], g[sample, rest][:, None, None]
        sums = [np.exp(a * tail + b * tail_g).sum(0) for a, b in ((1, 0), (0.5, 0), (0.5, 0.5))]
        np.testing.assert_allclose(kept[TAIL][sample, 1:].double(), np.log(sums), atol=4e-3)
        sums_g = [np.exp(b * g[sample, rest]).sum() for b in (1, 0.5)]
        np.testing.assert_allclose(kept[TAIL_GLOBAL][sample].double(), np.log(sums_g), atol=4e-3)


def test_a_flat_response_stays_flat() -> None:
    kept = TopK().encode(torch.zeros(2, 60, 2, 2).half(), torch.zeros(2, 60).half(), SEEDS)
    targets = TopKTargets(kept)
    flat = torch.full((2, 60, 2, 2), -math.log(60))
    found = targets.spatial_log_probabilities(0.3, 1.0)
    torch.testing.assert_close(found, flat, atol=1e-3, rtol=0)  # masses are float16
    found = targets.global_log_probabilities(2.0)
    torch.testing.assert_close(found, flat[:, :, 0, 0], atol=1e-3, rtol=0)


def test_extreme_logits_stay_finite() -> None:
    spatial = torch.zeros(1, 60, 1, 1).half()
    spatial[0, 7], spatial[0, 9:] = 65504.0, -65504.0
    kept = TopK().encode(spatial, spatial[:, :, 0, 0], SEEDS)
    targets = TopKTargets(kept)
    for tau in (1.0, 4.0):
        assert targets.spatial_log_probabilities(0.5, tau).isfinite().all()
        assert targets.hard_spatial(0.5).item() == 7


def test_labels_are_those_of_the_logits_if_the_margin_is_clear() -> None:
    spatial, global_ = logits(200)
    targets = TopKTargets(TopK().encode(spatial, global_, SEEDS))
    exact = LogitTargets(spatial, global_)
    assert torch.equal(targets.hard_global(), exact.hard_global())
    for r in (0.0, 0.5, 1.0):
        ordered = np.sort(probabilities(spatial, global_, r, 1.0), axis=1)
        first, second = ordered[:, -1], ordered[:, -2]
        clear = torch.from_numpy(first > 1.3 * second)
        assert clear.float().mean() > 0.5
        assert torch.equal(targets.hard_spatial(r)[clear], exact.hard_spatial(r)[clear])


def test_temperatures_below_one_are_refused() -> None:
    targets = TopKTargets(TopK().encode(*logits(40), SEEDS))
    for call in (
        lambda: targets.global_log_probabilities(0.5),
        lambda: targets.spatial_log_probabilities(0.5, 0.99),
    ):
        with pytest.raises(CacheError, match="does not support this temperature") as caught:
            call()
        assert "dense-q8" in str(caught.value)
