"""A folder opened as a cache: manifest, finished units, chunks, and errors with their location."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from mmap import mmap
from pathlib import Path
from typing import TypeVar

import numpy as np

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.chunks import ChunkReader, DamageError, encode_file
from cskd_pipeline.cache.digests import Record
from cskd_pipeline.cache.folders import Folder, open_folder
from cskd_pipeline.cache.manifest import CacheManifest
from cskd_pipeline.cache.remote_files import is_remote
from cskd_pipeline.distill.encodings import ENCODINGS, Encoding, register_encoding, registered
from cskd_pipeline.errors import CacheError
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.progress import progress

T = TypeVar("T")
V = TypeVar("V")

FINISH = "run its dump-teacher command again to write the missing units"
RESTORE = (
    "copy this file again from the original cache, or delete its unit's file in digest/ and run "
    "its dump-teacher command again"
)


class CacheStore:
    """The folder ``path`` opened as a cache; the basis of ``reader`` and ``writer``.

    A file of a finished unit is compared with the unit's record on first use. Forked processes
    share this knowledge, so only the first to use a file compares it.

    Args:
        path: a folder, or a URL to read from; see :mod:`cskd_pipeline.cache.folders`.
        manifest: the manifest if already known; None: read it.

    Attributes:
        folder: files by key; a missing file or one that is not regular raises ``DamageError``.

    Raises:
        CacheError: there is no cache, or its manifest was altered.
        ManifestError: the manifest does not match its schema.
    """

    def __init__(self, path: Path | str, manifest: CacheManifest | None = None) -> None:
        folder = open_folder(path)
        self.path: Path | str = str(path) if is_remote(path) else Path(path)
        self.manifest = manifest or _read_manifest(folder)
        self.arrays = layout.stored_arrays(self.manifest)
        self.lineage = self.manifest.lineage()
        self.folder = folder.for_cache(self.lineage, self._max_bytes)
        self._chunks = ChunkReader(self.folder)
        rows = [name for name, _ in self.recorded_files(0, 0)]
        self._rows, self._first_row = len(rows), {name: rows.index(name) for name in rows}
        units = self.manifest.blocks * len(self.manifest.dataset.shards)
        self._verified = mmap(-1, units * self._rows)  # one byte per file

    def __reduce__(self) -> tuple[object, ...]:
        encodings = registered(self.manifest.encodings)
        return _reopen, (encodings, self.path, self.manifest)

    def _max_bytes(self, key: str) -> int:
        """Return the maximum length of the file ``key``."""
        array = self.arrays.get(key.partition("/c/")[0])
        return schemas.MAX_BYTES if array is None else array.max_file_bytes

    def check_metadata(self) -> None:
        """Compare every ``zarr.json`` byte for byte with the one that the manifest implies.

        Raises:
            CacheError: lists the documents that are missing or differ.
        """
        problems = []
        differing: dict[str, bytes] = {}
        documents = layout.array_documents(self.manifest)
        for key, expected in documents.items():
            try:
                data = self.folder.read(key, schemas.MAX_BYTES)
            except DamageError as error:
                problems.append(f"{key}: {error}")
            else:
                if data != expected:
                    differing[key] = data
        longer = self._extended_documents() if differing else {}
        for key, data in differing.items():
            if data != longer.get(key):
                lines = layout.differences(data, documents[key], key)
                problems += [f"{key}: {line}" for line in lines]
        if problems:
            raise CacheError(
                "the cache's array metadata does not match its manifest",
                where=self.path,
                action="run its dump-teacher command again if it was interrupted while starting; "
                "otherwise copy these files again from the original cache",
                problems=problems,
            )

    def _extended_documents(self) -> dict[str, bytes]:
        """Return the documents of the longer cache that an interrupted extension was writing."""
        try:
            views = int(self.folder.read(layout.EXTENDING, 100))
        except (DamageError, ValueError):
            return {}
        if views <= self.manifest.views or views % self.manifest.view_block:
            return {}
        return layout.array_documents(replace(self.manifest, views=views))

    def done(self) -> np.ndarray:
        """Return the finished units, (blocks, shards) bool, from file names: 30,000 in 30 ms.

        If files cannot be listed, request each unit's record.
        """
        done = np.zeros((self.manifest.blocks, len(self.manifest.dataset.shards)), bool)
        if not self.folder.lists:
            keys = [self.record_key(*unit) for unit in np.ndindex(*done.shape)]
            found = self.each(self.folder.has, keys, "looking for finished units")
            return np.fromiter(found, bool).reshape(done.shape)
        root = f"{layout.RECORD}/c"
        blocks = {int(n) for n in self.folder.names(root) if n.isdecimal()}
        for block in sorted(n for n in blocks if n < len(done)):
            names = (int(n) for n in self.folder.names(f"{root}/{block}") if n.isdecimal())
            done[block, [n for n in names if n < done.shape[1]]] = True
        return done

    def record_key(self, block: int, shard: int) -> str:
        """Return the key of a unit's record."""
        array = self.arrays[layout.RECORD]
        return array.key(block, shard * array.file_shape[1])

    def record(self, block: int, shard: int) -> Record:
        """Return the record of a finished unit.

        Raises:
            CacheError: it is damaged, or belongs to another unit or cache.
        """
        key = self.record_key(block, shard)
        with self._file_context(key, f"the record of {self.unit_name(block, shard)}"):
            return self._retry_fetched(lambda: self._read_record(block, shard), key)

    def _read_record(self, block: int, shard: int) -> Record:
        array = self.arrays[layout.RECORD]
        chunk = self._chunks.read(array, block, shard * array.file_shape[1])
        assert chunk is not None
        record = Record.from_row(chunk[0])
        keys = [key for _, key in self.recorded_files(block, shard)]
        if record != Record.of(record.lineage.hex(), keys, record.files):
            raise DamageError("it belongs to another unit, or was altered")
        if record.lineage.hex() != self.lineage:
            raise DamageError(
                f"it has lineage {record.lineage.hex()[:12]}…, but the manifest has "
                f"{self.lineage[:12]}…: the data set, teacher, policy, seed or encodings differ, "
                "or the manifest was edited"
            )
        return record

    def chunk(self, name: str, view: int, shard: int, *at: int) -> np.ndarray:
        """Read the chunk that contains these indices, at its full shape.

        Raises:
            CacheError: it is missing, damaged, or does not match the unit's record; names array,
                views, shard and file.
        """
        chunk = self.chunk_if_written(name, view, shard, *at)
        if chunk is None:
            with self.error_context(name, view, shard):
                raise DamageError("a chunk is missing from the file")
        return chunk

    def chunk_if_written(self, name: str, view: int, shard: int, *at: int) -> np.ndarray | None:
        """Read a chunk like :meth:`chunk`; return None for one in a file that is all fill."""
        array, block = self.arrays[name], view // self.manifest.view_block

        def read() -> np.ndarray | None:
            row = view % self.manifest.view_block // array.file_shape[0]
            self._compare(block, shard, self._first_row[name] + row, array.key(view, shard))
            return self._chunks.read(array, view, shard, *at)

        with self.error_context(name, view, shard):
            return self._retry_fetched(read, array.key(view, shard), self.record_key(block, shard))

    def shard_chunk(self, name: str, shard: int, block: int | None) -> np.ndarray:
        """Read ``key``, ``label`` or ``image_crc32`` of a tar shard: (count, ...).

        Args:
            block: block of a finished unit, whose record has the file's digest; None: no unit of
                the tar shard is finished yet.
        """
        array = self.arrays[name]

        def read() -> np.ndarray:
            if block is not None:
                self._compare(block, shard, self._first_row[name], array.key(shard))
            chunk = self._chunks.read(array, shard)
            assert chunk is not None
            return chunk[0, : self.manifest.dataset.counts[shard]]

        keys = [array.key(shard), *([] if block is None else [self.record_key(block, shard)])]
        with self.error_context(name, None, shard):
            return self._retry_fetched(read, *keys)

    def compare_files(self, block: int, shard: int) -> None:
        """Compare every file of a finished unit with its record, without decoding.

        Raises:
            CacheError: a file is missing, or does not match the record.
        """
        for row, (name, key) in enumerate(self.recorded_files(block, shard)):
            with self._file_context(key, f"array {name}, {self.unit_name(block, shard)}"):
                self._compare(block, shard, row, key)

    def unit_bytes(self, block: int, shard: int) -> Iterator[tuple[bytes, bytes]]:
        """Yield contents and SHA-256 of every file in a unit's record, compared with it."""
        expected = self.record(block, shard).files
        for (name, key), digest in zip(self.recorded_files(block, shard), expected, strict=True):
            with self._file_context(key, f"array {name}, {self.unit_name(block, shard)}"):
                data = self.folder.read(key, self._max_bytes(key))
                _require_digest(hashlib.sha256(data).digest(), digest)
            yield data, digest

    def encode_record(self, block: int, shard: int, digests: Sequence[bytes]) -> bytes:
        """Return the encoded record of a unit whose files have these digests."""
        keys = [key for _, key in self.recorded_files(block, shard)]
        row = Record.of(self.lineage, keys, digests).row()
        return encode_file(self.arrays[layout.RECORD], row[None])

    def _compare(self, block: int, shard: int, row: int, key: str) -> None:
        """Compare a file with its unit's record, unless that was done before."""
        at = (block * len(self.manifest.dataset.shards) + shard) * self._rows + row
        if not self._verified[at]:
            _require_digest(self.folder.sha256(key), self.record(block, shard).files[row])
            self._verified[at] = 1

    def _retry_fetched(self, read: Callable[[], T], *keys: str) -> T:
        """Return ``read()``; if local copies of remote files are damaged, fetch them again first.

        A copy and its record may be of different ages, so all ``keys`` are fetched again.
        """
        try:
            return read()
        except DamageError:
            dropped = [self.folder.forget(key) for key in keys]
            if not any(dropped):
                raise
            for key in keys:
                self._chunks.forget(key)
            return read()

    def read_extra(self, name: str) -> bytes | None:
        """Return a file next to the arrays, at most 64 MiB; None if absent.

        Raises:
            CacheError: it is larger, or not a regular file.
        """
        if not self.folder.has(name):
            return None
        with self._file_context(name, "a file next to the arrays"):
            return self.folder.read(name, schemas.MAX_BYTES)

    def each(
        self, read: Callable[[T], V], items: Sequence[T], description: str, unit: str = "units"
    ) -> Iterator[V]:
        """Yield ``read(item)`` for each item, in order; remote files are read in parallel."""
        threads = self.folder.parallel
        with progress(len(items), unit, description) as meter, ThreadPoolExecutor(threads) as pool:
            for result in map(read, items) if threads == 1 else pool.map(read, items):
                yield result
                meter.advance()

    def unit_files(self, block: int, shard: int) -> Iterator[tuple[str, str]]:
        """Yield array and key of every per-view file of a unit, except its record."""
        first = block * self.manifest.view_block
        for name, array in self.arrays.items():
            if name not in (*layout.PER_SHARD, layout.RECORD):
                for view in range(first, first + self.manifest.view_block, array.file_shape[0]):
                    yield name, array.key(view, shard)

    def recorded_files(self, block: int, shard: int) -> Iterator[tuple[str, str]]:
        """Yield array and key of every file in a unit's record: the tar shard's, then its own."""
        for name in layout.PER_SHARD:
            yield name, self.arrays[name].key(shard)
        yield from self.unit_files(block, shard)

    def unit_name(self, block: int, shard: int) -> str:
        """Return views and tar shard of a unit, for messages."""
        size = self.manifest.view_block
        name = self.manifest.dataset.shards[shard].name
        return f"views {block * size}-{(block + 1) * size - 1} of shard {shard} ({name})"

    @contextmanager
    def error_context(self, name: str, view: int | None, shard: int) -> Iterator[None]:
        """Turn an error about bytes into a CacheError that names array, unit and file."""
        at: tuple[int, ...] = (shard,)
        part = f"shard {shard}"
        if view is not None:
            at, part = (view, shard), self.unit_name(view // self.manifest.view_block, shard)
        with self._file_context(self.arrays[name].key(*at), f"array {name}, {part}"):
            yield

    @contextmanager
    def _file_context(self, key: str, description: str) -> Iterator[None]:
        try:
            yield
        except (DamageError, ValueError) as error:
            raise CacheError(
                "the cache is damaged",
                where=self.folder.where(key),
                found=f"{description}: {error}",
                expected="the bytes written",
                action=RESTORE,
            ) from error


def _require_digest(found: bytes, expected: bytes) -> None:
    if found != expected:
        raise DamageError(
            f"sha256 {found.hex()}, but its unit's record has {expected.hex()}: altered, or "
            "a file of another unit or cache"
        )


def _reopen(encodings: list[Encoding], path: Path | str, manifest: CacheManifest) -> CacheStore:
    """Open a store in another process, where a user's encodings may not be registered yet."""
    for encoding in encodings:
        if encoding.name not in ENCODINGS:  # this process's own registration takes precedence
            register_encoding(encoding)
    return CacheStore(path, manifest)


def _read_manifest(folder: Folder) -> CacheManifest:
    where = folder.where(layout.GROUP)
    try:
        data = folder.read(layout.GROUP, schemas.MAX_BYTES)
    except DamageError as error:
        raise CacheError(
            "not a teacher cache",
            where=where,
            found=str(error),
            expected="a folder written by cskd-pipeline dump-teacher",
        ) from None
    return layout.parse_manifest(data, where)
