"""Sample keys found in a cache: key -> tar shard and offset."""

from collections.abc import Callable, Sequence

import numpy as np

from cskd_pipeline.errors import CacheError


class KeyIndex:
    """Finds samples by key; about 30 bytes a sample.

    Args:
        shards: the numbers of the tar shards to look in.
        keys: of one of them, in order.
        where: the cache, for messages.
    """

    def __init__(
        self, shards: Sequence[int], keys: Callable[[int], list[str]], where: object
    ) -> None:
        self._where = where
        parts = [np.array([key.encode() for key in keys(shard)]) for shard in shards]
        every = np.concatenate([np.empty(0, "S1"), *parts])
        counts = [len(part) for part in parts]
        offset = np.concatenate([np.empty(0, np.int64), *map(np.arange, counts)])
        at = np.stack([np.repeat(shards, counts), offset], axis=1)
        order = np.argsort(every, kind="stable")
        self._keys = every[order]
        self._found = at[order].astype(np.int32)

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Return the (n, 2) int64 shard and offset of ``keys``.

        Raises:
            CacheError: keys that the cache lacks, or has more than once.
        """
        sought = np.array([key.encode() for key in keys])
        first = np.searchsorted(self._keys, sought, side="left")
        count = np.searchsorted(self._keys, sought, side="right") - first
        wrong = np.flatnonzero(count != 1)
        if len(wrong):
            example = self._keys[0].decode() if len(self._keys) else "nothing yet"
            raise CacheError(
                f"{len(wrong)} of {len(keys)} keys are not in the cache, or more than once",
                where=self._where,
                found=", ".join(keys[i] for i in wrong[:3].tolist()),
                expected=f"keys of its {len(self._keys)} samples, such as {example}",
                action="use the sample keys of the tars that the cache was made from "
                "(cache.keys(shard) lists a shard's)",
            )
        return self._found[first].astype(np.int64)

    def repeated(self) -> tuple[int, str, list[int]]:
        """Count the keys that come more than once; give the first, and two shards that have it."""
        again = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        if not len(again):
            return 0, "", []
        first = again[0]
        return len(again), self._keys[first].decode(), self._found[first : first + 2, 0].tolist()
