"""``cache merge``: combine the finished units of several caches, disjoint or overlapping.

A unit that several caches have must be equal in all of them: in its files' bytes or, if another
zstd version wrote them, in every value. Files are compared with their unit's record and copied
verbatim; a unit is decoded and stored again only if its files have another shape, because the
longest tar shard differs. Units of an earlier merge are compared, not copied again.

The caches share data set, teacher, policy, root seed, encodings and view block. Their lists of tar
shards may differ (slices made by ``cache convert --shards``): the merged cache has every shard, in
the order of its parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from cskd_pipeline.cache.convert import require_apart, unit_data
from cskd_pipeline.cache.digests import split_pin
from cskd_pipeline.cache.folders import require_local
from cskd_pipeline.cache.info import SIZES, describe
from cskd_pipeline.cache.key_index import KeyIndex
from cskd_pipeline.cache.manifest import CacheManifest, ShardInfo, utc_now
from cskd_pipeline.cache.omitted import carry_lists
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.cache.store import CacheStore
from cskd_pipeline.cache.units import Unit
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.errors import CacheError
from cskd_pipeline.runtime.classes import ClassGuard
from cskd_pipeline.runtime.progress import progress

_IDENTITY = ("count", "bytes", "sha256", "keys_sha256", "key_bytes")
_LONGEST = 64  # maximum characters of a value in a message: a SHA-256


def merge(
    sources: Sequence[Path | str],
    target: Path | str,
    *,
    accept_versions: bool = False,
    guard: ClassGuard | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Create or continue the cache ``target`` from the finished units of ``sources``.

    Args:
        accept_versions: merge even if library versions that affect pixels or logits differ; the
            manifest then lists all.
        guard: comparison of class names; by default they must be equal. It keeps the accepted
            differences: the new cache has only the names of the first source that has any.
        stopped: called between units; merging stops when it returns true.

    Returns:
        Counts of units copied and compared, and the new cache's sizes. ``units_missing`` counts
        units that no source has finished.

    Raises:
        CacheError: the sources do not belong together, differ in a unit, or are damaged; or the
            target is another cache.
        KeyboardInterrupt: stopped between units.
    """
    for source in sources:
        location, _ = split_pin(source)
        require_local(location, "merge reads local folders only", "copy this cache here first")
    require_apart(sources, target, "merged")
    guard = guard or ClassGuard()
    merged, parts = unite([open_cache(source, memory=0) for source in sources], guard)
    _require_accepted(merged, parts, accept_versions)
    writer = CacheWriter.create(target, merged, accept_versions=accept_versions, guard=guard)
    if merged.views > writer.manifest.views:
        writer.extend(merged.views)
    numbers = range(len(merged.dataset.shards))
    result = Part(Cache(writer.store, writer.done()), {number: number for number in numbers})
    inverse = [{own: n for n, own in part.shards.items()} for part in (result, *parts)]
    stores = [part.store for part in (result, *parts)]
    carry_lists(writer.path, zip(stores, inverse, strict=True))
    every = [Unit.of(writer.manifest, b, s) for s in numbers for b in range(merged.blocks)]
    work = [unit for unit in every if any(part.has(unit) for part in parts)]
    counts = Counter(units_copied=0, views_copied=0, units_compared=0)
    with progress(sum(map(writer.size_of, work)), "views", "merging") as meter:
        for shard, units in groupby(work, lambda unit: unit.shard):
            _compare_shard([result, *parts], shard)
            for unit in units:
                if stopped():
                    raise KeyboardInterrupt
                counts += _merge_unit(writer, result, parts, unit)
                meter.advance(writer.size_of(unit))
    info = describe(Cache(writer.store, writer.done()))
    return {
        "cache": str(target),
        "sources": [str(part.path) for part in parts],
        "accepted_classes": guard.accepted,
        **{name: counts[name] for name in ("units_copied", "views_copied", "units_compared")},
        "units_missing": info["units"]["total"] - info["units"]["done"],
        **{name: info[name] for name in SIZES},
    }


