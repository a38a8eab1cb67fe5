"""Loss values and gradients, against numpy in float64 from the definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from timm.data.mixup import mixup_target

from cskd_pipeline.distill import ckf
from cskd_pipeline.distill.losses import DistillationLoss, LossParts, mixed_targets
from cskd_pipeline.distill.targets import EnvelopeTargets, LogitTargets
from cskd_pipeline.errors import CacheError, RecipeError, UsageError
from cskd_pipeline.models.student import Heads

B, K, H, W = 3, 7, 2, 4
RATIO = 0.37
SOFT = {"global_kind": "soft", "spatial_kind": "soft"}


class Case:
    """Random heads, labels and responses, as torch leaves and as numpy float64."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.cls, self.dist = rng.normal(0, 2, (2, B, K)).astype(np.float32)
        self.dense = rng.normal(0, 2, (B, K, H, W)).astype(np.float32)
        self.d = rng.normal(0, 3, (B, K, H, W)).astype(np.float16)
        self.g = rng.normal(0, 3, (B, K)).astype(np.float16)
        labels = rng.random((B, K)).astype(np.float32)
        self.labels = labels / labels.sum(1, keepdims=True)
        self.heads = Heads(
            *(torch.tensor(a, requires_grad=True) for a in (self.cls, self.dist, self.dense))
        )
        self.targets = LogitTargets(torch.from_numpy(self.d), torch.from_numpy(self.g))
        self.g = self.g.astype(np.float64)
        self.fused = RATIO * self.d.astype(np.float64) + (1 - RATIO) * self.g[:, :, None, None]

    def loss(self, **options: Any) -> LossParts:
        return DistillationLoss(**options)(
            self.heads, torch.from_numpy(self.labels), self.targets, RATIO
        )


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Along axis 1, in float64."""
    x = x.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def soft_ce(logits: np.ndarray, target: np.ndarray) -> float:
    return float(-(target * log_softmax(logits)).sum(axis=1).mean())


def hard_ce(logits: np.ndarray, label: np.ndarray) -> float:
    return float(-np.take_along_axis(log_softmax(logits), label[:, None], axis=1).mean())


def kl(student: np.ndarray, teacher: np.ndarray, tau: float) -> float:
    """KL(teacher || student) at temperature tau, summed over everything."""
    p, q = log_softmax(teacher / tau), log_softmax(student / tau)
    return float((np.exp(p) * (p - q)).sum())


def test_hard_cskd_is_the_weighted_sum_of_three_cross_entropies() -> None:
    case = Case()
    parts = case.loss(alpha=0.3, spatial_weight=1.7)
    base = soft_ce(case.cls, case.labels)
    global_ = hard_ce(case.dist, case.g.argmax(1))
    spatial = hard_ce(case.dense, case.fused.argmax(1))
    expected = [0.7 * base + 0.3 * global_ + 1.7 * spatial, base, global_, spatial]
    np.testing.assert_allclose(parts.detached(), expected, rtol=1e-5)


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize(
    ("scaling", "global_count", "spatial_count"), [("reference", B * K, B), ("mean", B, B * H * W)]
)
def test_soft_terms_are_divergences_in_both_scalings(
    tau: float, scaling: str, global_count: int, spatial_count: int
) -> None:
    case = Case(1)
    parts = case.loss(**SOFT, temperature=tau, scaling=scaling)
    base = soft_ce(case.cls, case.labels)
    global_ = kl(case.dist, case.g, tau) * tau**2 / global_count
    spatial = kl(case.dense, case.fused, tau) * tau**2 / spatial_count
    expected = [0.5 * base + 0.5 * global_ + spatial, base, global_, spatial]
    np.testing.assert_allclose(parts.detached(), expected, rtol=1e-5)


def test_either_term_may_be_soft_while_the_other_is_hard() -> None:
    case = Case(1)
    hard, soft = case.loss(), case.loss(**SOFT)
    assert case.loss(spatial_kind="soft")[1:] == (hard.base, hard.global_, soft.spatial)
    assert case.loss(global_kind="soft")[1:] == (hard.base, soft.global_, hard.spatial)


def test_weights_may_be_functions_of_progress() -> None:
    case = Case()
    loss = DistillationLoss(alpha=lambda t: t / 2, spatial_weight=lambda t: 3 - t)
    labels = torch.from_numpy(case.labels)
    for t in (0.0, 0.4, 1.0):
        found = loss(case.heads, labels, case.targets, RATIO, t)
        assert torch.equal(found.total, case.loss(alpha=t / 2, spatial_weight=3 - t).total)
    with pytest.raises(RecipeError, match="alpha is a function of the training progress"):
        loss(case.heads, labels, case.targets, RATIO)
    wrong = DistillationLoss(spatial_weight=lambda t: t - 1)
    with pytest.raises(RecipeError, match="spatial_weight is out of range"):
        wrong(case.heads, labels, case.targets, RATIO, 0.5)


def test_deit_has_no_spatial_term() -> None:
    case = Case(2)
    parts = case.loss(method="deit", alpha=0.3)
    base, global_ = soft_ce(case.cls, case.labels), hard_ce(case.dist, case.g.argmax(1))
    expected = [0.7 * base + 0.3 * global_, base, global_, 0.0]
    np.testing.assert_allclose(parts.detached(), expected, rtol=1e-5)


def test_none_is_the_cross_entropy_of_the_class_head_and_needs_no_teacher() -> None:
    case = Case(3)
    labels = torch.from_numpy(case.labels)
    parts = DistillationLoss(method="none")(case.heads._replace(dense=None), labels, None, 1.0)
    expected = soft_ce(case.cls, case.labels)
    np.testing.assert_allclose(parts.detached(), [expected, expected, 0.0, 0.0], rtol=1e-5)
    alone = DistillationLoss(method="none")(Heads(case.heads.cls), labels, None, 1.0)
    assert alone.base.item() == pytest.approx(soft_ce(case.cls, case.labels), rel=1e-5)


@pytest.mark.parametrize("method", ["deit", "cskd"])
def test_missing_targets_or_dense_logits_are_refused_with_the_fix(method: str) -> None:
    case, labels = Case(), torch.ones(B, K) / K
    loss = DistillationLoss(method)
    with pytest.raises(UsageError, match="pass the batch's targets"):
        loss(case.heads, labels, None, RATIO)
    heads = case.heads._replace(dense=None)
    if method == "cskd":
        with pytest.raises(UsageError, match="needs dense logits"):
            loss(heads, labels, case.targets, RATIO)
    else:
        loss(heads, labels, case.targets, RATIO)


def test_without_distillation_token_the_class_head_is_distilled() -> None:
    case = Case(4)
    case.heads = case.heads._replace(dist=None)
    parts = case.loss(method="deit")
    assert parts.global_.item() == pytest.approx(hard_ce(case.cls, case.g.argmax(1)), rel=1e-5)


def test_each_head_gets_the_gradient_of_its_own_term() -> None:
    case = Case(5)
    case.loss(alpha=0.3, spatial_weight=1.7).total.backward()
    cls, dist, dense = (leaf.grad.numpy() for leaf in case.heads)
    np.testing.assert_allclose(
        cls, 0.7 * (np.exp(log_softmax(case.cls)) - case.labels) / B, atol=1e-6
    )
    label = np.eye(K)[case.g.argmax(1)]
    np.testing.assert_allclose(dist, 0.3 * (np.exp(log_softmax(case.dist)) - label) / B, atol=1e-6)
    label = np.moveaxis(np.eye(K)[case.fused.argmax(1)], -1, 1)
    gradient = (np.exp(log_softmax(case.dense)) - label) / (B * H * W)
    np.testing.assert_allclose(dense, 1.7 * gradient, atol=1e-6)


def test_only_the_total_carries_a_gradient() -> None:
    parts = Case().loss()
    assert parts.total.requires_grad
    assert not any(part.requires_grad for part in parts[1:])
    assert not parts.detached().requires_grad
    assert parts.detached().tolist() == [part.item() for part in parts]


def test_half_precision_heads_are_compared_in_float32() -> None:
    case = Case(6)
    exact = case.loss()
    case.heads = Heads(*(logits.bfloat16() for logits in case.heads))
    parts = case.loss()
    assert all(part.dtype == torch.float32 for part in parts)
    np.testing.assert_allclose(parts.detached(), exact.detached(), rtol=0.02)


def test_envelope_and_logits_give_the_same_hard_loss_bit_for_bit() -> None:
    case = Case(7)
    planes = ckf.upper_envelope(case.targets.spatial, case.targets.global_)
    live = case.loss().detached()
    case.targets = EnvelopeTargets(planes, case.targets.hard_global())
    assert torch.equal(case.loss().detached(), live)
    with pytest.raises(CacheError, match="does not support"):
        case.loss(**SOFT)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("method", ["none", "deit", "cskd"])
def test_no_loss_waits_for_the_device(method: str, kind: str) -> None:
    # a meta tensor has no values, so reading one would raise
    with torch.device("meta"):
        heads = Heads(torch.empty(B, K), torch.empty(B, K), torch.empty(B, K, H, W))
        label = torch.zeros(B, dtype=torch.int64)
        targets = LogitTargets(torch.empty(B, K, H, W).half(), torch.empty(B, K).half())
        labels = mixed_targets(label, label, torch.ones(B), K, 0.1)
        parts = DistillationLoss(method, kind, kind)(heads, labels, targets, 0.5)
        assert parts.detached().shape == (4,)


def test_mixed_labels_are_smoothed_and_shared_by_lambda() -> None:
    label, partner = torch.tensor([0, 2, 1]), torch.tensor([1, 2, 3])
    lam = torch.tensor([0.25, 0.5, 1.0])
    target = mixed_targets(label, partner, lam, 4, 0.2)
    low = 0.05
    expected = [
        [low + 0.8 * 0.25, low + 0.8 * 0.75, low, low],
        [low, low, low + 0.8, low],
        [low, low + 0.8, low, low],
    ]
    np.testing.assert_allclose(target, expected, rtol=1e-6)
    assert target.dtype == torch.float32
    timms = mixup_target(label, 4, 0.25, 0.2)  # mixes a batch with its own reverse
    ours = mixed_targets(label, label.flip(0), torch.full((3,), 0.25), 4, 0.2)
    torch.testing.assert_close(ours, timms)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "fitnet"),
        ("global_kind", "medium"),
        ("spatial_kind", "medium"),
        ("scaling", "sum"),
        ("alpha", 1.5),
        ("spatial_weight", -1.0),
        ("temperature", 0.0),
    ],
)
def test_settings_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        DistillationLoss(**{field: value})
    assert caught.value.where == f"distill.{field}"
    assert caught.value.found == value
