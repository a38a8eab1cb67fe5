"""A unit of work: these views of this tar shard, and all that is stored of them.

A unit has a few files, however many views it holds: larger blocks of views make fewer files. Where
responses are read view by view, a chunk is one view of one tar shard whatever the block is.
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

SHARED_DECODE = 10  # views that share one decode of an image: more save little
MAX_VIEW_BLOCK = 100  # of those chosen here: what a stopped dump loses is one unit
MAX_UNIT_BYTES = 2**30
FEW_FILES = 40_000
HUB_FILES, HUB_FOLDER = 100_000, 10_000  # what the Hugging Face Hub recommends at most


class Unit(NamedTuple):
    """Name what is made, and committed, at once: these views of this tar shard."""

    block: int
    shard: int
    views: range

    @classmethod
    def of(cls, manifest: CacheManifest, block: int, shard: int) -> Unit:
        """Return the unit with the views that the block has in this cache."""
        size = manifest.view_block
        return cls(block, shard, range(block * size, (block + 1) * size))


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

    def per_view(self) -> Rows:
        """Return what differs between views, by the name of its array: name -> (V, ...)."""
        own = {"seed": self.seeds, "view_digest": self.view_digests, "top1": self.top1}
        return {**own, **self.arrays}

    def check(self, manifest: CacheManifest, unit: Unit) -> None:
        """Refuse keys and arrays that are not those of ``unit``, in ``manifest``'s data set."""
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
        require_rows(layout.specs(manifest).values(), self.arrays, (views, count))


def encoded(encoding: Encoding, spatial: Tensor, global_: Tensor, seeds: np.ndarray) -> Rows:
    """Return what :meth:`Encoding.encode` makes, on the host: array name -> (B, ...).

    Args:
        spatial: (B, K, h, w) float16.
        global_: (B, K) float16.
        seeds: (B,) uint64, of the views.

    Raises:
        CacheError: these are not the arrays of the encoding.
    """
    made = encoding.encode(spatial, global_, seeds)
    rows = {name: values.cpu().numpy() for name, values in made.items()}
    require_rows(encoding.arrays(ResponseShape(*spatial.shape[1:])), rows, (len(spatial),))
    return rows


def require_rows(
    specs: Iterable[ArraySpec], rows: Mapping[str, np.ndarray], leading: tuple[int, ...]
) -> None:
    """Refuse rows, axes ``leading`` first, unless they are exactly the arrays ``specs``."""
    known = {spec.name: spec for spec in specs}
    problems = [f"{name}: no array of the encoding's" for name in rows if name not in known]
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
                f"{(*leading, *spec.tail)}{', the first own axis or less' if spec.ragged else ''}"
            )
    if problems:
        raise CacheError(
            "these are not the arrays of the encoding",
            problems=sorted(problems),
            action="correct the encode or pack of the encoding that was registered",
        )


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


class FileCounts(NamedTuple):
    """Count the files of a whole cache, and the entries of its largest folder."""

    files: int
    largest_folder: int

    def __str__(self) -> str:
        return f"{self.files:,} files, at most {self.largest_folder:,} in a folder"

    @property
    def excess(self) -> str | None:
        """Return which limits of the Hub are exceeded, for a message; None where none is."""
        counts = (
            (self.files, HUB_FILES, "repository"),
            (self.largest_folder, HUB_FOLDER, "folder"),
        )
        found = [f"{limit:,} a {of}" for count, limit, of in counts if count > limit]
        return f"more than the {' and '.join(found)} that the Hub recommends" if found else None

    @property
    def advice(self) -> str | None:
        """Return what to do about a finished cache with an excess; None where there is none."""
        if self.excess is None:
            return None
        return (
            f"{self}, {self.excess}: cache convert makes fewer, with --view-block 0 or, of dense "
            "and dense-q8, which have a file for each view and shard, with another --encoding"
        )


def count_files(manifest: CacheManifest) -> FileCounts:
    """Count the files that the cache has when it is finished, its ``zarr.json`` documents too.

    Raises:
        CacheError: an encoding that is unknown or unusable, or chunks larger than readers accept.
    """
    arrays = layout.stored_arrays(manifest)
    grids = [array.files for array in arrays.values()]
    in_group = Counter(name.rpartition("/")[0] for name in arrays)
    groups = len(in_group)  # the cache itself is one
    entries = [1 + in_group[name] + (groups - 1 if name == "" else 0) for name in in_group]
    files = len(arrays) + groups + sum(map(math.prod, grids))  # each has a document
    return FileCounts(files, max(*entries, *map(max, grids)))


def choose_view_block(manifest: CacheManifest, views: int) -> int:
    """Return how many views a unit had best have: a divisor of ``views``.

    That is the largest one up to 10. Where the cache would have 40,000 files or more, it is the
    smallest one up to 100 with which it has fewer, or the largest if there is none. A unit takes at
    most 1 GiB of memory.

    Args:
        manifest: of the cache, with any view block.
    """
    row_bytes = sum(spec.row_bytes for spec in layout.specs(manifest).values())
    fitting = max(1, MAX_UNIT_BYTES // (max(manifest.dataset.counts) * row_bytes))
    blocks = [n for n in range(1, min(MAX_VIEW_BLOCK, fitting) + 1) if views % n == 0]
    usual = max(n for n in blocks if n <= SHARED_DECODE)
    larger = [n for n in blocks if n >= usual]
    few = (n for n in larger if count_files(replace(manifest, view_block=n)).files < FEW_FILES)
    return next(few, larger[-1])
