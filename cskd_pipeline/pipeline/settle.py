"""The samples of a cache that a run trains on: what it leaves out, and a check of the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from cskd_pipeline.config import TrainRecipe
from cskd_pipeline.data.corrupt import by_shard, find_corrupt
from cskd_pipeline.data.join import Join, find_differing
from cskd_pipeline.data.left_out import LeftOuts, Offsets, tars_sha256
from cskd_pipeline.data.replay import cache_of, renderer_of, replay, spread_views
from cskd_pipeline.runtime.device import worker_count

log = logging.getLogger(__name__)


def settle(recipe: TrainRecipe, found: Join, encoding: str, left_out: LeftOuts) -> Join:
    """Leave out of a join what the recipe says, tell it, and check a sample of what is left.

    With ``data.corrupt`` or ``data.drift`` = ``skip`` every image is read once, each rank its
    share; a run that is resumed has the outcome in its folder.

    Raises:
        JoinError: no image is the cache's.
        ViewDriftError, CacheError: see :func:`check_sample`.
    """
    data, counts = recipe.data, found.samples.counts
    shards = tars_sha256(found.images.shards)
    identity = {"cache": cache_of(found).lineage, "shards": shards}
    if data.corrupt == "skip":
        look = _corrupt(found, worker_count(recipe.run.workers))
        found = found.without(left_out.find("corrupt", identity, counts, look), "corrupt")
    if data.drift == "skip":
        look = _differing(found)
        found = found.without(left_out.find("differing", identity, counts, look), "other image")
    left_out.add(found.left_out())
    if len(left_out):
        corrupt = found.count("corrupt")
        log.warning(
            f"training without {len(left_out)} samples of the cache's {found.samples.total}: "
            f"{found.missing} are not in the shards, {found.count('other image')} have other images"
            f"{f', {corrupt} cannot be decoded' if corrupt else ''}{left_out.listed}"
        )
    if found.unused:
        log.info(f"{found.unused} samples of the shards are not in the cache, and not used")
    if left_out.ranks.first:
        check_sample(found, data.check, data.drift, encoding)
    return found


def _corrupt(found: Join, workers: int) -> Callable[[int, int], Offsets]:
    """Looks for images that are not the cache's and cannot be decoded."""

    def look(part: int, parts: int) -> Offsets:
        cache, samples = cache_of(found), found.there()
        intact = np.empty(len(samples), np.uint32)
        for shard in np.unique(samples[:, 0]).tolist():
            here = samples[:, 0] == shard
            intact[here] = cache.image_crc32(shard)[samples[here, 1]]
        corrupt = find_corrupt(
            found.images,
            samples,
            intact=intact,
            workers=workers,
            part=part,
            parts=parts,
        )
        return by_shard(corrupt)

    return look


def _differing(found: Join) -> Callable[[int, int], Offsets]:
    """Looks for images that are not the cache's."""

    def look(part: int, parts: int) -> Offsets:
        return find_differing(found, part=part, parts=parts)

    return look


def check_sample(found: Join, count: int, drift: str, encoding: str) -> None:
    """Make ``count`` views again, as training will, and read what the teacher said of them.

    Every view is compared while training, too; here a misfit is told before anything is spent.

    Args:
        drift: as in the recipe; ``warn`` tells of what is unlike the cache, and goes on.

    Raises:
        ViewDriftError, JoinError: a view, or its image, is not the one the teacher saw.
        CacheError: what the teacher said is damaged, or not all there.
    """
    rows = spread_views(found, count)
    if not len(rows):
        return
    cache_of(found).gather(encoding, rows)  # raises where it is damaged
    replayed = replay(found, rows)
    exact, same = int(replayed.exact.sum()), int(replayed.same_image.sum())
    wrong = rows[~replayed.exact]
    if len(wrong) and drift != "warn":
        renderer_of(found, strict=True).render(wrong)  # refuses them
    told = f"checked {len(rows)} views of the cache: {exact} come out bit for bit"
    if exact == len(rows):
        log.info(told)
    else:
        log.warning(
            f"{told}, {same - exact} differ by rounding, {len(rows) - same} are of other images"
        )
