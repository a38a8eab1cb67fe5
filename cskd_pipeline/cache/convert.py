"""``cache convert``: derive a smaller or partial cache from another one, without a teacher.

Encodings that the source has are copied; others are computed from its ``dense`` logits and equal
those of a dump. Seeds, digests, labels and image CRCs are copied too, so the new cache joins the
same images in the same views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cskd_pipeline.cache.digests import split_pin
from cskd_pipeline.cache.info import SIZES, describe
from cskd_pipeline.cache.layout import encodings_of, specs
from cskd_pipeline.cache.manifest import CacheManifest, utc_now
from cskd_pipeline.cache.omitted import carry_corrupt, carry_lists
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.cache.units import Unit, UnitBuffer, UnitData, choose_view_block, encode_batch
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.distill.encodings import Encoding, Rows, Sampled
from cskd_pipeline.errors import CacheError, UsageError
from cskd_pipeline.runtime.progress import progress

if TYPE_CHECKING:
    import torch

_ROWS = 64  # samples encoded at once


@dataclass(frozen=True)
class Conversion:
    """The contents of the new cache.

    Args:
        encodings: names of the encodings; empty: the source's.
        views: number of leading views; None: all.
        shards: range of tar shards, the end excluded; None: all.
        view_block: views per unit, which determines the number of files; 0: chosen by
            :func:`choose_view_block`; None: the source's, or chosen if that does not divide
            ``views``.
        sampled_draws, sampled_temperature: settings of the encoding ``sampled``, if it is included;
            None: the source's, or one draw at temperature 1.
    """

    encodings: Sequence[str] = ()
    views: int | None = None
    shards: tuple[int, int] | None = None
    view_block: int | None = None
    sampled_draws: int | None = None
    sampled_temperature: float | None = None


_COPY = Conversion()


def convert(
    source: Path | str,
    target: Path | str,
    conversion: Conversion = _COPY,
    *,
    device: str | torch.device = "cpu",
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Create or continue the cache ``target`` from the finished units of ``source``.

    Args:
        device: device that computes new encodings.
        stopped: called between units; conversion stops when it returns true.

    Returns:
        Counts of units and views written, and the new cache's sizes. ``units_missing`` counts units
        that the source has not finished: run the same command again when it has.

    Raises:
        CacheError: the source lacks the logits for an encoding or is damaged, or the target is
            another cache; UsageError: views or shards that the source does not have, or a view
            block that does not divide the views or is not the target's.
        KeyboardInterrupt: stopped between units.
    """
    reader = open_cache(source)
    require_apart([source], target, "converted")
    first, _ = _shard_range(reader, conversion.shards)
    manifest = _converted_manifest(reader, conversion)
    writer = CacheWriter.create(target, manifest, accept_versions=True)
    _require_block(writer, conversion.view_block)
    if manifest.views > writer.manifest.views:
        writer.extend(manifest.views)
    numbers = range(len(manifest.dataset.shards))
    own, theirs = {n: n for n in numbers}, {first + n: n for n in numbers}
    carry_lists(writer.path, [(writer.store, own), (reader.store, theirs)])
    if len(numbers) == len(reader.counts):  # the record holds for the full list of tars only
        carry_corrupt(writer.path, reader.store)
    units, done, block = writer.todo(), reader.done(), reader.manifest.view_block
    ready = [u for u in units if all(done[view // block, first + u.shard] for view in u.views)]
    views = sum(map(writer.size_of, ready))
    with progress(views, "views", "converting") as meter:
        for unit in ready:
            if stopped():
                raise KeyboardInterrupt
            shard = unit.shard + first
            writer.write_unit(unit, unit_data(reader, writer.manifest, unit, shard, device))
            meter.advance(writer.size_of(unit))
    info = describe(Cache(writer.store, writer.done()))
    return {
        "cache": str(target),
        "units_written": len(ready),
        "views_written": views,
        "units_missing": len(units) - len(ready),
        **{name: info[name] for name in SIZES},
    }


def _converted_manifest(reader: Cache, conversion: Conversion) -> CacheManifest:
    old, draws, tau = reader.manifest, conversion.sampled_draws, conversion.sampled_temperature
    shards = old.dataset.shards[slice(*_shard_range(reader, conversion.shards))]
    manifest = replace(
        old,
        dataset=replace(old.dataset, shards=shards),
        views=_view_count(reader, conversion.views),
        encodings=tuple(conversion.encodings) or old.encodings,
        sampled=Sampled(
            old.sampled.draws if draws is None else draws,
            old.sampled.temperature if tau is None else tau,
        ),
        created=utc_now(),
        parent=old.as_parent(reader.digest()),
    )
    _require_sources(reader, manifest)
    block = old.view_block if conversion.view_block is None else conversion.view_block
    if conversion.view_block and manifest.views % block:
        raise UsageError(
            "the view block does not divide the number of views",
            where=reader.path,
            found=f"{manifest.views} views in blocks of {block}",
            expected=f"a divisor of {manifest.views}",
        )
    if not block or manifest.views % block:
        block = choose_view_block(manifest, manifest.views)
    return replace(manifest, view_block=block)


def require_apart(sources: Iterable[Path | str], target: Path | str, what: str) -> None:
    """Refuse a target that is one of the sources."""
    if any(Path(split_pin(s)[0]).resolve() == Path(target).resolve() for s in sources):
        raise UsageError(
            f"a cache cannot be {what} into itself",
            where=target,
            action="choose another folder for the new cache",
        )


def _require_block(writer: CacheWriter, block: int | None) -> None:
    if block and block != writer.manifest.view_block:
        raise UsageError(
            "the view block of a cache is fixed when it is created",
            where=writer.path,
            found=f"blocks of {writer.manifest.view_block} views",
            expected=f"blocks of {block} views",
            action="choose another folder for the new cache, or leave out --view-block",
        )


def unit_data(
    reader: Cache,
    manifest: CacheManifest,
    unit: Unit,
    shard: int,
    device: str | torch.device = "cpu",
) -> UnitData:
    """Read a unit of ``manifest``'s cache from ``reader``, where its tar shard is ``shard``."""
    every = np.arange(reader.counts[shard])
    fill = {name: spec.fill for name, spec in specs(manifest).items()}
    buffer = UnitBuffer(len(unit.views), len(every), fill)
    new = _new_encodings(reader, manifest)
    for row, view in enumerate(unit.views):
        for name in manifest.encodings:
            if name not in new:
                buffer.put(row, every, reader.rows(name, view, shard, every))
        for offsets in np.split(every, range(_ROWS, len(every), _ROWS)) if new else ():
            buffer.put(row, offsets, _encode(reader, new, (view, shard), offsets, device))

    def stacked(of_view: Callable[[int, int], np.ndarray]) -> np.ndarray:
        return np.stack([of_view(view, shard) for view in unit.views])

    return UnitData(
        keys=reader.keys(shard),
        labels=reader.labels(shard),
        image_crc32=reader.image_crc32(shard),
        seeds=stacked(reader.seeds),
        view_digests=stacked(reader.view_digests),
        arrays=buffer.arrays,
        top1=stacked(reader.top1_of),
    )


def _encode(
    reader: Cache,
    encodings: Mapping[str, Encoding],
    at: tuple[int, int],
    offsets: np.ndarray,
    device: str | torch.device,
) -> Rows:
    """Encode the dense logits of some samples of a (view, tar shard)."""
    import torch

    dense = reader.rows("dense", *at, offsets)
    spatial, global_ = (torch.from_numpy(values).to(device) for values in dense.values())
    seeds = reader.seeds(*at)[offsets]
    rows = [encode_batch(encoding, spatial, global_, seeds) for encoding in encodings.values()]
    return {name: values for each in rows for name, values in each.items()}


def _new_encodings(reader: Cache, manifest: CacheManifest) -> dict[str, Encoding]:
    """Return the encodings that the source does not have, or has with other settings."""
    found = encodings_of(manifest).items()
    return {name: encoding for name, encoding in found if reader.encodings.get(name) != encoding}


def _require_sources(reader: Cache, manifest: CacheManifest) -> None:
    new = _new_encodings(reader, manifest)
    if new and "dense" not in reader.encodings:
        raise CacheError(
            f"the cache cannot be converted to {', '.join(new)}",
            where=reader.path,
            found=f"encodings {', '.join(reader.encodings)}",
            expected="dense, from which all others are computed",
            action="convert a cache of the same views that has dense, or dump with the teacher",
        )


def _view_count(reader: Cache, views: int | None) -> int:
    if views is not None and not 0 < views <= reader.views:
        raise UsageError(
            "the cache does not have the requested number of views",
            where=reader.path,
            found=f"{views} views",
            expected=f"1 to {reader.views}",
        )
    return views or reader.views


def _shard_range(reader: Cache, shards: tuple[int, int] | None) -> tuple[int, int]:
    count = len(reader.counts)
    first, last = shards or (0, count)
    if not 0 <= first < last <= count:
        raise UsageError(
            "the cache has no such tar shards",
            where=reader.path,
            found=f"{first}:{last}",
            expected=f"a range within 0:{count}",
        )
    return first, last
