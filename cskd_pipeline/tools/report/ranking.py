"""Which runs won, by how much, and at what cost: runs that differ in their seed count as one."""

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
        name: a run's, or what the names of several begin with.
        runs: at least one, of different seeds.
        style: of its curves.
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
        """Return the best top-1 by seed, in percent, of the runs that were evaluated."""
        found = {run.recipe.run.seed: run.best() for run in self.runs}
        return {seed: best["top1"] for seed, best in found.items() if best is not None}

    @property
    def best(self) -> MeanOfRuns | None:
        """Return the mean of :attr:`top1`; None without an evaluation."""
        return MeanOfRuns.of(list(self.top1.values())) if self.top1 else None

    @property
    def column(self) -> str:
        """Return the log's column that has the best top-1 of most runs."""
        weights = [best["weights"] for run in self.runs if (best := run.best()) is not None]
        return "ema_top1" if 2 * weights.count("ema") > len(weights) else "top1"

    @property
    def seconds(self) -> float | None:
        """Return the mean time of training, without evaluation; None where it was not logged."""
        spent = self._elapsed()
        return None if spent is None else fmean(each[-1] for each in spent)

    def mean(self, column: str) -> float | None:
        """Return the mean of a column over epochs and runs, or None."""
        found = [mean for run in self.runs if (mean := run.mean(column)) is not None]
        return fmean(found) if found else None

    def curve(self, column: str, *, timed: bool = False) -> Series | None:
        """Return the mean of a column over epochs, or seconds, and the seeds' range as its band.

        None of fewer than two points, or where the seconds were not logged.
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
        """Return the seconds up to every epoch, of each run; None where one has not logged them."""
        found = [spent for run in self.runs if (spent := run.elapsed()) is not None]
        return found if len(found) == len(self.runs) else None


def rank(runs: Sequence[RunRecord]) -> list[Contender]:
    """Return the recipes that ran, the one with the highest top-1 first."""
    groups: dict[tuple[str, int], list[RunRecord]] = {}
    seen = Counter[tuple[str, int]]()
    for run in runs:
        recipe = {k: v for k, v in flatten(asdict(run.recipe)) if k not in SEEDS_DIFFER_IN}
        recipe["run.fork_from"] = bool(run.recipe.run.fork_from)  # each seed forks its own state
        name, seed = repr(recipe), run.recipe.run.seed
        groups.setdefault((name, seen[name, seed]), []).append(run)  # a seed again is on its own
        seen[name, seed] += 1
    names = [_common([run.name for run in group]) for group in groups.values()]
    found = [
        Contender(
            name if name and names.count(name) == 1 else f"{group[0].name} and others",
            tuple(group),
            style,
        )
        for style, (name, group) in enumerate(zip(names, groups.values(), strict=True))
    ]
    return sorted(found, key=lambda one: -(one.best.mean if one.best else -1.0))


def _common(names: Sequence[str]) -> str:
    """Return a run's name; of several ``cskd`` of ``cskd-0`` and ``cskd-1``; empty if they differ.

    Names of seeds differ in a number at their end.
    """
    if len(names) == 1:
        return names[0]
    found = {_SEED.sub("", name) for name in names}
    return found.pop() if len(found) == 1 else ""


def verdict(ranked: Sequence[Contender]) -> list[str]:
    """Return who won, by how much and at what cost, in sentences that go on after the name of the
    first; none where no run has been evaluated.
    """
    means = [(one, one.best) for one in ranked if one.best is not None]
    if not means:
        return []
    first, best = means[0]
    said = [f"reaches {best} % top-1{_in(first)}."]
    if len(means) > 1:
        second, other = means[1]
        behind = f"{best.mean - other.mean:.2f} points behind"
        said += [f"{second.name} is second{_in(second)}, {behind}.", _noise(first, second)]
    return said


def _noise(first: Contender, second: Contender) -> str:
    if len(first.top1.keys() & second.top1.keys()) < 2:
        return "With one seed of each, the noise of seeds is not known."
    judged = judge(first.top1, second.top1)
    clear, found = "outside" if judged.clear else "within", judged.difference
    return (
        f"Seed by seed the difference is {found.mean:+.2f} ± {found.error:.2f}: {clear} the noise."
    )


def _in(one: Contender) -> str:
    return "" if one.seconds is None else f" in {took(one.seconds)} of training"


def took(seconds: float) -> str:
    """Return ``52.1 minutes``."""
    unit, size = unit_of(seconds)
    return f"{number(round(seconds / size, 1))} {unit}"


def unit_of(seconds: float) -> tuple[str, int]:
    """Return the unit in which a time is read best, and its seconds."""
    units = {"hours": 3600, "minutes": 60}
    return next(((u, s) for u, s in units.items() if seconds >= 2 * s), ("seconds", 1))
