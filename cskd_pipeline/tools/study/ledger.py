"""The study's recipes, and what its folder says is finished.

``plan.json`` says what the study is; ``results/NAME.json`` is written when a part has ended. What
has no file there is not finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cskd_pipeline.config.reading import load_recipe
from cskd_pipeline.config.sections import DumpRecipe, TrainRecipe
from cskd_pipeline.config.writing import result_digest
from cskd_pipeline.errors import ManifestError, OutputError, RecipeError
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.atomic import require_empty, sweep, write_json

METHODS = ("none", "deit", "cskd")
PLAN = "plan.json"


@dataclass(frozen=True)
class Recipes:
    """Hold the study's five recipes; ``sources``: role -> what ``--recipe`` takes."""

    sources: Mapping[str, str]
    teacher: TrainRecipe
    dump: DumpRecipe
    students: Mapping[str, TrainRecipe]

    @property
    def digests(self) -> dict[str, str]:
        """Return the digest of each recipe, by role."""
        training = {"teacher": self.teacher, **self.students}
        found = {role: result_digest(recipe) for role, recipe in training.items()}
        return {"dump": result_digest(self.dump), **found}


def load_recipes(family: str | Path) -> Recipes:
    """Return the recipes of a family in ``stages/study``, ``digits`` say, or those in a folder.

    Raises:
        RecipeError: one cannot be used; or the students' differ in more than the method, so that
            comparing them would say nothing about it; or they have one epoch, before whose end
            none can be forked.
    """

    def source(role: str) -> str:
        return f"{family}_{role}" if isinstance(family, str) else str(family / f"{role}.toml")

    students = {method: load_recipe(TrainRecipe, source(method)) for method in METHODS}
    for method, recipe in students.items():
        alike = replace(recipe, distill=replace(recipe.distill, method="cskd"))
        if recipe.distill.method != method or alike != students["cskd"]:
            raise RecipeError(
                "the students' recipes differ in more than the method",
                where=source(method),
                expected=f"{source('cskd')} with distill.method = {method!r}, and else its values",
            )
    if students["cskd"].schedule.epochs < 2:
        raise RecipeError(
            "a run of one epoch cannot be forked",
            where=source("cskd"),
            found="schedule.epochs = 1",
            expected="2 or more, in all students' recipes",
        )
    return Recipes(
        sources={role: source(role) for role in ("teacher", "dump", *METHODS)},
        teacher=load_recipe(TrainRecipe, source("teacher")),
        dump=load_recipe(DumpRecipe, source("dump")),
        students=students,
    )


class Ledger:
    """Know what is finished of the study in ``folder``.

    Args:
        digests: what decides the study's results, by name: recipes and data.

    Raises:
        OutputError: the folder holds something else, or a study of other recipes or data.
    """

    def __init__(self, folder: Path, digests: Mapping[str, str]) -> None:
        self.folder, self._results = folder, folder / "results"
        known = folder / PLAN
        if not known.exists():
            require_empty(folder, action="choose another folder: cskd-pipeline study --out DIR")
            write_json(known, {"digests": dict(digests)})
        begun = _read(known).get("digests")
        begun = begun if isinstance(begun, dict) else {}
        changed = [name for name, digest in digests.items() if begun.get(name) != digest]
        if changed:
            raise OutputError(
                "the study in this folder was begun with others",
                where=folder,
                found=", ".join(f"another {name}" for name in changed),
                expected=f"what it was begun with; {folder}/teacher and runs/* hold its recipes",
                action="undo the change, or begin anew with another --out",
            )
        if self._results.is_dir():
            sweep(self._results)

    def find(self, name: str, *numbers: str) -> dict[str, Any] | None:
        """Return what the part ``name`` found, or None while it is not finished.

        Raises:
            OutputError: a file that is not one of ours: no object, or without these ``numbers``.
        """
        path = self._results / f"{name}.json"
        return _read(path, *numbers) if path.exists() else None

    def add(self, name: str, found: Mapping[str, Any]) -> None:
        """Write down that the part ``name`` is finished."""
        write_json(self._results / f"{name}.json", found)


def _read(path: Path, *numbers: str) -> dict[str, Any]:
    try:
        document = schemas.read(path)
    except ManifestError as error:
        raise _damaged(path, error.problems[0]) from error
    if not isinstance(document, dict):
        raise _damaged(path, f"a {type(document).__name__} instead of an object")
    for name in numbers:
        if type(document.get(name)) not in (int, float):
            raise _damaged(path, f"no number called {name}")
    return document


def _damaged(path: Path, found: str) -> OutputError:
    return OutputError(
        "a file of the study is damaged",
        where=path,
        found=found,
        action="remove it and run the same command again: that part is then done once more",
    )


def data_digest(shard_ids: tuple[str, ...]) -> str:
    """Return the digest of a data set's samples: their keys, tar by tar."""
    return schemas.sha256(list(shard_ids))
