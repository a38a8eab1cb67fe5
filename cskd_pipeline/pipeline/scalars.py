"""A run's curves on Weights & Biases, by its own package; they never change the run.

The package is imported only where a run names a project. What cannot be sent is kept beside the
run, in ``wandb/``, from where ``wandb sync`` sends it; ``WANDB_MODE`` and the package's other
variables work as they always do.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.config.writing import result_digest
from cskd_pipeline.errors import ManifestError, MissingPackageError
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.atomic import write_json

log = logging.getLogger(__name__)

RECORD = "wandb.json"
FINISH_SECONDS = 60.0
"""How long the end of a run waits for what is still to be sent."""


def require_wandb(project: str) -> None:
    """Refuse early what could only fail late.

    Raises:
        MissingPackageError: a project is named, and the package is not installed.
    """
    if project and find_spec("wandb") is None:
        raise MissingPackageError(
            "curves on Weights & Biases need an optional package",
            where=f"run.wandb = {project}",
            found="no wandb",
            action="pip install 'cskd-pipeline[wandb]', or leave --wandb out",
        )


class WandbCurves:
    """Send one run's curves; the first trouble is logged, and the training continues without.

    Args:
        run: what ``wandb.init`` gave.
    """

    def __init__(self, run: Any) -> None:
        self._run: Any = run

    def scalars(self, update: int, values: Mapping[str, float | int | None]) -> None:
        """Send points of the curves at an optimizer update.

        A resumed run repeats the updates since its last state: the points that are there stay,
        and are equal.
        """
        if self._run is None or update < self._run.step:
            return
        try:
            self._run.log({k: v for k, v in values.items() if v is not None}, step=update)
        except Exception as error:  # of its service, its files, its network: none is the run's
            self._give_up(error)

    def close(self, *, ended: bool) -> None:
        """Send what is left, for a while; ``ended``: the training came to its end."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=0 if ended else 1)
        except Exception as error:
            self._give_up(error)
        self._run = None

    def _give_up(self, error: Exception) -> None:
        self._run = None
        log.warning(f"no more curves on Weights & Biases: {_reason(error)}")


def open_wandb(recipe: TrainRecipe) -> WandbCurves | None:
    """Start or resume the recipe's run on Weights & Biases; None if it names no project.

    Raises:
        ManifestError: the run's folder names it by something that is no identity.
    """
    if not recipe.run.wandb:
        return None
    import wandb

    out = Path(recipe.run.out)
    settings: dict[str, Any] = {"console": "off", "silent": True}
    if "WANDB_FINISH_TIMEOUT" not in os.environ:
        settings["finish_timeout"] = FINISH_SECONDS
    config = {name: values for name, values in asdict(recipe).items() if values is not None}
    arguments: dict[str, Any] = {
        "project": recipe.run.wandb,
        "dir": str(out),
        "id": _identity(out),
        "name": out.resolve().name,
        "resume": "allow",
        "config": config | {"recipe_sha256": result_digest(recipe)},
        "allow_val_change": True,  # folders and workers may be others when a run is resumed
        "settings": wandb.Settings(**settings),
    }
    kept = f"curves are kept in {out / 'wandb'}, from where `wandb sync` sends them"
    attempts: tuple[tuple[Any, str], ...] = ((None, kept), ("offline", "there will be no curves"))
    for mode, outcome in attempts:
        try:
            run = wandb.init(mode=mode, **arguments)
        except Exception as error:  # of its server, login, files: see WandbCurves
            log.warning(f"Weights & Biases cannot be used ({_reason(error)}): {outcome}")
            wandb.teardown()  # its service would still hold the run's name
            continue
        found = run.settings.mode
        log.info(f"Weights & Biases: {run.url if found == 'online' else found}")
        return WandbCurves(run)
    return None


def _identity(out: Path) -> str:
    """The run's name there, kept in its folder, so that a resumed run continues its curves."""
    path = out / RECORD
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:8]})
    document = schemas.read(path)
    found = document.get("id") if isinstance(document, dict) else None
    if not isinstance(found, str) or not re.fullmatch(r"[0-9a-z_-]{1,64}", found):
        raise ManifestError(
            path,
            ["$.id: expected letters, digits, - and _"],
            action="delete the file: new curves are started then",
        )
    return found


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
