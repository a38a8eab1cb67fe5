"""Views of samples as pixels: every image decoded once, every view rendered once, drift refused."""

from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache

import numpy as np

from cskd_pipeline.cache.manifest import library_versions
from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.data.images import SHOWN, ImageSource
from cskd_pipeline.data.plan import SampleSet
from cskd_pipeline.errors import ViewDriftError
from cskd_pipeline.views import apply
from cskd_pipeline.views.bits import view_seed
from cskd_pipeline.views.decode import decode
from cskd_pipeline.views.draw import ViewParams, draw
from cskd_pipeline.views.mixing import Mix, draw_mix, matching
from cskd_pipeline.views.policy import ViewPolicy


@dataclass(frozen=True)
class Pairing:
    """Rows and their partners; n rows.

    ``own``, ``partner``: (n, 3) view, shard, offset; equal where nothing is mixed in. ``mixes`` has
    a :class:`Mix` for each row.
    """

    own: np.ndarray
    partner: np.ndarray
    mixes: list[Mix]


@dataclass(frozen=True)
class RenderedViews:
    """Views by number: U of them, sorted by shard, offset and view.

    ``rows``: (U, 3) view, shard, offset. ``pixels``: (U, S, S, 3) uint8. ``params``: what was
    drawn.
    ``seed``: (U,) uint64. ``image_crc32``, ``digest``: (U,) uint32. ``drifted``: how many are not
    as the cache recorded them.
    """

    rows: np.ndarray
    pixels: np.ndarray
    params: list[ViewParams]
    seed: np.ndarray
    image_crc32: np.ndarray
    digest: np.ndarray
    drifted: int

    def find(self, rows: np.ndarray) -> np.ndarray:
        """Return the numbers of the views ``rows``, (n, 3): (n,) int64."""
        numbers = np.searchsorted(_packed(self.rows), _packed(rows))
        assert np.array_equal(self.rows[numbers], rows)
        return numbers


@lru_cache(maxsize=256)
def partners(
    root_seed: int, shard_id: str, count: int, view: int, policy: ViewPolicy
) -> np.ndarray:
    """Return :func:`matching`, kept for the next call."""
    return matching(root_seed, shard_id, count, view, policy)


