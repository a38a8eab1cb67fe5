"""Reading a cache: nothing that is not done, nothing that was altered, exchanged or lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.digests import SIZE, root_digest, split_pin
from cskd_pipeline.cache.lru import BytesLRU
from cskd_pipeline.cache.manifest import CacheManifest, keys_sha256
from cskd_pipeline.cache.store import FINISH, CacheStore
from cskd_pipeline.distill.encodings import ArraySpec, ResponseShape, Rows
from cskd_pipeline.errors import CacheError
from cskd_pipeline.runtime.progress import progress

MAX_SLAB_BYTES = 2**29
"""Of one ragged array, decoded: chunks of one value would unfold thousandfold."""


def open_cache(location: Path | str, *, memory: int = 192 * 2**20) -> Cache:
    """Open the cache at ``location``: a folder, or a URL (``https://``, ``s3://``, ``hf://``, …).

    ``LOCATION@sha256:DIGEST`` opens it only if its contents have this root digest.

    Args:
        memory: bytes of decoded slabs to keep; a slab is all rows of one (view, tar shard).

    Raises:
        CacheError: no cache, one cut off while it was created, metadata that was altered, an
            encoding that is not registered, or another digest than ``location`` states.
        ManifestError: the manifest does not fit its schema.
        UsageError: ``location`` ends with what is no digest.
    """
    folder, stated = split_pin(location)
    store = CacheStore(folder)
    store.check_metadata()
    cache = Cache(store, store.done(), memory)
    if stated is not None:
        cache.require_digest(stated)
    return cache


class Cache:
    """The finished units of a cache, as they were when :func:`open_cache` opened it.

    A unit is a block of ``view_block`` views of one tar shard; what is not done does not exist.
    Every file is compared with its unit's record when it is first used; every record with the
    cache's root digest where one was stated. Cheap to pickle: a copy in another process opens its
    own files. One cache object serves one thread.

    Args:
        store: the open folder.
        done: (blocks, shards) bool, the finished units.
        memory: bytes of decoded slabs to keep.
        units: (blocks, shards, 32) uint8, their digests where they are known already.

    Raises:
        CacheError: when reading, for units that are not done and for files that are missing,
            damaged or not what was written; it names array, views, shard and file.
    """

    def __init__(
        self,
        store: CacheStore,
        done: np.ndarray,
        memory: int = 0,
        units: np.ndarray | None = None,
    ) -> None:
        self.path = store.path
        self.manifest: CacheManifest = store.manifest
        self.encodings = layout.encodings_of(self.manifest)
        self.store = store
        self._done, self._memory, self._units = done, memory, units
        self._specs = layout.specs(self.manifest)
        self._shape = layout.response_shape(self.manifest)
        self._slabs: BytesLRU[tuple[str, int, int], Rows] = BytesLRU(memory)
        self._checked: set[tuple[int, int]] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, (self.store, self._done, self._memory, self._units)

    @property
    def views(self) -> int:
        return self.manifest.views

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples of each tar shard."""
        return self.manifest.dataset.counts

    @property
    def shard_ids(self) -> tuple[str, ...]:
        return self.manifest.dataset.shard_ids

    @property
    def shape(self) -> ResponseShape:
        """Of one view's spatial logits."""
        return self._shape

    def specs(self, encoding: str) -> tuple[ArraySpec, ...]:
        """The encoding's arrays."""
        return self.encodings[encoding].arrays(self._shape)

    def done(self) -> np.ndarray:
        """Which units are finished: (blocks, shards) bool."""
        return self._done.copy()

    @property
    def lineage(self) -> str:
        """SHA-256 (hex) of what decides the bytes of the cache's units."""
        return self.store.lineage

    def digest(self) -> str | None:
        """Return the root digest, SHA-256 (hex), of a finished cache's contents, else None.

        Reads a small file per unit, once; from then on a unit that changes is refused.

        Raises:
            CacheError: a unit's record is damaged, or of another unit or cache.
        """
        if not self._done.all():
            return None
        if self._units is None:
            self._units = self.unit_digests(self._done)
        return root_digest(self.lineage, self.views, self._units)

    def unit_digests(self, chosen: np.ndarray) -> np.ndarray:
        """Return the digests of finished units: (blocks, shards, 32) uint8, 0 where not chosen.

        Args:
            chosen: (blocks, shards) bool.
        """
        if self._units is not None:
            return self._units * chosen[..., None]
        found = np.zeros((*chosen.shape, SIZE), np.uint8)
        units = np.argwhere(chosen).tolist()
        with progress(len(units), "units", "reading their digests") as meter:
            records = self.store.each(lambda unit: self.store.record(*unit), units)
            for unit, record in zip(units, records, strict=True):
                found[tuple(unit)] = np.frombuffer(record.unit, np.uint8)
                meter.advance()
        return found

    def require_digest(self, stated: str) -> None:
        """Refuse the cache unless its root digest is ``stated``, SHA-256 (hex)."""
        found = self.digest()
        if found != stated:
            count = f"{np.count_nonzero(self._done)} of {self._done.size} units are finished"
            raise CacheError(
                "the cache is not the one that was stated",
                where=self.path,
                found=f"no digest: {count}" if found is None else f"sha256:{found}",
                expected=f"sha256:{stated}",
                action="get the cache that has this digest, or leave out @sha256:… to use this one",
            )

    def require_done(
        self, views: Iterable[int] | None = None, shards: Iterable[int] | None = None
    ) -> None:
        """Check that these views (default: all) of these shards (default: all) can be read.

        Raises:
            CacheError: how many units are missing, which, and what makes them.
        """
        wanted = sorted(set(range(self.views) if views is None else views))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < self.views:
            raise CacheError(
                "the cache has fewer views than asked for",
                where=self.path,
                found=f"views 0-{self.views - 1}",
                expected=f"views {wanted[0]}-{wanted[-1]}",
                action="extend it: dump-teacher with more --views",
            )
        blocks = sorted({view // self.manifest.view_block for view in wanted})
        chosen = range(len(self.counts)) if shards is None else sorted(set(shards))
        done = self._done[np.ix_(blocks, chosen)]
        count = done.size - np.count_nonzero(done)
        if count:
            missing = islice(((b, s) for b in blocks for s in chosen if not self._done[b, s]), 1000)
            raise CacheError(
                "the cache is not finished",
                where=self.path,
                found=f"{count} of {done.size} units missing",
                expected="all of them",
                action=FINISH,
                problems=[f"missing: {self.store.unit_name(b, s)}" for b, s in missing],
            )

    def sizes(self) -> dict[str, int] | None:
        """The length in bytes of every file there is, by key; None where nobody can tell."""
        return self.store.sizes()

    def file(self, name: str, *at: int) -> str:
        """The file of an array that holds the element ``at``, below the cache's folder."""
        return self.store.arrays[name].key(*at)

    def check_shard_files(self, block: int, shard: int) -> None:
        """Compare keys, labels and image CRCs of a tar shard with the record of this unit of it.

        Raises:
            CacheError: one is damaged, or not the one that the unit was made beside.
        """
        for name in layout.PER_SHARD:
            self.store.shard_chunk(name, shard, block)

    def keys(self, shard: int) -> list[str]:
        """Sample keys in the tar's order."""
        matrix = self._per_shard("key", shard)
        with self.store.explained("key", None, shard):
            keys = layout.keys_of(matrix)
            if keys_sha256(keys) != self.shard_ids[shard]:
                raise ValueError("these are not the keys that the manifest identifies")
            return keys

    def labels(self, shard: int) -> np.ndarray:
        """(count,) int32."""
        return self._per_shard("label", shard)

    def labels_of(self, shards: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield :meth:`labels` of each shard, several read at a time where files are far."""
        return self.store.each(self.labels, shards)

    def image_crc32(self, shard: int) -> np.ndarray:
        """CRC-32 of every image's bytes: (count,) uint32."""
        return self._per_shard("image_crc32", shard)

    def seeds(self, view: int, shard: int) -> np.ndarray:
        """(count,) uint64, read-only."""
        return self._small_slab("seed", view, shard)

    def view_digests(self, view: int, shard: int) -> np.ndarray:
        """CRC-32 of every view's uint8 pixels before mixing: (count,) uint32, read-only."""
        return self._small_slab("view_digest", view, shard)

    def top1(self) -> tuple[int, int]:
        """(correct, counted) of the teacher's global response, over all finished units.

        Reads a small file per unit.
        """

        def of(unit: list[int]) -> np.ndarray:
            block, shard = unit
            pairs = self.store.chunk("top1", block * self.manifest.view_block, shard)
            return pairs[:, 0].sum(axis=0, dtype=np.int64)

        units, total = np.argwhere(self._done).tolist(), np.zeros(2, np.int64)
        with progress(len(units), "units", "reading the teacher's top-1") as meter:
            for pair in self.store.each(of, units):
                total += pair
                meter.advance()
        return int(total[0]), int(total[1])

    def top1_of(self, view: int, shard: int) -> np.ndarray:
        """(correct, counted) of one view of one tar shard: (2,) uint32."""
        self._require(view, shard)
        block = self.store.chunk("top1", view, shard)
        return block[view % len(block), 0]

    def rows(
        self, encoding: str, view: int, shard: int, offsets: np.ndarray | Sequence[int]
    ) -> Rows:
        """The teacher's answers to one view of one tar shard, as ``Encoding.encode`` gave them.

        Args:
            offsets: (n,) places in the shard, in any order.

        Returns:
            Array name -> (n, ...), copies.
        """
        offsets = np.asarray(offsets, np.int64)
        assert ((offsets >= 0) & (offsets < self.counts[shard])).all(), (shard, offsets)
        self._require(view, shard)
        specs = self.specs(encoding)
        if specs[0].rows is None:
            slab = self._slab(encoding, view, shard)
            return {name: values[offsets] for name, values in slab.items()}
        packed = {spec.name: self._random(spec.name, view, shard, offsets) for spec in specs}
        return self._unpacked(encoding, packed, view, shard)

    def stored(self, name: str, view: int, shard: int) -> np.ndarray:
        """One array of an encoding for a view of a tar shard, as it lies there: (count, ...).

        Readers want :meth:`rows`; this tells which of an encoding's arrays is damaged.
        """
        self._require(view, shard)
        if self._specs[name].rows is None:
            return self._whole(name, view, shard)
        return self._random(name, view, shard, np.arange(self.counts[shard]))

    def gather(self, encoding: str, index: np.ndarray) -> Rows:
        """The teacher's answers to any samples in any views.

        Args:
            index: (n, 3) view, shard, offset; n > 0.

        Returns:
            Array name -> (n, ...) in ``index``'s order; ragged arrays are as long as the longest.
        """
        index = np.asarray(index, np.int64)
        order = np.lexsort((index[:, 1], index[:, 0]))
        changes = np.diff(index[order, :2], axis=0).any(axis=1)
        parts = []
        for group in np.split(order, np.flatnonzero(changes) + 1):
            view, shard = index[group[0], :2].tolist()
            parts.append((group, self.rows(encoding, view, shard, index[group, 2])))
        return {name: self._joined(name, len(index), parts) for name in parts[0][1]}

    def _joined(self, name: str, count: int, parts: list[tuple[np.ndarray, Rows]]) -> np.ndarray:
        """The parts' rows of one array at their places in the batch."""
        spec = self._specs[name]
        tail = np.max([rows[name].shape[1:] for _, rows in parts], axis=0).astype(int)
        if not spec.ragged:
            out = np.empty((count, *tail), spec.dtype)
            for group, rows in parts:
                out[group] = rows[name]
            return out
        out = np.full((count, *tail), spec.fill, spec.dtype)
        for group, rows in parts:
            out[group, : rows[name].shape[1]] = rows[name]
        return out

    def _random(self, name: str, view: int, shard: int, offsets: np.ndarray) -> np.ndarray:
        array = self.store.arrays[name]
        assert array.chunk_shape is not None
        step = array.chunk_shape[2]
        out = np.empty((len(offsets), *array.shape[3:]), array.dtype)
        for chunk in np.unique(offsets // step).tolist():
            here = np.flatnonzero(offsets // step == chunk)
            rows = self.store.chunk(name, view, shard, chunk * step)[0, 0]
            out[here] = rows[offsets[here] % step]
        return out

    def _slab(self, encoding: str, view: int, shard: int) -> Rows:
        """All rows of the encoding's arrays, decoded and kept."""
        slab = self._slabs.get((encoding, view, shard))
        if slab is None:
            packed = {s.name: self._whole(s.name, view, shard) for s in self.specs(encoding)}
            slab = self._unpacked(encoding, packed, view, shard)
            self._slabs.put((encoding, view, shard), slab, sum(r.nbytes for r in slab.values()))
        return slab

    def _unpacked(self, encoding: str, packed: Rows, view: int, shard: int) -> Rows:
        with self.store.explained(next(iter(packed)), view, shard):
            return self.encodings[encoding].unpack(packed, self._shape)

    def _whole(self, name: str, view: int, shard: int) -> np.ndarray:
        """(count, ...) of one view; a ragged axis ends with the last entry in use."""
        array, count = self.store.arrays[name], self.counts[shard]
        if array.chunk_shape is None:
            block = self.store.chunk(name, view, shard)
            return block[view % len(block), 0, :count].copy()  # the block itself is not kept
        pieces = [self.store.chunk(name, view, shard)[0, 0, :count]]
        if not self._specs[name].ragged:
            return pieces[0]
        for start in range(array.chunk_shape[3], array.shape[3], array.chunk_shape[3]):
            piece = self.store.chunk_if_written(name, view, shard, 0, start)
            if piece is None:
                break
            pieces.append(piece[0, 0, :count])
            if len(pieces) * pieces[0].nbytes > MAX_SLAB_BYTES:
                with self.store.explained(name, view, shard):
                    raise ValueError(f"rows of more than {MAX_SLAB_BYTES} bytes")
        whole = np.concatenate(pieces, axis=1)[:, : array.shape[3]]
        used = (whole != array.fill).any(axis=(0, *range(2, whole.ndim)))
        return whole[:, : max(1, int(used.sum()))]

    def _small_slab(self, name: str, view: int, shard: int) -> np.ndarray:
        self._require(view, shard)
        slab = self._slabs.get((name, view, shard))
        if slab is None:
            slab = {name: self._whole(name, view, shard)}
            slab[name].flags.writeable = False
            self._slabs.put((name, view, shard), slab, slab[name].nbytes)
        return slab[name]

    def _per_shard(self, name: str, shard: int) -> np.ndarray:
        if not self._done[:, shard].any():
            raise self._not_done(0, shard)
        return self.store.shard_chunk(name, shard, int(self._done[:, shard].argmax()))

    def _require(self, view: int, shard: int) -> None:
        """A unit's record is read at its first use: opening looked only at which files exist."""
        assert 0 <= view < self.views, view
        unit = (view // self.manifest.view_block, shard)
        if unit in self._checked:
            return
        if not self._done[unit]:
            raise self._not_done(*unit)
        record = self.store.record(*unit)
        if self._units is not None and record.unit != self._units[unit].tobytes():
            raise CacheError(
                "the cache has changed since it was opened",
                where=self.path,
                found=f"another record of {self.store.unit_name(*unit)}",
                expected="finished units, which never change",
                action="run the command again; if the cache was exchanged on purpose, start anew",
            )
        self._checked.add(unit)

    def _not_done(self, block: int, shard: int) -> CacheError:
        return CacheError(
            "this part of the cache is not made yet",
            where=self.path,
            found=f"no {self.store.unit_name(block, shard)}",
            action=FINISH,
        )