@dataclass(frozen=True)
class Part:
    """A source of the merge, or its result; ``shards`` maps merged tar shards to its own."""

    reader: Cache
    shards: dict[int, int]

    @cached_property
    def done(self) -> np.ndarray:
        """Return the part's finished units: (blocks, shards) bool."""
        return self.reader.done()

    @property
    def store(self) -> CacheStore:
        """Return the cache's open folder."""
        return self.reader.store

    @property
    def path(self) -> Path:
        """Return the cache's folder."""
        return Path(self.reader.path)

    @cached_property
    def geometry(self) -> dict[str, dict[str, Any]]:
        """Return the arrays' metadata that must be equal for files to be copied verbatim."""
        return {name: {**a.document(), "shape": None} for name, a in self.store.arrays.items()}

    def has(self, unit: Unit) -> bool:
        """Return whether the part has finished this unit of the merged cache."""
        own = self.shards.get(unit.shard)
        return own is not None and unit.block < len(self.done) and bool(self.done[unit.block, own])

    def has_any(self, shard: int) -> bool:
        """Return whether the part has finished any unit of this merged tar shard."""
        own = self.shards.get(shard)
        return own is not None and bool(self.done[:, own].any())

    def file(self, name: str, view: int | None, shard: int) -> Path:
        """Return the file of an array for a view (None: all views) and a merged tar shard."""
        own = self.shards[shard]
        return self.path / self.store.arrays[name].key(*((own,) if view is None else (view, own)))


def unite(readers: Sequence[Cache], guard: ClassGuard) -> tuple[CacheManifest, list[Part]]:
    """Return the manifest of the merged cache, and its parts.

    Class names are those of the first part that has any; ``guard`` compares the others. Versions
    are the first part's; ``other_versions`` lists those of other parts that affect pixels or
    logits and differ.

    Raises:
        CacheError: the parts do not belong together; lists every differing value and its caches.
    """
    first = readers[0].manifest
    shards, conflicts = _unite_shards(readers)
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
        Part(reader, {numbers[name]: own for own, name in enumerate(reader.shard_ids)})
        for reader in readers
    ]
    if len(shards) > max(len(reader.counts) for reader in readers):
        _require_unique_keys(parts)
    manifests = [reader.manifest for reader in readers]
    parents = [manifest.parent for manifest in manifests]
    names = named.manifest.dataset.class_names
    merged = replace(
        first,
        dataset=replace(first.dataset, shards=shards, class_names=names),
        views=max(manifest.views for manifest in manifests),
        license="; ".join(dict.fromkeys(m.license for m in manifests if m.license)),
        notes="\n".join(dict.fromkeys(m.notes for m in manifests if m.notes)),
        created=utc_now(),
        parent=parents[0] if all(parent == parents[0] for parent in parents) else None,
    )
    for manifest in manifests:
        for versions in (manifest.versions, *manifest.other_versions):
            if merged.version_differences(versions):
                merged = replace(merged, other_versions=(*merged.other_versions, dict(versions)))
    return merged, parts


def _unite_shards(readers: Sequence[Cache]) -> tuple[tuple[ShardInfo, ...], list[str]]:
    """Return every tar shard of the parts once, and the contradictions between them."""
    known: dict[str, tuple[ShardInfo, Path | str]] = {}  # by keys and by name
    shards: list[ShardInfo] = []
    conflicts: list[str] = []
    for reader in readers:
        for shard in reader.manifest.dataset.shards:
            found = known.get(f"keys {shard.keys_sha256}") or known.get(f"name {shard.name}")
            if found is None:
                found = shard, reader.path
                known[f"keys {shard.keys_sha256}"] = known[f"name {shard.name}"] = found
                shards.append(shard)
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
    digests = {
        shard.keys_sha256: shard.sha256
        for reader in readers
        for shard in reader.manifest.dataset.shards
        if shard.sha256 is not None
    }
    return tuple(replace(s, sha256=digests.get(s.keys_sha256)) for s in shards), conflicts


def _conflicts(one: Cache, other: Cache) -> list[str]:
    """List the contradictions other than tar shards; without a common one, names must be equal."""
    mine, theirs = one.manifest, other.manifest
    aligned = replace(theirs, dataset=replace(theirs.dataset, shards=mine.dataset.shards))
    found = [*mine.conflicts(aligned), ("view_block", mine.view_block, theirs.view_block)]
    if not set(other.shard_ids) & set(one.shard_ids):
        found.append(("dataset.name", mine.dataset.name, theirs.dataset.name))
    return [_conflict(at, (a, one.path), (b, other.path)) for at, a, b in found if a != b]


def _conflict(at: str, one: tuple[Any, Path | str], other: tuple[Any, Path | str]) -> str:
    return f"{at}: {_shorten(one[0])} in {one[1]}, {_shorten(other[0])} in {other[1]}"


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _require_unique_keys(parts: Sequence[Part]) -> None:
    """Refuse samples in more than one tar shard: the data set was split in different ways."""
    started = {n: part for part in parts[::-1] for n in part.shards if part.has_any(n)}
    index = KeyIndex(list(started), lambda n: started[n].reader.keys(started[n].shards[n]), None)
    count, key, repeated = index.repeated()
    if count:
        shards = [
            f"{part.reader.manifest.dataset.shards[part.shards[n]].name} of {part.path}"
            for n, part in sorted(started.items())
            if n in repeated
        ]
        raise CacheError(
            "the caches cannot be merged: they have the same samples in different tar shards",
            where=" and ".join(shards),
            found=f"{count} keys more than once, for example {key}",
            expected="one split of the data set into tar shards",
            action="leave out the caches that were made from another split",
        )


