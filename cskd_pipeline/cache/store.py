"""A cache's folder: its manifest, its units that are done, its chunks; errors that say where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from cskd_pipeline import documents
from cskd_pipeline.cache import layout
from cskd_pipeline.cache.chunks import ChunkReader, DamageError, Folder
from cskd_pipeline.cache.remote import is_remote, open_folder
from cskd_pipeline.errors import CacheError
from cskd_pipeline.manifest import CacheManifest
from cskd_pipeline.progress import Progress, silent

T = TypeVar("T")
V = TypeVar("V")

FINISH = "run the dump-teacher command that made it again: it makes what is missing"
RESTORE = (
    "copy this file again from where the cache came from, or delete it and its unit's file in "
    "done/ and run the dump-teacher command that made it again"
)


class CacheStore:
    """The folder ``path`` as a cache; ``reader`` and ``writer`` stand on it.

    Args:
        path: a folder, or a URL to read from; see :mod:`cskd_pipeline.cache.remote`.
        manifest: when it is known already; it is read otherwise.

    Raises:
        CacheError: there is no cache, or its manifest was altered.
        ManifestError: the manifest does not fit its schema.
    """

    def __init__(self, path: Path | str, manifest: CacheManifest | None = None) -> None:
        folder = open_folder(path)
        self.path: Path | str = str(path) if is_remote(path) else Path(path)
        self.manifest = manifest or _read_manifest(folder)
        self.arrays = layout.stored_arrays(self.manifest)
        self._folder = folder.settled(self.manifest.lineage())
        self._chunks = ChunkReader(self._folder)

    def __reduce__(self) -> tuple[object, ...]:
        return CacheStore, (self.path, self.manifest)

    def check_metadata(self) -> None:
        """Compare every array's ``zarr.json`` with what the manifest implies.

        Raises:
            CacheError: lists what is missing or decides values and differs.
        """
        problems = []
        for key in layout.array_documents(self.manifest):
            array = self.arrays.get(key.removesuffix("/zarr.json"))
            try:
                found = documents.parse(self._folder.read(key, documents.MAX_BYTES), key)
            except DamageError as error:
                problems.append(f"{key}: {error}")
            else:
                lines = layout.group_problems(found) if array is None else array.problems(found)
                problems += [f"{key}: {line}" for line in lines]
        if problems:
            raise CacheError(
                "the cache's arrays are not what its manifest says",
                where=self.path,
                action=(
                    "run the dump-teacher command that made it again if it was cut off while it "
                    "started; else copy these files again from where the cache came from"
                ),
                problems=problems,
            )

    def done(self, progress: Progress = silent) -> np.ndarray:
        """(blocks, shards) bool, from the names of the files in ``done``: 30,000 in 30 ms.

        Where files are not listed, each is asked for.
        """
        done = np.zeros((self.manifest.blocks, len(self.manifest.dataset.shards)), bool)
        if not self._folder.lists:
            keys = [self.arrays["done"].key(*unit) for unit in np.ndindex(*done.shape)]
            return np.array(self._folder.there(keys, progress), bool).reshape(done.shape)
        blocks = {int(n) for n in self._folder.names("done/c") if n.isdecimal()}
        for block in sorted(n for n in blocks if n < len(done)):
            names = (int(n) for n in self._folder.names(f"done/c/{block}") if n.isdecimal())
            done[block, [n for n in names if n < done.shape[1]]] = True
        return done

    def check_done(self, block: int, shard: int) -> None:
        """Read the ``done`` of a unit whose file is there.

        Raises:
            CacheError: the file is damaged.
        """
        with self.explained("done", block * self.manifest.view_block, shard):
            chunk = self._chunks.read(self.arrays["done"], block, shard)
            if chunk is None or chunk.item() != 1:
                raise DamageError("it does not hold 1")

    def chunk(self, name: str, view: int, shard: int, *at: int) -> np.ndarray:
        """The chunk that holds these indices, at its full shape.

        Raises:
            CacheError: it is missing or damaged; names array, views, shard and file.
        """
        with self.explained(name, view, shard):
            chunk = self._chunks.read(self.arrays[name], view, shard, *at)
            if chunk is None:
                raise DamageError("a chunk that should be in it is not")
            return chunk

    def chunk_if_written(self, name: str, view: int, shard: int, *at: int) -> np.ndarray | None:
        """Like :meth:`chunk`; None where a chunk inside a file is all fill."""
        with self.explained(name, view, shard):
            return self._chunks.read(self.arrays[name], view, shard, *at)

    def shard_chunk(self, name: str, shard: int) -> np.ndarray:
        """``key``, ``label`` or ``image_crc32`` of a tar shard: (count, ...)."""
        with self.explained(name, None, shard):
            chunk = self._chunks.read(self.arrays[name], shard)
            assert chunk is not None
            return chunk[0, : self.manifest.dataset.counts[shard]]

    def length(self, key: str) -> int:
        """Of a file, in bytes.

        Raises:
            DamageError: there is none, or it is no plain file.
        """
        return self._folder.length(key)

    def each(self, look: Callable[[T], V], items: Iterable[T]) -> Iterator[V]:
        """``look`` at each of ``items``, in their order; several at a time where files are far."""
        if self._folder.at_once == 1:
            yield from map(look, items)
            return
        with ThreadPoolExecutor(self._folder.at_once) as pool:
            yield from pool.map(look, items)

    def sizes(self) -> dict[str, int] | None:
        """The length in bytes of every file there is, by key; None where nobody can tell."""
        return self._folder.sizes()

    def unit_files(self, block: int, shard: int) -> Iterator[tuple[str, str]]:
        """Array and key of every per-view file of a unit, ``done`` last."""
        first = block * self.manifest.view_block
        for name, array in self.arrays.items():
            if name not in (*layout.PER_SHARD, "done"):
                for view in range(first, first + self.manifest.view_block, array.file_shape[0]):
                    yield name, array.key(view, shard)
        yield "done", self.arrays["done"].key(block, shard)

    def unit_name(self, block: int, shard: int) -> str:
        size = self.manifest.view_block
        name = self.manifest.dataset.shards[shard].name
        return f"views {block * size}-{(block + 1) * size - 1} of shard {shard} ({name})"

    @contextmanager
    def explained(self, name: str, view: int | None, shard: int) -> Iterator[None]:
        """Name array, unit and file in errors about bytes."""
        array = self.arrays[name]
        try:
            yield
        except (DamageError, ValueError) as error:
            if view is None:
                part, key = f"shard {shard}", array.key(shard)
            else:
                block = view // self.manifest.view_block
                part = self.unit_name(block, shard)
                key = array.key(block if name == "done" else view, shard)
            raise CacheError(
                "the cache is damaged",
                where=self._folder.where(key),
                found=f"array {name}, {part}: {error}",
                expected="the bytes that were written",
                action=RESTORE,
            ) from error


def _read_manifest(folder: Folder) -> CacheManifest:
    where = folder.where(layout.GROUP)
    try:
        data = folder.read(layout.GROUP, documents.MAX_BYTES)
    except DamageError as error:
        raise CacheError(
            "not a teacher cache",
            where=where,
            found=str(error),
            expected="a folder made by cskd-pipeline dump-teacher",
        ) from None
    return layout.parse_manifest(data, where)
