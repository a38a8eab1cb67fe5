"""Caches that are parts of one: whether they belong together, what the whole is, who has what.

Parts are of one data set, teacher, policy, root seed, set of encodings and view block. Their lists
of tar shards may differ (slices made by ``cache convert --shards``): the whole has every shard, in
the order of the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cskd_pipeline.cache.key_index import KeyIndex
from cskd_pipeline.cache.manifest import CacheManifest, ShardInfo, utc_now
from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.cache.store import CacheStore
from cskd_pipeline.cache.units import Unit
from cskd_pipeline.errors import CacheError
from cskd_pipeline.runtime.classes import ClassGuard

_IDENTITY = ("count", "bytes", "sha256", "keys_sha256", "key_bytes")
_LONGEST = 64  # characters of a value in a message: a SHA-256


@dataclass(frozen=True)
class Part:
    """One cache, its files by array, and the numbers that the whole's tar shards have here."""

    reader: Cache
    shards: dict[int, int]
    done: np.ndarray

    @classmethod
    def of(cls, reader: Cache, shards: dict[int, int]) -> Part:
        """Take a cache as it is now."""
        return cls(reader, shards, reader.done())

    @property
    def store(self) -> CacheStore:
        """Return the cache's open folder."""
        return self.reader.store

    @property
    def path(self) -> Path:
        """Return the cache's folder."""
        return Path(self.reader.path)

    @property
    def geometry(self) -> dict[str, dict[str, Any]]:
        """Return what must agree for two caches' files to be alike, by array."""
        return {name: {**a.document(), "shape": None} for name, a in self.store.arrays.items()}

    def has(self, unit: Unit) -> bool:
        """Say that this unit of the whole is finished here."""
        own = self.shards.get(unit.shard)
        return own is not None and unit.block < len(self.done) and bool(self.done[unit.block, own])

    def has_any(self, shard: int) -> bool:
        """Say that some unit of this tar shard of the whole is finished here."""
        own = self.shards.get(shard)
        return own is not None and bool(self.done[:, own].any())

    def file(self, name: str, view: int | None, shard: int) -> Path:
        """Return the file in which an array has a view of a tar shard of the whole."""
        own = self.shards[shard]
        return self.path / self.store.arrays[name].key(*((own,) if view is None else (view, own)))


def unite(readers: Sequence[Cache], guard: ClassGuard) -> tuple[CacheManifest, list[Part]]:
    """Return the manifest of the whole, and its parts.

    The classes have the names of the first part that names them; ``guard`` compares the others'.

    Versions are the first part's; those of the others that differ in what decides pixels or logits
    are listed in ``other_versions``.

    Raises:
        CacheError: the parts do not belong together; says every value that differs, and where.
    """
    first = readers[0].manifest
    shards, conflicts = _united_shards(readers)
    for reader in readers[1:]:
        conflicts += _conflicts(readers[0], reader)
    named = next((r for r in readers if r.manifest.dataset.class_names is not None), readers[0])
    for reader in readers:
        sides = (r.manifest.dataset.classes(str(r.path), r.path) for r in (reader, named))
        classes = guard.conflict(*sides)
        conflicts += [] if classes is None else [classes]
    if conflicts:
        raise CacheError(
            "the caches cannot be merged: they do not belong together",
            where=", ".join(str(reader.path) for reader in readers),
            expected="the same data, teacher, policy, root seed, encodings and view block",
            action="leave out the caches that do not belong to the others",
            problems=conflicts,
        )
    numbers = {shard.keys_sha256: number for number, shard in enumerate(shards)}
    parts = [
        Part.of(reader, {numbers[name]: own for own, name in enumerate(reader.shard_ids)})
        for reader in readers
    ]
    if len(shards) > max(len(reader.counts) for reader in readers):
        _require_unique_keys(parts)
    manifests = [reader.manifest for reader in readers]
    parents = [manifest.parent for manifest in manifests]
    whole = replace(
        first,
        dataset=replace(
            first.dataset, shards=shards, class_names=named.manifest.dataset.class_names
        ),
        views=max(manifest.views for manifest in manifests),
        license="; ".join(dict.fromkeys(m.license for m in manifests if m.license)),
        notes="\n".join(dict.fromkeys(m.notes for m in manifests if m.notes)),
        created=utc_now(),
        parent=parents[0] if all(parent == parents[0] for parent in parents) else None,
    )
    for manifest in manifests:
        for versions in (manifest.versions, *manifest.other_versions):
            if whole.version_differences(versions):
                whole = replace(whole, other_versions=(*whole.other_versions, dict(versions)))
    return whole, parts


def _united_shards(readers: Sequence[Cache]) -> tuple[tuple[ShardInfo, ...], list[str]]:
    """Every tar shard of the parts once, and what contradicts itself among them."""
    known: dict[str, tuple[ShardInfo, Path | str]] = {}  # by contents and by name
    shards: list[ShardInfo] = []
    conflicts: list[str] = []
    for reader in readers:
        for shard in reader.manifest.dataset.shards:
            found = known.get(f"keys {shard.keys_sha256}") or known.get(f"name {shard.name}")
            if found is None:
                known[f"keys {shard.keys_sha256}"] = known[f"name {shard.name}"] = (
                    shard,
                    reader.path,
                )
                shards.append(shard)
                continue
            other, path = found
            conflicts += [
                _conflict(
                    f"tar shard {shard.name}: {field}",
                    (getattr(other, field), path),
                    (getattr(shard, field), reader.path),
                )
                for field in _IDENTITY
                if getattr(other, field) != getattr(shard, field)
                and not (field == "sha256" and None in (other.sha256, shard.sha256))
            ]
    stated = {
        shard.keys_sha256: shard.sha256
        for reader in readers
        for shard in reader.manifest.dataset.shards
        if shard.sha256 is not None
    }
    return tuple(replace(s, sha256=stated.get(s.keys_sha256)) for s in shards), conflicts


def _conflicts(one: Cache, other: Cache) -> list[str]:
    """List contradictions beside the tar shards; those of one list differ by contents alone,
    those of different lists belong together only if the data set has the same name.
    """
    mine, theirs = one.manifest, other.manifest
    alike = replace(theirs, dataset=replace(theirs.dataset, shards=mine.dataset.shards))
    found = [*mine.conflicts(alike), ("view_block", mine.view_block, theirs.view_block)]
    if not set(other.shard_ids) & set(one.shard_ids):
        found.append(("dataset.name", mine.dataset.name, theirs.dataset.name))
    return [_conflict(at, (a, one.path), (b, other.path)) for at, a, b in found if a != b]


def _conflict(at: str, one: tuple[Any, Path | str], other: tuple[Any, Path | str]) -> str:
    return f"{at}: {_shown(one[0])} in {one[1]}, {_shown(other[0])} in {other[1]}"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _require_unique_keys(parts: Sequence[Part]) -> None:
    """A data set that was cut in two ways has tar shards unlike each other with the same images."""
    begun = {n: part for part in parts[::-1] for n in part.shards if part.has_any(n)}
    index = KeyIndex(list(begun), lambda n: begun[n].reader.keys(begun[n].shards[n]), None)
    count, key, twice = index.repeated()
    if count:
        places = [
            f"{begun[n].reader.manifest.dataset.shards[begun[n].shards[n]].name} of {begun[n].path}"
            for n in sorted(twice)
        ]
        raise CacheError(
            "the caches cannot be merged: they hold the same samples in different tar shards",
            where=" and ".join(places),
            found=f"{count} keys more than once, for example {key}",
            expected="caches of one cut of the data set into tar shards",
            action="leave out the caches that were made from another cut",
        )
