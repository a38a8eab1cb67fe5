"""``left_out.csv``, the list of samples that a command left out, in a run's or a cache's folder.

``corrupt.json`` next to it records the corrupt images found, and the tars in which all were read.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from cskd_pipeline.cache.store import CacheStore
from cskd_pipeline.errors import CacheError
from cskd_pipeline.runtime.atomic import write_bytes, write_csv

LIST, CORRUPT = "left_out.csv", "corrupt.json"


class LeftOut(NamedTuple):
    """A sample that is not used: ``reason`` is ``missing``, ``other image`` or ``corrupt``."""

    reason: str
    shard: int
    offset: int
    key: str


def write_list(path: Path, samples: Iterable[LeftOut]) -> None:
    """Write the list atomically."""
    write_csv(path, LeftOut._fields, (sample._asdict() for sample in samples))


def carry_lists(target: Path, sources: Iterable[tuple[CacheStore, Mapping[int, int]]]) -> None:
    """Merge the sources' lists of samples into the list of the cache ``target``.

    Args:
        sources: each with the map from its tar shards' numbers to those in ``target``; samples of
            other tar shards are dropped.

    Raises:
        CacheError: a malformed list.
    """
    found = {
        sample._replace(shard=numbers[sample.shard])
        for store, numbers in sources
        for sample in _read_list(store)
        if sample.shard in numbers
    }
    if found:
        write_list(target / LIST, sorted(found, key=lambda sample: sample[1:]))


def carry_corrupt(target: Path, source: CacheStore) -> None:
    """Copy the source's ``corrupt.json``, so that a dump continues without rereading the images."""
    record = source.read_extra(CORRUPT)
    if record is not None:
        write_bytes(target / CORRUPT, record)


def _read_list(store: CacheStore) -> list[LeftOut]:
    text = store.read_extra(LIST)
    if text is None:
        return []
    try:
        header, *rows = csv.reader(text.decode().splitlines(), strict=True)
        if tuple(header) != LeftOut._fields:
            raise ValueError(f"columns {', '.join(header)[:100]}")
        return [LeftOut(reason, int(at), int(offset), key) for reason, at, offset, key in rows]
    except (ValueError, csv.Error) as error:
        raise CacheError(
            "the cache's list of samples left out cannot be read",
            where=f"{store.path}/{LIST}",
            found=str(error),
            expected=f"a CSV table with the columns {', '.join(LeftOut._fields)}",
            action="copy the file again from the original cache, or remove it",
        ) from error
