"""``cache upgrade``: convert a cache of format version 1 to version 2 in place.

Version 1 marked a finished unit by a file in ``done`` and had no digests. Every finished unit is
decoded, which verifies all checksums, and gets its record; then the manifest of version 2 is
written, and ``done`` is removed last. A killed upgrade continues when run again. The records
describe the files as they are at the upgrade; earlier changes cannot be detected.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.check import check_bytes
from cskd_pipeline.cache.chunks import DamageError
from cskd_pipeline.cache.durable import DurableFolder, exclusive, inside
from cskd_pipeline.cache.folders import require_local
from cskd_pipeline.cache.manifest import CacheManifest
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.cache.store import CacheStore
from cskd_pipeline.errors import CacheError
from cskd_pipeline.runtime import atomic, schemas
from cskd_pipeline.runtime.progress import progress

_MARKS = "done"


def upgrade(path: Path | str, *, stopped: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Upgrade the cache in the folder ``path`` to format version 2.

    Returns:
        The cache, the number of units that got a record, and the root digest if it is finished.

    Raises:
        CacheError: not a cache, or a damaged one; lists every damaged file.
        KeyboardInterrupt: stopped between units.
    """
    root = require_local(path, "a cache is upgraded in place", "copy it to this machine first")
    with atomic.translate_os_errors(root), exclusive(root) as held:
        old = _old_manifest(root)
        written = 0 if old is None else _write_records(DurableFolder(root, held), old, stopped)
        shutil.rmtree(inside(root, f"{_MARKS}/zarr.json").parent, ignore_errors=True)
    reader = open_cache(root)
    return {
        "cache": str(root),
        "units": written,
        "complete": bool(reader.done().all()),
        "digest": reader.digest(),
    }


def _old_manifest(root: Path) -> CacheManifest | None:
    """Return the manifest converted to version 2; None if the cache already has version 2."""
    path = root / layout.GROUP
    document = schemas.read(path) if path.exists() else None
    try:
        content = document["attributes"][layout.ATTRIBUTE]  # type: ignore[index]  # else a TypeError
        old, digest = dict(content["manifest"]), content["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(
            "not a teacher cache",
            where=root,
            expected="a folder written by cskd-pipeline dump-teacher",
        ) from error
    if old.get("format_version") != 1:
        return None
    if schemas.sha256(old) != digest:
        raise CacheError(
            "the manifest does not match its SHA-256",
            where=path,
            found=f"sha256 {schemas.sha256(old)}",
            expected=f"sha256 {digest}",
            action="copy the file again from the original cache",
        )
    if isinstance(old.get("parent"), dict):
        old["parent"] = {"digest": None, **old["parent"]}
    return CacheManifest.from_json(old | {"format_version": 2}, path)


def _write_records(
    folder: DurableFolder, manifest: CacheManifest, stopped: Callable[[], bool]
) -> int:
    """Write the documents and records of version 2, the manifest last; return the unit count."""
    root = folder.root
    for key, document in layout.array_documents(manifest).items():
        folder.write(key, document)
    store = CacheStore(root, manifest)
    done = np.zeros((manifest.blocks, len(manifest.dataset.shards)), bool)
    for block, shard in np.ndindex(*done.shape):
        done[block, shard] = (root / f"{_MARKS}/c/{block}/{shard}").is_file()
    units: list[tuple[int, int]] = [(block, shard) for block, shard in np.argwhere(done).tolist()]
    with progress(len(units), "units", "writing digests") as meter:
        for block, shard in units:
            if stopped():
                raise KeyboardInterrupt
            keys = [key for _, key in store.recorded_files(block, shard)]
            record = store.encode_record(block, shard, _digests(store, keys))
            folder.write(store.record_key(block, shard), record)
            meter.advance()
    folder.flush()
    problems = check_bytes(Cache(store, done), units)
    if problems:
        raise CacheError(
            "the cache is damaged and was not upgraded",
            where=root,
            expected="files that decode",
            action="copy these files again, or delete their unit's file in done/ and dump the unit "
            "again after the upgrade; then run this command again",
            problems=[str(problem) for problem in problems],
        )
    folder.write(layout.GROUP, layout.manifest_document(manifest))
    folder.flush()
    return len(units)


def _digests(store: CacheStore, keys: list[str]) -> list[bytes]:
    """Return the SHA-256 of each file; raise CacheError at the first missing one."""
    digests = []
    for key in keys:
        try:
            digests.append(store.folder.sha256(key))
        except DamageError as error:
            raise CacheError(
                "a finished unit lacks a file",
                where=f"{store.path}/{key}",
                found=str(error),
                action="copy it again, or delete its unit's file in done/ and dump the unit again "
                "after the upgrade",
            ) from error
    return digests
