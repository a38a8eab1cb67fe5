"""``cache merge``: one cache of the finished units of several, disjoint or overlapping.

A unit that several have must be equal in all of them: their files' bytes, or, where another zstd
wrote them, every value. A unit is decoded once, which looks at every checksum, and its files are
copied as they are; its record comes last. What an earlier merge left is compared, not copied again.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.convert import unit_data
from cskd_pipeline.cache.digests import split_pin
from cskd_pipeline.cache.durable import DurableFolder, exclusive
from cskd_pipeline.cache.info import describe
from cskd_pipeline.cache.manifest import CacheManifest
from cskd_pipeline.cache.omitted import carry_lists
from cskd_pipeline.cache.parts import Part, unite
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.cache.remote import require_local
from cskd_pipeline.cache.units import Unit
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.errors import CacheError, UsageError
from cskd_pipeline.runtime.classes import ClassGuard
from cskd_pipeline.runtime.progress import progress

_PIECE = 2**20


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
    _require_apart(sources, target)
    guard = guard or ClassGuard(switch=None)
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
    work = _work(writer, parts)
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
        **{name: info[name] for name in ("views", "samples", "complete", "bytes")},
        "bytes_per_view": info["bytes_per_view"],
    }


def _merge_unit(
    writer: CacheWriter, result: Part, parts: Sequence[Part], unit: Unit
) -> Counter[str]:
    """Compare the unit wherever it is done, then store it if ``result`` had it not; what was done.

    Comparing comes first: a unit about which two parts disagree is not stored.
    """
    holders = [part for part in (result, *parts) if part.has(unit.block, unit.shard)]
    for other in holders[1:]:
        _compare_unit(holders[0], other, unit)
    counts = Counter(units_compared=len(holders) - 1)
    if holders[0] is not result and _take(writer, result, holders[0], unit):
        counts.update(units_copied=1, views_copied=writer.size_of(unit))
    return counts


def _require_apart(sources: Iterable[Path | str], target: Path | str) -> None:
    for source in sources:
        if Path(split_pin(source)[0]).resolve() == Path(target).resolve():
            raise UsageError(
                "a cache cannot be merged into itself",
                where=target,
                action="choose another folder for the merged cache",
            )


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


def _work(writer: CacheWriter, parts: Sequence[Part]) -> list[Unit]:
    """The units that some part has, tar shard by tar shard."""
    block, shards = writer.manifest.view_block, len(writer.manifest.dataset.shards)
    return [
        Unit(number, shard, range(number * block, (number + 1) * block))
        for shard in range(shards)
        for number in range(writer.manifest.blocks)
        if any(part.has(number, shard) for part in parts)
    ]


def _compare_shard(caches: Sequence[Part], shard: int) -> None:
    """Labels and image CRCs of a tar shard are the same wherever it was begun."""
    begun = [cache for cache in caches if cache.has_any(shard)]
    for other in begun[1:]:
        for name in ("label", "image_crc32"):
            values = (cache.shard_values(name, shard) for cache in (begun[0], other))
            _require_equal(begun[0], other, name, (None, shard), *values)


def _compare_unit(one: Part, other: Part, unit: Unit) -> None:
    if _same_files(one, other, unit):
        return
    pairs = zip(
        one.values(unit.views, unit.shard), other.values(unit.views, unit.shard), strict=True
    )
    for (name, view, mine), (_, _, theirs) in pairs:
        _require_equal(one, other, name, (view, unit.shard), mine, theirs)


def _same_files(one: Part, other: Part, unit: Unit) -> bool:
    pairs = zip(
        one.keys_of_files(unit.views, unit.shard),
        other.keys_of_files(unit.views, unit.shard),
        strict=True,
    )
    return all(_same_bytes(one.path / a, other.path / b) for a, b in pairs)


def _same_bytes(one: Path, other: Path) -> bool:
    """False, too, where one cannot be read: reading its values will say why."""
    if not (one.is_file() and other.is_file()) or one.stat().st_size != other.stat().st_size:
        return False
    with open(one, "rb") as a, open(other, "rb") as b:
        while piece := a.read(_PIECE):
            if piece != b.read(_PIECE):
                return False
    return True


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


def _take(writer: CacheWriter, result: Part, part: Part, unit: Unit) -> bool:
    """Check the unit of ``part`` and store it; False if another process did so meanwhile."""
    own = part.shards[unit.shard]
    if part.geometry != result.geometry:  # its longest tar shard is another: so are its files
        return writer.write_unit(unit, unit_data(part.reader, writer, unit, own))
    _decode(part, unit)
    digests = part.digests(unit.block, unit.shard)
    with writer.committing(unit) as folder:
        if folder is None:
            return False
        _copy_shard(folder, result, part, unit.shard, digests)
        pairs = zip(
            result.keys_of_files(unit.views, unit.shard),
            part.keys_of_files(unit.views, unit.shard),
            strict=True,
        )
        for key, source in pairs:
            _copy(folder, key, part, source, digests)
    return True


def _decode(part: Part, unit: Unit) -> None:
    """Raises: CacheError, a file is missing or damaged."""
    own, reader = part.shards[unit.shard], part.reader
    for read in (reader.keys, reader.labels, reader.image_crc32):
        read(own)
    for _ in part.values(unit.views, unit.shard):
        pass


def _copy_shard(
    folder: DurableFolder, result: Part, part: Part, shard: int, digests: Mapping[str, bytes]
) -> None:
    """Keys, labels and image CRCs, if no unit of the tar shard has brought them yet."""
    with exclusive(result.file("key", None, shard).parent):
        for name in layout.PER_SHARD:
            if not result.file(name, None, shard).exists():
                source = part.store.arrays[name].key(part.shards[shard])
                _copy(folder, result.store.arrays[name].key(shard), part, source, digests)
            elif name != "key":
                mine, theirs = (cache.shard_values(name, shard) for cache in (result, part))
                _require_equal(result, part, name, (None, shard), mine, theirs)


def _copy(
    folder: DurableFolder, key: str, part: Part, source: str, digests: Mapping[str, bytes]
) -> None:
    folder.copy(part.path / source, key)
    if folder.digests[key] != digests[source]:
        raise CacheError(
            "a file changed while it was copied",
            where=part.path / source,
            found=f"sha256 {folder.digests[key].hex()}",
            expected=digests[source].hex(),
            action="run the command again when nothing else writes there",
        )
