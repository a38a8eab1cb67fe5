"""Eight bits per logit: the error is half a step, up to a constant that softmax ignores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cskd_pipeline.distill.encodings.dense_q8 import GLOBAL, SPATIAL, STEP, DenseQ8
from cskd_pipeline.distill.targets import LogitTargets

SEEDS = np.zeros(0, np.uint64)  # not used


def restore(codes: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, K, h, w) and (B, K) float32, as the losses have them."""
    targets = DenseQ8().targets(codes)
    assert isinstance(targets, LogitTargets)
    return targets.spatial, targets.global_


def logits(seed: int, spread: float, classes: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spatial = torch.randn(3, classes, 2, 3, generator=generator) * spread
    spatial = spatial.clamp(-65504, 65504)  # the largest float16
    return spatial.half(), spatial.mean((2, 3)).half()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 1e-3, 1.0, 10.0, 1000.0, 15000.0]))
def test_values_come_back_within_half_a_step_up_to_a_number_per_location(
    seed: int, spread: float
) -> None:
    spatial, global_ = logits(seed, spread)
    codes = DenseQ8().encode(spatial, global_, SEEDS)
    assert codes[SPATIAL].dtype == codes[GLOBAL].dtype == torch.uint8
    assert max(codes[SPATIAL].max(), codes[GLOBAL].max()) <= 254
    for column, (exact, found) in enumerate(zip((spatial, global_), restore(codes), strict=True)):
        error = found - exact.float()
        error = (error - error.mean(1, keepdim=True)).abs().flatten(1).amax(1)
        # Half a step from each rounding, as much again from centring on the rounded values' mean.
        assert (error <= codes[STEP][:, column] * 1.001).all()


def test_the_step_is_an_eighth_or_what_255_codes_need() -> None:
    spatial, global_ = logits(0, 1.0)
    assert (DenseQ8().encode(spatial, global_, SEEDS)[STEP] == 1 / 8).all()
    wide = spatial.clone()
    wide[1, 0, 0, 0], wide[1, 1, 0, 0] = 500.0, -500.0
    step = DenseQ8().encode(wide, global_, SEEDS)[STEP]
    centred = wide.float() - wide.float().mean(1, keepdim=True)
    expected = (centred[1].max() - centred[1].min()) / 254
    assert step[1, 0] == pytest.approx(float(expected), rel=1e-6)
    assert (step[[0, 2]] == 1 / 8).all()
    assert (step[:, 1] == 1 / 8).all()


def test_adding_to_all_classes_of_a_location_changes_no_code() -> None:
    spatial = torch.arange(3 * 16 * 4).reshape(3, 16, 2, 2).remainder(13).half()
    global_ = spatial[:, :, 0, 0]
    offsets = torch.tensor([[0.0, 8.0], [-4.0, 16.0]]).half()
    first, second = (
        DenseQ8().encode(spatial, global_, SEEDS),
        DenseQ8().encode(spatial + offsets, global_ - 2, SEEDS),
    )
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_distributions_are_close_at_every_ratio() -> None:
    spatial, global_ = logits(1, 3.0, 1000)
    d, g = restore(DenseQ8().encode(spatial, global_, SEEDS))
    for r in (0.0, 0.5, 1.0):
        exact = (r * spatial.float() + (1 - r) * global_.float()[..., None, None]).log_softmax(1)
        found = (r * d + (1 - r) * g[..., None, None]).log_softmax(1)
        # A uniform error within s/2 gives about s^2 / 24 nats: 6.5e-4 at s = 1/8.
        assert float((exact.exp() * (exact - found)).sum(1).mean()) < 1e-3


def test_restoring_is_codes_times_steps() -> None:
    codes = {
        SPATIAL: torch.tensor([[[[0]], [[254]]]], dtype=torch.uint8),
        GLOBAL: torch.tensor([[3, 1]], dtype=torch.uint8),
        STEP: torch.tensor([[0.5, 0.125]]),
    }
    spatial, global_ = restore(codes)
    assert spatial.flatten().tolist() == [0.0, 127.0]
    assert global_.tolist() == [[0.375, 0.125]]
