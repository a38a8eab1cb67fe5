"""A dump of a few sampled images, complete or part by part: loader, teacher, cache."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from cskd_pipeline.cache.manifest import CacheManifest
from cskd_pipeline.config.sections import DumpRecipe
from cskd_pipeline.data.assemble import normalise
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.data.full_batches import logits_of
from cskd_pipeline.data.index import Dataset, sample
from cskd_pipeline.data.left_out import LeftOuts
from cskd_pipeline.data.unit_views import Loading, unit_batches
from cskd_pipeline.models.teacher import Logits, Teacher
from cskd_pipeline.pipeline.dump import loading_for, teacher_info, without_corrupt_images
from cskd_pipeline.pipeline.write_cache import cache_manifest, write_cache
from cskd_pipeline.runtime.distributed import ALONE
from cskd_pipeline.runtime.progress import silence


@dataclass(frozen=True)
class SampledDump:
    """Sampled images of a recipe's data set, and the teacher to run on their views."""

    recipe: DumpRecipe
    dataset: Dataset
    teacher: Teacher
    loading: Loading

    @classmethod
    def of(
        cls, recipe: DumpRecipe, dataset: Dataset, teacher: Teacher, images: int, parts: int = 4
    ) -> SampledDump:
        """Sample about ``images`` images in ``parts`` contiguous runs."""
        loading = loading_for(recipe, teacher)
        left_outs = LeftOuts(None, ALONE)
        sampled = sample(dataset, images, parts)
        sampled = without_corrupt_images(sampled, recipe.data.corrupt, left_outs, loading.workers)
        return cls(recipe, sampled, teacher, loading)

    @cached_property
    def manifest(self) -> CacheManifest:
        """Return the manifest of a cache of these images."""
        recipe = self.recipe
        info = teacher_info(self.teacher, recipe.teacher.kwargs)
        assert self.dataset.manifest is not None  # a sample has its own
        return cache_manifest(recipe.cache, self.dataset.manifest, info, recipe.views)

    def batches(
        self, views: int, *, block: int | None = None, loading: Loading | None = None
    ) -> Iterator[Batch]:
        """Yield the first ``views`` views of every image, from the loader alone.

        Args:
            block: views per unit; None: all views in one unit.
            loading: loader settings; None: the dump's.
        """
        units = [
            (shard, range(first, min(first + (block or views), views)))
            for shard in range(len(self.dataset.shards))
            for first in range(0, views, block or views)
        ]
        policy, seed = self.recipe.views, self.recipe.cache.root_seed
        return unit_batches(self.dataset, units, policy, seed, loading or self.loading)

    def logits(self, batch: Batch) -> Logits:
        """Return the teacher's checked logits for a batch of :meth:`batches`, on the CPU."""
        logits = logits_of(self.teacher, batch.to(self.teacher.device), self.recipe.views)
        return Logits(*(values.cpu() for values in logits))

    def dump(self, views: int) -> Generator[int]:
        """Dump like :meth:`dump_to`, but silently and into a temporary folder."""
        with silence(), tempfile.TemporaryDirectory(prefix="cskd-trial-") as folder:
            yield from self.dump_to(Path(folder) / "cache", views)

    def dump_to(self, path: Path, views: int) -> Iterator[int]:
        """Dump ``views`` views of every image as stage one does, in one unit per shard.

        Yields:
            The number of views just dumped.
        """
        recipe, teacher = self.recipe, self.teacher
        info = teacher_info(teacher, recipe.teacher.kwargs)
        cache = replace(recipe.cache, path=str(path), views=views, view_block=views)
        with write_cache(cache, self.dataset, info, recipe.views, loading=self.loading) as out:
            for batch in out.views():
                images = normalise(batch.images, teacher.mean, teacher.std)
                out.put(batch, *teacher.unchecked(images))
                yield len(batch)
