"""The arms that the study compares, and the claims of the paper (arXiv 2307.08500)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """Name one way to train the student; ``schedule`` is CKF's, None where nothing is fused."""

    name: str
    method: str
    schedule: str | None
    label: str

    @property
    def sets(self) -> tuple[str, ...]:
        """Return its changes of its method's recipe, as ``--set`` takes them."""
        return () if self.schedule is None else (f"distill.schedule={self.schedule}",)


ARMS = (
    Arm("none", "none", None, "none: labels alone"),
    Arm("deit", "deit", None, "deit: the global logits"),
    Arm("cskd_spatial", "cskd", "spatial", "cskd, spatial only (r = 1)"),
    Arm("cskd_global", "cskd", "global", "cskd, global only (r = 0)"),
    Arm("cskd_linear", "cskd", "linear", "cskd, CKF linear"),
    Arm("cskd_x2", "cskd", "x2", "cskd, CKF x2"),
    Arm("cskd_cos", "cskd", "cos", "cskd, CKF cos"),
)


@dataclass(frozen=True)
class Claim:
    """Claim that the arm ``better`` reaches a higher top-1 than the arm ``worse``."""

    text: str
    better: str
    worse: str


ORDERING = (
    Claim("cskd > deit", "cskd_linear", "deit"),
    Claim("deit > none", "deit", "none"),
)
"""The paper's main table: cskd > deit > none, cskd with its linear schedule."""
FUSION = Claim("CKF > spatial only", "cskd_linear", "cskd_spatial")
"""The paper's ablation of CKF."""


@dataclass(frozen=True)
class StudyRun:
    """Name one student: an arm with a seed, which decides first weights and the order of images."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """Return the name of its folder, ``cskd_linear-1``."""
        return f"{self.arm.name}-{self.seed}"


def all_runs(seeds: Sequence[int]) -> list[StudyRun]:
    """Return all, seed by seed, so that a study stopped early has all methods at the same seeds."""
    return [StudyRun(arm, seed) for seed in seeds for arm in ARMS]
