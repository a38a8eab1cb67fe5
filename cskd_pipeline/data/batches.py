"""Rows of (view, shard, offset) to batches: every image decoded once, every view rendered once,
drift refused. A batch contains uint8 views, mixing parameters, labels and encoded targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
class Batch:
    """A batch of B samples, one view each, built from U rendered views of S x S pixels.

    On the device after :meth:`to`:

    - ``pixels``: (U, S, S, 3) uint8, cropped, flipped and recoloured; not yet erased or mixed.
    - ``own``, ``partner``: (B,) int64 indices into ``pixels``; equal if the view is not mixed.
    - ``lam``: (B,) float32, the share of the sample's own pixels.
    - ``cutmix_box``: (B, 4) int32 top, left, height, width of the partner's patch; zero area for
      mixup.
    - ``label``, ``partner_label``: (B,) int64.
    - ``erase_box``: (E, 5) int32 index into ``pixels``, top, left, height, width.
    - ``erase_noise``: (sum of 3 * height * width,) int16, standard normal times 256, box by box.
    - ``targets``: the teacher's encoded response: array name -> (B, ...).

    Always on the host: ``index`` (B, 3) int32 view, shard, offset; ``seed`` (U,) uint64,
    ``image_crc32`` and ``view_digest`` (U,) uint32 of each rendered view; ``drifted``, the number
    of rendered views that differ from the cache's record.
    """

    pixels: Tensor
    own: Tensor
    partner: Tensor
    lam: Tensor
    cutmix_box: Tensor
    label: Tensor
    partner_label: Tensor
    erase_box: Tensor
    erase_noise: Tensor
    index: Tensor
    seed: Tensor
    image_crc32: Tensor
    view_digest: Tensor
    drifted: int = 0
    targets: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.own)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its device fields on ``device``; do not wait for pinned ones."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch with its device fields in pinned memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Any) -> Batch:
        moved = {name: change(getattr(self, name)) for name in _ON_DEVICE}
        targets = {name: change(tensor) for name, tensor in self.targets.items()}
        return replace(self, targets=targets, **moved)


_ON_DEVICE = (
    *("pixels", "own", "partner", "lam", "cutmix_box", "label", "partner_label"),
    *("erase_box", "erase_noise"),
)


@dataclass(frozen=True)
class Pairing:
    """n rows and their partners.

    ``own``, ``partner``: (n, 3) view, shard, offset; equal if the view is not mixed. ``mixes``: one
    :class:`Mix` per row.
    """

    own: np.ndarray
    partner: np.ndarray
    mixes: list[Mix]


@dataclass(frozen=True)
class RenderedViews:
    """U numbered views, sorted by shard, offset and view.

    ``rows``: (U, 3) view, shard, offset. ``pixels``: (U, S, S, 3) uint8. ``params``: as drawn.
    ``seed``: (U,) uint64. ``image_crc32``, ``digest``: (U,) uint32. ``drifted``: the number of
    views that differ from the cache's record.
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
        numbers = np.searchsorted(_sort_keys(self.rows), _sort_keys(rows))
        assert np.array_equal(self.rows[numbers], rows)
        return numbers


_partners = lru_cache(maxsize=256)(matching)


@dataclass(eq=False)
class Renderer:
    """Renderer of any view of any sample in a layout; picklable, keeps no file open.

    Args:
        samples: the layout that shard and offset refer to.
        images: source of the layout's images. If it has a cache, seeds come from the cache and
            every view's digest is compared: drift is refused if ``images`` is strict, else counted.
    """

    samples: SampleSet
    images: ImageSource
    policy: ViewPolicy
    root_seed: int

    @classmethod
    def of_cache(cls, images: ImageSource) -> Renderer:
        """Return a renderer of the views of ``images.cache``."""
        assert images.cache is not None
        manifest = images.cache.manifest
        return cls(SampleSet.of(images.cache), images, manifest.policy, manifest.root_seed)

    def pair(self, rows: np.ndarray) -> Pairing:
        """Return the partners of ``rows``, (n, 3) view, shard, offset, and each pair's mix."""
        partner = rows.copy()
        for view, shard, indices in _slabs(rows):
            count, shard_id = self.samples.counts[shard], self.samples.shard_ids[shard]
            offsets = _partners(self.root_seed, shard_id, count, view, self.policy)
            partner[indices, 2] = offsets[rows[indices, 2]]
        drawn: dict[tuple[int, int], Mix] = {}
        mixes = []
        for one, other in zip(self._seeds(rows), self._seeds(partner), strict=True):
            pair = (one, other) if one < other else (other, one)
            if pair not in drawn:
                drawn[pair] = draw_mix(*pair, self.policy)
            mixes.append(drawn[pair])
        unmixed = np.array([mix.lam == 1.0 for mix in mixes])
        partner[unmixed] = rows[unmixed]
        return Pairing(rows, partner, mixes)

    def render(self, rows: np.ndarray) -> RenderedViews:
        """Render the views ``rows``, (n, 3) view, shard, offset; duplicates only once."""
        _, first = np.unique(_sort_keys(rows), return_index=True)
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
        drifted = self._count_drifted(rows, digests)
        return RenderedViews(rows, pixels, params, seed, crcs, digests, drifted)

    def _seeds(self, rows: np.ndarray) -> list[int]:
        cache = self.images.cache
        if cache is None:
            keys = self.images.keys(rows[:, 1:])
            views = rows[:, 0].tolist()
            return [view_seed(self.root_seed, k, v) for k, v in zip(keys, views, strict=True)]
        seeds = np.empty(len(rows), np.uint64)
        for view, shard, indices in _slabs(rows):
            seeds[indices] = cache.seeds(view, shard)[rows[indices, 2]]
        return seeds.tolist()

    def _count_drifted(self, rows: np.ndarray, digests: np.ndarray) -> int:
        """Count the views whose digest differs from the cache's; refuse them if strict."""
        cache = self.images.cache
        if cache is None:
            return 0
        recorded = np.empty_like(digests)
        for view, shard, indices in _slabs(rows):
            recorded[indices] = cache.view_digests(view, shard)[rows[indices, 2]]
        wrong = np.flatnonzero(recorded != digests)
        if len(wrong) and self.images.strict:
            examples = []
            for i in wrong[:SHOWN].tolist():
                view, shard, offset = rows[i].tolist()
                where = self.images.where(shard, offset)
                examples.append((where, view, int(digests[i]), int(recorded[i])))
            raise drift_error(cache, examples, len(wrong))
        return len(wrong)


