"""``cache convert``: another cache from a finished one, smaller or only a part, without a teacher.

Encodings that the source has are copied; others are made from its ``dense`` logits, and are what a
dump would have written. Seeds, digests, labels and image CRCs come along, so the new cache joins
the same images in the same views.
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
from cskd_pipeline.cache.units import Unit, UnitBuffer, UnitData, choose_view_block, encoded
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.distill.encodings import Encoding, Rows, Sampled
from cskd_pipeline.errors import CacheError, UsageError
from cskd_pipeline.runtime.progress import progress

if TYPE_CHECKING:
    import torch

_ROWS = 64  # encoded at once


@dataclass(frozen=True)
class Conversion:
    """Say what the new cache has of the source.

    Args:
        encodings: none: the source's.
        views: only the first so many; None: all.
        shards: only the tar shards from, up to and not including; None: all.
        view_block: views per unit, which decide how many files there are; 0: as
            :func:`choose_view_block` says; None: the source's, or chosen if ``views`` are no whole
            number of them.
        sampled_draws, sampled_temperature: of the encoding ``sampled``, if it is among them; None:
            the source's, or one draw at temperature 1.
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
    wanted: Conversion = _COPY,
    *,
    device: str | torch.device = "cpu",
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Make, or continue, the cache ``target`` from the finished units of ``source``.

    Args:
        device: where new encodings are made.
        stopped: called between units; true ends the work there.

    Returns:
        What was written, and the new cache's sizes. ``units_missing`` counts units that the source
        does not have yet: run the same command again when it does.

    Raises:
        CacheError: the source cannot serve an encoding, is damaged, or the target is another
            cache; UsageError: views or shards that the source does not have, or blocks that do not
            divide the views or that the target does not have.
        KeyboardInterrupt: stopped between units.
    """
    reader = open_cache(source)
    require_apart([source], target, "converted")
    first, _ = _shard_range(reader, wanted.shards)
    made = _converted_manifest(reader, wanted)
    writer = CacheWriter.create(target, made, accept_versions=True)
    _require_block(writer, wanted.view_block)
    if made.views > writer.manifest.views:
        writer.extend(made.views)
    numbers = range(len(made.dataset.shards))
    own, theirs = {n: n for n in numbers}, {first + n: n for n in numbers}
    carry_lists(writer.path, [(writer.store, own), (reader.store, theirs)])
    if len(numbers) == len(reader.counts):  # of a part of the tars another record is true
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


def _converted_manifest(reader: Cache, wanted: Conversion) -> CacheManifest:
    old, draws, tau = reader.manifest, wanted.sampled_draws, wanted.sampled_temperature
    shards = old.dataset.shards[slice(*_shard_range(reader, wanted.shards))]
    made = replace(
        old,
        dataset=replace(old.dataset, shards=shards),
        views=_view_count(reader, wanted.views),
        encodings=tuple(wanted.encodings) or old.encodings,
        sampled=Sampled(
            old.sampled.draws if draws is None else draws,
            old.sampled.temperature if tau is None else tau,
        ),
        created=utc_now(),
        parent=old.as_parent(reader.digest()),
    )
    _require_sources(reader, made)
    block = old.view_block if wanted.view_block is None else wanted.view_block
    if wanted.view_block and made.views % block:
        raise UsageError(
            "views come in whole blocks",
            where=reader.path,
            found=f"{made.views} views in blocks of {block}",
            expected="a divisor of the number of views",
        )
    if not block or made.views % block:
        block = choose_view_block(made, made.views)
    return replace(made, view_block=block)


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
            "the blocks of views of a cache are fixed when it is made",
            where=writer.path,
            found=f"blocks of {writer.manifest.view_block} views",
            expected=f"blocks of {block} views",
            action="choose another folder for the new cache, or leave the block out",
        )


def unit_data(
    reader: Cache,
    made: CacheManifest,
    unit: Unit,
    shard: int,
    device: str | torch.device = "cpu",
) -> UnitData:
    """Read a unit of a cache ``made`` from this one, in which ``shard`` is its tar shard."""
    every = np.arange(reader.counts[shard])
    fill = {name: spec.fill for name, spec in specs(made).items()}
    buffer = UnitBuffer(len(unit.views), len(every), fill)
    fresh = _fresh(reader, made)
    for row, view in enumerate(unit.views):
        for name in made.encodings:
            if name not in fresh:
                buffer.put(row, every, reader.rows(name, view, shard, every))
        for offsets in np.split(every, range(_ROWS, len(every), _ROWS)) if fresh else ():
            buffer.put(row, offsets, _made(reader, fresh, (view, shard), offsets, device))

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


def _made(
    reader: Cache,
    fresh: Mapping[str, Encoding],
    at: tuple[int, int],
    offsets: np.ndarray,
    device: str | torch.device,
) -> Rows:
    """Make new rows of some samples in a (view, tar shard) from the logits."""
    import torch

    dense = reader.rows("dense", *at, offsets)
    spatial, global_ = (torch.from_numpy(values).to(device) for values in dense.values())
    seeds = reader.seeds(*at)[offsets]
    made = [encoded(encoding, spatial, global_, seeds) for encoding in fresh.values()]
    return {name: values for rows in made for name, values in rows.items()}


def _fresh(reader: Cache, made: CacheManifest) -> dict[str, Encoding]:
    """The encodings that the source does not have, or has with other draws."""
    found = encodings_of(made).items()
    return {name: encoding for name, encoding in found if reader.encodings.get(name) != encoding}


def _require_sources(reader: Cache, made: CacheManifest) -> None:
    fresh = _fresh(reader, made)
    if fresh and "dense" not in reader.encodings:
        raise CacheError(
            f"the cache cannot be converted to {', '.join(fresh)}",
            where=reader.path,
            found=f"encodings {', '.join(reader.encodings)}",
            expected="dense, from which every other is made",
            action="convert the cache that this one was made from, or dump it with the teacher",
        )


def _view_count(reader: Cache, views: int | None) -> int:
    if views is not None and not 0 < views <= reader.views:
        raise UsageError(
            "the cache does not have so many views",
            where=reader.path,
            found=f"{views}",
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
