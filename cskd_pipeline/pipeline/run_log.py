"""A run's curves: ``summary.csv``, one row an epoch, and scalars for TensorBoard and, where the
recipe names a project, Weights & Biases.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from cskd_pipeline.pipeline.scalars import Board
from cskd_pipeline.runtime.atomic import write_text

Row = dict[str, float | int | None]


class RunLog:
    """Write the history of a run, whole on disk after every epoch.

    ``rows`` travels with the training state, so that a resumed run rewrites the rows it had and
    TensorBoard drops the points after the update it goes on from.

    Args:
        writes: False for ranks that only keep the rows.
        board: gets the same scalars as TensorBoard.
    """

    def __init__(
        self,
        folder: Path,
        rows: list[Row],
        update: int,
        *,
        writes: bool = True,
        board: Board | None = None,
    ) -> None:
        self.folder = folder
        self.rows = rows
        self._board = board
        self._tensorboard = (
            SummaryWriter(str(folder / "tensorboard"), purge_step=update or None)
            if writes
            else None
        )

    def scalars(self, update: int, values: Mapping[str, float | int | None]) -> None:
        """Add points to the curves at an optimizer update."""
        for name, value in values.items():
            if value is not None and self._tensorboard is not None:
                self._tensorboard.add_scalar(name, value, update)
        if self._board is not None:
            self._board.scalars(update, values)

    def epoch(self, update: int, row: Row) -> None:
        """Add a row to ``summary.csv``; its numbers become scalars under ``epoch/``."""
        self.rows.append(row)
        if self._tensorboard is None:
            return
        columns = list(dict.fromkeys(name for r in self.rows for name in r))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.folder / "summary.csv", text.getvalue())
        self.scalars(update, {f"epoch/{k}": v for k, v in row.items() if k != "epoch"})
        self._tensorboard.flush()

    def close(self, *, ended: bool) -> None:
        """Write what is left; ``ended``: the training came to its end."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._board is not None:
            self._board.close(ended=ended)
