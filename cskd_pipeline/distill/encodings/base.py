"""The interface of encodings: arrays, and the way from logits to them and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from cskd_pipeline.errors import CacheError

if TYPE_CHECKING:
    from torch import Tensor

    from cskd_pipeline.distill.targets import Targets

Rows = dict[str, np.ndarray]
"""Array name -> values, one row per sample."""

UNUSED = 65535
"""Fills arrays of class numbers, uint16."""
_CHUNK_BYTES = 16 * 1024


class ResponseShape(NamedTuple):
    """Shape of a teacher's spatial logits for one view: (classes, height, width)."""

    classes: int
    height: int
    width: int

    def require_numbered(self, encoding: str) -> None:
        """Refuse more classes than ``encoding`` can number: uint16, one of which is fill."""
        if self.classes > UNUSED:
            raise CacheError(
                f"the {encoding} encoding cannot hold so many classes",
                found=f"{self.classes} classes",
                expected=f"at most {UNUSED}",
                action="use the encoding dense or dense-q8",
            )

    def require_classes(self, found: np.ndarray) -> None:
        """Refuse class numbers, by a ``ValueError``, that the teacher does not have."""
        if found.size and found.max() >= self.classes:
            raise ValueError(f"class {found.max()} of {self.classes}")


@dataclass(frozen=True)
class ArraySpec:
    """One array of an encoding, on the axes (view, shard, offset) followed by its own.

    Args:
        name: its path in the cache.
        axes, tail: names and lengths of its own axes.
        fill: stands where nothing was written; no written row consists of it.
        level: of zstd.
        rows: samples in one chunk, for encodings read row by row; None: all samples of a tar
            shard, for encodings that readers decode, and keep, shard by shard. All arrays of an
            encoding are read in one of the two ways.
        tail_chunk: the part of ``tail`` in one chunk; None: all of it.
        order: all axes, view, shard and offset first, as a chunk lays them out; None: as they are.
        ragged: the first own axis may end early, in rows given and rows returned; beyond it all is
            fill, and chunks that hold only fill are not written.
        file_per_view: one file per (view, tar shard), for arrays so large that a file per unit
            would need too much memory.
    """

    name: str
    dtype: str
    axes: tuple[str, ...]
    tail: tuple[int, ...]
    fill: int | float
    level: int
    rows: int | None = None
    tail_chunk: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    ragged: bool = False
    file_per_view: bool = False

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a sample in memory; if ragged, of its first chunk along that axis."""
        tail = self.tail_chunk if self.ragged and self.tail_chunk else self.tail
        return int(np.prod(tail)) * np.dtype(self.dtype).itemsize

    def read_by_row(self) -> ArraySpec:
        """Return the array in chunks of a few rows, so small that one costs little more.

        Logits of 1,000 classes on 7x7 take 91.4 kB of 98.0 in zstd, whatever the level (1 to 9),
        the order of axes and the rows in a chunk (1 to 16), and a random row takes 0.3 ms to read;
        in chunks of 8 rows 1.2 ms.
        """
        return replace(self, rows=max(1, _CHUNK_BYTES // self.row_bytes))


class Encoding(Protocol):
    """A way of storing the teacher's response; :func:`register_encoding` adds a user's own.

    One that inherits from this class and stores rows as they are needs no ``pack`` or ``unpack``.

    Attributes:
        name: lower-case letters, digits and hyphens; its arrays are called ``NAME/...``.
        serves: kinds of loss: ``hard``, ``soft``.
        exact: these losses are, bit for bit, those of the teacher's logits.
        temperatures: the lowest and the highest of soft losses that it serves.
    """

    name: str
    serves: tuple[str, ...]
    exact: bool
    temperatures: tuple[float, float]

    def arrays(self, shape: ResponseShape) -> tuple[ArraySpec, ...]:
        """Return what is stored.

        Raises:
            CacheError: the encoding cannot hold responses of this shape.
        """
        ...

    def encode(self, spatial: Tensor, global_: Tensor, seeds: np.ndarray) -> dict[str, Tensor]:
        """Make rows from logits, on their device: array name -> (B, ...).

        Args:
            spatial: (B, K, h, w) float16.
            global_: (B, K) float16.
            seeds: (B,) uint64, of the views: for an encoding that draws.
        """
        ...

    def targets(self, arrays: Mapping[str, Tensor]) -> Targets:
        """Make targets for the losses from rows as :meth:`encode` gave them, on any device."""
        ...

    def pack(self, rows: Rows) -> Rows:
        """Return rows as they are stored: same names and shapes, rearranged for compression."""
        return rows

    def unpack(self, rows: Rows, shape: ResponseShape) -> Rows:
        """Return the rows that :meth:`pack` was given, compared with what can be.

        Raises:
            ValueError: values that no response of this shape has.
        """
        return rows