@dataclass(eq=False)
class Renderer:
    """Renders any view of any sample of a layout. Picklable; holds no open file.

    Args:
        samples: the layout that shard and offset refer to.
        images: reads from it.
        cache: seeds come from it, and every view's digest is compared with it.
        drift: ``warn`` counts views and images that differ; ``error`` and ``skip`` refuse them.
    """

    samples: SampleSet
    images: ImageSource
    policy: ViewPolicy
    root_seed: int
    _: KW_ONLY
    cache: Cache | None = None
    drift: str = "error"

    def pair(self, rows: np.ndarray) -> Pairing:
        """Return partners of ``rows``, (n, 3) view, shard, offset, and how each pair is mixed."""
        partner = rows.copy()
        for view, shard, here in _slabs(rows):
            count, shard_id = self.samples.counts[shard], self.samples.shard_ids[shard]
            offsets = partners(self.root_seed, shard_id, count, view, self.policy)
            partner[here, 2] = offsets[rows[here, 2]]
        drawn: dict[tuple[int, int], Mix] = {}
        mixes = []
        for one, other in zip(self._seeds(rows), self._seeds(partner), strict=True):
            pair = (one, other) if one < other else (other, one)
            if pair not in drawn:
                drawn[pair] = draw_mix(*pair, self.policy)
            mixes.append(drawn[pair])
        alone = np.array([mix.lam == 1.0 for mix in mixes])
        partner[alone] = rows[alone]
        return Pairing(rows, partner, mixes)

    def render(self, rows: np.ndarray) -> RenderedViews:
        """Render the views ``rows``, (n, 3) view, shard, offset; repeated ones once.

        Raises:
            ImageError, ShardError, JoinError: an image cannot be had.
            ViewDriftError: a view is not the one in the cache.
        """
        _, first = np.unique(_packed(rows), return_index=True)
        rows = np.ascontiguousarray(rows[first])
        seeds = self._seeds(rows)
        size = self.policy.size
        pixels = np.empty((len(rows), size, size, 3), np.uint8)
        crcs, digests = np.zeros(len(rows), np.uint32), np.zeros(len(rows), np.uint32)
        params: list[ViewParams] = [None] * len(rows)  # type: ignore[list-item]  # filled below
        starts = np.flatnonzero(np.diff(rows[:, 1:], axis=0, prepend=-1).any(axis=1))
        ends = np.append(starts[1:], len(rows))
        for i, data, crc in self.images.read(rows[starts, 1:]):
            image = decode(data, self.images.where(*rows[starts[i], 1:].tolist()))
            height, width, _ = image.shape
            for number in range(starts[i], ends[i]):
                params[number] = draw(seeds[number], self.policy, width, height)
                pixels[number] = apply.render(image, params[number], self.policy)
                digests[number] = apply.digest(pixels[number])
                crcs[number] = crc
        seed = np.array(seeds, np.uint64)
        drifted = self._compare(rows, digests)
        return RenderedViews(rows, pixels, params, seed, crcs, digests, drifted)

    def labels(self, pairing: Pairing) -> np.ndarray:
        """Return the class numbers of samples and partners, (2, n) int64.

        Raises:
            JoinError: the cache has other labels.
        """
        samples = np.concatenate([pairing.own, pairing.partner])[:, 1:]
        return np.stack(np.split(self.images.labels(samples), 2))

    def _seeds(self, rows: np.ndarray) -> list[int]:
        if self.cache is None:
            keys = self.images.keys(rows[:, 1:])
            views = rows[:, 0].tolist()
            return [view_seed(self.root_seed, k, v) for k, v in zip(keys, views, strict=True)]
        seeds = np.empty(len(rows), np.uint64)
        for view, shard, here in _slabs(rows):
            seeds[here] = self.cache.seeds(view, shard)[rows[here, 2]]
        return seeds.tolist()

    def _compare(self, rows: np.ndarray, digests: np.ndarray) -> int:
        """Count the views that differ from the cache's."""
        if self.cache is None:
            return 0
        recorded = np.empty_like(digests)
        for view, shard, here in _slabs(rows):
            recorded[here] = self.cache.view_digests(view, shard)[rows[here, 2]]
        wrong = np.flatnonzero(recorded != digests)
        if len(wrong) and self.drift != "warn":
            shown = zip(
                rows[wrong[:SHOWN]].tolist(), digests[wrong].tolist(), recorded[wrong].tolist(),
                strict=False,
            )  # fmt: skip
            found = [(self.images.where(*at[1:]), at[0], *pair) for at, *pair in shown]
            raise drift_error(self.cache, found, len(wrong))
        return len(wrong)


def drift_error(
    cache: Cache, examples: Iterable[tuple[object, int, int, int]], count: int
) -> ViewDriftError:
    """Return the error of ``count`` views whose pixels are not the recorded ones.

    Args:
        examples: where, view, its digest and the recorded one.
    """
    differences = cache.manifest.version_differences(library_versions())
    return ViewDriftError(
        f"{count} views are not those the teacher saw, though the images are the same",
        where=cache.path,
        found="other versions: " + "; ".join(differences) if differences else "same versions",
        expected="pixels equal to the last bit",
        action="install the versions the cache was made with, or accept it: --set data.drift=warn",
        problems=[
            f"{where}, view {view}: digest {digest:08x}, recorded {expected:08x}"
            for where, view, digest, expected in examples
        ],
    )


def _slabs(rows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield view, shard, and the indices in ``rows`` of each pair of them."""
    order = np.lexsort((rows[:, 0], rows[:, 1]))
    changes = np.diff(rows[order, :2], axis=0).any(axis=1)
    for here in np.split(order, np.flatnonzero(changes) + 1):
        view, shard = rows[here[0], :2].tolist()
        yield view, shard, here


def _packed(rows: np.ndarray) -> np.ndarray:
    """(n,) uint64 that order as shard, offset, view do: views of one image are neighbours."""
    view, shard, offset = rows.astype(np.uint64).T
    return shard << np.uint64(44) | offset << np.uint64(20) | view
