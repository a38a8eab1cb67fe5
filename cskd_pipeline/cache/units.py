"""A unit of work, a block of views of one tar shard, and the arrays stored for it.

A unit has a few files however many views it contains: larger view blocks give fewer files. The
encodings that are read view by view have a chunk for each view whatever the block size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.manifest import CacheManifest, keys_sha256
from cskd_pipeline.distill.encodings import ArraySpec, Encoding, ResponseShape, Rows
from cskd_pipeline.errors import CacheError

if TYPE_CHECKING:
    from torch import Tensor

SHARED_DECODE = 10  # views that share one image decode: more save little
MAX_VIEW_BLOCK = 100  # largest automatic choice: a stopped dump loses a unit
MAX_UNIT_BYTES = 2**30
FEW_FILES = 40_000
HUB_FILES, HUB_FOLDER = 100_000, 10_000  # limits recommended by the Hugging Face Hub


class Unit(NamedTuple):
    """A unit of work, committed as a whole: a block of views of one tar shard."""

    block: int
    shard: int
    views: range

    @classmethod
    def of(cls, manifest: CacheManifest, block: int, shard: int) -> Unit:
        """Return the unit of a block and a tar shard of the cache."""
        size = manifest.view_block
        return cls(block, shard, range(block * size, (block + 1) * size))


@dataclass
class UnitData:
    """The data of one unit of V views and n samples, in the tar's order.

    Args:
        keys: n sample keys.
        labels: (n,) int32.
        image_crc32: (n,) uint32, CRC-32 of the image bytes.
        seeds: (V, n) uint64.
        view_digests: (V, n) uint32.
        arrays: name -> (V, n, ...), rows as returned by the encodings' ``encode``; the first own
            axis of a ragged array may be shorter than declared.
        top1: (V, 2) uint32, for each view the samples whose label is the teacher's global top-1,
            and the samples counted.
    """

    keys: Sequence[str]
    labels: np.ndarray
    image_crc32: np.ndarray
    seeds: np.ndarray
    view_digests: np.ndarray
    arrays: Mapping[str, np.ndarray]
    top1: np.ndarray

    def per_view(self) -> Rows:
        """Return the arrays with a view axis: name -> (V, ...)."""
        own = {"seed": self.seeds, "view_digest": self.view_digests, "top1": self.top1}
        return {**own, **self.arrays}

    def check(self, manifest: CacheManifest, unit: Unit) -> None:
        """Refuse keys and arrays that do not fit ``unit`` and the manifest's data set."""
        shard = manifest.dataset.shards[unit.shard]
        views, count = len(unit.views), shard.count
        if len(self.keys) != count or keys_sha256(self.keys) != shard.keys_sha256:
            raise CacheError(
                "the samples are not those of the cache's data set",
                where=f"shard {unit.shard} ({shard.name})",
                found=f"{len(self.keys)} samples, keys_sha256 {keys_sha256(self.keys)}",
                expected=f"{count} samples, keys_sha256 {shard.keys_sha256}",
                action="use the shards that the cache was started with",
            )
        assert unit.views == range(views * unit.block, views * (unit.block + 1)), unit
        assert self.labels.shape == self.image_crc32.shape == (count,)
        assert self.seeds.shape == self.view_digests.shape == (views, count)
        assert self.top1.shape == (views, 2)
        require_rows(layout.specs(manifest).values(), self.arrays, (views, count))


def encode_batch(encoding: Encoding, spatial: Tensor, global_: Tensor, seeds: np.ndarray) -> Rows:
    """Encode a batch of responses and return the arrays on the host: name -> (B, ...).

    Args:
        spatial: (B, K, h, w) float16.
        global_: (B, K) float16.
        seeds: (B,) uint64, the views' seeds.

    Raises:
        CacheError: the encoding returned other arrays than it declares.
    """
    tensors = encoding.encode(spatial, global_, seeds)
    rows = {name: values.cpu().numpy() for name, values in tensors.items()}
    require_rows(encoding.arrays(ResponseShape(*spatial.shape[1:])), rows, (len(spatial),))
    return rows


