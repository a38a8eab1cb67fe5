"""Means, deviations, and verdicts on claims: numbers in, words out.

Runs of one seed share initial weights and the order of images, so two methods are compared seed by
seed, which cancels the variation they share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

NOISE = 2.0
"""Differences below this many standard errors of the mean paired difference are within noise.

With few seeds that is a low bar: Student's t requires 4.3 for three seeds at 95 %.
"""


@dataclass(frozen=True)
class MeanOfRuns:
    """A mean and its sample standard deviation (n - 1), which is None for a single value."""

    n: int
    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> MeanOfRuns:
        """Return the mean of at least one value."""
        mean = fmean(values)
        if len(values) == 1:
            return cls(1, mean, None)
        squares = math.fsum((value - mean) ** 2 for value in values)
        return cls(len(values), mean, math.sqrt(squares / (len(values) - 1)))

    @property
    def error(self) -> float | None:
        """Return the standard error of the mean."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.n)

    def __str__(self) -> str:
        """Return mean and deviation: ``55.82 ± 0.31``."""
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")


@dataclass(frozen=True)
class Verdict:
    """The verdict on the claim that one method is better than another.

    Attributes:
        better, worse: means over the seeds that both methods have.
        differences: paired differences, better minus worse, in the order of the seeds.
        held: the mean difference is positive; None if not all values are finite.
        clear: it is outside the noise, see :data:`NOISE`; None if the noise is unknown.
    """

    better: MeanOfRuns
    worse: MeanOfRuns
    differences: tuple[float, ...]
    held: bool | None
    clear: bool | None

    @property
    def difference(self) -> MeanOfRuns:
        """Return the mean of the paired differences."""
        return MeanOfRuns.of(self.differences)

    @property
    def word(self) -> str:
        """Return ``held``, ``did not hold, within noise``, and so on."""
        if self.held is None:
            return "undecided: not all values are finite"
        equal = self.difference.mean == 0
        word = "held" if self.held else "did not hold: no difference" if equal else "did not hold"
        if self.clear is None:
            return f"{word}, one seed only"
        return word if self.clear or equal else f"{word}, within noise"

    @property
    def numbers(self) -> str:
        """Return ``55.82 ± 0.31 > 53.80 ± 0.40; Δ +2.02 ± 0.17: +1.90 +1.80 +2.36``.

        Means have their sample standard deviation; Δ, the mean paired difference, has its standard
        error and is followed by the difference of each seed.
        """
        difference = self.difference
        sign = ">" if difference.mean > 0 else "<" if difference.mean < 0 else "="
        sign = "?" if self.held is None else sign
        error = "" if difference.error is None else f" ± {difference.error:.2f}"
        each = " ".join(f"{value:+.2f}" for value in self.differences)
        return f"{self.better} {sign} {self.worse}; Δ {difference.mean:+.2f}{error}: {each}"


def judge(better: Mapping[int, float], worse: Mapping[int, float]) -> Verdict:
    """Compare two methods, each a mapping of seed to top-1, with at least one seed in common."""
    seeds = [seed for seed in better if seed in worse]
    differences = tuple(better[seed] - worse[seed] for seed in seeds)
    upper, lower = (MeanOfRuns.of([side[seed] for seed in seeds]) for side in (better, worse))
    difference = MeanOfRuns.of(differences)
    held = clear = None
    if math.isfinite(difference.mean):
        held = difference.mean > 0
        error = difference.error
        if error is not None:
            clear = difference.mean != 0 and abs(difference.mean) >= NOISE * error
    return Verdict(upper, lower, differences, held, clear)


def ordering(verdicts: Sequence[Verdict]) -> str:
    """Return the joint verdict on a chain of claims."""
    if any(verdict.held is None for verdict in verdicts):
        return "undecided"
    if not all(verdict.held for verdict in verdicts):
        return "did not hold"
    if any(verdict.clear is None for verdict in verdicts):
        return "held, one seed only"
    return "held" if all(verdict.clear for verdict in verdicts) else "held, within noise"