def render_batch(renderer: Renderer, rows: np.ndarray, views: RenderedViews | None = None) -> Batch:
    """Render a batch of ``rows``, (B, 3) view, shard, offset, without targets.

    Args:
        views: already rendered views that include those of ``rows`` and their partners.
    """
    pairing = renderer.pair(rows)
    both = np.concatenate([pairing.own, pairing.partner])
    views = views or renderer.render(both)
    labels = renderer.images.labels(both[:, 1:])
    return compose(labels.reshape(2, -1), pairing, views)


def compose(labels: np.ndarray, pairing: Pairing, views: RenderedViews) -> Batch:
    """Compose a batch from ``labels``, (2, B) int64 of samples and partners, and rendered views.

    Unneeded views are left out of the batch.
    """
    needed, number = np.unique(
        np.concatenate([views.find(pairing.own), views.find(pairing.partner)]), return_inverse=True
    )
    own, partner = np.split(number, 2)
    pixels = views.pixels if len(needed) == len(views.rows) else views.pixels[needed]
    params = [views.params[i] for i in needed]
    boxes = [(i, *box) for i, param in enumerate(params) for box in param.erase]
    noise = [apply.erase_noise(param) for param in params if param.erase]
    cutmix = [mix.box if mix.cutmix else (0, 0, 0, 0) for mix in pairing.mixes]
    arrays: dict[str, np.ndarray] = {
        "pixels": pixels,
        "own": own,
        "partner": partner,
        "lam": np.array([mix.lam for mix in pairing.mixes], np.float32),
        "cutmix_box": np.array(cutmix, np.int32),
        "label": labels[0],
        "partner_label": labels[1],
        "erase_box": np.array(boxes, np.int32).reshape(-1, 5),
        "erase_noise": np.concatenate([np.empty(0, np.int16), *noise]),
        "index": pairing.own.astype(np.int32),
        "seed": views.seed[needed],
        "image_crc32": views.image_crc32[needed],
        "view_digest": views.digest[needed],
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(drifted=views.drifted, targets={}, **tensors)


def drift_error(
    cache: Cache, examples: Iterable[tuple[object, int, int, int]], count: int
) -> ViewDriftError:
    """Return the error for ``count`` views whose pixels differ from the cache's record.

    ``examples``: location of the sample, view, digest and recorded digest.
    """
    differences = cache.manifest.version_differences(library_versions())
    return ViewDriftError(
        f"{count} views are not those the teacher saw, although the images are the same",
        where=cache.path,
        found=f"different library versions: {'; '.join(differences)}"
        if differences
        else "the same library versions",
        expected="bit-identical pixels",
        action="install the library versions the cache was dumped with, or accept the drift: "
        "--set data.drift=warn",
        problems=[
            f"{where}, view {view}: digest {digest:08x}, recorded {expected:08x}"
            for where, view, digest, expected in examples
        ],
    )


def _slabs(rows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield each (view, shard) in ``rows`` with the indices of its rows."""
    order = np.lexsort((rows[:, 0], rows[:, 1]))
    changes = np.diff(rows[order, :2], axis=0).any(axis=1)
    for indices in np.split(order, np.flatnonzero(changes) + 1):
        view, shard = rows[indices[0], :2].tolist()
        yield view, shard, indices


def _sort_keys(rows: np.ndarray) -> np.ndarray:
    """Return (n,) uint64 that sort by shard, offset, view: views of an image are neighbours."""
    view, shard, offset = rows.astype(np.uint64).T
    return shard << np.uint64(44) | offset << np.uint64(20) | view
