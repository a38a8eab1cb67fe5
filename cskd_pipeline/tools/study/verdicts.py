"""Means, deviations, and whether a claim held. Plain numbers in, plain words out.

Runs of one seed share first weights and the order of images, so two methods are compared seed by
seed: what the seeds have in common cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

NOISE = 2.0
"""Standard errors of the mean paired difference: less than them is within the noise.

With few seeds that is a low bar: Student's t asks for 4.3 of three seeds at 95 %.
"""


@dataclass(frozen=True)
class MeanOfRuns:
    """Hold a mean and the sample standard deviation (n - 1), which a single value has not."""

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
        """Return ``55.82 ± 0.31``."""
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")


@dataclass(frozen=True)
class Verdict:
    """Say whether one method was better than another.

    Attributes:
        better, worse: of the seeds that both have.
        differences: paired, better minus worse, in the order of the seeds.
        held: the mean difference is above zero; None where that is not known.
        clear: it lies outside the noise, see :data:`NOISE`; None where the noise is not known.
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
            return "cannot be judged: not all values are numbers"
        word = "held" if self.held else "did not hold"
        if not self.held and self.difference.mean == 0:
            word += ": equal"
        if self.clear is None:
            return f"{word}, in the one seed there is"
        return word if self.clear else f"{word}, within noise"

    @property
    def numbers(self) -> str:
        """Return ``55.82 ± 0.31 > 53.80 ± 0.40; paired +2.02 ± 0.17: +1.90 +1.80 +2.36``.

        What follows a mean is the sample standard deviation, what follows the mean paired
        difference its standard error.
        """
        difference = self.difference
        sign = ">" if difference.mean > 0 else "<" if difference.mean < 0 else "="
        sign = "?" if self.held is None else sign
        error = "" if difference.error is None else f" ± {difference.error:.2f}"
        each = " ".join(f"{value:+.2f}" for value in self.differences)
        return f"{self.better} {sign} {self.worse}; paired {difference.mean:+.2f}{error}: {each}"


def judge(better: Mapping[int, float], worse: Mapping[int, float]) -> Verdict:
    """Compare two methods by seed -> top-1; at least one seed is in both."""
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
    """Return the word for a chain of claims together."""
    if any(verdict.held is None for verdict in verdicts):
        return "cannot be judged"
    if not all(verdict.held for verdict in verdicts):
        return "did not hold"
    if any(verdict.clear is None for verdict in verdicts):
        return "held, in the one seed there is"
    return "held" if all(verdict.clear for verdict in verdicts) else "held, within noise"
