"""The state of a training run, and the recipe changes that a resumed run or a fork may make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cskd_pipeline.cache.manifest import utc_now
from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.config.writing import adjustable_keys, deciding_keys, result_digest
from cskd_pipeline.distill.losses import inference_heads
from cskd_pipeline.errors import OutputError, WeightsError
from cskd_pipeline.models.checkpoint import StudentHeader
from cskd_pipeline.models.train_state import FORMAT
from cskd_pipeline.pipeline.finetune import Start, read_source, start_from
from cskd_pipeline.pipeline.trainer import Trainer
from cskd_pipeline.pipeline.training_data import TrainingData
from cskd_pipeline.runtime.atomic import write_text
from cskd_pipeline.runtime.classes import Classes

CHANGES = "changes.jsonl"
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


@dataclass
class TrainJob:
    """A training run: its recipe, data and trainer, and its history.

    Args:
        rows: rows of ``summary.csv``, one per epoch.
        pending: the row of an epoch whose updates are done, until it is evaluated and its students
            are written; then it moves to ``rows``. It is saved with the state, so that a run killed
            in between repeats no update.
        best: top-1, epoch and weights of the best student.
        changes: changes of the recipe, one for each time the run was resumed with a different one.
        just_changed: the last of ``changes`` is new.
        init: ``from`` and ``sha256`` of the weights that the run started from.
        forked: ``from`` and ``sha256`` of the state that the run was forked from.
    """

    recipe: TrainRecipe
    data: TrainingData
    trainer: Trainer
    rows: list[dict[str, float | int | None]] = field(default_factory=list)
    pending: dict[str, float | int | None] | None = None
    best: dict[str, Any] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    just_changed: bool = False
    init: dict[str, str] | None = None
    forked: dict[str, str] | None = None

    @property
    def heads(self) -> tuple[str, ...]:
        """Return the student's heads that are trained."""
        return inference_heads(self.recipe.distill.method, self.trainer.student)

    def start_from(self, path: str) -> Start:
        """Start with the weights at ``path`` instead of fresh ones.

        Raises:
            WeightsError: the weights do not fit, or the ranks found different ones.
            ClassesError: the weights have the same classes in a different order or spelling.
        """
        trainer = self.trainer
        source = read_source(Path(path))
        started = start_from(source, trainer.student, self.data.classes, self.data.guard)
        if len(set(trainer.ranks.gather(started.sha256))) > 1:
            raise WeightsError("the ranks found different weights to start from", where=path)
        if trainer.ema is not None:
            trainer.ema.module.load_state_dict(trainer.student.model.state_dict())
        self.init = {"from": path, "sha256": started.sha256}
        return started

    def state(self) -> dict[str, Any]:
        """Return the state for :meth:`restore`: the same for any number of ranks; all call this."""
        return {
            "format": FORMAT,
            "recipe": deciding_keys(self.recipe),
            "changes": self.changes,
            "data": self.data.identity,
            "init": self.init,
            "forked": self.forked,
            "class_names": self.data.classes.names,
            "accepted_classes": list(self.data.guard.accepted),
            **self.trainer.state(),
            "pending": self.pending,
            "rows": self.rows,
            "best": self.best,
        }

    def fork(self, state: dict[str, Any], where: Path) -> None:
        """Continue from the :meth:`state` of another run, whose ``distill`` may differ.

        CKF's progress restarts at the fork, and so does the record of the best student.

        Raises:
            OutputError, ClassesError, WeightsError: see :meth:`restore`; or the state is not from
                the end of an epoch; or the ranks found different states.
        """
        self.forked = {"from": str(where), "sha256": file_sha256(where)}
        if len(set(self.trainer.ranks.gather(self.forked["sha256"]))) > 1:
            raise WeightsError("the ranks found different states to fork from", where=where)
        self.restore(state, where, forking=True)
        update, total = self.trainer.update, self.trainer.total_updates
        if update % self.trainer.steps_per_epoch or not 0 < update < total:
            raise OutputError(
                "a run can be forked only at the end of an epoch, and not of the last one",
                where=where,
                found=f"update {update} of {total}, {self.trainer.steps_per_epoch} per epoch",
                action="pass a state that run.keep_every kept",
            )
        self.trainer.forked_at, self.best = self.trainer.epoch, {}

    def restore(self, state: dict[str, Any], where: Path, *, forking: bool = False) -> None:
        """Continue from a :meth:`state`; record in ``changes`` how the recipe differs now.

        Args:
            forking: ``distill`` may differ, see :meth:`fork`.

        Raises:
            OutputError: the state's recipe or data differ, or it is past this recipe's end.
            ClassesError: the data's classes had different names or a different order.
            WeightsError: the state is malformed or does not fit the run.
        """
        try:
            changed = changed_keys(state["recipe"], self.recipe, where, forking=forking)
            require_same_data(state["data"], self.data.identity, where)
            steps, epochs = self.trainer.steps_per_epoch, self.recipe.schedule.epochs
            require_within(state["update"], steps, epochs, where)
            self._restore(state, where)
            if not forking:
                self.forked = _checked_start(state.get("forked"), "forked")
                require_same_start(self.recipe.run.fork_from, self.forked, where)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise WeightsError(
                "the training state does not fit the run",
                where=where,
                found=f"{type(error).__name__}: {error}".splitlines()[0],
                action="start again in a new output folder; the students next to it are still good",
            ) from error
        if forking:
            changed["run.fork_from"] = ["", f"{where.parent.name}/{where.name}"]
        self.just_changed = bool(changed)
        if changed:
            update = self.trainer.update
            self.changes.append({"time": utc_now(), "update": update, "changed": changed})

    def _restore(self, state: dict[str, Any], where: Path) -> None:
        rows, best, pending, changes = (state[n] for n in ("rows", "best", "pending", "changes"))
        accepted = state["accepted_classes"]
        names = [*(state["class_names"] or ()), *accepted]
        if not all(isinstance(row, dict) for row in [*rows, best, pending or {}, *changes]):
            raise ValueError("rows, best, pending or changes are not dicts")
        if not all(type(name) is str for name in names):
            raise ValueError("class names are not strings")
        init = _checked_start(state["init"], "init")
        change_lines(changes)  # raises if they are malformed
        data = self.data
        before = Classes("the training state", where, data.classes.count, state["class_names"])
        data.guard.compare(data.classes, before)
        for line in accepted:
            data.guard.record(line)
        self.trainer.restore(state)
        self.rows, self.best, self.init = rows, best, init
        self.pending, self.changes = pending, list(changes)

    def summary(self, images: int, seconds: float) -> dict[str, Any]:
        """Return the summary of ``train``, which trained on ``images`` images in ``seconds``."""
        recipe = self.recipe
        return {
            "out": recipe.run.out,
            "student": recipe.student.name,
            "method": recipe.distill.method,
            "cache_digest": self.data.cache_digest,
            "init": self.init,
            "accepted_classes": list(self.data.guard.accepted),
            "epochs": recipe.schedule.epochs,
            "updates": self.trainer.total_updates,
            "recipe_changes": change_lines(self.changes),
            "seconds": seconds,
            "images_per_second": images / seconds if images else None,
            "last": self.rows[-1] if self.rows else {},
            "best": self.best,
        }

    def header(self, weights: str, top1: float | None) -> StudentHeader:
        """Return the header of a student's file.

        Args:
            weights: ``last``, or ``ema`` for the moving average.
            top1: in percent; None if not measured.
        """
        cache, views = self.data.views.cache, self.data.views
        preprocessing = self.trainer.student.preprocessing
        return StudentHeader(
            model=self.recipe.student.name,
            num_classes=views.num_classes,
            size=views.policy.size,
            heads=self.heads,
            method=self.recipe.distill.method,
            kwargs=dict(self.recipe.student.kwargs),
            grid=self.trainer.grid,
            crop_pct=preprocessing.crop_pct,
            interpolation=preprocessing.interpolation,
            weights=weights,
            epoch=self.trainer.epoch,
            top1=top1,
            class_names=self.data.classes.names,
            accepted_classes=tuple(self.data.guard.accepted),
            dataset=self.data.name,
            teacher=None if cache is None else cache.manifest.teacher.name,
            recipe_sha256=result_digest(self.recipe),
            cache_sha256=self.data.cache_digest,
            init_sha256=None if self.init is None else self.init["sha256"],
            recipe_changes=tuple(change_lines(self.changes)),
        )


