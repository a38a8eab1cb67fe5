"""An index of a cache's sample keys: key -> tar shard and offset."""

from collections.abc import Callable, Sequence

import numpy as np

from cskd_pipeline.errors import CacheError


class KeyIndex:
    """Finds samples by key; takes about 30 bytes per sample.

    Args:
        shards: the numbers of the tar shards to index.
        keys: returns the keys of one tar shard in order.
        where: the cache, for messages.
    """

    def __init__(
        self, shards: Sequence[int], keys: Callable[[int], list[str]], where: object
    ) -> None:
        self._where = where
        parts = [np.array([key.encode() for key in keys(shard)]) for shard in shards]
        unsorted = np.concatenate([np.empty(0, "S1"), *parts])
        counts = [len(part) for part in parts]
        offset = np.concatenate([np.empty(0, np.int64), *map(np.arange, counts)])
        index = np.stack([np.repeat(shards, counts), offset], axis=1)
        order = np.argsort(unsorted, kind="stable")
        self._keys = unsorted[order]
        self._index = index[order].astype(np.int32)

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Return the shard and offset of ``keys``: (n, 2) int64.

        Raises:
            CacheError: a key is missing from the cache, or not unique in it.
        """
        encoded = np.array([key.encode() for key in keys])
        first = np.searchsorted(self._keys, encoded, side="left")
        count = np.searchsorted(self._keys, encoded, side="right") - first
        wrong = np.flatnonzero(count != 1)
        if len(wrong):
            example = f", such as {self._keys[0].decode()}" if len(self._keys) else ""
            raise CacheError(
                f"{len(wrong)} of {len(keys)} keys are missing from the cache, or not unique",
                where=self._where,
                found=", ".join(keys[i] for i in wrong[:3].tolist()),
                expected=f"keys of its {len(self._keys)} samples{example}",
                action="use the sample keys of the tars that the cache was dumped from "
                "(listed by cache.keys(shard))",
            )
        return self._index[first].astype(np.int64)

    def repeated(self) -> tuple[int, str, list[int]]:
        """Return the number of repeated keys, the first of them, and two shards that contain it."""
        again = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        if not len(again):
            return 0, "", []
        first = again[0]
        return len(again), self._keys[first].decode(), self._index[first : first + 2, 0].tolist()
