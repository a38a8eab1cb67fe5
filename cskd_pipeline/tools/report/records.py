"""A training run's folder: its recipe and its log, read within bounds.

The folder is untrusted, and the run may still be in progress.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from cskd_pipeline.config.reading import load_recipe
from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.errors import RunError, UsageError, printable
from cskd_pipeline.runtime.console import flatten

RECIPE = "recipe.toml"
LOG = "summary.csv"
MAX_RUNS = 24
"""The number of distinct curve styles."""
MAX_BYTES = 16 * 2**20
MAX_LINES = 50_000
LARGEST = 1e30
"""The largest number in a log; float32 plots go no further."""

Row = Mapping[str, float | None]


@dataclass(frozen=True)
class RunRecord:
    """A training run.

    Args:
        name: the folder's name, with as many parents as tell it from the other runs.
        rows: one per finished epoch, column to number; None if not measured.
    """

    folder: Path
    name: str
    recipe: TrainRecipe
    rows: tuple[Row, ...]

    @property
    def method(self) -> str:
        """Return ``none``, ``deit`` or ``cskd``."""
        return self.recipe.distill.method

    @property
    def epochs(self) -> int:
        """Count the finished epochs."""
        return int(self.rows[-1]["epoch"] or 0) if self.rows else 0

    @property
    def schedule(self) -> str | None:
        """Return the name of the CKF schedule; None unless the method is ``cskd``."""
        return self.recipe.distill.schedule if self.method == "cskd" else None

    def column(self, name: str) -> dict[int, float]:
        """Return a column's numbers by epoch, without the epochs that lack one."""
        cells = ((int(row["epoch"] or 0), row.get(name)) for row in self.rows)
        return {epoch: value for epoch, value in cells if value is not None}

    def last(self, name: str) -> float | None:
        """Return the last number of a column, or None."""
        return next(reversed(self.column(name).values()), None)

    def mean(self, name: str) -> float | None:
        """Return the mean of a column over epochs, or None."""
        values = self.column(name).values()
        return sum(values) / len(values) if values else None

    def elapsed(self) -> list[float] | None:
        """Return the seconds of training up to the end of every epoch; None if not logged."""
        seconds = self.column("seconds").values()
        return list(accumulate(seconds)) if 0 < self.epochs == len(seconds) else None

    def best(self) -> dict[str, Any] | None:
        """Return the highest top-1 (percent), its epoch, and its weights: ``last`` or ``ema``.

        The first of equals, as in ``train``; None without validation.
        """
        best: dict[str, Any] | None = None
        for row in self.rows:
            for weights, column in (("last", "top1"), ("ema", "ema_top1")):
                value = row.get(column)
                if value is not None and (best is None or value > best["top1"]):
                    best = {"top1": value, "epoch": int(row["epoch"] or 0), "weights": weights}
        return best


def epoch_name(epoch: int, weights: str) -> str:
    """Name one of a run's students: ``epoch 7``, or ``epoch 7, EMA`` for averaged weights."""
    averaged = {"last": "", "ema": ", EMA"}
    return f"epoch {epoch}{averaged.get(weights, f', {weights}')}"


def is_run(folder: Path) -> bool:
    """Return whether a folder has a training run's recipe."""
    return (folder / RECIPE).is_file()


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read runs, in the order given, under distinct names."""
    if len(folders) > MAX_RUNS:
        raise UsageError(
            "too many runs for one page",
            found=f"{len(folders)} runs",
            expected=f"at most {MAX_RUNS}",
        )
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise UsageError("duplicate run", found=folder)
        seen.add(folder.resolve())
    names = distinct_names(folders)
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, each with as many parents as it takes to be unique."""
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        depths = range(1, len(own) + 1)
        depth = next((n for n in depths if all(o[-n:] != own[-n:] for o in others)), len(own))
        names.append(Path(*own[-depth:]).as_posix())
    return names


def recipe_differences(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Return the keys in which recipes differ: dotted name -> each run's value, ``-`` if absent.

    ``run.out``, the folder, is left out.
    """
    recipes = [dict(flatten(asdict(run.recipe))) for run in runs]
    for recipe in recipes:
        recipe.pop("run.out")
    names = dict.fromkeys(name for recipe in recipes for name in recipe)
    table = {name: [_value(recipe.get(name)) for recipe in recipes] for name in names}
    return {name: values for name, values in table.items() if len(set(values)) > 1}


def _value(value: Any) -> str:
    """Return a recipe's value on one line, with all digits."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return printable(value)


def _read(folder: Path, name: str) -> RunRecord:
    if not is_run(folder):
        raise RunError(
            "not a training run",
            where=folder,
            found=f"no {RECIPE}" if folder.is_dir() else "no such folder",
            expected=f"a folder written by train, with {RECIPE} and {LOG}",
        )
    recipe = load_recipe(TrainRecipe, folder / RECIPE)
    return RunRecord(folder, name, recipe, read_log(folder / LOG))


def read_log(path: Path) -> tuple[Row, ...]:
    """Read ``summary.csv``: one row per finished epoch; empty if the file does not exist yet.

    A last line without a newline is still being written, and is left out.
    """
    if not path.exists():
        return ()
    if not path.is_file():
        raise RunError("the run's log is not a regular file", where=path)
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES or data.count(b"\n") > MAX_LINES:
        raise _damaged(path, f"more than {MAX_BYTES >> 20} MiB or {MAX_LINES} lines")
    columns, rows = list[str](), list[Row]()
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            fields = line.decode().split(",")
            if number > 1:
                rows.append(_row(columns, fields, after=rows[-1]["epoch"] if rows else None))
                continue
            columns = fields
            if columns[0] != "epoch" or len(set(columns)) < len(columns):
                raise ValueError("the first column is not epoch, or a column is repeated")
        except ValueError as error:
            raise _damaged(path, f"line {number}: {error}") from error
    return tuple(rows)


def _row(columns: list[str], fields: list[str], after: float | None) -> Row:
    if len(fields) != len(columns):
        raise ValueError(f"{len(fields)} fields, expected {len(columns)}")
    if not re.fullmatch("[0-9]{1,7}", fields[0]) or int(fields[0]) <= (after or 0):
        raise ValueError(f"epoch {fields[0]}, expected more than {after or 0:.0f}")
    row: dict[str, float | None] = {"epoch": int(fields[0])}
    for column, text in zip(columns[1:], fields[1:], strict=True):
        row[column] = _number(column, text) if text else None
    return row


def _number(column: str, text: str) -> float:
    with suppress(ValueError):
        if abs(value := float(text)) <= LARGEST:
            return value
    raise ValueError(f"{column} {text}, expected a number")


def _damaged(path: Path, found: str) -> RunError:
    return RunError(
        "the run's log is damaged",
        where=path,
        found=found,
        expected="comma-separated columns, then one line of numbers per epoch",
        action="copy it again, or resume the run: it rewrites the log after its next epoch",
    )
