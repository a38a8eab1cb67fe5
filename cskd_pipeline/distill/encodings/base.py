"""The interface of encodings: their arrays, and the conversion of logits to rows and targets."""

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
"""Fill value of uint16 arrays of class indices."""
_CHUNK_BYTES = 16 * 1024


class ResponseShape(NamedTuple):
    """Shape of a teacher's spatial logits for one view: (classes, height, width)."""

    classes: int
    height: int
    width: int

    def require_numbered(self, encoding: str) -> None:
        """Refuse more classes than fit in uint16, whose largest value is fill."""
        if self.classes > UNUSED:
            raise CacheError(
                f"the {encoding} encoding does not support so many classes",
                found=f"{self.classes} classes",
                expected=f"at most {UNUSED}",
                action="use the encoding dense or dense-q8",
            )

    def require_classes(self, indices: np.ndarray) -> None:
        """Raise ``ValueError`` for a class index that the teacher does not have."""
        if indices.size and indices.max() >= self.classes:
            raise ValueError(f"class {indices.max()} of {self.classes}")


@dataclass(frozen=True)
class ArraySpec:
    """One array of an encoding, with the axes (view, shard, offset) followed by its own.

    Args:
        name: path in the cache.
        axes, tail: names and lengths of its own axes.
        fill: value of rows not written; no written row consists of it alone.
        level: zstd level.
        rows: samples per chunk, for encodings read row by row; None: all samples of a tar shard,
            for encodings that readers decode and keep shard by shard. All arrays of an encoding
            are alike in this.
        tail_chunk: chunk lengths along ``tail``; None: all of it.
        order: axes in a chunk's memory order, view, shard and offset first; None: as they are.
        ragged: whether the first own axis may be shorter, in rows given and rows returned; beyond
            its end all values are fill, and chunks of only fill are not written.
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
        """Return a sample's size in memory; if ragged, of the first chunk along the ragged axis."""
        tail = self.tail_chunk if self.ragged and self.tail_chunk else self.tail
        return int(np.prod(tail)) * np.dtype(self.dtype).itemsize

    def read_by_row(self) -> ArraySpec:
        """Return the array with chunks of a few rows, so that reading a single row is cheap.

        Logits of 1,000 classes on 7x7 compress from 98.0 to 91.4 kB, whatever the zstd level (1 to
        9), axis order and rows per chunk (1 to 16). Reading a random row takes 0.3 ms, or 1.2 ms
        from chunks of 8 rows.
        """
        return replace(self, rows=max(1, _CHUNK_BYTES // self.row_bytes))


class Encoding(Protocol):
    """A storage encoding of the teacher's response; :func:`register_encoding` adds a user's own.

    A subclass that stores rows unchanged needs no ``pack`` or ``unpack``.

    Attributes:
        name: lower-case letters, digits and hyphens; its arrays are named ``NAME/...``.
        serves: supported kinds of loss: ``hard``, ``soft``.
        exact: whether these losses equal, bit for bit, those from the teacher's logits.
        temperatures: lowest and highest supported temperature of soft losses.
    """

    name: str
    serves: tuple[str, ...]
    exact: bool
    temperatures: tuple[float, float]

    def arrays(self, shape: ResponseShape) -> tuple[ArraySpec, ...]:
        """Return the stored arrays.

        Raises:
            CacheError: the encoding does not support responses of this shape.
        """
        ...

    def encode(self, spatial: Tensor, global_: Tensor, seeds: np.ndarray) -> dict[str, Tensor]:
        """Encode logits on their device: array name -> rows (B, ...).

        Args:
            spatial: (B, K, h, w) float16.
            global_: (B, K) float16.
            seeds: (B,) uint64, the views' seeds, for an encoding that draws random numbers.
        """
        ...

    def targets(self, arrays: Mapping[str, Tensor]) -> Targets:
        """Return targets for the losses from rows of :meth:`encode`, on any device."""
        ...

    def pack(self, rows: Rows) -> Rows:
        """Rearrange rows for compression before they are stored; names and shapes stay."""
        return rows

    def unpack(self, rows: Rows, shape: ResponseShape) -> Rows:
        """Validate stored rows and undo :meth:`pack`.

        Raises:
            ValueError: values that no response of this shape has.
        """
        return rows
