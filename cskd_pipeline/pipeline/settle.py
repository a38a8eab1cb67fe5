"""The samples of a cache that a run trains on: what it leaves out, and a check of the rest."""

from __future__ import annotations

import logging

import numpy as np

from cskd_pipeline.config.sections import TrainData
from cskd_pipeline.data.corrupt import by_shard, find_corrupt
from cskd_pipeline.data.join import Join, find_differing
from cskd_pipeline.data.left_out import LeftOuts, Offsets, tars_sha256
from cskd_pipeline.data.remote_tar import FETCHING
from cskd_pipeline.data.replay import cache_of, renderer_of, replay, spread_views

log = logging.getLogger(__name__)


def settle(found: Join, data: TrainData, workers: int, encoding: str, left_out: LeftOuts) -> Join:
    """Leave out of a join what ``data`` says, report it, and check a sample of what is left.

    With ``data.corrupt`` or ``data.drift`` = ``skip`` every image is read once, each rank its
    share; a run that is resumed has the outcome in its folder.

    Raises:
        JoinError: no image is the cache's.
        ViewDriftError, CacheError: see :func:`check_sample`.
    """
    counts, shards = found.samples.counts, tars_sha256(found.images.shards)
    identity = {"cache": cache_of(found).lineage, "shards": shards}

    def corrupt(part: int, parts: int) -> Offsets:
        return _corrupt(found, workers, part, parts)

    def differing(part: int, parts: int) -> Offsets:
        return find_differing(found, part=part, parts=parts)

    if data.corrupt == "skip":
        found = found.without(left_out.find("corrupt", identity, counts, corrupt), "corrupt")
    if data.drift == "skip":
        offsets = left_out.find("differing", identity, counts, differing)
        found = found.without(offsets, "other image")
    left_out.add(found.left_out())
    if len(left_out):
        count = found.count("corrupt")
        log.warning(
            f"training without {len(left_out)} samples of the cache's {found.samples.total}: "
            f"{found.missing} are not in the shards, {found.count('other image')} have other images"
            f"{f', {count} cannot be decoded' if count else ''}{left_out.listed}"
        )
    if found.unused:
        log.info(f"{found.unused} samples of the shards are not in the cache, and not used")
    if left_out.ranks.first:
        check_sample(found, data.check, data.drift, encoding)
    return found


def _corrupt(found: Join, workers: int, part: int, parts: int) -> Offsets:
    """Images that are not the cache's and cannot be decoded: the cache's could be."""
    cache, samples = cache_of(found), found.there()
    intact = np.empty(len(samples), np.uint32)
    for shard in np.unique(samples[:, 0]).tolist():
        here = samples[:, 0] == shard
        intact[here] = cache.image_crc32(shard)[samples[here, 1]]
    return by_shard(
        find_corrupt(found.images, samples, intact=intact, workers=workers, part=part, parts=parts)
    )


def check_sample(found: Join, count: int, drift: str, encoding: str) -> None:
    """Replay ``count`` views, as training will, and read their targets.

    Every view is compared while training, too; here a misfit is found before anything is spent.

    Args:
        drift: ``error``, ``skip``, or ``warn``: report what differs from the cache, and continue.

    Raises:
        ViewDriftError, JoinError: a view, or its image, is not the one the teacher saw.
        CacheError: targets are damaged, or not all there.
    """
    rows = spread_views(found, count, few=FETCHING)
    if not len(rows):
        return
    cache_of(found).gather(encoding, rows)  # raises where it is damaged
    replayed = replay(found, rows)
    exact, same = int(replayed.exact.sum()), int(replayed.same_image.sum())
    wrong = rows[~replayed.exact]
    if len(wrong) and drift != "warn":
        renderer_of(found, strict=True).render(wrong)  # refuses them
    line = f"checked {len(rows)} views of the cache: {exact} come out bit for bit"
    if exact == len(rows):
        log.info(line)
    else:
        log.warning(
            f"{line}, {same - exact} differ by rounding, {len(rows) - same} are of other images"
        )
