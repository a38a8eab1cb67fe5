"""Read a cache: finished units only, verified against their digests."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cskd_pipeline.cache import choosing, layout
from cskd_pipeline.cache.digests import SIZE, root_digest, split_pin
from cskd_pipeline.cache.key_index import KeyIndex
from cskd_pipeline.cache.manifest import CacheManifest, keys_sha256
from cskd_pipeline.cache.slabs import SlabReader
from cskd_pipeline.cache.store import FINISH, CacheStore
from cskd_pipeline.distill.encodings import ArraySpec, ResponseShape, Rows
from cskd_pipeline.errors import CacheError

if TYPE_CHECKING:
    import torch
    import zarr

    from cskd_pipeline.distill.targets import Targets


def open_cache(location: Path | str, *, memory: int = 192 * 2**20) -> Cache:
    """Open the cache at ``location``: a folder, or a URL (``https://``, ``s3://``, ``hf://``, …).

    ``LOCATION@sha256:DIGEST`` opens it only if its contents have this root digest.

    Args:
        memory: bytes of decoded slabs to keep; a slab is all rows of one (view, tar shard).

    Raises:
        CacheError: no cache, one whose creation was interrupted, altered metadata, an encoding that
            is not registered, or a root digest other than the one in ``location``.
        ManifestError: the manifest does not match its schema.
        UsageError: ``location`` ends with a malformed digest.
    """
    folder, digest = split_pin(location)
    store = CacheStore(folder)
    store.check_metadata()
    cache = Cache(store, store.done(), memory)
    if digest is not None:
        cache.require_digest(digest)
    return cache


class Cache:
    """The units of a cache that were finished when :func:`open_cache` opened it.

    A unit is a block of ``view_block`` views of one tar shard. Every file is compared with its
    unit's record on first use, and every record with the root digest if one was given. Cheap to
    pickle: a copy in another process opens its own files. Not thread-safe: see :meth:`reopened`.

    Args:
        store: the open folder.
        done: (blocks, shards) bool, the finished units.
        memory: bytes of decoded slabs to keep.
        units: (blocks, shards, 32) uint8, the unit digests if already known.

    Raises:
        CacheError: on reading a unit that is not finished, or a file that is missing, damaged or
            altered; names array, views, shard and file.
    """

    def __init__(
        self, store: CacheStore, done: np.ndarray, memory: int = 0, units: np.ndarray | None = None
    ) -> None:
        self.path = store.path
        self.manifest: CacheManifest = store.manifest
        self.store = store
        self._done, self._memory, self._units = done, memory, units
        self.slabs = SlabReader(store, memory)
        self.encodings = self.slabs.encodings
        self._checked: set[tuple[int, int]] = set()
        self._index: KeyIndex | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, (self.store, self._done, self._memory, self._units)

    def reopened(self) -> Cache:
        """Return a copy of the cache with its own open files, for another thread."""
        return Cache(CacheStore(self.path, self.manifest), self._done, self._memory, self._units)

    def __repr__(self) -> str:
        units = f"{np.count_nonzero(self._done)} of {self._done.size} units"
        samples = f"{sum(self.counts)} samples in {len(self.counts)} shards"
        encodings = ", ".join(self.encodings)
        return f"Cache({self.path}: {self.views} views of {samples}, {units}; {encodings})"

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Return the shard and offset of the samples with ``keys``: (n, 2) int64.

        Raises:
            CacheError: the cache does not contain a key, or not yet.
        """
        if self._index is None:
            started = np.flatnonzero(self._done.any(axis=0)).tolist()
            self._index = KeyIndex(started, self.keys, self.path)
        return self._index.find(keys)

    def targets(
        self,
        pairs: Sequence[tuple[int, str]],
        encoding: str = "auto",
        *,
        kinds: Collection[str] = ("hard",),
        temperature: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> Targets:
        """Read the teacher's responses to n (view, key) pairs, as targets for the loss at any r.

        Args:
            pairs: view numbers and sample keys; n > 0.
            encoding, kinds, temperature: see :meth:`choose`.

        Returns:
            Targets on ``device``: ``hard_global()`` (n,) and ``hard_spatial(r)`` (n, h, w) int64,
            ``global_log_probabilities(temperature)`` (n, K) and
            ``spatial_log_probabilities(r, temperature)`` (n, K, h, w) float32. ``sampled`` has only
            the classes ``drawn_global(temperature)`` and ``drawn_spatial(r, temperature)``.

        Raises:
            CacheError: a key or view is missing or not finished, or no encoding supports ``kinds``.
        """
        import torch

        chosen = self.choose(kinds, temperature, encoding)
        views = np.array([view for view, _ in pairs], np.int64)
        self.require_done(views=views.tolist(), shards=())
        index = np.column_stack([views, self.find([key for _, key in pairs])])
        rows = self.gather(chosen, index)
        tensors = {name: torch.from_numpy(values).to(device) for name, values in rows.items()}
        return self.encodings[chosen].targets(tensors)

    def serving(self, kinds: Collection[str], temperature: float | None = 1.0) -> list[str]:
        """List the encodings that support these losses, best first.

        Exact encodings come first, by increasing size; then approximations, by decreasing size;
        then draws.

        Args:
            kinds: target kinds, ``hard`` and ``soft``.
            temperature: temperature of the soft losses; None: any.
        """
        return choosing.serving(self.encodings, self.shape, kinds, temperature)

    def choose(self, kinds: Collection[str], temperature: float = 1.0, name: str = "auto") -> str:
        """Return the encoding ``name``; for ``auto`` the first of :meth:`serving`.

        Raises:
            CacheError: the cache has no such encoding, or none that supports these losses.
        """
        supported = self.serving(kinds, temperature)
        if name in supported or (name == "auto" and supported):
            return supported[0] if name == "auto" else name
        raise choosing.refusal(self, kinds, temperature, name)

    def zarr(self) -> zarr.Group:
        """Return the cache as a read-only zarr group, to explore it with zarr's own tools.

        zarr verifies no digests and reads a missing file as fill values. It reads URLs through
        fsspec, without this package's limits on time and size.
        """
        import zarr

        return zarr.open_group(str(self.path), mode="r")

    @property
    def views(self) -> int:
        """Return the number of views of every sample, finished or not."""
        return self.manifest.views

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the number of samples in each tar shard."""
        return self.manifest.dataset.counts

    @property
    def shard_ids(self) -> tuple[str, ...]:
        """Return the ID of each tar shard: the SHA-256 of its keys in order."""
        return self.manifest.dataset.shard_ids

    @property
    def shape(self) -> ResponseShape:
        """Return the shape of one view's spatial logits: (classes, height, width)."""
        return self.slabs.shape

    def specs(self, encoding: str) -> tuple[ArraySpec, ...]:
        """Return the encoding's arrays."""
        return self.encodings[encoding].arrays(self.shape)

    def done(self) -> np.ndarray:
        """Return the finished units: (blocks, shards) bool."""
        return self._done.copy()

    @property
    def lineage(self) -> str:
        """Return the SHA-256 (hex) of everything that determines the bytes of the cache's units."""
        return self.store.lineage

    def digest(self) -> str | None:
        """Return the root digest, SHA-256 (hex), of the cache's contents; None if unfinished.

        The first call reads one small file per unit; later reads refuse a unit that has changed.

        Raises:
            CacheError: a unit's record is damaged, or belongs to another unit or cache.
        """
        if not self._done.all():
            return None
        if self._units is None:
            self._units = self.unit_digests(self._done)
        return root_digest(self.lineage, self.views, self._units)

    def unit_digests(self, chosen: np.ndarray) -> np.ndarray:
        """Return the digests of finished units: (blocks, shards, 32) uint8, 0 unless chosen.

        Args:
            chosen: (blocks, shards) bool, the finished units to include.
        """
        if self._units is not None:
            return self._units * chosen[..., None]
        digests = np.zeros((*chosen.shape, SIZE), np.uint8)
        units = np.argwhere(chosen).tolist()
        records = self.store.each(lambda u: self.store.record(*u), units, "reading digests")
        for unit, record in zip(units, records, strict=True):
            digests[tuple(unit)] = np.frombuffer(record.unit, np.uint8)
        return digests

    def require_digest(self, stated: str) -> None:
        """Raise a CacheError unless the root digest, SHA-256 (hex), is ``stated``."""
        found = self.digest()
        if found != stated:
            count = f"{np.count_nonzero(self._done)} of {self._done.size} units are finished"
            raise CacheError(
                "the cache does not have the requested digest",
                where=self.path,
                found=f"no digest: {count}" if found is None else f"sha256:{found}",
                expected=f"sha256:{stated}",
                action="get the cache with this digest, or omit @sha256:… to use this one",
            )

    def require_done(
        self, views: Iterable[int] | None = None, shards: Iterable[int] | None = None
    ) -> None:
        """Require that these views (default: all) of these shards (default: all) are finished.

        Raises:
            CacheError: units are missing; lists them.
        """
        required = sorted(set(range(self.views) if views is None else views))
        if required and not 0 <= required[0] <= required[-1] < self.views:
            raise CacheError(
                "the cache has too few views",
                where=self.path,
                found=f"views 0-{self.views - 1}",
                expected=f"views {required[0]}-{required[-1]}",
                action="extend the cache: run dump-teacher with more --views",
            )
        blocks = sorted({view // self.manifest.view_block for view in required})
        chosen = range(len(self.counts)) if shards is None else sorted(set(shards))
        done = self._done[np.ix_(blocks, chosen)]
        count = done.size - np.count_nonzero(done)
        if count:
            missing = islice(((b, s) for b in blocks for s in chosen if not self._done[b, s]), 1000)
            raise CacheError(
                "the cache is not finished",
                where=self.path,
                found=f"{count} of {done.size} units missing",
                expected="no unit missing",
                action=FINISH,
                problems=[f"missing: {self.store.unit_name(b, s)}" for b, s in missing],
            )

    def keys(self, shard: int) -> list[str]:
        """Return the sample keys of a tar shard in tar order."""
        matrix = self._per_shard("key", shard)
        with self.store.error_context("key", None, shard):
            keys = layout.keys_of(matrix)
            if keys_sha256(keys) != self.shard_ids[shard]:
                raise ValueError("the keys do not match keys_sha256 in the manifest")
            return keys

    def labels(self, shard: int) -> np.ndarray:
        """Return the labels of a tar shard: (count,) int32."""
        return self._per_shard("label", shard)

    def image_crc32(self, shard: int) -> np.ndarray:
        """Return the CRC-32 of every image's bytes: (count,) uint32, read-only."""
        return self.slabs.cached(
            ("image_crc32", None, shard), lambda: self._per_shard("image_crc32", shard)
        )

    def seeds(self, view: int, shard: int) -> np.ndarray:
        """Return the seed of every view: (count,) uint64, read-only."""
        self._require(view, shard)
        return self.slabs.small("seed", view, shard)

    def view_digests(self, view: int, shard: int) -> np.ndarray:
        """Return the CRC-32 of every view's pixels before mixing: (count,) uint32, read-only."""
        self._require(view, shard)
        return self.slabs.small("view_digest", view, shard)

    def top1(self) -> tuple[int, int]:
        """Count the teacher's top-1 hits in all finished units: (correct, counted).

        Reads one small file per unit.
        """

        def count(unit: list[int]) -> np.ndarray:
            block, shard = unit
            pairs = self.store.chunk("top1", block * self.manifest.view_block, shard)
            return pairs[:, 0].sum(axis=0, dtype=np.int64)

        units = np.argwhere(self._done).tolist()
        pairs = self.store.each(count, units, "reading the teacher's top-1")
        correct, counted = sum(pairs, np.zeros(2, np.int64)).tolist()
        return correct, counted

    def top1_of(self, view: int, shard: int) -> np.ndarray:
        """Return the top-1 counts (correct, counted) of one view of one tar shard: (2,) uint32."""
        self._require(view, shard)
        block = self.slabs.block("top1", view, shard)
        return block[view % len(block), 0].copy()

    def rows(
        self, encoding: str, view: int, shard: int, offsets: np.ndarray | Sequence[int]
    ) -> Rows:
        """Return the encoded responses to samples of one tar shard in one view.

        Args:
            offsets: (n,) positions of the samples in the shard, in any order.

        Returns:
            Array name -> (n, ...), copies.
        """
        offsets = np.asarray(offsets, np.int64)
        assert ((offsets >= 0) & (offsets < self.counts[shard])).all(), (shard, offsets)
        self._require(view, shard)
        return self.slabs.rows(encoding, view, shard, offsets)

    def gather(self, encoding: str, index: np.ndarray) -> Rows:
        """Return the encoded responses to any samples in any views.

        Args:
            index: (n, 3) view, shard, offset; n > 0.

        Returns:
            Array name -> (n, ...) in ``index``'s order; ragged arrays are padded to the longest.
        """
        index = np.asarray(index, np.int64)
        order = np.lexsort((index[:, 1], index[:, 0]))
        changes = np.diff(index[order, :2], axis=0).any(axis=1)
        parts = []
        for group in np.split(order, np.flatnonzero(changes) + 1):
            view, shard = index[group[0], :2].tolist()
            parts.append((group, self.rows(encoding, view, shard, index[group, 2])))
        return self.slabs.join(parts)

    def _per_shard(self, name: str, shard: int) -> np.ndarray:
        if not self._done[:, shard].any():
            raise self._not_done(0, shard)
        return self.store.shard_chunk(name, shard, int(self._done[:, shard].argmax()))

    def _require(self, view: int, shard: int) -> None:
        """Require a finished unit; verify its record on first use."""
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
                found=f"a different record of {self.store.unit_name(*unit)}",
                expected="finished units never change",
                action="run the command again; if the cache was replaced on purpose, start over",
            )
        self._checked.add(unit)

    def _not_done(self, block: int, shard: int) -> CacheError:
        found = f"no {self.store.unit_name(block, shard)}"
        problem = "this part of the cache is not written yet"
        return CacheError(problem, where=self.path, found=found, action=FINISH)
