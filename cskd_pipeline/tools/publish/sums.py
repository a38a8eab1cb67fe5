"""The SHA-256 of every file of a cache, as ``sha256sum --check`` reads it."""

from __future__ import annotations

import numpy as np

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.runtime.progress import progress

NAME = "SHA256SUMS"


def sums(cache: Cache) -> str:
    """Return a line for each file of the finished units, and for each of zarr's documents.

    Units' files are not read: their records, which are, hold what was written.

    Raises:
        CacheError: a record is missing or damaged.
    """
    documents = (layout.GROUP, *layout.array_documents(cache.manifest))
    found = {key: cache.store.folder.sha256(key) for key in documents}
    units = np.argwhere(cache.done()).tolist()
    with progress(len(units), "units", "reading their records") as meter:
        for files in cache.store.each(lambda unit: _unit(cache, *unit), units):
            found |= files
            meter.advance()
    return "".join(f"{found[key].hex()}  {key}\n" for key in sorted(found))


def _unit(cache: Cache, block: int, shard: int) -> dict[str, bytes]:
    keys = [key for _, key in cache.store.recorded_files(block, shard)]
    files = cache.store.record(block, shard).files
    own = cache.store.record_key(block, shard)
    return {**dict(zip(keys, files, strict=True)), own: cache.store.folder.sha256(own)}
