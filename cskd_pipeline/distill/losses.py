"""The loss of each method, hard and soft, as in CSKD (arXiv 2307.08500) and its authors' code.

``total = (1 - alpha) * base + alpha * global + spatial_weight * spatial``: ``base`` compares the
class head with the labels, ``global`` the distillation head with the teacher's global response,
``spatial`` the dense head with the fused response at every location. ``deit`` has no spatial term,
``none`` is ``base`` alone.

With draws of the soft targets in their place (:class:`SampledTargets`), a soft term is the cross
entropy with the drawn classes, mean over draws: it has the same expected gradient as the KL
divergence, and a value that is larger, in expectation, by tau^2 times the targets' entropy.
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
"""Of a term of the loss: a number, or a function of the training's progress t in [0, 1]."""

soft_cross_entropy = SoftTargetCrossEntropy()


def mixed_targets(
    label: Tensor, partner_label: Tensor, lam: Tensor, num_classes: int, smoothing: float
) -> Tensor:
    """Return the smoothed labels of mixed views, (B, K) float32, as timm's mixup makes them.

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
    """Return the heads that the method trains; their mean is the student's prediction."""
    if method == "none":
        return ("cls",)
    heads = ("cls", "dist") if student.has_distillation_token else ("cls",)
    return (*heads, "dense") if method == "cskd" else heads


class LossParts(NamedTuple):
    """Hold scalar tensors, in this order: the loss of a batch, and its unweighted parts.

    Attributes:
        total: the weighted sum, with its gradient: call ``total.backward()``.
        base, global_, spatial: without gradient; 0 where the method has no such term.
    """

    total: Tensor
    base: Tensor
    global_: Tensor
    spatial: Tensor

    def detached(self) -> Tensor:
        """Return (4,) total, base, global, spatial, still on their device."""
        return torch.stack([part.detach() for part in self])


@dataclass(frozen=True)
class DistillationLoss:
    """Compare a student's logits with labels and the teacher's response, in one of three methods.

    It needs nothing of the rest of the package: heads from :func:`dense_logits` (or any
    :class:`Heads` of one's own), labels of one's own, and targets of a cache or a live teacher::

        loss = DistillationLoss("cskd", spatial_weight=lambda t: 2 - t)
        targets = LogitTargets(spatial, global_)  # (B, K, h, w), (B, K)
        r = ckf_ratio("linear", t)  # t: epoch / epochs
        loss(Heads(cls, dist, dense), labels, targets, r, t).total.backward()

    Args:
        method: ``none``, ``deit`` or ``cskd``.
        global_kind: of the global term, ``hard`` (cross entropy with the teacher's class) or
            ``soft`` (KL divergence).
        spatial_kind: of the spatial term, likewise.
        alpha: weight of the global term, in [0, 1]; a number, or a function of progress.
        spatial_weight: lambda, weight of the spatial term, 0 or more; likewise.
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
        """Return the kind of each term that the method has, by its name."""
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
            heads: the student's; ``dense`` is needed by ``cskd`` only. A student without
                distillation token is distilled through its class head.
            label_targets: (B, K) float32, probabilities: a batch's ``labels``.
            targets: the teacher's response; None for ``none``.
            r: the CKF ratio.
            progress: t in [0, 1]; needed where a weight is a function of it.

        Raises:
            CacheError: a soft term, and an encoding that holds hard labels alone.
            RecipeError: a weight or r is out of range.
            UsageError: no targets, or no dense head, where the method needs them.
        """
        heads = heads.float()
        unused = heads.cls.new_zeros(())
        base = soft_cross_entropy(heads.cls, label_targets)
        if self.method == "none":
            return LossParts(base, base.detach(), unused, unused)
        if targets is None:
            raise UsageError(
                f"the method {self.method} compares with the teacher's response, which is None",
                action="pass the batch's targets, of views that a cache was opened for; or use "
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
                "the method cskd compares the dense head, which these heads lack",
                action="pass the teacher's grid: dense_logits(model, images, views.grid)",
            )
        spatial = self._spatial(heads.dense, targets, r)
        total = total + self._weight("spatial_weight", progress) * spatial
        return LossParts(total, base.detach(), global_.detach(), spatial.detach())

    def _weight(self, name: str, progress: float | None) -> float:
        """The weight of a term at ``progress``, checked."""
        weight: Weight = getattr(self, name)
        if callable(weight):
            if progress is None:
                raise RecipeError(
                    f"{name} is a function of the training's progress, which is not given",
                    where=f"distill.{name}",
                    action="pass progress=t, in [0, 1], when you compute the loss",
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

    def _drawn(self, logits: Tensor, drawn: Tensor) -> Tensor:
        """tau^2 * cross entropy of the student at tau with draws, mean over them, else summed.

        Args:
            logits: (B, K, ...).
            drawn: (B, draws, ...) int64.
        """
        tau = self.temperature
        found = log_softmax(logits / tau, dim=1).gather(1, drawn)
        return -found.mean(dim=1).sum() * tau**2


def _require(fits: bool, name: str, found: float, expected: str) -> None:
    if not fits:
        raise RecipeError(
            f"{name} is out of range", where=f"distill.{name}", found=found, expected=expected
        )
