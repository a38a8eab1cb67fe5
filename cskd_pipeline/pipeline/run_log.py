"""A run's curves: ``summary.csv``, one row an epoch, and scalars for TensorBoard and, where the
recipe names a project, Weights & Biases.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from cskd_pipeline.pipeline.scalars import WandbCurves
from cskd_pipeline.runtime.atomic import write_text

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
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.folder / "summary.csv", text.getvalue())
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
