"""Reading a cache: nothing that is not done, nothing that was altered, exchanged or lost."""

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
    """Hold the finished units of a cache, as they were when :func:`open_cache` opened it.

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
        """Return the same cache, with files of its own: for another thread."""
        return Cache(CacheStore(self.path, self.manifest), self._done, self._memory, self._units)

    def __repr__(self) -> str:
        units = f"{np.count_nonzero(self._done)} of {self._done.size} units"
        samples = f"{sum(self.counts)} samples in {len(self.counts)} shards"
        encodings = ", ".join(self.encodings)
        return f"Cache({self.path}: {self.views} views of {samples}, {units}; {encodings})"

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Return the (n, 2) int64 shard and offset of samples by their keys.

        Raises:
            CacheError: keys that the cache does not have, or not yet.
        """
        if self._index is None:
            begun = np.flatnonzero(self._done.any(axis=0)).tolist()
            self._index = KeyIndex(begun, self.keys, self.path)
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
        """Read the teacher's response to n (view, key) pairs, ready for the loss at any r.

        Args:
            pairs: view number and sample key; n > 0.
            encoding, kinds, temperature: see :meth:`choose`.

        Returns:
            Targets on ``device``: ``hard_global()`` (n,) and ``hard_spatial(r)`` (n, h, w) int64,
            ``global_log_probabilities(temperature)`` (n, K) and
            ``spatial_log_probabilities(r, temperature)`` (n, K, h, w) float32; of ``sampled`` only
            ``drawn_global(temperature)`` and ``drawn_spatial(r, temperature)``, classes.

        Raises:
            CacheError: a key or view that the cache does not have, or not yet, or no encoding.
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
        """List the encodings that serve these losses, the best first.

        That is the smallest exact one; of approximations, after them, the largest; then draws.

        Args:
            kinds: ``hard``, ``soft``.
            temperature: of soft losses; None: any.
        """
        return choosing.serving(self.encodings, self.shape, kinds, temperature)

    def choose(self, kinds: Collection[str], temperature: float = 1.0, name: str = "auto") -> str:
        """Return the encoding ``name``; for ``auto`` the first of :meth:`serving`.

        Raises:
            CacheError: the cache does not have it, or nothing that serves these losses.
        """
        serving = self.serving(kinds, temperature)
        if name in serving or (name == "auto" and serving):
            return serving[0] if name == "auto" else name
        raise choosing.refusal(self, kinds, temperature, name)

    def zarr(self) -> zarr.Group:
        """Return the cache as a zarr group, read-only, for a look around with zarr's own tools.

        zarr compares no digests, and a file that is missing reads as fill values. Of a URL it
        reads through fsspec, without the bounds on time and size that this package sets.
        """
        import zarr

        return zarr.open_group(str(self.path), mode="r")

    @property
    def views(self) -> int:
        """Count the views of every sample, finished or not."""
        return self.manifest.views

    @property
    def counts(self) -> tuple[int, ...]:
        """Count the samples of each tar shard."""
        return self.manifest.dataset.counts

    @property
    def shard_ids(self) -> tuple[str, ...]:
        """Identify each tar shard by the SHA-256 of its keys in order."""
        return self.manifest.dataset.shard_ids

    @property
    def shape(self) -> ResponseShape:
        """Return the shape of one view's spatial logits: (classes, height, width)."""
        return self.slabs.shape

    def specs(self, encoding: str) -> tuple[ArraySpec, ...]:
        """Return the encoding's arrays."""
        return self.encodings[encoding].arrays(self.shape)

    def done(self) -> np.ndarray:
        """Return which units are finished: (blocks, shards) bool."""
        return self._done.copy()

    @property
    def lineage(self) -> str:
        """Return the SHA-256 (hex) of what decides the bytes of the cache's units."""
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
        records = self.store.each(lambda u: self.store.record(*u), units, "reading their digests")
        for unit, record in zip(units, records, strict=True):
            found[tuple(unit)] = np.frombuffer(record.unit, np.uint8)
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
                "the cache has fewer views than are needed",
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

    def keys(self, shard: int) -> list[str]:
        """Return the sample keys of a tar shard, in the tar's order."""
        matrix = self._per_shard("key", shard)
        with self.store.error_context("key", None, shard):
            keys = layout.keys_of(matrix)
            if keys_sha256(keys) != self.shard_ids[shard]:
                raise ValueError("these are not the keys that the manifest identifies")
            return keys

    def labels(self, shard: int) -> np.ndarray:
        """Return the labels of a tar shard: (count,) int32."""
        return self._per_shard("label", shard)

    def image_crc32(self, shard: int) -> np.ndarray:
        """Return the CRC-32 of every image's bytes: (count,) uint32, read-only."""
        return self.slabs.kept(
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
        """Count the teacher's top-1 over all finished units: (correct, counted).

        Reads a small file per unit.
        """

        def of(unit: list[int]) -> np.ndarray:
            block, shard = unit
            pairs = self.store.chunk("top1", block * self.manifest.view_block, shard)
            return pairs[:, 0].sum(axis=0, dtype=np.int64)

        units = np.argwhere(self._done).tolist()
        pairs = self.store.each(of, units, "reading the teacher's top-1")
        correct, counted = sum(pairs, np.zeros(2, np.int64)).tolist()
        return correct, counted

    def top1_of(self, view: int, shard: int) -> np.ndarray:
        """Return (correct, counted) of one view of one tar shard: (2,) uint32."""
        self._require(view, shard)
        block = self.slabs.block("top1", view, shard)
        return block[view % len(block), 0].copy()

    def rows(
        self, encoding: str, view: int, shard: int, offsets: np.ndarray | Sequence[int]
    ) -> Rows:
        """Return the teacher's response to one view of one tar shard, as it was encoded.

        Args:
            offsets: (n,) numbers of samples in the shard, in any order.

        Returns:
            Array name -> (n, ...), copies.
        """
        offsets = np.asarray(offsets, np.int64)
        assert ((offsets >= 0) & (offsets < self.counts[shard])).all(), (shard, offsets)
        self._require(view, shard)
        return self.slabs.rows(encoding, view, shard, offsets)

    def gather(self, encoding: str, index: np.ndarray) -> Rows:
        """Return the teacher's response to any samples in any views, as it was encoded.

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
        return self.slabs.joined(parts)

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
        found = f"no {self.store.unit_name(block, shard)}"
        problem = "this part of the cache is not made yet"
        return CacheError(problem, where=self.path, found=found, action=FINISH)
