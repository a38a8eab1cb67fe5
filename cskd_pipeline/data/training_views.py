"""Views to train on: shards joined to a cache, any rows of them as batches with encoded targets."""

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
from cskd_pipeline.data.join import Join, classes_of, join, require_word
from cskd_pipeline.data.plan import SampleSet
from cskd_pipeline.distill.encodings import Sampled
from cskd_pipeline.distill.losses import DistillationLoss
from cskd_pipeline.distill.targets import Targets
from cskd_pipeline.runtime.classes import ClassGuard
from cskd_pipeline.views.policy import ViewPolicy

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TrainingViews(TorchDataset[Batch]):
    """Map rows (B, 3) of view, shard, offset to a :class:`Batch` of them.

    A map-style data set of ``torch.utils.data`` whose index is a whole batch: so images are decoded
    and views rendered once where rows share them. :class:`CachedLoader` orders the rows.

    Args:
        samples: the layout that shard and offset refer to: the cache's, or the shards' own.
        images: reads from it; knows the cache, if there is one.
        policy, root_seed, num_classes: of the views; a student needs ``policy.size`` (pixels) and
            ``num_classes``.
        views: how many the cache has; None: as many as are wanted.
        allowed: per shard (count,) bool, samples that can be read; None: all.
        encoding: the one that targets are read from; None: no targets.
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
        """Return a cache's views of the samples that were found, with targets in ``encoding``."""
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
        """Return as many views as are wanted of a data set alone, without targets.

        Raises:
            DataError: nothing states the number of classes.
        """
        classes = require_num_classes(dataset, "use dataset.with_classes(N)")
        samples, images = SampleSet.of(dataset), ImageSource(dataset.shards)
        return cls(samples, images, policy, seed, classes)

    @property
    def cache(self) -> Cache | None:
        """Return the cache that the views are compared with and targets read from."""
        return self.images.cache

    def without_cache(self) -> TrainingViews:
        """Return the same views, compared with no cache, without targets."""
        return replace(self, images=self.images.alone(), encoding=None)

    @property
    def renderer(self) -> Renderer:
        """Return what renders the views, and compares them with the cache's."""
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
    """Open shards and a cache, and find the cache's samples in the shards by their keys.

    Args:
        shards: webdataset shards: a folder, a pattern, a comma list, an index of them, or a
            sequence of these.
        cache: a folder or URL, or an open cache.
        loss: what the targets are for; None: hard targets.
        encoding: the one to read targets from; ``auto``: the smallest exact one that serves the
            loss, else the closest.
        missing: ``skip``: samples that the shards lack, and their partners, are not shown.
        drift: ``warn``: images and views unlike the teacher's are shown, and counted.

    Returns:
        A map-style data set of batches for :class:`CachedLoader`. Its ``num_classes``, ``grid``
        (the teacher's rows and columns) and ``policy.size`` (pixels) are what a student needs.

    Raises:
        CskdError: no such shards or cache, a cache that is not finished or does not serve the loss,
            other classes, labels or samples, another word for ``missing`` or ``drift``.
    """
    require_word("missing", missing, ("error", "skip"))
    require_word("drift", drift, ("error", "warn"))
    reader = cache if isinstance(cache, Cache) else open_cache(cache)
    reader.require_done()
    loss = loss or DistillationLoss()
    chosen = reader.choose(set(loss.kinds.values()), loss.temperature, encoding)
    guard = ClassGuard()
    dataset = load_dataset(shards).fitting(classes_of(reader), "the shards", guard)
    found = join(dataset, reader, guard, missing=missing, drift=drift)
    guard.report_new()
    if found.missing:
        log.warning(f"{found.missing} of the cache's samples are not in the shards, and not shown")
    return TrainingViews.of_join(found, chosen)