def _require_accepted(merged: CacheManifest, parts: Sequence[Part], accept: bool) -> None:
    if not merged.other_versions or accept:
        return
    first = parts[0].reader.manifest
    lines = [
        f"{part.path}: {line}"
        for part in parts
        for versions in (part.reader.manifest.versions, *part.reader.manifest.other_versions)
        for line in first.version_differences(versions)
    ]
    if lines:
        raise CacheError(
            "the caches were made with different library versions "
            f"(in {parts[0].path} and in the others)",
            action="dump the others again with the first one's versions, or mix versions with "
            "--accept-versions",
            problems=lines,
        )


def _merge_unit(
    writer: CacheWriter, result: Part, parts: Sequence[Part], unit: Unit
) -> Counter[str]:
    """Compare the unit between all parts, then copy it if ``result`` lacks it; return the counts.

    Comparison comes first: a unit that differs between parts is not stored.
    """
    holders = [part for part in (result, *parts) if part.has(unit)]
    for other in holders[1:]:
        _compare_unit(holders[0], other, unit)
    counts = Counter(units_compared=len(holders) - 1)
    source = holders[0]
    if source is not result:
        own = source.shards[unit.shard]
        if source.geometry == result.geometry:
            stored = writer.copy_unit(unit, source.reader, own)
        else:
            stored = writer.write_unit(unit, unit_data(source.reader, writer.manifest, unit, own))
        counts.update(units_copied=stored, views_copied=stored * writer.size_of(unit))
    return counts


def _compare_shard(caches: Sequence[Part], shard: int) -> None:
    """Refuse labels and image CRCs of a tar shard that differ between caches."""
    started = [cache for cache in caches if cache.has_any(shard)]
    for other in started[1:]:
        for name, read in (("label", Cache.labels), ("image_crc32", Cache.image_crc32)):
            values = (read(cache.reader, cache.shards[shard]) for cache in (started[0], other))
            _require_equal(started[0], other, name, (None, shard), *values)


def _compare_unit(one: Part, other: Part, unit: Unit) -> None:
    sides = [(part, part.shards[unit.shard]) for part in (one, other)]
    digests = [part.store.record(unit.block, own).files for part, own in sides]
    if digests[0] == digests[1]:
        for part, own in sides:
            part.store.compare_files(unit.block, own)
        return
    manifest = one.reader.manifest
    mine, theirs = (unit_data(p.reader, manifest, unit, own).per_view() for p, own in sides)
    for name in mine:
        for row, view in enumerate(unit.views):
            at = (view, unit.shard)
            _require_equal(one, other, name, at, mine[name][row], theirs[name][row])


def _require_equal(
    one: Part,
    other: Part,
    name: str,
    at: tuple[int | None, int],
    mine: np.ndarray,
    theirs: np.ndarray,
) -> None:
    """Refuse values of an array ``at`` (view, tar shard) that differ; view None: of all views."""
    view, shard = at
    if mine.shape == theirs.shape and mine.tobytes() == theirs.tobytes():
        return
    manifest = one.reader.manifest
    own = one.shards[shard]
    part = f"shard {own} ({manifest.dataset.shards[own].name})"
    if view is not None:
        part = one.store.unit_name(view // manifest.view_block, own)
    raise CacheError(
        "two caches differ where they should be equal",
        where=f"{one.file(name, view, shard)} and {other.file(name, view, shard)}",
        found=f"array {name}, {part}: {_difference(one, name, shard, mine, theirs)}",
        expected="equal values",
        action="find out which cache is right, and leave out the other",
    )


def _difference(one: Part, name: str, shard: int, mine: np.ndarray, theirs: np.ndarray) -> str:
    if name == "top1" or mine.shape != theirs.shape:
        return "the values differ"
    rows = (np.ascontiguousarray(v).reshape(len(v), -1).view(np.uint8) for v in (mine, theirs))
    differing = np.flatnonzero(np.not_equal(*rows).any(axis=1))
    key = one.reader.keys(one.shards[shard])[differing[0]]
    return f"{len(differing)} of {len(mine)} samples differ, the first is {key}"
