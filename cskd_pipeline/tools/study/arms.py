"""The arms compared in the study, and the claims of the paper (arXiv 2307.08500)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Args:
        sets: changes to the method's recipe, in the form of ``--set``.
        fork: start from the state of :data:`TRUNK` at the fork instead of fresh weights.
    """

    name: str
    method: str
    label: str
    sets: tuple[str, ...] = ()
    fork: bool = False


TRUNK = Arm("cskd_spatial", "cskd", "cskd, r = 1 throughout", ("distill.schedule=spatial",))
"""The arm whose state is forked; it also serves as the fork with r = 1."""
ARMS = (
    Arm("none", "none", "none: labels alone"),
    Arm("deit", "deit", "deit: the global response"),
    Arm("cskd_linear", "cskd", "cskd, r from 1 to 0"),
    TRUNK,
    Arm("fork_linear", "cskd", "fork: r from 1 to 0", ("distill.schedule=linear",), True),
    Arm("fork_off", "cskd", "fork: no spatial term", ("distill.spatial_weight=0.0",), True),
)


@dataclass(frozen=True)
class Claim:
    """The claim that arm ``better`` reaches a higher top-1 than arm ``worse``."""

    text: str
    better: str
    worse: str


ORDERING = (
    Claim("cskd > deit", "cskd_linear", "deit"),
    Claim("deit > none", "deit", "none"),
)
"""The paper's main table: cskd > deit > none, cskd with the linear schedule."""
FUSION = Claim("CKF > r = 1, full runs", "cskd_linear", "cskd_spatial")
"""The paper's ablation of CKF."""
LATE = (
    Claim("CKF > r = 1, from the fork", "fork_linear", "cskd_spatial"),
    Claim("no spatial term > r = 1, from the fork", "fork_off", "cskd_spatial"),
    Claim("CKF > no spatial term, from the fork", "fork_linear", "fork_off"),
)
"""The paper's explanation of CKF: once learned, local labels hold the student back."""
CLAIMS = (*ORDERING, FUSION, *LATE)


@dataclass(frozen=True)
class StudyRun:
    """One student: an arm and a seed, which sets the initial weights and the order of images."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """Return the name of the run's folder, such as ``cskd_linear-1``."""
        return f"{self.arm.name}-{self.seed}"


def runs_of(seed: int, *, forks: bool) -> list[StudyRun]:
    """Return a seed's full runs or its forks, which need the finished trunk."""
    return [StudyRun(arm, seed) for arm in ARMS if arm.fork == forks]


@dataclass(frozen=True)
class ForkPoint:
    """The epoch at which a trunk is forked, its dense head's top-1 at that epoch, and whether this
    reaches the teacher's local accuracy.
    """

    epoch: int
    dense: float | None
    reached: bool


def kept_every(epochs: int) -> int:
    """Return the interval in epochs between a trunk's kept states: about ten per run."""
    return max(1, epochs // 10)


def fork_point(dense: Sequence[float | None], local: float) -> ForkPoint:
    """Return the first kept epoch at which the trunk has learned what local labels can teach.

    Args:
        dense: the dense head's top-1 after each of at least two epochs, in percent; None: not
            measured.
        local: the teacher's local accuracy, in percent. If it is not reached in the first half of
            the run, the fork is at the end of that half.
    """
    every = kept_every(len(dense))
    kept = range(every, len(dense) // 2 + 1, every)
    reached = [epoch for epoch in kept if (dense[epoch - 1] or 0.0) >= local]
    epoch = reached[0] if reached else kept[-1]
    return ForkPoint(epoch, dense[epoch - 1], bool(reached))
