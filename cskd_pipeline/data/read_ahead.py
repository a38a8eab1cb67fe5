"""Tars at a URL fetched before they are used, so that what reads them does not wait."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np

from cskd_pipeline.data.remote_tar import FETCHING, RemoteTar, Tar, room_of
from cskd_pipeline.data.workers import Loader
from cskd_pipeline.errors import CskdError

log = logging.getLogger(__name__)

Item = TypeVar("Item")

THREAD = "read ahead"


@dataclass(frozen=True)
class Use:
    """State that a tar is used from item ``first`` to ``last`` of what is read."""

    tar: RemoteTar
    first: int
    last: int


def uses_of(tars: Sequence[Tar], numbers: np.ndarray, position: np.ndarray) -> list[Use]:
    """Return the uses of tars that lie elsewhere, in the order of their first.

    Args:
        numbers: (n,) of the tars that are used, one after the other.
        position: (n,) int64 of each use, ascending.
    """
    found, first = np.unique(numbers, return_index=True)
    _, back = np.unique(numbers[::-1], return_index=True)
    last = len(numbers) - 1 - back
    uses = []
    for i in np.argsort(first, kind="stable").tolist():
        tar = tars[int(found[i])]
        if isinstance(tar, RemoteTar):
            uses.append(Use(tar, int(position[first[i]]), int(position[last[i]])))
    return uses


class ReadAhead:
    """Fetch tars in the order of their use, by threads.

    What is in use and what was fetched ahead fit into half of the room for copies together: the
    other half is for a cache's files and for evaluation, so that nothing that is fetched drives
    out what is still needed. A tar that cannot be fetched is left to its reader, who meets the
    error where it belongs.

    Args:
        tars: all that there are; where none lies elsewhere, nothing is done.
        uses: in the order of ``first``; may have no end. None: they come by :meth:`add`.
        horizon: positions ahead that are looked at.
        position: of the reader's first item.
    """

    def __init__(
        self,
        tars: Sequence[Tar],
        uses: Iterable[Use] | None,
        horizon: int = sys.maxsize,
        position: int = 0,
    ) -> None:
        room = room_of(tars)
        self._closed = room is None
        self._uses, self._growing = iter(uses or ()), uses is None
        self._room, self._horizon = (room or 0) // 2, horizon
        self._waiting: Use | None = None
        self._held: dict[RemoteTar, int] = {}  # and the position of its last use
        self._position = position
        self._change = threading.Condition()

    def over(self, loader: Loader[Item]) -> Iterator[Item]:
        """Yield the loader's items, of which each moves the reader on by one position.

        Tars are fetched as soon as the loader's processes, which may be forked, are there: these
        read the first ones meanwhile.
        """
        try:
            for position, item in enumerate(loader.items(self.start), self._position + 1):
                self.advance(position)
                yield item
        finally:
            self.close()

    def start(self) -> None:
        """Start to fetch."""
        for _ in range(0 if self._closed else FETCHING):
            threading.Thread(target=self._work, daemon=True, name=THREAD).start()

    def advance(self, position: int) -> None:
        """Note where the reader is."""
        with self._change:
            self._position = max(position, self._position)
            self._change.notify_all()

    def add(self, use: Use) -> None:
        """Add a use that has become known."""
        with self._change:
            self._uses = chain(self._uses, [use])
            self._change.notify_all()

    def close(self) -> None:
        """Fetch nothing more; transfers that have begun are finished."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    def _work(self) -> None:
        while (tar := self._next()) is not None:
            try:
                tar.fetch()
            except CskdError as error:
                log.debug("%s was not fetched ahead: %s", tar, error)

    def _next(self) -> RemoteTar | None:
        """Return the next tar, once there is room for it; None at the end."""
        with self._change:
            while not self._closed:
                use = self._waiting or next(self._uses, None)
                self._waiting = use
                if use is None and not self._growing:
                    return None
                if use is None:
                    self._change.wait()
                elif use.last < self._position:
                    self._waiting = None
                elif self._fits(use):
                    self._waiting = None
                    self._held[use.tar] = max(use.last, self._held.get(use.tar, 0))
                    return use.tar
                else:
                    self._change.wait()
            return None

    def _fits(self, use: Use) -> bool:
        if use.first > self._position + self._horizon:
            return False
        held = {tar: last for tar, last in self._held.items() if last >= self._position}
        self._held = held
        known = 0 if use.tar in held else use.tar.size
        return sum(tar.size for tar in held) + known <= self._room
