"""A unit of work: these views of this tar shard, and all that is stored of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.manifest import CacheManifest, keys_sha256
from cskd_pipeline.errors import CacheError


class Unit(NamedTuple):
    """Name what is made, and committed, at once: these views of this tar shard."""

    block: int
    shard: int
    views: range


@dataclass
class UnitData:
    """Hold everything of one unit of V views and n samples, in the tar's order.

    Args:
        keys: n sample keys.
        labels: (n,) int32.
        image_crc32: (n,) uint32, of the images' bytes.
        seeds: (V, n) uint64.
        view_digests: (V, n) uint32.
        arrays: name -> (V, n, ...), rows as the encodings' ``encode`` gave them; the first own axis
            of a ragged array may end early.
        top1: (V, 2) uint32, of each view: samples whose label the teacher's global response has on
            top, and samples that were counted.
    """

    keys: Sequence[str]
    labels: np.ndarray
    image_crc32: np.ndarray
    seeds: np.ndarray
    view_digests: np.ndarray
    arrays: Mapping[str, np.ndarray]
    top1: np.ndarray

    def check(self, manifest: CacheManifest, unit: Unit) -> None:
        """Refuse data that are not of ``unit``, in ``manifest``'s data set.

        Raises:
            CacheError: keys are not the manifest's.
        """
        shard = manifest.dataset.shards[unit.shard]
        views, count = len(unit.views), shard.count
        if len(self.keys) != count or keys_sha256(self.keys) != shard.keys_sha256:
            raise CacheError(
                "the samples are not those of the cache's data set",
                where=f"shard {unit.shard} ({shard.name})",
                found=f"{len(self.keys)} samples, keys_sha256 {keys_sha256(self.keys)}",
                expected=f"{count} samples, keys_sha256 {shard.keys_sha256}",
                action="use the shards that the cache was begun with",
            )
        assert unit.views == range(views * unit.block, views * (unit.block + 1)), unit
        assert self.labels.shape == self.image_crc32.shape == (count,)
        assert self.seeds.shape == self.view_digests.shape == (views, count)
        assert self.top1.shape == (views, 2)
        for name, spec in layout.specs(manifest).items():
            found = self.arrays[name]
            tail = found.shape[2:]
            assert found.dtype == np.dtype(spec.dtype), (name, found.dtype)
            assert found.shape[:2] == (views, count), (name, found.shape)
            assert tail == spec.tail or (
                spec.ragged and tail[1:] == spec.tail[1:] and tail[0] <= spec.tail[0]
            ), (name, tail)


class UnitBuffer:
    """Gather arrays (views, count, ...) of one unit, whose samples come in any order.

    Args:
        fill: what stands where a ragged array's rows end early, by array name.
    """

    def __init__(self, views: int, count: int, fill: Mapping[str, int | float]) -> None:
        self.leading = (views, count)
        self.fill = fill
        self.arrays: dict[str, np.ndarray] = {}

    def put(
        self, rows: np.ndarray | int, offsets: np.ndarray, values: Mapping[str, np.ndarray]
    ) -> None:
        """Put ``values[name][i]`` at view row ``rows[i]`` and sample ``offsets[i]``."""
        for name, value in values.items():
            array = self._room(name, value)
            inner: list[Any] = [slice(0, n) for n in value.shape[1:]]
            array[(rows, offsets, *inner)] = value

    def _room(self, name: str, value: np.ndarray) -> np.ndarray:
        tail = value.shape[1:]
        old = self.arrays.get(name)
        if old is not None and all(a <= b for a, b in zip(tail, old.shape[2:], strict=True)):
            return old
        if old is not None:
            tail = tuple(max(a, b) for a, b in zip(tail, old.shape[2:], strict=True))
        new = np.full((*self.leading, *tail), self.fill.get(name, 0), value.dtype)
        if old is not None:
            new[tuple(slice(0, n) for n in old.shape)] = old
        self.arrays[name] = new
        return new
