"""A cache's views replayed from the user's images, and compared with what it recorded."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.data.batches import Pairing, Renderer, drift_error
from cskd_pipeline.data.images import NOWHERE, ImageSource, other_image
from cskd_pipeline.data.join import Join
from cskd_pipeline.data.remote_tar import room_of
from cskd_pipeline.errors import UsageError
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.views import apply
from cskd_pipeline.views.bits import view_seed
from cskd_pipeline.views.decode import decode
from cskd_pipeline.views.draw import draw

_AT_ONCE = 64  # views rendered at a time
_STRIDE = 2_654_435_761  # a prime: its multiples visit any number of views before one comes again


def replay_view(cache: Cache, view: int, key: str, image: bytes) -> np.ndarray:
    """Replay one of a cache's views from an image's bytes, pixel by pixel as the teacher saw it.

    For a data pipeline of one's own; only of caches whose policy mixes nothing (``views.mix = 0``).

    Args:
        view: its number.
        key: of the sample.
        image: the file's bytes, as they were when the cache was made.

    Returns:
        (policy.size, policy.size, 3) float32: uint8 pixels / 255, in erased boxes the policy's
        mean + std * noise. Normalise it with the student's own mean and std.

    Raises:
        UsageError: the views are mixed in pairs, so that no view follows from one image.
        CacheError: a view or key that the cache does not have, or not yet.
        JoinError: not the image that the cache was made from, by its CRC-32.
        ViewDriftError: the uint8 pixels have another digest than the recorded one.
    """
    policy = cache.manifest.policy
    if policy.mixes:
        raise UsageError(
            "a view of this cache is mixed with another image's",
            where=cache.path,
            found=f"policy.mix = {policy.mix:g}",
            expected="a cache dumped with views.mix = 0",
            action="use cskd_pipeline.CachedLoader, which decodes both images of a pair",
        )
    shard, offset = cache.find([key])[0].tolist()
    cache.require_done([view], [shard])
    crc, recorded = zlib.crc32(image), int(cache.image_crc32(shard)[offset])
    if crc != recorded:
        raise other_image(key, crc, recorded)
    pixels = decode(image, key)
    height, width, _ = pixels.shape
    params = draw(int(cache.seeds(view, shard)[offset]), policy, width, height)
    rendered = apply.render(pixels, params, policy)
    digest, expected = apply.digest(rendered), int(cache.view_digests(view, shard)[offset])
    if digest != expected:
        raise drift_error(cache, [(key, view, digest, expected)], 1)
    return apply.to_float(rendered, params, policy)


@dataclass(frozen=True)
class Replay:
    """n replayed views.

    Args:
        rows: (n, 3) int64 view, shard, offset.
        same_image: (n,) bool, the user's image has the recorded CRC-32.
        same_seed: (n,) bool, the recorded seed is the one that root seed, key and view give.
        exact: (n,) bool, the pixels have the recorded digest. False, on the same image and seed:
            the pixels differ by rounding, as other library versions decode or resize.
    """

    rows: np.ndarray
    same_image: np.ndarray
    same_seed: np.ndarray
    exact: np.ndarray


def spread_views(found: Join, count: int, few: int | None = None) -> np.ndarray:
    """Choose about ``count`` views of finished units: one of each of so many samples, spread evenly
    over those that are allowed.

    Args:
        few: so many tars at most, where they lie elsewhere: each is fetched whole.

    Returns:
        (n, 3) int64 view, shard, offset.
    """
    cache = found.cache
    done, samples = cache.done(), found.usable()
    samples = samples[np.isin(samples[:, 0], np.flatnonzero(done.any(axis=0)))]
    if few is not None and room_of(found.images.tars) is not None:
        tars = found.images.locate(samples)[0]
        every = np.unique(tars)
        samples = samples[np.isin(tars, every[:: -(-len(every) // few)])]
    if not len(samples) or not count:
        return np.empty((0, 3), np.int64)
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(np.int64))
    block, rows = cache.manifest.view_block, []
    for number, (shard, offset) in enumerate(samples[chosen].tolist()):
        blocks = np.flatnonzero(done[:, shard]).tolist()
        which = number * _STRIDE % (len(blocks) * block)
        rows.append((blocks[which // block] * block + which % block, shard, offset))
    return np.array(rows, np.int64)


def replay(found: Join, rows: np.ndarray) -> Replay:
    """Replay the views ``rows``, (n, 3) view, shard, offset, of samples that are joined.

    Views of images that are not the cache's are left out: they are others in any case.
    """
    cache = found.cache
    exact = np.zeros(len(rows), bool)
    with progress(len(rows), "views", "replaying") as meter:
        same_image = same_images(found, rows)
        found.images.labels(rows[:, 1:])  # late: of tars elsewhere there are copies now
        meter.advance(len(rows) - int(same_image.sum()))
        renderer = replace(found.renderer, images=found.images.lenient())
        numbers = np.flatnonzero(same_image)
        for start in range(0, len(numbers), _AT_ONCE):
            part = numbers[start : start + _AT_ONCE]
            views = renderer.render(rows[part])
            recorded = [
                cache.view_digests(view, shard)[o] for view, shard, o in rows[part].tolist()
            ]
            exact[part] = views.digest[views.find(rows[part])] == recorded
            meter.advance(len(part))
    return Replay(rows, same_image, _same_seeds(cache, rows), exact)


def same_images(found: Join, rows: np.ndarray) -> np.ndarray:
    """Return (n,) bool: the user's image of the views (n, 3) is the cache's; False for none."""
    cache = found.cache
    same = np.zeros(len(rows), bool)
    here = np.flatnonzero(found.images.locate(rows[:, 1:])[0] != NOWHERE)
    for i, crc in found.images.crc32(rows[here, 1:]):
        _, shard, offset = rows[here[i]].tolist()
        same[here[i]] = crc == cache.image_crc32(shard)[offset]
    return same


def pair_views(cache: Cache, rows: np.ndarray) -> Pairing:
    """Return partners of a cache's views, (n, 3), and how each pair is mixed; needs no images."""
    return Renderer.of_cache(ImageSource((), cache=cache)).pair(rows)


def _same_seeds(cache: Cache, rows: np.ndarray) -> np.ndarray:
    """(n,) bool, the recorded seeds follow from root seed, key and view."""
    keys = {shard: cache.keys(shard) for shard in np.unique(rows[:, 1]).tolist()}
    root_seed = cache.manifest.root_seed
    return np.array(
        [
            int(cache.seeds(view, shard)[offset]) == view_seed(root_seed, keys[shard][offset], view)
            for view, shard, offset in rows.tolist()
        ],
        bool,
    )
