"""``cache merge``: one cache of the finished units of several, disjoint or overlapping.

A unit that several have must be equal in all of them: its files' bytes, or, where another zstd
wrote them, every value. A unit is decoded once, which looks at every checksum, and its files are
copied as they are. What an earlier merge left is compared, not copied again.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from cskd_pipeline.cache.convert import require_apart, unit_data
from cskd_pipeline.cache.digests import split_pin
from cskd_pipeline.cache.info import SIZES, describe
from cskd_pipeline.cache.manifest import CacheManifest
from cskd_pipeline.cache.omitted import carry_lists
from cskd_pipeline.cache.parts import Part, unite
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.cache.remote import require_local
from cskd_pipeline.cache.units import Unit
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.errors import CacheError
from cskd_pipeline.runtime.classes import ClassGuard
from cskd_pipeline.runtime.progress import progress


def merge(
    sources: Sequence[Path | str],
    target: Path | str,
    *,
    accept_versions: bool = False,
    guard: ClassGuard | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Make, or continue, the cache ``target`` from the finished units of ``sources``.

    Args:
        accept_versions: merge though library versions that decide pixels or logits differ; the
            manifest then lists all.
        guard: compares the class names; without, they must be the same. It keeps what was accepted,
            which the new cache does not say: it has the names of the first part that has some.
        stopped: called between units; true ends the work there.

    Returns:
        What was copied and compared, and the new cache's sizes. ``units_missing`` counts units
        that no source has finished.

    Raises:
        CacheError: the sources do not belong together, a unit is not the same in two of them, or
            one is damaged; the target is another cache.
        KeyboardInterrupt: stopped between units.
    """
    for source in sources:
        location, _ = split_pin(source)
        require_local(location, "merge copies files of folders", "copy this cache here first")
    require_apart(sources, target, "merged")
    guard = guard or ClassGuard()
    whole, parts = unite([open_cache(source, memory=0) for source in sources], guard)
    _require_accepted(whole, parts, accept_versions)
    writer = CacheWriter.create(target, whole, accept_versions=accept_versions, guard=guard)
    if whole.views > writer.manifest.views:
        writer.extend(whole.views)
    numbers = range(len(whole.dataset.shards))
    result = Part.of(Cache(writer.store, writer.done()), {number: number for number in numbers})
    inverse = [{own: n for n, own in part.shards.items()} for part in (result, *parts)]
    stores = [part.store for part in (result, *parts)]
    carry_lists(writer.path, zip(stores, inverse, strict=True))
    every = [Unit.of(writer.manifest, b, s) for s in numbers for b in range(whole.blocks)]
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


def _require_accepted(whole: CacheManifest, parts: Sequence[Part], accept: bool) -> None:
    if not whole.other_versions or accept:
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
            f"(in {parts[0].path}, and in the others)",
            action="dump the others again with the first one's versions, or accept that units "
            "differ in them: --accept-versions",
            problems=lines,
        )


def _merge_unit(
    writer: CacheWriter, result: Part, parts: Sequence[Part], unit: Unit
) -> Counter[str]:
    """Compare the unit wherever it is done, then store it if ``result`` had it not; what was done.

    Comparing comes first: a unit about which two parts disagree is not stored.
    """
    holders = [part for part in (result, *parts) if part.has(unit)]
    for other in holders[1:]:
        _compare_unit(holders[0], other, unit)
    counts = Counter(units_compared=len(holders) - 1)
    source = holders[0]
    if source is not result:
        data = unit_data(source.reader, writer.manifest, unit, source.shards[unit.shard])
        copy = partial(_copied, source, _files(source, result, unit))
        # Where its longest tar shard is another, a cache has files of another shape.
        if writer.write_unit(unit, data, copy if source.geometry == result.geometry else None):
            counts.update(units_copied=1, views_copied=writer.size_of(unit))
    return counts


def _files(source: Part, result: Part, unit: Unit) -> dict[str, tuple[str, bytes]]:
    """Return where the unit's files are in ``source``, and their digests, by key in ``result``."""
    own = (unit.block, source.shards[unit.shard])
    keys = (key for _, key in result.store.recorded_files(unit.block, unit.shard))
    sources = (key for _, key in source.store.recorded_files(*own))
    digests = source.store.record(*own).files
    return dict(zip(keys, zip(sources, digests, strict=True), strict=True))


def _copied(source: Part, files: dict[str, tuple[str, bytes]], key: str) -> bytes:
    """Return the bytes of the file that is to have this key."""
    own, digest = files[key]
    data = (source.path / own).read_bytes()
    found = hashlib.sha256(data)
    if found.digest() != digest:
        raise CacheError(
            "a file changed while it was copied",
            where=source.path / own,
            found=f"sha256 {found.hexdigest()}",
            expected=digest.hex(),
            action="run the command again when nothing else writes there",
        )
    return data


def _compare_shard(caches: Sequence[Part], shard: int) -> None:
    """Labels and image CRCs of a tar shard are the same wherever it was begun."""
    begun = [cache for cache in caches if cache.has_any(shard)]
    for other in begun[1:]:
        for name, read in (("label", Cache.labels), ("image_crc32", Cache.image_crc32)):
            values = (read(cache.reader, cache.shards[shard]) for cache in (begun[0], other))
            _require_equal(begun[0], other, name, (None, shard), *values)


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
    """Refuse values of an array ``at`` a view (None: of all) and tar shard that differ in a bit."""
    view, shard = at
    if mine.shape == theirs.shape and mine.tobytes() == theirs.tobytes():
        return
    manifest = one.reader.manifest
    own = one.shards[shard]
    of = f"shard {own} ({manifest.dataset.shards[own].name})"
    if view is not None:
        of = one.store.unit_name(view // manifest.view_block, own)
    raise CacheError(
        "two caches differ where they should be equal",
        where=f"{one.file(name, view, shard)} and {other.file(name, view, shard)}",
        found=f"array {name}, {of}: {_difference(one, name, shard, mine, theirs)}",
        expected="equal values",
        action="find out which one is right, and leave the other out",
    )


def _difference(one: Part, name: str, shard: int, mine: np.ndarray, theirs: np.ndarray) -> str:
    if name == "top1" or mine.shape != theirs.shape:
        return "the values differ"
    rows = (np.ascontiguousarray(v).reshape(len(v), -1).view(np.uint8) for v in (mine, theirs))
    differing = np.flatnonzero(np.not_equal(*rows).any(axis=1))
    key = one.reader.keys(one.shards[shard])[differing[0]]
    return f"{len(differing)} of {len(mine)} samples differ, the first is {key}"