def _checked_start(value: Any, name: str) -> dict[str, str] | None:
    """Return a state's ``init`` or ``forked``; refuse anything but a path and its SHA-256."""
    if value is not None and [type(value[key]) for key in ("from", "sha256")] != [str, str]:
        raise ValueError(f"{name} has no path and SHA-256")
    start: dict[str, str] | None = value
    return start


# -- changes that a resumed run or a fork may make ---------------------------------------------


def changed_keys(
    before: Mapping[str, Any], recipe: TrainRecipe, where: Path, *, forking: bool = False
) -> dict[str, list[Any]]:
    """Return dotted name -> [before, after] of the keys in which ``recipe`` differs from a run's.

    A fork may change the section ``distill`` too. The view policy is compared with the data, since
    a recipe may leave it to the cache.

    Raises:
        OutputError: the recipe changes keys that must not change; lists them all.
    """
    now = deciding_keys(recipe)
    names = [name for name in {**before, **now} if not name.startswith("views.")]
    found = {n: [before.get(n), now.get(n)] for n in names if before.get(n) != now.get(n)}
    fixed = found.keys() - adjustable_keys(TrainRecipe)
    if forking:
        fixed = {name for name in fixed if not name.startswith("distill.")}
    if fixed:
        raise OutputError(
            "the training state was saved with another recipe",
            where=where,
            problems=[
                f"{name}: was {_format(found[name][0])}, now {_format(found[name][1])}"
                for name in sorted(fixed)
            ],
            action=f"use the run's own values (see {where.parent}/recipe.toml), or start again in "
            "a new output folder",
        )
    return found


