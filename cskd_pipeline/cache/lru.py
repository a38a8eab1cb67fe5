"""A least-recently-used store of arrays, bounded by bytes."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BytesLRU(Generic[K, V]):
    """Keeps what was used last, up to ``limit`` bytes in all; always at least the newest."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._items: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def get(self, key: K) -> V | None:
        """Return what is kept of ``key``, used now; None where nothing is."""
        item = self._items.get(key)
        if item is None:
            return None
        self._items.move_to_end(key)
        return item[0]

    def drop(self, key: K) -> None:
        """Let go of ``key``."""
        _, size = self._items.pop(key, (None, 0))
        self.used -= size

    def put(self, key: K, value: V, size: int) -> None:
        """Keep ``value``, of ``size`` bytes, and let go of what was not used for longest."""
        _, old = self._items.pop(key, (None, 0))
        self._items[key] = (value, size)
        self.used += size - old
        while self.used > self.limit and len(self._items) > 1:
            _, (_, oldest) = self._items.popitem(last=False)
            self.used -= oldest