def require_rows(
    specs: Iterable[ArraySpec], rows: Mapping[str, np.ndarray], leading: tuple[int, ...]
) -> None:
    """Refuse rows, with leading axes ``leading``, that are not exactly the arrays ``specs``."""
    known = {spec.name: spec for spec in specs}
    problems = [f"{name}: not an array of the encoding" for name in rows if name not in known]
    problems += [f"{name}: missing" for name in known if name not in rows]
    for name in known.keys() & rows.keys():
        spec, values = known[name], rows[name]
        depth, tail = len(leading), values.shape[len(leading) :]
        fits = tail == spec.tail or (
            spec.ragged and tail[1:] == spec.tail[1:] and len(tail) > 0 and tail[0] <= spec.tail[0]
        )
        if values.dtype != np.dtype(spec.dtype) or values.shape[:depth] != leading or not fits:
            problems.append(
                f"{name}: found {values.dtype} {values.shape}, expected {spec.dtype} "
                f"{(*leading, *spec.tail)}{', or a shorter first own axis' if spec.ragged else ''}"
            )
    if problems:
        raise CacheError(
            "the arrays are not those that the encoding declares",
            problems=sorted(problems),
            action="correct encode or pack of the registered encoding",
        )


class UnitBuffer:
    """A buffer for the arrays (views, count, ...) of one unit, filled in any order of samples.

    Args:
        fill: padding value of ragged arrays, by array name.
    """

    def __init__(self, views: int, count: int, fill: Mapping[str, int | float]) -> None:
        self.leading = (views, count)
        self.fill = fill
        self.arrays: dict[str, np.ndarray] = {}

    def put(
        self, rows: np.ndarray | int, offsets: np.ndarray, values: Mapping[str, np.ndarray]
    ) -> None:
        """Store ``values[name][i]`` at view row ``rows[i]`` and sample ``offsets[i]``."""
        for name, value in values.items():
            array = self._array_for(name, value)
            inner: list[Any] = [slice(0, n) for n in value.shape[1:]]
            array[(rows, offsets, *inner)] = value

    def _array_for(self, name: str, value: np.ndarray) -> np.ndarray:
        """Return the array ``name``, enlarged if ``value`` does not fit."""
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


class FileCounts(NamedTuple):
    """The number of files of a finished cache, and of entries in its largest folder."""

    files: int
    largest_folder: int

    def __str__(self) -> str:
        return f"{self.files:,} files, at most {self.largest_folder:,} in a folder"

    @property
    def excess(self) -> str | None:
        """Return which limits of the Hub are exceeded, for a message; None if none is."""
        counts = (
            (self.files, HUB_FILES, "repository"),
            (self.largest_folder, HUB_FOLDER, "folder"),
        )
        found = [f"{limit:,} per {unit}" for count, limit, unit in counts if count > limit]
        return f"more than the {' and '.join(found)} that the Hub recommends" if found else None

    @property
    def advice(self) -> str | None:
        """Return how to have fewer files if the limits are exceeded; None if they are not."""
        if self.excess is None:
            return None
        return (
            f"{self}, {self.excess}: reduce them with cache convert --view-block 0 or, for dense "
            "and dense-q8, which have a file for each view and shard, with another --encoding"
        )


def count_files(manifest: CacheManifest) -> FileCounts:
    """Return the number of files of the finished cache, including its ``zarr.json`` documents.

    Raises:
        CacheError: an unknown or unusable encoding, or chunks larger than readers accept.
    """
    arrays = layout.stored_arrays(manifest)
    grids = [array.files for array in arrays.values()]
    in_group = Counter(name.rpartition("/")[0] for name in arrays)
    groups = len(in_group)  # the cache itself is one
    entries = [1 + in_group[name] + (groups - 1 if name == "" else 0) for name in in_group]
    files = len(arrays) + groups + sum(map(math.prod, grids))  # each has a document
    return FileCounts(files, max(*entries, *map(max, grids)))


def choose_view_block(manifest: CacheManifest, views: int) -> int:
    """Return the recommended number of views per unit, a divisor of ``views``.

    This is the largest divisor up to 10 or, if the cache would then have 40,000 files or more, the
    smallest one up to 100 that keeps it below, else the largest. A unit takes at most 1 GiB of
    memory.

    Args:
        manifest: the cache's manifest, with any view block.
    """
    row_bytes = sum(spec.row_bytes for spec in layout.specs(manifest).values())
    fitting = max(1, MAX_UNIT_BYTES // (max(manifest.dataset.counts) * row_bytes))
    blocks = [n for n in range(1, min(MAX_VIEW_BLOCK, fitting) + 1) if views % n == 0]
    usual = max(n for n in blocks if n <= SHARED_DECODE)
    larger = [n for n in blocks if n >= usual]
    few = (n for n in larger if count_files(replace(manifest, view_block=n)).files < FEW_FILES)
    return next(few, larger[-1])
