"""Fetching remote tars before they are used, so that their readers do not wait."""

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
    """The use of a tar, from item ``first`` to item ``last`` of those read."""

    tar: RemoteTar
    first: int
    last: int


def uses_of(tars: Sequence[Tar], numbers: np.ndarray, position: np.ndarray) -> list[Use]:
    """Return the uses of the remote tars, ordered by ``first``.

    Args:
        numbers: (n,) indices into ``tars``, in the order of reading.
        position: (n,) int64 positions of these reads, ascending.
    """
    used, first = np.unique(numbers, return_index=True)
    _, back = np.unique(numbers[::-1], return_index=True)
    last = len(numbers) - 1 - back
    uses = []
    for i in np.argsort(first, kind="stable").tolist():
        tar = tars[int(used[i])]
        if isinstance(tar, RemoteTar):
            uses.append(Use(tar, int(position[first[i]]), int(position[last[i]])))
    return uses


class ReadAhead:
    """Threads that fetch tars in the order of their use.

    Tars in use and tars fetched ahead take up half of the room for copies. The other half is for a
    cache's files and for evaluation, so that no fetch evicts a copy that is still needed. If a
    fetch fails, the reader of the tar raises the error.

    Args:
        tars: all tars; without a remote one, nothing is done.
        uses: uses ordered by ``first``, possibly endless; None: :meth:`add` adds them.
        horizon: number of positions to look ahead.
        position: position of the reader's first item.
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
        self._held: dict[RemoteTar, int] = {}  # with the position of the last use
        self._position = position
        self._change = threading.Condition()

    def over(self, loader: Loader[Item]) -> Iterator[Item]:
        """Yield the loader's items, each of which advances the reader by one position.

        Fetching starts once the loader's processes, which may be forked, have started.
        """
        try:
            for position, item in enumerate(loader.items(self.start), self._position + 1):
                self.advance(position)
                yield item
        finally:
            self.close()

    def start(self) -> None:
        """Start fetching."""
        for _ in range(0 if self._closed else FETCHING):
            threading.Thread(target=self._work, daemon=True, name=THREAD).start()

    def advance(self, position: int) -> None:
        """Record the reader's position."""
        with self._change:
            self._position = max(position, self._position)
            self._change.notify_all()

    def add(self, use: Use) -> None:
        """Add a use."""
        with self._change:
            self._uses = chain(self._uses, [use])
            self._change.notify_all()

    def close(self) -> None:
        """Stop fetching; transfers under way are finished."""
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
        return sum(tar.size for tar in {*held, use.tar}) <= self._room
