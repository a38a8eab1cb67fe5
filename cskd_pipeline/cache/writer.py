"""Write a cache unit by unit: the arrays first, then the record of their digests.

A unit is (block of views, tar shard). Any number of processes may write different units of one
cache at the same time. An interrupted unit is not done and is written again in full.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.chunks import decode_file, encode_file
from cskd_pipeline.cache.durable import DurableFolder, exclusive, inside
from cskd_pipeline.cache.folders import require_local
from cskd_pipeline.cache.manifest import CacheManifest
from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.cache.store import CacheStore
from cskd_pipeline.cache.units import Unit, UnitData, require_rows
from cskd_pipeline.distill.encodings import Rows
from cskd_pipeline.errors import CacheError, OutputError, UsageError
from cskd_pipeline.runtime import atomic
from cskd_pipeline.runtime.classes import ClassGuard


class CacheWriter:
    """A writer for the cache in a folder; construct it with :meth:`create` or :meth:`open`.

    ``store`` is the open folder; a :class:`Cache` over it reads the finished units.
    """

    def __init__(self, store: CacheStore) -> None:
        self.path = Path(store.path)
        self.store = store

    @property
    def manifest(self) -> CacheManifest:
        """Return the manifest as this process last read or wrote it."""
        return self.store.manifest

    def _reload(self, manifest: CacheManifest | None = None) -> None:
        """Reopen the folder after its manifest has changed."""
        self.store = CacheStore(self.path, manifest)

    @classmethod
    def create(
        cls,
        path: Path | str,
        manifest: CacheManifest,
        *,
        accept_versions: bool = False,
        guard: ClassGuard | None = None,
    ) -> CacheWriter:
        """Create a cache, or continue the existing one if it is the same.

        An existing cache may have another number of views than ``manifest``: see :meth:`extend`.

        Args:
            accept_versions: continue even if library versions that affect pixels or logits differ
                from the recorded ones; the manifest then lists both.
            guard: comparison of class names; by default they must be equal.

        Raises:
            OutputError: the folder contains other files.
            CacheError: it contains a cache of another data set, teacher, policy, seed or set of
                encodings, or with other library versions; lists every difference.
            ManifestError: ``manifest`` does not fit its schema.
        """
        path = _local(path)
        if path.exists() and not path.is_dir():
            raise OutputError("the output is a file", where=path, expected="a folder")
        CacheManifest.from_json(manifest.to_json())  # refuse what readers would refuse
        layout.stored_arrays(manifest)
        if not (path / layout.GROUP).exists():
            with exclusive(path):
                _require_free(path)
                if not (path / layout.GROUP).exists():
                    atomic.write_bytes(path / layout.GROUP, layout.manifest_document(manifest))
        writer = cls.open(path)
        writer._require_same(manifest, guard or ClassGuard())
        for versions in (manifest.versions, *manifest.other_versions):
            writer._join_versions(versions, accept_versions)
        return writer

    @classmethod
    def open(cls, path: Path | str) -> CacheWriter:
        """Open an existing cache for writing, completing an interrupted creation or extension.

        Raises:
            CacheError: not a cache, or its metadata was altered; ManifestError.
        """
        root = _local(path)
        store = CacheStore(root)
        with exclusive(root) as held:
            if held:
                atomic.sweep(root, layout.GROUP)
            interrupted = (root / layout.EXTENDING).exists()
            if interrupted:
                store = CacheStore(root)  # read again under the lock
            for key, document in layout.array_documents(store.manifest).items():
                path = inside(root, key)
                if held:
                    atomic.sweep(path.parent, path.name)
                if interrupted or not path.exists():
                    atomic.write_bytes(path, document)
            (root / layout.EXTENDING).unlink(missing_ok=True)
        store.check_metadata()
        return cls(store)

    def extend(self, views: int) -> None:
        """Extend the cache to ``views`` views per sample; a smaller number changes nothing.

        Run one extension at a time where the file system has no locks.

        Raises:
            CacheError: not a multiple of the view block, which is fixed at creation.
        """
        block = self.manifest.view_block
        if views % block:
            raise CacheError(
                "the number of views is not a multiple of the view block",
                where=self.path,
                found=f"{views} views",
                expected=f"a multiple of {block}, this cache's view block",
                action=f"choose {-(-views // block) * block}",
            )
        with exclusive(self.path):
            self._reload()
            if views > self.manifest.views:
                extended = replace(self.manifest, views=views)
                atomic.write_bytes(self.path / layout.EXTENDING, f"{views}\n".encode())
                for key, document in layout.array_documents(extended).items():
                    atomic.write_bytes(inside(self.path, key), document)
                self._write_manifest(extended)
                (self.path / layout.EXTENDING).unlink(missing_ok=True)

    def size_of(self, unit: Unit) -> int:
        """Return the number of sample views in the unit."""
        return len(unit.views) * self.manifest.dataset.counts[unit.shard]

    def done(self) -> np.ndarray:
        """Return the units finished by now: (blocks, shards) bool."""
        return self.store.done()

    def is_done(self, unit: Unit) -> bool:
        """Return whether the unit is finished by now."""
        return (self.path / self.store.record_key(unit.block, unit.shard)).exists()

    def todo(
        self, shards: Iterable[int] | None = None, views: Iterable[int] | None = None
    ) -> list[Unit]:
        """Return the unfinished units, block by block.

        Args:
            shards, views: tar shards and views to consider; the views must form whole blocks.

        Raises:
            UsageError: shards or views that the cache does not have, or incomplete blocks.
        """
        size, manifest = self.manifest.view_block, self.manifest
        requested = set(range(manifest.views) if views is None else views)
        blocks = sorted({view // size for view in requested})
        full = {view for block in blocks for view in range(block * size, (block + 1) * size)}
        if requested != full or not full <= set(range(manifest.views)):
            raise UsageError(
                "the views do not form whole blocks",
                where=self.path,
                found=f"views {_ranges(requested)}",
                expected=f"blocks of {size} (0-{size - 1} and so on) up to {manifest.views - 1}",
            )
        chosen = sorted(set(range(len(manifest.dataset.shards)) if shards is None else shards))
        if chosen and not 0 <= chosen[0] <= chosen[-1] < len(manifest.dataset.shards):
            raise UsageError(
                "the cache has no such tar shard",
                where=self.path,
                found=f"shards {_ranges(chosen)}",
                expected=f"shards 0-{len(manifest.dataset.shards) - 1}",
            )
        done = self.done()
        return [
            Unit.of(manifest, block, shard)
            for block in blocks
            for shard in chosen
            if not done[block, shard]
        ]

    def write_unit(self, unit: Unit, data: UnitData) -> bool:
        """Store a unit and mark it done; return False if another writer finished it first.

        The unit is locked against other processes. Once stored, it survives a power cut.

        Raises:
            CacheError: keys are not the manifest's, arrays not its encodings', or labels or image
                CRCs differ from those of an earlier unit of the same tar shard; states both.
            OutputError: no space left; the unit stays unfinished.
        """
        data.check(self.manifest, unit)
        return self._commit(unit, self._encode(data))

    def copy_unit(self, unit: Unit, source: Cache, shard: int) -> bool:
        """Store a unit like :meth:`write_unit`, copying the files of another cache verbatim.

        Every file is compared with its digest, and those of the tar shard are decoded, before the
        first is written: units copied later, from other caches, must agree with the latter.

        Args:
            source: cache that has the unit finished, with arrays of the same chunk and file shapes.
            shard: the unit's tar shard in ``source``, with the same keys.

        Raises:
            CacheError: also if a file of ``source`` is missing or differs from the unit's record,
                or its keys are not the manifest's.
        """
        source.store.compare_files(unit.block, shard)
        for read in (source.keys, source.labels, source.image_crc32):
            read(shard)
        return self._commit(unit, source.store.unit_bytes(unit.block, shard))

    def _encode(self, data: UnitData) -> Iterator[tuple[bytes, bytes]]:
        """Yield content and SHA-256 of each file in a unit's record."""
        matrix = layout.key_matrix(data.keys, self.store.arrays["key"])
        per_shard = {"key": matrix, "label": data.labels, "image_crc32": data.image_crc32}
        per_view = self._pack(data)
        for name, array in self.store.arrays.items():
            step = array.file_shape[0]
            if name in per_shard:
                parts = [per_shard[name][None]]
            elif name in per_view:
                views = per_view[name][:, None]  # axis of tar shards
                parts = [views[start : start + step] for start in range(0, len(views), step)]
            else:  # the record itself
                continue
            for part in parts:
                content = encode_file(array, part)
                yield content, hashlib.sha256(content).digest()

    def _commit(self, unit: Unit, files: Iterable[tuple[bytes, bytes]]) -> bool:
        """Write the files (content, SHA-256) of a unit's record, in its order, then the record."""
        key = self.store.record_key(unit.block, unit.shard)
        own_folder = self._file("seed", unit.views[0], unit.shard).parent
        with atomic.translate_os_errors(self.path), exclusive(own_folder) as held:
            if inside(self.path, key).exists():
                return False
            folder, digests = DurableFolder(self.path, held), []
            recorded = self.store.recorded_files(unit.block, unit.shard)
            for (name, own), (content, digest) in zip(recorded, files, strict=True):
                if name in layout.PER_SHARD:
                    digest = self._write_shared(folder, name, unit.shard, content, digest)
                else:
                    folder.write(own, content)
                digests.append(digest)
            folder.flush()
            folder.write(key, self.store.encode_record(unit.block, unit.shard, digests))
            folder.flush()
        return True

    def _write_shared(
        self, folder: DurableFolder, name: str, shard: int, content: bytes, digest: bytes
    ) -> bytes:
        """Write keys, labels or image CRCs with a tar shard's first unit; compare later ones.

        Values are compared, since another zstd version may have written other bytes. Returns the
        SHA-256 of the stored file.
        """
        key = self.store.arrays[name].key(shard)
        with exclusive(self._file(name, shard).parent):
            if self._file(name, shard).exists():
                self._compare(name, shard, content)
                return self.store.folder.sha256(key)
            folder.write(key, content)
            return digest

    def _pack(self, data: UnitData) -> Rows:
        values, shape = data.per_view(), layout.response_shape(self.manifest)
        for encoding in layout.encodings_of(self.manifest).values():
            specs = encoding.arrays(shape)
            packed = encoding.pack({spec.name: data.arrays[spec.name] for spec in specs})
            require_rows(specs, packed, data.seeds.shape)
            values |= packed
        return values

    def _compare(self, name: str, shard: int, content: bytes) -> None:
        block = self._finished_block(shard)
        recorded = self.store.shard_chunk(name, shard, block)
        values = decode_file(self.store.arrays[name], content)[0, : len(recorded)]
        differing = np.flatnonzero((recorded != values).reshape(len(values), -1).any(axis=1))
        if differing.size:
            first = differing[0]
            pair = np.stack([values[first], recorded[first]])
            found, expected = layout.keys_of(pair) if name == "key" else pair
            sample = layout.keys_of(self.store.shard_chunk("key", shard, block))[first]
            raise CacheError(
                f"{name} differs from an earlier unit of the same tar shard",
                where=f"shard {shard} ({self.manifest.dataset.shards[shard].name})",
                found=f"{found} for sample {sample}; {differing.size} samples differ",
                expected=f"{expected}, in {self._file(name, shard)}",
                action="use the shards that the cache was started with",
            )

    def _finished_block(self, shard: int) -> int | None:
        """Return the first finished block of this tar shard, or None."""
        keys = (self.store.record_key(block, shard) for block in range(self.manifest.blocks))
        return next((n for n, key in enumerate(keys) if inside(self.path, key).exists()), None)

    def _require_same(self, manifest: CacheManifest, guard: ClassGuard) -> None:
        conflicts = self.manifest.conflicts(manifest)
        differences = [f"{at}: {mine} and {theirs}" for at, mine, theirs in conflicts]
        classes = guard.conflict(
            self.manifest.dataset.classes("the cache", self.path),
            manifest.dataset.classes("the new data", self.path),
        )
        if classes is not None:
            differences.append(classes)
        if differences:
            raise CacheError(
                "the folder contains another cache (recorded and requested values)",
                where=self.path,
                action="choose another folder, or the same data, teacher, views and encodings",
                problems=differences,
            )

    def _join_versions(self, versions: Mapping[str, str], accept: bool) -> None:
        differences = self.manifest.version_differences(versions)
        if differences and not accept:
            raise CacheError(
                "the cache was started with other library versions (recorded and installed)",
                where=self.path,
                action="install the recorded versions, or mix versions with --accept-versions",
                problems=differences,
            )
        if differences:
            with exclusive(self.path):
                self._reload()
                if self.manifest.version_differences(versions):
                    others = (*self.manifest.other_versions, dict(versions))
                    self._write_manifest(replace(self.manifest, other_versions=others))

    def _write_manifest(self, manifest: CacheManifest) -> None:
        atomic.write_bytes(self.path / layout.GROUP, layout.manifest_document(manifest))
        self._reload(manifest)

    def _file(self, name: str, *at: int) -> Path:
        return inside(self.path, self.store.arrays[name].key(*at))


def _require_free(path: Path) -> None:
    names = sorted(e.name for e in path.iterdir() if not e.name.startswith(f".{layout.GROUP}."))
    if names and layout.GROUP not in names:
        raise OutputError(
            "the output folder contains other files",
            where=path,
            found=", ".join(names[:5]) + (" …" if len(names) > 5 else ""),
            expected="an empty or new folder, or a cache",
            action="choose another folder for the cache",
        )


def _ranges(numbers: Iterable[int]) -> str:
    numbers = sorted(numbers)
    return f"{numbers[0]}-{numbers[-1]} ({len(numbers)})" if numbers else "none"


def _local(path: Path | str) -> Path:
    return require_local(
        path, "a cache is written to a local folder", "write it to a folder, then upload the folder"
    )
