"""The units that a dump has yet to make, drawn one by one by any number of processes.

Ranks of a job draw from one counter, so none gets a unit that another has drawn, and a slow one
draws fewer. Jobs that share a cache's folder alone, and a job's ranks once the counter has run out,
see each other's claims there. No rank waits for another before all units are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cskd_pipeline.cache.claims import Claims
from cskd_pipeline.cache.units import Unit
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.runtime.distributed import ALONE, Ranks
from cskd_pipeline.runtime.signals import pause

_SHORTEST, _LONGEST = 0.05, 5.0  # seconds between looks at what others make


class UndoneUnits:
    """Draw the units of a cache that nobody has made or claimed.

    Args:
        units: those that were undone at the start; the same list on every rank.
        patience: seconds without a sign of life after which a unit is taken over from the process
            that claimed it.
        ranks: of one job.

    Attributes:
        expected: how many views this process will have drawn in the end, as far as is known.
    """

    def __init__(
        self, cache: CacheWriter, units: Sequence[Unit], patience: float, ranks: Ranks = ALONE
    ) -> None:
        self.cache, self.units, self.ranks = cache, tuple(units), ranks
        self.claims = Claims(cache.path, patience)
        self._left = np.cumsum([cache.size_of(unit) for unit in self.units][::-1])[::-1].tolist()
        self._mine = 0
        self.expected = self._expect(0)

    def rounds(self) -> Iterator[Iterator[Unit]]:
        """Yield rounds of units until all are done, here or elsewhere.

        What a round has drawn is committed before the next is requested, or two processes might
        wait for each other.

        Raises:
            CskdError: the one that ended another rank.
            KeyboardInterrupt: a signal came while there was nothing to do but wait.
        """
        yield self._drawn()
        seconds = _SHORTEST
        while left := self.left():
            if taken := next((unit for unit in left if self._takes(unit)), None):
                yield iter([taken])
                seconds = _SHORTEST
                continue
            self.ranks.heed()
            pause(seconds)
            seconds = min(1.5 * seconds, _LONGEST)
        if self.cache.done().all():
            self.claims.sweep()

    def left(self) -> list[Unit]:
        """Return the units that are not done at this moment, whoever makes them."""
        done = self.cache.done()
        return [unit for unit in self.units if not done[unit.block, unit.shard]]

    def _drawn(self) -> Iterator[Unit]:
        for number in self.ranks.numbers("units"):
            if number >= len(self.units):
                return
            unit = self.units[number]
            taken = self._takes(unit)
            self._mine += taken * self.cache.size_of(unit)
            self.expected = self._expect(number + 1)
            if taken:
                yield unit

    def _takes(self, unit: Unit) -> bool:
        if self.cache.is_done(unit) or not self.claims.take(unit):
            return False
        if self.cache.is_done(unit):  # by one that has let go of it just now
            self.claims.drop(unit)
            return False
        return True

    def _expect(self, number: int) -> int:
        """Count the views drawn, and an equal share of those from unit ``number`` on."""
        left = self._left[number] if number < len(self.units) else 0
        return self._mine + left // self.ranks.world
