"""Changes that a resumed run or a fork may make, and the log of them: ``changes.jsonl``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.config.writing import adjustable, deciding
from cskd_pipeline.errors import OutputError
from cskd_pipeline.runtime.atomic import write_text

LOG = "changes.jsonl"
_DATA = {
    "shards": "data.shards: different samples, or in different shards",
    "left_out": "data: different samples are left out",
    "policy": "views: different policy",
    "root_seed": "views: different root seed",
    "cache": "data.cache: different cache",
    "encoding": "distill.encoding: different encoding",
}

Change = dict[str, Any]
"""``time``, ``update`` and ``changed``: dotted name -> [before, after]."""


def changed_keys(
    before: Mapping[str, Any], recipe: TrainRecipe, where: Path, *, forking: bool = False
) -> dict[str, list[Any]]:
    """Return dotted name -> [before, after] of the keys in which ``recipe`` differs from a run's.

    A fork may change the section ``distill`` too. The policy of the views is not compared here: it
    is the data's, whether the recipe has it or takes the cache's.

    Raises:
        OutputError: keys differ that a run may not change; names them all.
    """
    now = deciding(recipe)
    names = [name for name in {**before, **now} if not name.startswith("views.")]
    found = {n: [before.get(n), now.get(n)] for n in names if before.get(n) != now.get(n)}
    fixed = found.keys() - adjustable(TrainRecipe)
    if forking:
        fixed = {name for name in fixed if not name.startswith("distill.")}
    if fixed:
        raise OutputError(
            "the training state was made with another recipe",
            where=where,
            problems=[
                f"{name}: the run's {_shown(found[name][0])}, here {_shown(found[name][1])}"
                for name in sorted(fixed)
            ],
            action=f"give the run's own values ({where.parent}/recipe.toml has them all), or start "
            "again in a new output folder",
        )
    return found


def require_same_data(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Refuse to continue a run with different data.

    Raises:
        OutputError: says in what the data differ.
    """
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        raise OutputError(
            "the training state was made with other data",
            where=where,
            problems=[
                f"{_DATA[name]}: the run's {_shown(before.get(name))}, here {_shown(now[name])}"
                for name in differing
            ],
            action="give the data that the run started with, or start again in a new output folder",
        )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_same_start(fork_from: str, record: Mapping[str, str] | None, where: Path) -> None:
    """Refuse to resume a fork as if it were none, or of another state, or another run as a fork.

    Args:
        fork_from: ``run.fork_from`` of the recipe at hand.
        record: the path and SHA-256 of the state that the run began with; it may be gone.

    Raises:
        OutputError: says which.
    """
    given = Path(fork_from)
    if record is None or not fork_from:
        same = record is None and not fork_from
    else:
        same = fork_from == record["from"] and not given.exists()
        same = same or (given.is_file() and file_sha256(given) == record["sha256"])
    if not same:
        raise OutputError(
            "the run to resume began in another way",
            where=where,
            found=f"--fork-from {fork_from}" if fork_from else "no --fork-from",
            expected="no --fork-from" if record is None else f"--fork-from {record['from']}",
            action="give the flags that the run was started with, or use a new --out folder",
        )


def require_within(update: Any, steps: int, epochs: int, where: Path) -> None:
    """Refuse to continue a run that is past its recipe's end.

    Raises:
        OutputError: says how many epochs it needs.
    """
    if type(update) is int and update > steps * epochs:
        raise OutputError(
            "the training state is past the end of this recipe",
            where=where,
            found=f"update {update}: {update / steps:.4g} epochs of {steps} updates",
            expected=f"at most schedule.epochs = {epochs}",
            action=f"give schedule.epochs = {-(-update // steps)} or more",
        )


def change_lines(changes: Iterable[Change]) -> list[str]:
    """Return a line for every key of every change: ``update 120: optim.lr 0.001 -> 0.0005``."""
    return [
        f"update {change['update']}: {name} {_shown(before)} -> {_shown(after)}"
        for change in changes
        for name, (before, after) in change["changed"].items()
    ]


def write_changes(folder: Path, changes: list[Change]) -> None:
    """Write every change of the run's recipe to its folder, one JSON object a line."""
    write_text(folder / LOG, "".join(json.dumps(change) + "\n" for change in changes))


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
