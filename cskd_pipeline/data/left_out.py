"""Samples that a command leaves out: a list for the user, and records for resuming.

``left_out.csv`` in the run's or cache's folder lists the samples. Results of reading every image
are kept in records next to it, so that a resumed command does not read the images again.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from cskd_pipeline.cache.omitted import LIST, LeftOut, write_list
from cskd_pipeline.data.shards import TarShard
from cskd_pipeline.errors import ManifestError
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.atomic import write_json
from cskd_pipeline.runtime.distributed import Ranks

log = logging.getLogger(__name__)

Offsets = dict[int, list[int]]
"""Shard -> offsets of samples in the shard."""


class LeftOuts:
    """The samples that one command leaves out of one data set.

    Args:
        folder: folder of the run or cache; None: write nothing.
        part: suffix of the file names, if a folder has several lists.
    """

    def __init__(self, folder: Path | None, ranks: Ranks, *, part: str = "") -> None:
        self.folder, self.ranks = folder, ranks
        self._part = f"-{part}" if part else ""
        self._samples: list[LeftOut] = []
        self._records: dict[Path, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def path(self, name: str) -> Path | None:
        """Return the path of ``name`` in the folder, with the suffix: ``left_out-1.csv``."""
        stem, dot, suffix = name.partition(".")
        return None if self.folder is None else self.folder / f"{stem}{self._part}{dot}{suffix}"

    @property
    def listed(self) -> str:
        """Return the end of a log line, which names the list."""
        return "" if self.folder is None else f"; {self.path(LIST)} lists them"

    def add(self, samples: Iterable[LeftOut]) -> None:
        """Add samples to the list."""
        self._samples += samples

    def find(
        self,
        name: str,
        identity: Mapping[str, Any],
        counts: Sequence[int],
        search: Callable[..., Iterable[tuple[Any, ...]]],
    ) -> Offsets:
        """Return the samples that ``search`` finds in all images, from the record if there is one.

        Args:
            name: name of the record, and of the offsets in it.
            identity: identity of the data that the record describes; a record with another identity
                is ignored.
            counts: number of samples in each shard.
            search: function that reads ``part`` of ``parts`` of the images, one part per rank, and
                returns tuples that start with shard and offset.
        """
        path = self.path(f"{name}.json")
        recorded = None
        if self.ranks.first and path is not None and path.exists():
            recorded = _read(path, name, identity, counts)
        found = self.ranks.gather(recorded)[0]
        if found is None:
            parts = self.ranks.gather(search(part=self.ranks.rank, parts=self.ranks.world))
            found = by_shard(chain.from_iterable(parts))
        if path is not None:
            self._records[path] = {**identity, name: found}
        return found

    def write(self) -> None:
        """Write the list unless it is empty, and the records."""
        path = self.path(LIST)
        if path is not None and self._samples:
            write_list(path, self._samples)
        for path, document in self._records.items():
            write_json(path, document)


def by_shard(samples: Iterable[tuple[Any, ...]]) -> Offsets:
    """Group tuples that start with shard and offset by shard, in order."""
    found: Offsets = {}
    for shard, offset, *_ in sorted(samples):
        found.setdefault(shard, []).append(offset)
    return found


def tars_sha256(shards: Sequence[TarShard]) -> str:
    """Return the identity of tars, by their keys and lengths; copies have the same identity.

    A tar that was altered without a change in length is noticed only when its images are read.
    """
    return schemas.sha256([[tar.keys_sha256, tar.size] for tar in shards])


def _read(
    path: Path, name: str, identity: Mapping[str, Any], counts: Sequence[int]
) -> Offsets | None:
    record = schemas.read(path)
    if not isinstance(record, dict) or any(record.get(n) != v for n, v in identity.items()):
        log.info(f"{path} is for different shards or a different cache: reading the images again")
        return None
    found = record.get(name)
    sizes = {str(shard): count for shard, count in enumerate(counts)}
    if isinstance(found, dict) and all(
        shard in sizes
        and isinstance(offsets, list)
        and all(type(n) is int and 0 <= n < sizes[shard] for n in offsets)
        and len(set(offsets)) == len(offsets)
        for shard, offsets in found.items()
    ):
        return {int(shard): offsets for shard, offsets in found.items()}
    raise ManifestError(
        path,
        [f"$.{name}: expected lists of offsets in the shards"],
        action="delete the file; the images will be read again",
    )
