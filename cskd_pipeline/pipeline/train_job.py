"""A training run with its recipe, its data, and what it keeps from epoch to epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cskd_pipeline.cache.manifest import utc_now
from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.config.writing import deciding, result_digest
from cskd_pipeline.distill.losses import inference_heads
from cskd_pipeline.errors import OutputError, WeightsError
from cskd_pipeline.models.header import StudentHeader
from cskd_pipeline.models.train_state import FORMAT
from cskd_pipeline.pipeline.finetune import Started, read_source, start_from
from cskd_pipeline.pipeline.resuming import (
    Change,
    change_lines,
    changed_keys,
    file_sha256,
    require_same_data,
    require_same_start,
    require_within,
)
from cskd_pipeline.pipeline.trainer import Trainer
from cskd_pipeline.pipeline.training_data import TrainingData
from cskd_pipeline.runtime.classes import Classes


@dataclass
class TrainJob:
    """Hold a training run: its recipe, data and trainer, and its history.

    Args:
        rows: rows of ``summary.csv``, one an epoch.
        pending: the row of an epoch whose updates are done, and that is still to be evaluated.
        best: top-1, epoch and weights of the best student.
        changes: how the recipe was changed, each time the run was resumed with a different one.
        changed: the last of ``changes`` is new.
        init: the weights that the run started from: ``from`` and ``sha256``.
        forked: the state that a fork began with, in the same way.
    """

    recipe: TrainRecipe
    data: TrainingData
    trainer: Trainer
    rows: list[dict[str, float | int | None]] = field(default_factory=list)
    pending: dict[str, float | int | None] | None = None
    best: dict[str, Any] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    changed: bool = False
    init: dict[str, str] | None = None
    forked: dict[str, str] | None = None

    @property
    def heads(self) -> tuple[str, ...]:
        """Return the student's heads that are trained."""
        return inference_heads(self.recipe.distill.method, self.trainer.student)

    def start_from(self, path: str) -> Started:
        """Start with the weights at ``path`` instead of fresh ones.

        Raises:
            WeightsError: they do not fit, or the ranks found different ones.
            ClassesError: they have the same classes in a different order or spelling.
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
        """Return what :meth:`restore` takes, the same for any number of ranks; all call it."""
        return {
            "format": FORMAT,
            "recipe": deciding(self.recipe),
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

        CKF's progress begins here, and the best student is this run's own.

        Raises:
            OutputError, ClassesError, WeightsError: see :meth:`restore`; or no epoch ends here; or
                the ranks found different states.
        """
        self.forked = {"from": str(where), "sha256": file_sha256(where)}
        if len(set(self.trainer.ranks.gather(self.forked["sha256"]))) > 1:
            raise WeightsError("the ranks found different states to fork", where=where)
        self.restore(state, where, forking=True)
        update, total = self.trainer.update, self.trainer.total_updates
        if update % self.trainer.steps_per_epoch or not 0 < update < total:
            raise OutputError(
                "a run is forked where an epoch ends, and others follow",
                where=where,
                found=f"update {update} of {total}, {self.trainer.steps_per_epoch} an epoch",
                action="name a state that run.keep_every kept",
            )
        self.trainer.forked_at, self.best = self.trainer.epoch, {}

    def restore(self, state: dict[str, Any], where: Path, *, forking: bool = False) -> None:
        """Continue from :meth:`state`; add to ``changes`` how the recipe differs now.

        Args:
            forking: ``distill`` may differ, see :meth:`fork`.

        Raises:
            OutputError: the state's recipe or data differ, or it is past this recipe's end.
            ClassesError: the data's classes had different names or a different order.
            WeightsError: its values are not those of a run.
        """
        try:
            changed = changed_keys(state["recipe"], self.recipe, where, forking=forking)
            require_same_data(state["data"], self.data.identity, where)
            steps, epochs = self.trainer.steps_per_epoch, self.recipe.schedule.epochs
            require_within(state["update"], steps, epochs, where)
            self._restore(state, where)
            if not forking:
                self.forked = _recorded(state.get("forked"), "forked")
                require_same_start(self.recipe.run.fork_from, self.forked, where)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise WeightsError(
                "the training state does not fit the run",
                where=where,
                found=f"{type(error).__name__}: {error}".splitlines()[0],
                action="start again in a new output folder; the students beside it are still good",
            ) from error
        if forking:
            changed["run.fork_from"] = ["", f"{where.parent.name}/{where.name}"]
        self.changed = bool(changed)
        if changed:
            update = self.trainer.update
            self.changes.append({"time": utc_now(), "update": update, "changed": changed})

    def _restore(self, state: dict[str, Any], where: Path) -> None:
        rows, best, pending, changes = (state[n] for n in ("rows", "best", "pending", "changes"))
        accepted = state["accepted_classes"]
        names = [*(state["class_names"] or ()), *accepted]
        if not all(isinstance(row, dict) for row in [*rows, best, pending or {}, *changes]):
            raise ValueError("rows, best, pending or changes are no dicts")
        if not all(type(name) is str for name in names):
            raise ValueError("class names are no text")
        init = _recorded(state["init"], "init")
        change_lines(changes)  # fails where they are none
        data = self.data
        before = Classes("the training state", where, data.classes.count, state["class_names"])
        data.guard.compare(data.classes, before)
        for line in accepted:
            data.guard.note(line)
        self.trainer.restore(state)
        self.rows, self.best, self.init = rows, best, init
        self.pending, self.changes = pending, list(changes)

    def summary(self, images: int, seconds: float) -> dict[str, Any]:
        """Return what ``train`` reports: ``images`` is how many it trained on in ``seconds``."""
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
            top1: in percent, where it was measured.
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


def _recorded(value: Any, name: str) -> dict[str, str] | None:
    """Return where a run started from, as a state has it."""
    if value is not None and [type(value[key]) for key in ("from", "sha256")] != [str, str]:
        raise ValueError(f"{name} has no path and SHA-256")
    found: dict[str, str] | None = value
    return found
