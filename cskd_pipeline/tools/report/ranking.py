"""Ranking of runs by top-1, with margin and cost; runs that differ only in their seed are one."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from cskd_pipeline.runtime.console import flatten
from cskd_pipeline.tools.report.plots import Series, number
from cskd_pipeline.tools.report.records import RunRecord
from cskd_pipeline.tools.study.verdicts import MeanOfRuns, judge

_SEED = re.compile("[-_./ ]*(seed)?[-_./ ]*[0-9]+$")
SEEDS_DIFFER_IN = ("run.out", "run.seed")


@dataclass(frozen=True)
class Contender:
    """Runs of one recipe.

    Args:
        name: the run's name, or the common start of several.
        runs: at least one, with different seeds.
        style: style of its curves.
    """

    name: str
    runs: tuple[RunRecord, ...]
    style: int

    @property
    def method(self) -> str:
        """Return ``none``, ``deit`` or ``cskd``."""
        return self.runs[0].method

    @property
    def top1(self) -> dict[int, float]:
        """Return the best top-1 in percent, by seed, of the evaluated runs."""
        bests = {run.recipe.run.seed: run.best() for run in self.runs}
        return {seed: best["top1"] for seed, best in bests.items() if best is not None}

    @property
    def best(self) -> MeanOfRuns | None:
        """Return the mean of :attr:`top1`; None without an evaluation."""
        return MeanOfRuns.of(list(self.top1.values())) if self.top1 else None

    @property
    def column(self) -> str:
        """Return the log's column that holds the best top-1 for most runs."""
        weights = [best["weights"] for run in self.runs if (best := run.best()) is not None]
        return "ema_top1" if 2 * weights.count("ema") > len(weights) else "top1"

    @property
    def seconds(self) -> float | None:
        """Return the mean training time, without evaluation; None if not logged."""
        spent = self._elapsed()
        return None if spent is None else fmean(each[-1] for each in spent)

    def mean(self, column: str) -> float | None:
        """Return the mean of a column over epochs and runs, or None."""
        means = [mean for run in self.runs if (mean := run.mean(column)) is not None]
        return fmean(means) if means else None

    def curve(self, column: str, *, timed: bool = False) -> Series | None:
        """Return the mean of a column over epochs or seconds, with the seeds' range as its band.

        None if it has fewer than two points or the seconds were not logged.
        """
        logged = [run.column(column) for run in self.runs]
        epochs = [epoch for epoch in logged[0] if all(epoch in values for values in logged)]
        spent = self._elapsed() if timed else []
        if len(epochs) < 2 or spent is None:
            return None
        x = [fmean(each[epoch - 1] for each in spent) if timed else epoch for epoch in epochs]
        y = [[values[epoch] for values in logged] for epoch in epochs]
        band = ([min(each) for each in y], [max(each) for each in y]) if len(logged) > 1 else ()
        return Series(self.name, x, [fmean(each) for each in y], self.style, *band)

    def _elapsed(self) -> list[list[float]] | None:
        """Return each run's seconds up to every epoch; None unless all runs logged them."""
        logged = [spent for run in self.runs if (spent := run.elapsed()) is not None]
        return logged if len(logged) == len(self.runs) else None


def rank(runs: Sequence[RunRecord]) -> list[Contender]:
    """Group runs by recipe, the recipe with the highest top-1 first."""
    groups: dict[tuple[str, int], list[RunRecord]] = {}
    seen = Counter[tuple[str, int]]()
    for run in runs:
        recipe = {k: v for k, v in flatten(asdict(run.recipe)) if k not in SEEDS_DIFFER_IN}
        recipe["run.fork_from"] = bool(run.recipe.run.fork_from)  # each seed forks its own state
        name, seed = repr(recipe), run.recipe.run.seed
        # A repeated seed starts a group of its own.
        groups.setdefault((name, seen[name, seed]), []).append(run)
        seen[name, seed] += 1
    names = [_common_name([run.name for run in group]) for group in groups.values()]
    contenders = [
        Contender(
            name if name and names.count(name) == 1 else f"{group[0].name} and others",
            tuple(group),
            style,
        )
        for style, (name, group) in enumerate(zip(names, groups.values(), strict=True))
    ]
    return sorted(contenders, key=lambda one: -(one.best.mean if one.best else -1.0))


def _common_name(names: Sequence[str]) -> str:
    """Return the names without the seed at their end; empty if they still differ."""
    if len(names) == 1:
        return names[0]
    common = {_SEED.sub("", name) for name in names}
    return common.pop() if len(common) == 1 else ""


def verdict(ranked: Sequence[Contender]) -> list[str]:
    """Return sentences on the winner, its margin and cost; empty if no run has been evaluated.

    The first sentence continues after the winner's name.
    """
    means = [(one, one.best) for one in ranked if one.best is not None]
    if not means:
        return []
    first, best = means[0]
    sentences = [f"reaches {best} % top-1{_training_time(first)}."]
    if len(means) > 1:
        second, other = means[1]
        behind = f"{best.mean - other.mean:.2f} points behind"
        sentences += [
            f"{second.name} is second, {behind}{_training_time(second)}.",
            _noise(first, second),
        ]
    return sentences


def _noise(first: Contender, second: Contender) -> str:
    if len(first.top1.keys() & second.top1.keys()) < 2:
        return "With fewer than two common seeds, the noise is unknown."
    judged = judge(first.top1, second.top1)
    clear, paired = "outside" if judged.clear else "within", judged.difference
    difference = f"{paired.mean:+.2f} ± {paired.error:.2f}"
    return f"Paired by seed, the difference is {difference}: {clear} the noise."


def _training_time(one: Contender) -> str:
    return "" if one.seconds is None else f" in {duration(one.seconds)} of training"


def duration(seconds: float) -> str:
    """Format a time, such as ``52.1 minutes``."""
    unit, size = unit_of(seconds)
    return f"{number(round(seconds / size, 1))} {unit}"


def unit_of(seconds: float) -> tuple[str, int]:
    """Return the unit for a time, and its length in seconds."""
    units = {"hours": 3600, "minutes": 60}
    return next(((u, s) for u, s in units.items() if seconds >= 2 * s), ("seconds", 1))
