"""The loss of each method, hard and soft, as in CSKD (arXiv 2307.08500) and its authors' code.

``total = (1 - alpha) * base + alpha * global + spatial_weight * spatial``: ``base`` compares the
class head with the labels, ``global`` the distillation head with the teacher's global response, and
``spatial`` the dense head with the fused response at every location. ``deit`` omits the spatial
term; ``none`` is ``base`` alone.

A soft term is ``tau^2 * KL(teacher || student)`` of softmax distributions at temperature tau. With
draws from the soft targets (:class:`SampledTargets`) it is ``tau^2`` times the cross entropy with
the drawn classes, averaged over draws: the expected gradient is the same, the expected value larger
by ``tau^2`` times the targets' entropy. :class:`DistillationLoss` gives the normalisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from cskd_pipeline.distill.targets import SampledTargets, Targets
from cskd_pipeline.errors import RecipeError, UsageError
from cskd_pipeline.models.student import Heads, Student

METHODS = ("none", "deit", "cskd")
KINDS = ("hard", "soft")
SCALINGS = ("reference", "mean")

Weight = float | Callable[[float], float]
"""Weight of a loss term: a number, or a function of the training progress t in [0, 1]."""

soft_cross_entropy = SoftTargetCrossEntropy()


def mixed_targets(
    label: Tensor, partner_label: Tensor, lam: Tensor, num_classes: int, smoothing: float
) -> Tensor:
    """Return the smoothed labels of mixed views, (B, K) float32, as timm's ``mixup_target`` does.

    Args:
        label, partner_label: (B,) int64.
        lam: (B,) float32, weight of a sample's own label (its share of the pixels).
        smoothing: probability mass spread evenly over all classes.
    """
    low = smoothing / num_classes
    target = torch.full((len(label), num_classes), low, device=label.device)
    own = (1.0 - smoothing) * lam.float()
    target.scatter_add_(1, label[:, None], own[:, None])
    target.scatter_add_(1, partner_label[:, None], (1.0 - smoothing - own)[:, None])
    return target


def inference_heads(method: str, student: Student) -> tuple[str, ...]:
    """Return the heads that the method trains; their mean logits are the student's prediction."""
    if method == "none":
        return ("cls",)
    heads = ("cls", "dist") if student.has_distillation_token else ("cls",)
    return (*heads, "dense") if method == "cskd" else heads


class LossParts(NamedTuple):
    """The loss of a batch and its unweighted terms, as scalar tensors.

    Attributes:
        total: weighted sum, with gradient: call ``total.backward()``.
        base, global_, spatial: detached terms; 0 if the method has no such term.
    """

    total: Tensor
    base: Tensor
    global_: Tensor
    spatial: Tensor

    def detached(self) -> Tensor:
        """Return total, base, global and spatial without gradient, (4,), on their device."""
        return torch.stack([part.detach() for part in self])


