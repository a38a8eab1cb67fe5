"""A run's curves: ``summary.csv``, one row an epoch, and scalars for TensorBoard and, where the
recipe names a project, Weights & Biases, by its own package. They never change the run.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.config.writing import result_digest
from cskd_pipeline.errors import ManifestError, MissingPackageError
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.atomic import write_csv, write_json

log = logging.getLogger(__name__)

WANDB_RECORD = "wandb.json"
WANDB_FINISH = 60.0
"""Seconds that the end of a run waits for what is still to be sent."""

Row = dict[str, float | int | None]


class RunLog:
    """Write the history of a run, whole on disk after every epoch.

    Args:
        update: finished updates; a resumed run's points after it are dropped from TensorBoard.
        writes: False for ranks that write nothing.
        wandb_curves: gets the same scalars as TensorBoard.
    """

    def __init__(
        self,
        folder: Path,
        update: int,
        *,
        writes: bool = True,
        wandb_curves: WandbCurves | None = None,
    ) -> None:
        self.folder = folder
        self._wandb_curves = wandb_curves
        self._tensorboard = (
            SummaryWriter(str(folder / "tensorboard"), purge_step=update + 1) if writes else None
        )

    def scalars(self, update: int, values: Mapping[str, float | int | None]) -> None:
        """Add points to the curves at an optimizer update."""
        for name, value in values.items():
            if value is not None and self._tensorboard is not None:
                self._tensorboard.add_scalar(name, value, update)
        if self._wandb_curves is not None:
            self._wandb_curves.scalars(update, values)

    def epoch(self, update: int, rows: Sequence[Row]) -> None:
        """Write ``summary.csv``; the last row's numbers become scalars under ``epoch/``."""
        if self._tensorboard is None:
            return
        columns = list(dict.fromkeys(name for row in rows for name in row))
        write_csv(self.folder / "summary.csv", columns, rows)
        self.scalars(update, {f"epoch/{k}": v for k, v in rows[-1].items() if k != "epoch"})
        self._tensorboard.flush()

    def close(self, *, ended: bool) -> None:
        """Write what is left; ``ended``: the training came to its end."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb_curves is not None:
            self._wandb_curves.close(ended=ended)


def epoch_line(row: Row, epochs: int) -> str:
    """Return an epoch's row as the line that the log has of it."""
    parts = [f"epoch {row['epoch']}/{epochs}", f"loss {row['loss']:.4f}"]
    parts += [f"r {row['ckf_ratio']:.3f}"] if row["spatial"] else []
    if row.get("top1") is not None:
        parts.append(f"top-1 {row['top1']:.2f}")
    if row.get("ema_top1") is not None:
        parts.append(f"EMA {row['ema_top1']:.2f}")
    parts.append(f"{row['images_per_second']:.0f} images/s")
    parts.append(f"data wait {100 * (row['data_wait'] or 0):.0f} %")
    return "  ".join(parts)


def require_wandb(project: str) -> None:
    """Refuse early a project without the package, which could only fail late."""
    if project and find_spec("wandb") is None:
        raise MissingPackageError(
            "curves on Weights & Biases need an optional package",
            where=f"run.wandb = {project}",
            found="no wandb",
            action="pip install 'cskd-pipeline[wandb]', or leave --wandb out",
        )


class WandbCurves:
    """Send the curves of ``wandb.init``'s run; the first trouble is logged, and ends them alone."""

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

    The package is imported only where a run names a project. What cannot be sent is kept beside
    the run, in ``wandb/``, from where ``wandb sync`` sends it; ``WANDB_MODE`` and the package's
    other variables work as they always do.
    """
    if not recipe.run.wandb:
        return None
    import wandb

    out = Path(recipe.run.out)
    settings: dict[str, Any] = {"console": "off", "silent": True}
    if "WANDB_FINISH_TIMEOUT" not in os.environ:
        settings["finish_timeout"] = WANDB_FINISH
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
    path = out / WANDB_RECORD
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
