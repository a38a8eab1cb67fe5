"""Views as the network saw them: made again from the user's images, mixed, as pictures."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cskd_pipeline.data.assemble import assemble
from cskd_pipeline.data.batches import render_batch
from cskd_pipeline.data.images import NOWHERE
from cskd_pipeline.data.join import Join
from cskd_pipeline.data.replay import cache_of, renderer_of, same_images, spread_views
from cskd_pipeline.runtime.progress import progress

SMALL = 64
"""Pixels up to which a view is stored as it is, and shown without smoothing."""


@dataclass(frozen=True)
class GalleryViews:
    """n views: ``rows`` (n, 3) view, shard, offset; ``pixels`` (n, S, S, 3) uint8, mixed.

    ``same``: (n,) bool, both pictures in the view are the teacher's. ``exact``: (n,) bool, the
    sample's own view has the digest that the cache recorded.
    """

    rows: np.ndarray
    pixels: np.ndarray
    same: np.ndarray
    exact: np.ndarray


def choose_views(found: Join, count: int) -> np.ndarray:
    """About ``count`` views whose pictures the user has: (n, 3) view, shard, offset."""
    rows = spread_views(found, count)
    if not len(rows):
        return rows
    partner = renderer_of(found, strict=False).pair(rows).partner
    return rows[found.images.locate(partner[:, 1:])[0] != NOWHERE]


def make_views(found: Join, rows: np.ndarray) -> GalleryViews:
    """Make the views ``rows``, (n, 3), n > 0.

    Raises:
        ShardError, ImageError: an image cannot be had.
    """
    cache, renderer = cache_of(found), renderer_of(found, strict=False)
    partner = renderer.pair(rows).partner
    pixels, exact = [], []
    with progress(len(rows), "views", "making views again") as meter:
        for i in range(len(rows)):
            batch = render_batch(renderer, rows[i : i + 1])
            seen = assemble(batch, cache.manifest.policy)[0].permute(1, 2, 0)
            pixels.append((seen.clamp(0, 1) * 255).round().byte().numpy())
            view, shard, offset = rows[i].tolist()
            digest = int(batch.view_digest[int(batch.own[0])])
            exact.append(digest == int(cache.view_digests(view, shard)[offset]))
            meter.advance()
    same = same_images(found, rows) & same_images(found, partner)
    return GalleryViews(rows, np.stack(pixels), same, np.array(exact))


def encoded(pixels: np.ndarray) -> tuple[bytes, str]:
    """(S, S, 3) uint8 as an image file, and its kind: small ones PNG, others JPEG."""
    kind = "png" if len(pixels) <= SMALL else "jpeg"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind.upper(), quality=88)
    return buffer.getvalue(), kind
