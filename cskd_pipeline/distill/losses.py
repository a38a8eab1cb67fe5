"""The loss of each method, hard and soft, as in CSKD (arXiv 2307.08500) and its authors' code.

``total = (1 - alpha) * base + alpha * global + spatial_weight * spatial``: ``base`` compares the
class head with the labels, ``global`` the distillation head with the teacher's global response,
``spatial`` the dense head with the fused response at every location. ``deit`` has no spatial term,
``none`` is ``base`` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from cskd_pipeline.distill.targets import Targets
from cskd_pipeline.errors import RecipeError
from cskd_pipeline.models.student import Heads, Student

METHODS = ("none", "deit", "cskd")
KINDS = ("hard", "soft")
SCALINGS = ("reference", "mean")

soft_cross_entropy = SoftTargetCrossEntropy()


def mixed_targets(
    label: Tensor, partner_label: Tensor, lam: Tensor, num_classes: int, smoothing: float
) -> Tensor:
    """Smoothed labels of mixed views, (B, K) float32, as timm's mixup makes them.

    Args:
        label, partner_label: (B,) int64.
        lam: (B,) float32, the share of the sample's own pixels.
        smoothing: mass spread evenly over all classes.
    """
    low = smoothing / num_classes
    target = torch.full((len(label), num_classes), low, device=label.device)
    own = (1.0 - smoothing) * lam.float()
    target.scatter_add_(1, label[:, None], own[:, None])
    target.scatter_add_(1, partner_label[:, None], (1.0 - smoothing - own)[:, None])
    return target


def inference_heads(method: str, student: Student) -> tuple[str, ...]:
    """Return the heads that the method trains; their mean is the student's answer."""
    if method == "none":
        return ("cls",)
    heads = ("cls", "dist") if student.has_distillation_token else ("cls",)
    return (*heads, "dense") if method == "cskd" else heads


class LossParts(NamedTuple):
    """Scalars: ``total`` with its gradient, the unweighted parts without; unused parts are 0."""

    total: Tensor
    base: Tensor
    global_: Tensor
    spatial: Tensor

    def detached(self) -> Tensor:
        """(4,) total, base, global, spatial, still on their device."""
        return torch.stack([part.detach() for part in self])


@dataclass(frozen=True)
class DistillationLoss:
    """The loss of a method.

    Args:
        method: ``none``, ``deit`` or ``cskd``.
        global_kind: of the global term, ``hard`` (cross entropy with the teacher's class) or
            ``soft`` (KL divergence).
        spatial_kind: of the spatial term, likewise.
        alpha: weight of the global term.
        spatial_weight: lambda, weight of the spatial term.
        temperature: tau of the soft terms.
        scaling: of the soft terms, which are sums over everything: ``reference`` multiplies the
            global one by tau^2 / (B * K) and the spatial one by tau^2 / B, as the authors do;
            ``mean`` by tau^2 / B and tau^2 / (B * h * w), the mean over distributions.

    Raises:
        RecipeError: an unknown word, or a weight out of range.
    """

    method: str = "cskd"
    global_kind: str = "hard"
    spatial_kind: str = "hard"
    alpha: float = 0.5
    spatial_weight: float = 1.0
    temperature: float = 1.0
    scaling: str = "reference"

    def __post_init__(self) -> None:
        for name, known in (
            ("method", METHODS),
            ("global_kind", KINDS),
            ("spatial_kind", KINDS),
            ("scaling", SCALINGS),
        ):
            if getattr(self, name) not in known:
                raise RecipeError(
                    f"unknown {name}",
                    where=f"distill.{name}",
                    found=getattr(self, name),
                    expected=", ".join(known),
                )
        for name, fits, expected in (
            ("alpha", 0.0 <= self.alpha <= 1.0, "0 to 1"),
            ("spatial_weight", self.spatial_weight >= 0.0, "0 or more"),
            ("temperature", self.temperature > 0.0, "more than 0"),
        ):
            if not fits:
                raise RecipeError(
                    f"{name} is out of range",
                    where=f"distill.{name}",
                    found=getattr(self, name),
                    expected=expected,
                )

    def __call__(
        self, heads: Heads, label_targets: Tensor, targets: Targets | None, r: float
    ) -> LossParts:
        """The loss of a batch; no host sync.

        Args:
            heads: the student's; ``dense`` is needed by ``cskd`` only. A student without
                distillation token is distilled through its class head.
            label_targets: (B, K) float32, see :func:`mixed_targets`.
            targets: the teacher's answers; None for ``none``.
            r: the CKF ratio.

        Raises:
            CacheError: soft targets asked of an encoding that has none.
        """
        heads = heads.float()
        unused = heads.cls.new_zeros(())
        base = soft_cross_entropy(heads.cls, label_targets)
        if self.method == "none":
            return LossParts(base, base.detach(), unused, unused)
        assert targets is not None, self.method
        distilled = heads.cls if heads.dist is None else heads.dist
        global_ = self._global(distilled, targets)
        total = (1.0 - self.alpha) * base + self.alpha * global_
        if self.method == "deit":
            return LossParts(total, base.detach(), global_.detach(), unused)
        assert heads.dense is not None
        spatial = self._spatial(heads.dense, targets, r)
        total = total + self.spatial_weight * spatial
        return LossParts(total, base.detach(), global_.detach(), spatial.detach())

    def _global(self, logits: Tensor, targets: Targets) -> Tensor:
        if self.global_kind == "hard":
            return cross_entropy(logits, targets.hard_global())
        samples = len(logits) if self.scaling == "mean" else logits.numel()
        teacher = targets.global_log_probabilities(self.temperature)
        return self._divergence(logits, teacher) / samples

    def _spatial(self, logits: Tensor, targets: Targets, r: float) -> Tensor:
        if self.spatial_kind == "hard":
            return cross_entropy(logits, targets.hard_spatial(r))
        locations = logits[:, 0].numel() if self.scaling == "mean" else len(logits)
        teacher = targets.spatial_log_probabilities(r, self.temperature)
        return self._divergence(logits, teacher) / locations

    def _divergence(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """tau^2 * KL(teacher || student) at temperature tau along dimension 1, summed.

        Args:
            teacher: log-probabilities at that temperature.
        """
        tau = self.temperature
        divergence = kl_div(
            log_softmax(logits / tau, dim=1),
            teacher,
            reduction="sum",
            log_target=True,
        )
        return divergence * tau**2