@dataclass(frozen=True)
class DistillationLoss:
    """The loss between a student's logits, the labels and the teacher's response.

    It works without the rest of the package: with heads from :func:`dense_logits` or your own
    :class:`Heads`, your own labels, and targets from a cache or a live teacher::

        loss = DistillationLoss("cskd", spatial_weight=lambda t: 2 - t)
        targets = LogitTargets(spatial, global_)  # (B, K, h, w), (B, K)
        r = ckf_ratio("linear", t)  # t: epoch / epochs
        loss(Heads(cls, dist, dense), labels, targets, r, t).total.backward()

    Args:
        method: ``none``, ``deit`` or ``cskd``.
        global_kind: ``hard`` (cross entropy with the teacher's class) or ``soft`` (KL divergence).
        spatial_kind: ``hard`` or ``soft``, for the spatial term.
        alpha: weight of the global term, in [0, 1]: a number, or a function of progress.
        spatial_weight: lambda, weight of the spatial term, 0 or more: a number, or a function of
            progress.
        temperature: tau of the soft terms.
        scaling: factor of the soft terms' KL divergence, summed over batch and locations.
            ``reference``, the authors' code: tau^2 / (B * K) for the global term, tau^2 / B for the
            spatial term. ``mean``, per distribution: tau^2 / B and tau^2 / (B * h * w).

    Raises:
        RecipeError: an unknown method, kind or scaling; a weight or temperature out of range.
    """

    method: str = "cskd"
    global_kind: str = "hard"
    spatial_kind: str = "hard"
    alpha: Weight = 0.5
    spatial_weight: Weight = 1.0
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
        _require(self.temperature > 0.0, "temperature", self.temperature, "more than 0")
        for name in ("alpha", "spatial_weight"):
            if not callable(getattr(self, name)):
                self._weight(name, None)

    @property
    def kinds(self) -> dict[str, str]:
        """Return the kind of each teacher term of the method, by its key."""
        terms: dict[str, tuple[str, ...]] = {
            "none": (),
            "deit": ("global_kind",),
            "cskd": ("global_kind", "spatial_kind"),
        }
        return {name: getattr(self, name) for name in terms[self.method]}

    def __call__(
        self,
        heads: Heads,
        label_targets: Tensor,
        targets: Targets | None,
        r: float,
        progress: float | None = None,
    ) -> LossParts:
        """Return the loss of a batch as :class:`LossParts`; no host sync.

        Args:
            heads: the student's logits; ``dense`` is required by ``cskd`` only. A student without
                distillation token is distilled through its class head.
            label_targets: (B, K) float32 probabilities: a batch's ``labels``.
            targets: the teacher's response; None for ``none``.
            r: CKF ratio.
            progress: t in [0, 1]; required if a weight is a function of it.

        Raises:
            CacheError: the targets' encoding does not support a term's kind or temperature.
            RecipeError: a weight or r is out of range.
            UsageError: the method needs targets or a dense head that is missing.
        """
        heads = heads.float()
        unused = heads.cls.new_zeros(())
        base = soft_cross_entropy(heads.cls, label_targets)
        if self.method == "none":
            return LossParts(base, base.detach(), unused, unused)
        if targets is None:
            raise UsageError(
                f"the method {self.method} needs the teacher's response, but targets is None",
                action="pass the batch's targets, from views opened with a cache; or use "
                'DistillationLoss("none")',
            )
        distilled = heads.cls if heads.dist is None else heads.dist
        global_ = self._global(distilled, targets)
        alpha = self._weight("alpha", progress)
        total = (1.0 - alpha) * base + alpha * global_
        if self.method == "deit":
            return LossParts(total, base.detach(), global_.detach(), unused)
        if heads.dense is None:
            raise UsageError(
                "the method cskd needs dense logits, but the heads have none",
                action="pass the teacher's grid: dense_logits(model, images, views.grid)",
            )
        spatial = self._spatial(heads.dense, targets, r)
        total = total + self._weight("spatial_weight", progress) * spatial
        return LossParts(total, base.detach(), global_.detach(), spatial.detach())

    def _weight(self, name: str, progress: float | None) -> float:
        """Return a term's weight at ``progress``; refuse one that is out of range."""
        weight: Weight = getattr(self, name)
        if callable(weight):
            if progress is None:
                raise RecipeError(
                    f"{name} is a function of the training progress, but progress is None",
                    where=f"distill.{name}",
                    action="pass progress=t, in [0, 1], to the loss",
                )
            weight = weight(progress)
        if name == "alpha":
            _require(0.0 <= weight <= 1.0, name, weight, "0 to 1")
        else:
            _require(weight >= 0.0, name, weight, "0 or more")
        return weight

    def _global(self, logits: Tensor, targets: Targets) -> Tensor:
        if self.global_kind == "hard":
            return cross_entropy(logits, targets.hard_global())
        samples = len(logits) if self.scaling == "mean" else logits.numel()
        if isinstance(targets, SampledTargets):
            return self._drawn(logits, targets.drawn_global(self.temperature)) / samples
        teacher = targets.global_log_probabilities(self.temperature)
        return self._divergence(logits, teacher) / samples

    def _spatial(self, logits: Tensor, targets: Targets, r: float) -> Tensor:
        if self.spatial_kind == "hard":
            return cross_entropy(logits, targets.hard_spatial(r))
        locations = logits[:, 0].numel() if self.scaling == "mean" else len(logits)
        if isinstance(targets, SampledTargets):
            return self._drawn(logits, targets.drawn_spatial(r, self.temperature)) / locations
        teacher = targets.spatial_log_probabilities(r, self.temperature)
        return self._divergence(logits, teacher) / locations

    def _divergence(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """Return tau^2 * KL(teacher || student) along dimension 1, summed.

        Args:
            logits: the student's, (B, K, ...).
            teacher: log-probabilities at temperature tau, (B, K, ...).
        """
        tau = self.temperature
        student = log_softmax(logits / tau, dim=1)
        divergence = kl_div(student, teacher, reduction="sum", log_target=True)
        return divergence * tau**2

    def _drawn(self, logits: Tensor, drawn: Tensor) -> Tensor:
        """Return tau^2 * cross entropy with drawn classes, averaged over draws, else summed.

        Args:
            logits: the student's, (B, K, ...).
            drawn: (B, draws, ...) int64 classes.
        """
        tau = self.temperature
        log_likelihood = log_softmax(logits / tau, dim=1).gather(1, drawn)
        return -log_likelihood.mean(dim=1).sum() * tau**2


def _require(fits: bool, name: str, found: float, expected: str) -> None:
    if not fits:
        raise RecipeError(
            f"{name} is out of range", where=f"distill.{name}", found=found, expected=expected
        )
