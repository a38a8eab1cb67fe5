"""Arrays of one unit, which fill up while its samples come in, in any order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class UnitBuffer:
    """Gather arrays (views, count, ...) of one unit.

    Args:
        fill: by array name, the value beyond the end of a ragged array's rows.
    """

    def __init__(self, views: int, count: int, fill: Mapping[str, int | float]) -> None:
        self.leading = (views, count)
        self.fill = fill
        self.arrays: dict[str, np.ndarray] = {}

    def put(
        self, rows: np.ndarray | int, offsets: np.ndarray, values: Mapping[str, np.ndarray]
    ) -> None:
        """Store ``values[name][i]`` at view row ``rows[i]`` and sample ``offsets[i]``."""
        for name, value in values.items():
            array = self._room(name, value)
            inner: list[Any] = [slice(0, n) for n in value.shape[1:]]
            array[(rows, offsets, *inner)] = value

    def _room(self, name: str, value: np.ndarray) -> np.ndarray:
        tail = value.shape[1:]
        old = self.arrays.get(name)
        if old is not None and all(a <= b for a, b in zip(tail, old.shape[2:], strict=True)):
            return old
        if old is not None:
            tail = tuple(max(a, b) for a, b in zip(tail, old.shape[2:], strict=True))
        new = np.full((*self.leading, *tail), self.fill.get(name, 0), value.dtype)
        if old is not None:
            new[tuple(slice(0, n) for n in old.shape)] = old
        self.arrays[name] = new
        return new
