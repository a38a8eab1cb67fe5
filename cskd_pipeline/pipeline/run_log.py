"""A run's curves: ``summary.csv``, one row per epoch, and scalars for TensorBoard and, if the
recipe names a project, Weights & Biases. Logging never affects the run.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.config.writing import result_digest
from cskd_pipeline.errors import ManifestError, require_packages
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.atomic import write_csv, write_json

log = logging.getLogger(__name__)

WANDB_RECORD = "wandb.json"
WANDB_FINISH = 60.0
"""Seconds that the end of a run waits for its last points to be sent."""

Row = dict[str, float | int | None]


class RunLog:
    """Writer of a run's history, complete on disk after every epoch.

    Args:
        update: finished updates; when a run is resumed, TensorBoard drops its points after it.
        writes: False for ranks that write nothing.
        wandb_curves: receives the same scalars as TensorBoard.
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
        """Flush and close; ``ended``: training reached its end."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb_curves is not None:
            self._wandb_curves.close(ended=ended)


def epoch_line(row: Row, epochs: int) -> str:
    """Return the log line of an epoch's row."""
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
    """Fail early if the recipe names a project but wandb is not installed."""
    if project:
        problem = f"run.wandb = {project} needs an optional package"
        require_packages("wandb", extra="wandb", problem=problem)


class WandbCurves:
    """Curves of a ``wandb.init`` run; the first error is logged and ends them, not the run."""

    def __init__(self, run: Any) -> None:
        self._run: Any = run

    def scalars(self, update: int, values: Mapping[str, float | int | None]) -> None:
        """Send points of the curves at an optimizer update.

        The updates that a resumed run repeats are not sent again: their points would be equal.
        """
        if self._run is None or update < self._run.step:
            return
        try:
            self._run.log({k: v for k, v in values.items() if v is not None}, step=update)
        except Exception as error:  # service, files or network: none may stop the run
            self._give_up(error)

    def close(self, *, ended: bool) -> None:
        """Send the last points, within a time limit; ``ended``: training reached its end."""
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

    The package is imported only in that case. Points that cannot be sent are kept in the run's
    folder ``wandb/``, and ``wandb sync`` sends them later. ``WANDB_MODE`` and wandb's other
    environment variables work as usual.
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
        "allow_val_change": True,  # a resumed run may have other folders and workers
        "settings": wandb.Settings(**settings),
    }
    kept = f"curves are kept in {out / 'wandb'}; `wandb sync` sends them later"
    attempts: tuple[tuple[Any, str], ...] = ((None, kept), ("offline", "no curves will be sent"))
    for mode, outcome in attempts:
        try:
            run = wandb.init(mode=mode, **arguments)
        except Exception as error:  # server, login or files; see WandbCurves
            log.warning(f"Weights & Biases cannot be used ({_reason(error)}): {outcome}")
            wandb.teardown()  # its service would keep the run's id in use
            continue
        found = run.settings.mode
        log.info(f"Weights & Biases: {run.url if found == 'online' else found}")
        return WandbCurves(run)
    return None


def _identity(out: Path) -> str:
    """Return the run's wandb id, kept in the run's folder so that a resumed run continues its
    curves.
    """
    path = out / WANDB_RECORD
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:8]})
    document = schemas.read(path)
    found = document.get("id") if isinstance(document, dict) else None
    if not isinstance(found, str) or not re.fullmatch(r"[0-9a-z_-]{1,64}", found):
        raise ManifestError(
            path,
            ["$.id: expected letters, digits, - and _"],
            action="delete the file; the run then starts new curves",
        )
    return found


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
