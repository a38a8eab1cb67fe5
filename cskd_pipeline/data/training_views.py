"""Views to train on: shards joined to a cache, whose rows are read as batches with targets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.data.batches import Batch, Renderer, render_batch
from cskd_pipeline.data.images import ImageSource
from cskd_pipeline.data.index import Dataset, load_dataset, require_num_classes
from cskd_pipeline.data.join import Join, classes_of, join, require_choice
from cskd_pipeline.data.plan import SampleSet
from cskd_pipeline.distill.encodings import Sampled
from cskd_pipeline.distill.losses import DistillationLoss
from cskd_pipeline.distill.targets import Targets
from cskd_pipeline.runtime.classes import ClassGuard
from cskd_pipeline.views.policy import ViewPolicy

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TrainingViews(TorchDataset[Batch]):
    """Map-style data set from rows, (B, 3) view, shard, offset, to a :class:`Batch`.

    An index is a whole batch of rows, so images and views that the rows share are decoded and
    rendered once. :class:`CachedLoader` orders the rows.

    Args:
        samples: the layout that shard and offset refer to: the cache's, or the shards' own.
        images: source of the layout's images, with the cache, if there is one.
        policy, root_seed, num_classes: parameters of the views; a student needs ``policy.size``
            (pixels) and ``num_classes``.
        views: number of views in the cache; None: unlimited.
        allowed: per shard (count,) bool, samples to use; None: all.
        encoding: encoding to read targets from; None: no targets.
        grid: the teacher's (rows, columns).
    """

    samples: SampleSet
    images: ImageSource
    policy: ViewPolicy
    root_seed: int
    num_classes: int
    views: int | None = None
    allowed: Sequence[np.ndarray] | None = None
    encoding: str | None = None
    grid: tuple[int, int] | None = None

    @classmethod
    def of_join(cls, found: Join, encoding: str) -> TrainingViews:
        """Return a cache's views of the joined samples, with targets in ``encoding``."""
        cache = found.cache
        if not cache.encodings[encoding].exact:
            kind = "draws from" if encoding == Sampled.name else "an approximation of"
            log.info(f"targets from {encoding}: {kind} the teacher's response")
        manifest = cache.manifest
        return cls(
            found.samples,
            found.images,
            manifest.policy,
            manifest.root_seed,
            manifest.dataset.num_classes,
            views=cache.views,
            allowed=found.allowed,
            encoding=encoding,
            grid=manifest.teacher.grid,
        )

    @classmethod
    def of_dataset(cls, dataset: Dataset, policy: ViewPolicy, seed: int) -> TrainingViews:
        """Return unlimited views of a data set without a cache, hence without targets.

        Raises:
            DataError: the number of classes is unknown.
        """
        classes = require_num_classes(dataset, "use dataset.with_classes(N)")
        samples, images = SampleSet.of(dataset), ImageSource(dataset.shards)
        return cls(samples, images, policy, seed, classes)

    @property
    def cache(self) -> Cache | None:
        """Return the cache that views are compared with and targets are read from, if any."""
        return self.images.cache

    def without_cache(self) -> TrainingViews:
        """Return the same views without comparison to a cache and without targets."""
        return replace(self, images=self.images.without_cache(), encoding=None)

    @property
    def renderer(self) -> Renderer:
        """Return a renderer of the views, which compares them with the cache's."""
        return Renderer(self.samples, self.images, self.policy, self.root_seed)

    def __getitem__(self, rows: np.ndarray) -> Batch:
        batch = render_batch(self.renderer, rows)
        if self.cache is None or self.encoding is None:
            return batch
        arrays = self.cache.gather(self.encoding, rows)
        return replace(batch, targets={n: torch.from_numpy(a) for n, a in arrays.items()})

    def targets(self, batch: Batch) -> Targets | None:
        """Return the teacher's response to a batch, on the batch's device; None without a cache."""
        if self.cache is None or self.encoding is None:
            return None
        return self.cache.encodings[self.encoding].targets(batch.targets)


def open_views(
    shards: str | Path | Sequence[str | Path],
    cache: str | Path | Cache,
    loss: DistillationLoss | None = None,
    *,
    encoding: str = "auto",
    missing: str = "error",
    drift: str = "error",
) -> TrainingViews:
    """Open shards and a cache, and match the cache's samples to the shards' by key.

    Args:
        shards: webdataset shards: a folder, a pattern, a comma-separated list, an index of them,
            or a sequence of these.
        cache: folder or URL of a cache, or an open cache.
        loss: loss that the targets are for; None: hard targets.
        encoding: encoding to read targets from; ``auto``: the smallest exact one that supports the
            loss, else the closest.
        missing: ``error``, or ``skip``: leave out samples that the shards lack, and their partners.
        drift: ``error``, or ``warn``: use images and views unlike the teacher's, and count them.

    Returns:
        A map-style data set of batches for :class:`CachedLoader`. A student needs its
        ``num_classes``, ``grid`` (the teacher's rows and columns) and ``policy.size`` (pixels).

    Raises:
        CskdError: no such shards or cache; a cache that is unfinished or does not support the loss;
            classes, labels or samples that differ; an invalid value of ``missing`` or ``drift``.
    """
    require_choice("missing", missing, ("error", "skip"))
    require_choice("drift", drift, ("error", "warn"))
    reader = cache if isinstance(cache, Cache) else open_cache(cache)
    reader.require_done()
    loss = loss or DistillationLoss()
    chosen = reader.choose(set(loss.kinds.values()), loss.temperature, encoding)
    guard = ClassGuard()
    dataset = load_dataset(shards).with_classes_of(classes_of(reader), "the shards", guard)
    found = join(dataset, reader, guard, missing=missing, drift=drift)
    guard.report_new()
    if found.missing:
        log.warning(f"{found.missing} of the cache's samples are not in the shards: left out")
    return TrainingViews.of_join(found, chosen)
