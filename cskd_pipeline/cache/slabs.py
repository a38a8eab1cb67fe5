"""Rows of an encoding's arrays, from cached slabs or by decoding single chunks.

A slab is all rows of one (view, tar shard). ``reader`` checks beforehand that its unit is finished.
"""

from collections.abc import Callable

import numpy as np

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.chunks import BytesLRU
from cskd_pipeline.cache.store import CacheStore
from cskd_pipeline.distill.encodings import Rows

SlabKey = tuple[str, int | None, int]
"""Encoding or array, view (None: the same in all views), tar shard."""
KEPT_BLOCK_BYTES = 2**22
"""Largest single-chunk block of views to keep; larger ones are decoded for every view."""
MAX_SLAB_BYTES = 2**29
"""Largest decoded ragged array: chunks of one repeated value would expand a thousandfold."""


class SlabReader:
    """Reads arrays of ``store`` by (view, tar shard); keeps up to ``memory`` bytes of slabs.

    Raises:
        CacheError: a file is missing, damaged, or does not match its unit's record.
    """

    def __init__(self, store: CacheStore, memory: int) -> None:
        self.store = store
        self.shape = layout.response_shape(store.manifest)
        self.encodings = layout.encodings_of(store.manifest)
        self.specs = layout.specs(store.manifest)
        self._counts = store.manifest.dataset.counts
        self._slabs: BytesLRU[SlabKey, Rows] = BytesLRU(memory)
        self._blocks: dict[str, tuple[str, np.ndarray]] = {}  # array -> (file key, its chunk)

    def rows(self, encoding: str, view: int, shard: int, offsets: np.ndarray) -> Rows:
        """Return copies of the rows ``offsets``, (n,), unpacked: array name -> (n, ...)."""
        specs = self.encodings[encoding].arrays(self.shape)
        if specs[0].rows is None:
            slab = self._slabs.get((encoding, view, shard))
            if slab is None:
                packed = {spec.name: self._slab(spec.name, view, shard) for spec in specs}
                slab = self._unpack(encoding, packed, view, shard)
                self._slabs.put((encoding, view, shard), slab, sum(r.nbytes for r in slab.values()))
            return {name: values[offsets] for name, values in slab.items()}
        packed = {spec.name: self._chunk_rows(spec.name, view, shard, offsets) for spec in specs}
        return self._unpack(encoding, packed, view, shard)

    def packed(self, name: str, view: int, shard: int) -> np.ndarray:
        """Return one array as stored, packed: (count, ...)."""
        if self.specs[name].rows is None:
            return self._slab(name, view, shard)
        return self._chunk_rows(name, view, shard, np.arange(self._counts[shard]))

    def block(self, name: str, view: int, shard: int) -> np.ndarray:
        """Return a single-chunk file of an array: (views of a unit, 1, ...).

        The last one is kept, so that reading view after view decodes it once.
        """
        key = self.store.arrays[name].key(view, shard)
        if self._blocks.get(name, ("",))[0] != key:
            chunk = self.store.chunk(name, view, shard)
            if chunk.nbytes > KEPT_BLOCK_BYTES:
                return chunk
            self._blocks[name] = key, chunk
        return self._blocks[name][1]

    def small(self, name: str, view: int, shard: int) -> np.ndarray:
        """Return ``seed`` or ``view_digest``: (count,), read-only."""
        return self.cached((name, view, shard), lambda: self._slab(name, view, shard))

    def cached(self, key: SlabKey, read: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the small array ``key``, read-only, from memory or from ``read``."""
        slab = self._slabs.get(key)
        if slab is None:
            slab = {key[0]: read()}
            slab[key[0]].flags.writeable = False
            self._slabs.put(key, slab, slab[key[0]].nbytes)
        return slab[key[0]]

    def join(self, parts: list[tuple[np.ndarray, Rows]]) -> Rows:
        """Join rows of several slabs; each part has the indices of its rows in the result.

        Ragged arrays are padded to the longest.
        """
        count = sum(len(indices) for indices, _ in parts)
        joined: Rows = {}
        for name in parts[0][1]:
            spec = self.specs[name]
            tail = np.max([rows[name].shape[1:] for _, rows in parts], axis=0).astype(int)
            out = joined[name] = np.full((count, *tail), spec.fill, spec.dtype)
            for indices, rows in parts:
                if spec.ragged:
                    out[indices, : rows[name].shape[1]] = rows[name]
                else:
                    out[indices] = rows[name]
        return joined

    def _unpack(self, encoding: str, packed: Rows, view: int, shard: int) -> Rows:
        with self.store.error_context(next(iter(packed)), view, shard):
            return self.encodings[encoding].unpack(packed, self.shape)

    def _chunk_rows(self, name: str, view: int, shard: int, offsets: np.ndarray) -> np.ndarray:
        array = self.store.arrays[name]
        assert array.chunk_shape is not None
        step = array.chunk_shape[2]
        out = np.empty((len(offsets), *array.shape[3:]), array.dtype)
        for chunk in np.unique(offsets // step).tolist():
            inside = np.flatnonzero(offsets // step == chunk)
            rows = self.store.chunk(name, view, shard, chunk * step)[0, 0]
            out[inside] = rows[offsets[inside] % step]
        return out

    def _slab(self, name: str, view: int, shard: int) -> np.ndarray:
        """Return one view: (count, ...); a ragged axis ends with the last entry in use."""
        array, count = self.store.arrays[name], self._counts[shard]
        if array.chunk_shape is None:
            block = self.block(name, view, shard)
            return block[view % len(block), 0, :count].copy()
        pieces = [self.store.chunk(name, view, shard)[0, 0, :count]]
        if not self.specs[name].ragged:
            return pieces[0]
        for start in range(array.chunk_shape[3], array.shape[3], array.chunk_shape[3]):
            piece = self.store.chunk_if_written(name, view, shard, 0, start)
            if piece is None:
                break
            pieces.append(piece[0, 0, :count])
            if len(pieces) * pieces[0].nbytes > MAX_SLAB_BYTES:
                with self.store.error_context(name, view, shard):
                    raise ValueError(f"decoded rows of more than {MAX_SLAB_BYTES} bytes")
        slab = np.concatenate(pieces, axis=1)[:, : array.shape[3]]
        used = (slab != array.fill).any(axis=(0, *range(2, slab.ndim)))
        return slab[:, : max(1, int(used.sum()))]
