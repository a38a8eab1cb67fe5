"""The study's recipes, and the record of its finished parts.

``plan.json`` identifies the study's recipes and data; ``results/NAME.json`` is written when the
part NAME has finished.
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
    """The study's five recipes; ``sources``: role -> value of ``--recipe``."""

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
    """Return the recipes of a family in ``stages/study``, such as ``digits``, or those in a folder.

    Raises:
        RecipeError: a recipe is invalid; or the students' recipes differ in more than the method,
            which would make the comparison meaningless; or they have only one epoch, which leaves
            no epoch to fork at.
    """

    def source(role: str) -> str:
        return f"{family}_{role}" if isinstance(family, str) else str(family / f"{role}.toml")

    students = {method: load_recipe(TrainRecipe, source(method)) for method in METHODS}
    for method, recipe in students.items():
        as_cskd = replace(recipe, distill=replace(recipe.distill, method="cskd"))
        if recipe.distill.method != method or as_cskd != students["cskd"]:
            raise RecipeError(
                "the students' recipes differ in more than the method",
                where=source(method),
                expected=f"the values of {source('cskd')}, except distill.method = {method!r}",
            )
    if students["cskd"].schedule.epochs < 2:
        raise RecipeError(
            "a run of one epoch cannot be forked",
            where=source("cskd"),
            found="schedule.epochs = 1",
            expected="2 or more in all students' recipes",
        )
    return Recipes(
        sources={role: source(role) for role in ("teacher", "dump", *METHODS)},
        teacher=load_recipe(TrainRecipe, source("teacher")),
        dump=load_recipe(DumpRecipe, source("dump")),
        students=students,
    )


class Ledger:
    """The finished parts of the study in ``folder``.

    Args:
        digests: name -> digest of each input of the study: recipes and data.

    Raises:
        OutputError: the folder contains other files, or a study with other recipes or data.
    """

    def __init__(self, folder: Path, digests: Mapping[str, str]) -> None:
        self.folder, self._results = folder, folder / "results"
        plan = folder / PLAN
        if not plan.exists():
            require_empty(folder, action="choose another folder: cskd-pipeline study --out DIR")
            write_json(plan, {"digests": dict(digests)})
        recorded = _read(plan).get("digests")
        recorded = recorded if isinstance(recorded, dict) else {}
        changed = [name for name, digest in digests.items() if recorded.get(name) != digest]
        if changed:
            raise OutputError(
                "the study in this folder was started with other recipes or images",
                where=folder,
                found=f"changed: {', '.join(changed)}",
                expected=f"the original ones; recipes are in {folder}/teacher and runs/*",
                action="undo the change, or start a new study with another --out",
            )
        if self._results.is_dir():
            sweep(self._results)

    def find(self, name: str, *numbers: str) -> dict[str, Any] | None:
        """Return the results of the part ``name``, or None if it is not finished.

        Raises:
            OutputError: the file is damaged: not an object, or without the ``numbers``.
        """
        path = self._results / f"{name}.json"
        return _read(path, *numbers) if path.exists() else None

    def add(self, name: str, results: Mapping[str, Any]) -> None:
        """Record the part ``name`` as finished, with its results."""
        write_json(self._results / f"{name}.json", results)


def _read(path: Path, *numbers: str) -> dict[str, Any]:
    try:
        document = schemas.read(path)
    except ManifestError as error:
        raise _damaged(path, error.problems[0]) from error
    if not isinstance(document, dict):
        raise _damaged(path, f"a {type(document).__name__} instead of an object")
    for name in numbers:
        if type(document.get(name)) not in (int, float):
            raise _damaged(path, f"no number named {name}")
    return document


def _damaged(path: Path, found: str) -> OutputError:
    return OutputError(
        "a file of the study is damaged",
        where=path,
        found=found,
        action="delete it and run the same command again to redo that part",
    )
