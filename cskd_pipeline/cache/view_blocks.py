"""The size of a unit in views, and the number of files that it makes of a cache.

A unit has a few files, however many views it holds: larger blocks of views make fewer files. Where
responses are read view by view, a chunk is one view of one tar shard whatever the block is.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.manifest import CacheManifest

SHARED_DECODE = 10  # views that share one decode of an image: more save little
MAX_VIEW_BLOCK = 100  # of those chosen here: what a stopped dump loses is one unit
MAX_UNIT_BYTES = 2**30
FEW_FILES = 40_000
HUB_FILES, HUB_FOLDER = 100_000, 10_000  # what the Hugging Face Hub recommends at most


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
