"""A cache's views replayed from the user's images and compared with the cache's record."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.data.batches import Pairing, Renderer, drift_error
from cskd_pipeline.data.images import ABSENT, ImageSource, image_error
from cskd_pipeline.data.join import Join
from cskd_pipeline.data.remote_tar import room_of
from cskd_pipeline.errors import UsageError
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.views import apply
from cskd_pipeline.views.bits import view_seed
from cskd_pipeline.views.decode import decode
from cskd_pipeline.views.draw import draw

_AT_ONCE = 64  # views rendered at a time
_STRIDE = 2_654_435_761  # a prime: its multiples visit all views before one repeats


def replay_view(cache: Cache, view: int, key: str, image: bytes) -> np.ndarray:
    """Replay one view of a cache from an image's bytes, exactly as the teacher saw it.

    For custom data pipelines, and only for caches without mixing (``views.mix = 0``).

    Args:
        view: number of the view.
        key: key of the sample.
        image: content of the image file, unchanged since the dump.

    Returns:
        (policy.size, policy.size, 3) float32: uint8 pixels / 255, and the policy's mean + std *
        noise in erased boxes. Normalise it with the student's mean and std.

    Raises:
        UsageError: the cache's views are mixed in pairs, so a view needs two images.
        CacheError: the cache does not have the view or key, or not yet.
        JoinError: the image's CRC-32 differs from the recorded one.
        ViewDriftError: the digest of the uint8 pixels differs from the recorded one.
    """
    policy = cache.manifest.policy
    if policy.mixes:
        raise UsageError(
            "a view of this cache is mixed from two images",
            where=cache.path,
            found=f"policy.mix = {policy.mix:g}",
            expected="a cache dumped with views.mix = 0",
            action="use cskd_pipeline.CachedLoader, which decodes both images",
        )
    shard, offset = cache.find([key])[0].tolist()
    cache.require_done([view], [shard])
    crc, recorded = zlib.crc32(image), int(cache.image_crc32(shard)[offset])
    if crc != recorded:
        raise image_error(key, crc, recorded)
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
        same_seed: (n,) bool, the recorded seed is the one derived from root seed, key and view.
        exact: (n,) bool, the pixels have the recorded digest. If False for the same image and seed,
            the pixels differ by rounding, because other library versions decode or resize.
    """

    rows: np.ndarray
    same_image: np.ndarray
    same_seed: np.ndarray
    exact: np.ndarray


def spread_views(found: Join, count: int, few: int | None = None) -> np.ndarray:
    """Choose about ``count`` views of finished units, one per sample, spread evenly over the
    allowed samples.

    Args:
        few: maximum number of tars if they are remote, because each is fetched completely.

    Returns:
        (n, 3) int64 view, shard, offset.
    """
    cache = found.cache
    done, samples = cache.done(), found.usable()
    samples = samples[np.isin(samples[:, 0], np.flatnonzero(done.any(axis=0)))]
    if few is not None and room_of(found.images.tars) is not None:
        tars = found.images.locate(samples)[0]
        numbers = np.unique(tars)
        samples = samples[np.isin(tars, numbers[:: -(-len(numbers) // few)])]
    if not len(samples) or not count:
        return np.empty((0, 3), np.int64)
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(np.int64))
    block, rows = cache.manifest.view_block, []
    for number, (shard, offset) in enumerate(samples[chosen].tolist()):
        blocks = np.flatnonzero(done[:, shard]).tolist()
        i, within = divmod(number * _STRIDE % (len(blocks) * block), block)
        rows.append((blocks[i] * block + within, shard, offset))
    return np.array(rows, np.int64)


def replay(found: Join, rows: np.ndarray) -> Replay:
    """Replay the views ``rows``, (n, 3) view, shard, offset, of joined samples.

    Only views of images that are identical to the cache's are rendered.
    """
    cache = found.cache
    exact = np.zeros(len(rows), bool)
    with progress(len(rows), "views", "replaying") as meter:
        same_image = same_images(found, rows)
        found.images.labels(rows[:, 1:])  # after same_images, which has fetched remote tars
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
    """Return (n,) bool, whether the user has the cache's image for the views (n, 3)."""
    cache = found.cache
    same = np.zeros(len(rows), bool)
    present = np.flatnonzero(found.images.locate(rows[:, 1:])[0] != ABSENT)
    for i, crc in found.images.crc32(rows[present, 1:]):
        _, shard, offset = rows[present[i]].tolist()
        same[present[i]] = crc == cache.image_crc32(shard)[offset]
    return same


def pair_views(cache: Cache, rows: np.ndarray) -> Pairing:
    """Return the partners of a cache's views, (n, 3), and each pair's mix, without any images."""
    return Renderer.of_cache(ImageSource((), cache=cache)).pair(rows)


def _same_seeds(cache: Cache, rows: np.ndarray) -> np.ndarray:
    """Return (n,) bool, whether the recorded seeds follow from root seed, key and view."""
    keys = {shard: cache.keys(shard) for shard in np.unique(rows[:, 1]).tolist()}
    root_seed = cache.manifest.root_seed
    return np.array(
        [
            int(cache.seeds(view, shard)[offset]) == view_seed(root_seed, keys[shard][offset], view)
            for view, shard, offset in rows.tolist()
        ],
        bool,
    )
