"""Check that a cache is whole, from nothing but itself, to two depths.

*structure*: every finished unit has a record of its own, and the files that the manifest implies,
long enough to be what they should be. *bytes*: every file is the one in its unit's record, decodes,
and holds values that a response can have. That it belongs to someone's images is another question,
which :mod:`cskd_pipeline.data.replay` decides.
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

THREADS = 8  # at most, that decode: it frees the interpreter
Unit = tuple[int, int]
"""Block of views, tar shard."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        depth: what was looked at: ``structure``, ``bytes``, ``join``, ``images``, ``views`` or
            ``targets``.
        where: a file of the cache, or a sample in a tar.
    """

    depth: str
    where: str
    found: str

    def __str__(self) -> str:
        return f"{self.depth}: {self.where}: {self.found}"


def check_structure(store: CacheStore, units: Sequence[Unit]) -> list[Problem]:
    """Check the records of ``units``, and the lengths of all files that they should have.

    Args:
        units: finished ones.
    """
    problems = []
    for shard in sorted({shard for _, shard in units}):
        for name in layout.PER_SHARD:
            problems += _length_problems(store, name, store.arrays[name].key(shard))
    for found in store.each(partial(_missing_files, store), units, "looking at files"):
        problems += found
    return problems


def _missing_files(store: CacheStore, unit: Unit) -> list[Problem]:
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
        return [Problem("structure", key, f"cut short: {length} bytes, at least {least} expected")]
    return []


def check_bytes(reader: Cache, units: Sequence[Unit]) -> list[Problem]:
    """Decode everything that ``units`` hold, several at a time.

    Args:
        reader: of the cache; every thread reads through one of its own.
        units: finished ones.
    """
    own = threading.local()

    def look(read: Callable[[Cache], list[Problem]]) -> list[Problem]:
        if not hasattr(own, "reader"):
            own.reader = reader.reopened()
        return read(own.reader)

    shards = sorted({shard for _, shard in units})
    work = [partial(_shard_problems, shard=shard) for shard in shards]
    work += [partial(_unit_problems, block=block, shard=shard) for block, shard in units]
    sizes = [0] * len(shards) + [reader.manifest.view_block * reader.counts[s] for _, s in units]
    found: dict[Problem, None] = {}  # one damaged file spoils several reads
    with progress(sum(sizes), "views", "decoding") as meter:
        pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
        try:
            for problems, size in zip(pool.map(look, work), sizes, strict=True):
                found.update(dict.fromkeys(problems))
                meter.advance(size)
        finally:
            pool.shutdown(cancel_futures=True)
    return list(found)


def _shard_problems(reader: Cache, shard: int) -> list[Problem]:
    """Of what a tar shard's samples have in all views."""
    reads = (reader.keys, reader.image_crc32)
    problems = _damage(reader, (partial(read, shard) for read in reads))
    try:
        labels = reader.labels(shard)
    except CacheError as error:
        return [*problems, _problem(reader, error)]
    classes = reader.manifest.dataset.num_classes
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        found = f"{len(wrong)} labels, {labels[wrong[0]]} the first, that {classes} classes lack"
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
            if found:  # in the first damaged array; there may be more
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