def require_same_data(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Refuse to resume a run with different data.

    Raises:
        OutputError: the data differ; lists the differences.
    """
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        raise OutputError(
            "the training state was saved with other data",
            where=where,
            problems=[
                f"{_DATA[name]}: was {_format(before.get(name))}, now {_format(now[name])}"
                for name in differing
            ],
            action="use the data that the run started with, or start again in a new output folder",
        )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_same_start(fork_from: str, record: Mapping[str, str] | None, where: Path) -> None:
    """Refuse to resume a run unless the recipe names the state it was forked from, if any.

    Args:
        fork_from: ``run.fork_from`` of the current recipe.
        record: path and SHA-256 of the state, which may no longer exist; None if not forked.

    Raises:
        OutputError: the run was forked from another state, or not at all.
    """
    given = Path(fork_from)
    if record is None or not fork_from:
        same = record is None and not fork_from
    else:
        same = fork_from == record["from"] and not given.exists()
        same = same or (given.is_file() and file_sha256(given) == record["sha256"])
    if not same:
        raise OutputError(
            "the run to resume was started with another --fork-from",
            where=where,
            found=f"--fork-from {fork_from}" if fork_from else "no --fork-from",
            expected="no --fork-from" if record is None else f"--fork-from {record['from']}",
            action="pass the flags that the run was started with, or choose a new --out",
        )


def require_within(update: Any, steps: int, epochs: int, where: Path) -> None:
    """Refuse to resume a run that is past its recipe's end.

    Raises:
        OutputError: the recipe has too few epochs.
    """
    if type(update) is int and update > steps * epochs:
        raise OutputError(
            "the training state is past the end of this recipe",
            where=where,
            found=f"update {update}: {update / steps:.4g} epochs of {steps} updates",
            expected=f"at most schedule.epochs = {epochs}",
            action=f"set schedule.epochs to {-(-update // steps)} or more",
        )


def change_lines(changes: Iterable[Change]) -> list[str]:
    """Return a line for every key of every change: ``update 120: optim.lr 0.001 -> 0.0005``."""
    return [
        f"update {change['update']}: {name} {_format(before)} -> {_format(after)}"
        for change in changes
        for name, (before, after) in change["changed"].items()
    ]


def write_changes(folder: Path, changes: list[Change]) -> None:
    """Write all changes of the run's recipe to its folder, one JSON object per line."""
    write_text(folder / CHANGES, "".join(json.dumps(change) + "\n" for change in changes))


def _format(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
