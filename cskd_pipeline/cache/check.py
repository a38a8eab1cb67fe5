"""Check a cache's integrity without other data, at two depths.

*structure*: every finished unit has its own record and the files that the manifest implies, none
too short. *bytes*: every file matches its unit's record, decodes, and contains valid values.
Whether the cache belongs to given images is decided by :mod:`cskd_pipeline.data.replay`.
"""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.chunks import DamageError
from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.cache.store import CacheStore
from cskd_pipeline.errors import CacheError
from cskd_pipeline.runtime.progress import progress

THREADS = 8  # at most: decoding releases the GIL
UnitIndex = tuple[int, int]
"""Block of views, tar shard."""


@dataclass(frozen=True)
class Problem:
    """A problem found by a check.

    Args:
        depth: name of the check, such as ``structure``, ``bytes``, ``join`` or ``views``.
        where: a file of the cache, or a sample in a tar.
    """

    depth: str
    where: str
    found: str

    def __str__(self) -> str:
        return f"{self.depth}: {self.where}: {self.found}"


def check_structure(store: CacheStore, units: Sequence[UnitIndex]) -> list[Problem]:
    """Check the records of finished units, and the lengths of the files they should have."""
    problems = []
    for shard in sorted({shard for _, shard in units}):
        for name in layout.PER_SHARD:
            problems += _length_problems(store, name, store.arrays[name].key(shard))
    for found in store.each(partial(_structure_problems, store), units, "checking files"):
        problems += found
    return problems


def _structure_problems(store: CacheStore, unit: UnitIndex) -> list[Problem]:
    found = (_length_problems(store, name, key) for name, key in store.unit_files(*unit))
    problems = [problem for problems in found for problem in problems]
    try:
        store.record(*unit)
    except CacheError as error:
        where = str(error.where).removeprefix(f"{store.path}/")
        problems.append(Problem("structure", where, str(error.found)))
    return problems


def _length_problems(store: CacheStore, name: str, key: str) -> list[Problem]:
    least = store.arrays[name].min_file_bytes
    try:
        length = store.folder.length(key)
    except DamageError as error:
        return [Problem("structure", key, str(error))]
    if length < least:
        return [Problem("structure", key, f"truncated: {length} bytes, at least {least} expected")]
    return []


def check_bytes(reader: Cache, units: Sequence[UnitIndex]) -> list[Problem]:
    """Compare and decode every file of finished units, in several threads."""
    own = threading.local()

    def check(find: Callable[[Cache], list[Problem]]) -> list[Problem]:
        if not hasattr(own, "reader"):
            own.reader = reader.reopened()
        return find(own.reader)

    shards = sorted({shard for _, shard in units})
    work = [partial(_shard_problems, shard=shard) for shard in shards]
    work += [partial(_unit_problems, block=block, shard=shard) for block, shard in units]
    sizes = [0] * len(shards) + [reader.manifest.view_block * reader.counts[s] for _, s in units]
    found: dict[Problem, None] = {}  # a damaged file fails several reads
    with progress(sum(sizes), "views", "decoding") as meter:
        pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
        try:
            for problems, size in zip(pool.map(check, work), sizes, strict=True):
                found.update(dict.fromkeys(problems))
                meter.advance(size)
        finally:
            pool.shutdown(cancel_futures=True)
    return list(found)


def _shard_problems(reader: Cache, shard: int) -> list[Problem]:
    """Return the problems of a tar shard's keys, labels and image CRCs."""
    reads = (reader.keys, reader.image_crc32)
    problems = _damage(reader, (partial(read, shard) for read in reads))
    try:
        labels = reader.labels(shard)
    except CacheError as error:
        return [*problems, _problem(reader, error)]
    classes = reader.manifest.dataset.num_classes
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        found = f"{len(wrong)} labels out of range for {classes} classes, first {labels[wrong[0]]}"
        problems.append(Problem("bytes", reader.store.arrays["label"].key(shard), found))
    return problems


def _unit_problems(reader: Cache, block: int, shard: int) -> list[Problem]:
    size, every = reader.manifest.view_block, np.arange(reader.counts[shard])
    store = reader.store
    problems = _damage(
        reader, [partial(store.shard_chunk, name, shard, block) for name in layout.PER_SHARD]
    )
    for view in range(block * size, (block + 1) * size):
        reads = (reader.seeds, reader.view_digests, reader.top1_of)
        problems += _damage(reader, (partial(read, view, shard) for read in reads))
        for name in reader.encodings:
            found = _damage(reader, [partial(reader.rows, name, view, shard, every)])
            if found:  # reading stopped at the first damaged array
                specs = reader.specs(name)
                found += _damage(
                    reader, (partial(reader.slabs.packed, s.name, view, shard) for s in specs)
                )
            problems += found
    return problems


def _damage(reader: Cache, reads: Iterable[Callable[[], Any]]) -> list[Problem]:
    problems = []
    for read in reads:
        try:
            read()
        except CacheError as error:
            problems.append(_problem(reader, error))
    return problems


def _problem(reader: Cache, error: CacheError) -> Problem:
    where = str(error.where).removeprefix(f"{reader.path}/")
    return Problem("bytes", where, str(error.found))
