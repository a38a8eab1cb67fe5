"""Join cache, shards and recipe to a run's data; every mismatch among them is refused here."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from cskd_pipeline import Cache, open_cache
from cskd_pipeline.cache.digests import root_digest
from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.data.corrupt import find_corrupt, without_corrupt
from cskd_pipeline.data.index import Dataset, load_dataset, require_num_classes
from cskd_pipeline.data.join import Join, classes_of, find_differing, join
from cskd_pipeline.data.left_out import LeftOuts, tars_sha256
from cskd_pipeline.data.remote_tar import FETCHING
from cskd_pipeline.data.replay import replay, spread_views
from cskd_pipeline.data.training_views import TrainingViews
from cskd_pipeline.errors import CacheError, UsageError
from cskd_pipeline.pipeline.from_recipe import make_loss
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.classes import TRAIN_SWITCH, Classes, ClassGuard
from cskd_pipeline.runtime.device import worker_count
from cskd_pipeline.runtime.distributed import ALONE, Ranks
from cskd_pipeline.views.policy import ViewPolicy

log = logging.getLogger(__name__)

SHARDS = "the training shards"


@dataclass(frozen=True)
class TrainingData:
    """The data of a training run.

    Args:
        name: name of the data set.
        classes: classes of the training shards, with the cache's names if the shards have none.
        guard: compares classes and records accepted differences.
        validation: images on which students are evaluated.
        cache_digest: SHA-256 of a finished cache's contents, else None.
        left_out: samples left out of training, and of validation.
    """

    name: str
    classes: Classes
    guard: ClassGuard
    views: TrainingViews
    validation: Dataset | None
    cache_digest: str | None
    left_out: tuple[LeftOuts, ...]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Return digests of all that decides batches and targets; a resumed run must match them."""
        views, cache = self.views, self.views.cache
        masks = None
        if views.allowed is not None:
            packed = [np.packbits(mask).tobytes() for mask in views.allowed]
            masks = schemas.sha256([hashlib.sha256(mask).hexdigest() for mask in packed])
        return {
            "shards": schemas.sha256(list(views.samples.shard_ids)),
            "left_out": masks,
            "policy": schemas.sha256(views.policy.to_json()),
            "root_seed": views.root_seed,
            "cache": None if cache is None else _identity(cache),
            "encoding": views.encoding,
        }


def open_training_data(recipe: TrainRecipe, ranks: Ranks = ALONE) -> TrainingData:
    """Open shards and cache; refuse any mismatch with the recipe or each other: of classes, view
    policy, views, encoding or samples.
    """
    guard = ClassGuard(TRAIN_SWITCH, accept=recipe.data.classes == "accept")
    folder = Path(recipe.run.out) if recipe.run.out else None
    left_out = LeftOuts(folder, ranks)
    left_out_of_validation = LeftOuts(folder, ranks, part="validation")
    cache = None if recipe.distill.method == "none" else _open_cache(recipe)
    dataset, classes = _open_shards(recipe, cache, guard)
    validation = _open_validation(recipe, classes, guard, left_out_of_validation)
    if cache is None:
        if recipe.data.corrupt == "skip":
            dataset = without_corrupt(dataset, left_out, workers=worker_count(recipe.run.workers))
        policy = recipe.views or ViewPolicy()
        views = TrainingViews.of_dataset(dataset, policy, recipe.run.seed)
    else:
        views = _join(recipe, dataset, cache, guard, left_out)
    guard.report_new()
    return TrainingData(
        name=dataset.name,
        classes=classes,
        guard=guard,
        views=views,
        validation=validation,
        cache_digest=None if cache is None else cache.digest(),
        left_out=(left_out, left_out_of_validation),
    )


def _open_cache(recipe: TrainRecipe) -> Cache:
    """Open the recipe's cache; refuse one with another class count or view policy."""
    if not recipe.data.cache:
        raise UsageError(
            f"method {recipe.distill.method} needs a teacher's cache",
            action="pass --cache DIR, written by cskd-pipeline dump-teacher, or --method none",
        )
    cache = open_cache(recipe.data.cache)
    classes, found = recipe.data.num_classes, cache.manifest.dataset.num_classes
    if classes and classes != found:
        raise CacheError(
            "the cache has a different number of classes",
            where=cache.path,
            found=f"{found} classes",
            expected=f"data.num_classes = {classes}",
            action="use a cache of these classes, or correct data.num_classes",
        )
    if recipe.views is not None and recipe.views != cache.manifest.policy:
        raise CacheError(
            "the cache has a different view policy than the recipe (recipe's value, cache's value)",
            where=cache.path,
            problems=recipe.views.difference(cache.manifest.policy),
            action="remove [views] from the recipe to use the cache's, or use a different cache",
        )
    return cache


def _open_shards(
    recipe: TrainRecipe, cache: Cache | None, guard: ClassGuard
) -> tuple[Dataset, Classes]:
    """Open the training shards; return them and their classes, with the cache's names if needed."""
    dataset = load_dataset(
        recipe.data.shards,
        split=recipe.data.split or None,
        num_classes=recipe.data.num_classes or None,
        empty="pass" if recipe.data.corrupt == "skip" else "error",
    )
    names = dataset.class_names
    if cache is not None:
        dataset = dataset.with_classes_of(classes_of(cache), SHARDS, guard)
        names = names or cache.manifest.dataset.class_names
    require_num_classes(dataset, "pass --set data.num_classes=N")
    return dataset, replace(dataset.classes(SHARDS), names=names)


def _open_validation(
    recipe: TrainRecipe, classes: Classes, guard: ClassGuard, left_out: LeftOuts
) -> Dataset | None:
    if not recipe.data.val_shards:
        return None
    skip = recipe.data.corrupt == "skip"
    dataset = load_dataset(
        recipe.data.val_shards,
        split=recipe.data.val_split or None,
        prefer=("validation", "val", "test"),
        empty="pass" if skip else "error",
    )
    dataset = dataset.with_classes_of(classes, "the validation shards", guard)
    if not skip:
        return dataset
    workers = worker_count(recipe.run.workers)
    return without_corrupt(dataset, left_out, workers=workers, doing="evaluating")


def _join(
    recipe: TrainRecipe, dataset: Dataset, cache: Cache, guard: ClassGuard, left_out: LeftOuts
) -> TrainingViews:
    """Return the cache's views of the shards' samples, without those that the recipe leaves out."""
    data, loss = recipe.data, make_loss(recipe.distill)
    encoding = cache.choose(set(loss.kinds.values()), loss.temperature, recipe.distill.encoding)
    _require_views(cache, recipe.schedule.epochs, recipe.batch.repeats)
    found = join(dataset, cache, guard, missing=data.missing, drift=data.drift)
    found = _leave_out(found, recipe, left_out)
    if left_out.ranks.first:
        _check_sample(found, data.check, data.drift, encoding)
    return TrainingViews.of_join(found, encoding)


def _require_views(cache: Cache, epochs: int, repeats: int) -> None:
    """Refuse a cache without the views that the run needs; warn if the run repeats views."""
    cycles, fresh = -(-epochs // repeats), cache.views // repeats
    cache.require_done(range(min(cycles * repeats, cache.views)))
    if cycles > fresh:
        log.warning(
            f"{epochs} epochs show every image {cycles * repeats} times in {cache.views} views: "
            f"views repeat from epoch {fresh * repeats + 1} on"
        )


def _leave_out(found: Join, recipe: TrainRecipe, left_out: LeftOuts) -> Join:
    """Leave out the samples that the recipe skips, and report them.

    With ``data.corrupt`` or ``data.drift`` = ``skip`` the ranks together read every image once; a
    resumed run reads the result from its folder.
    """
    counts, shards = found.samples.counts, tars_sha256(found.images.shards)
    identity = {"cache": found.cache.lineage, "shards": shards}
    if recipe.data.corrupt == "skip":
        workers = worker_count(recipe.run.workers)
        corrupt = partial(find_corrupt, found.images, found.present(), workers=workers)
        found = found.without(left_out.find("corrupt", identity, counts, corrupt), "corrupt")
    if recipe.data.drift == "skip":
        other = partial(find_differing, found)
        found = found.without(left_out.find("differing", identity, counts, other), "other image")
    left_out.add(found.left_out())
    if len(left_out):
        count = found.count("corrupt")
        log.warning(
            f"training without {len(left_out)} samples of the cache's {found.samples.total}: "
            f"{found.missing} are not in the shards, {found.count('other image')} have other images"
            f"{f', {count} cannot be decoded' if count else ''}{left_out.listed}"
        )
    if found.unused:
        log.info(f"{found.unused} samples of the shards are not in the cache and not used")
    return found


def _check_sample(found: Join, count: int, drift: str, encoding: str) -> None:
    """Replay ``count`` views, as training will, and read their targets.

    Training compares every view, too; this finds a mismatch before any work is done. With ``drift``
    = ``warn`` mismatches are only reported.
    """
    rows = spread_views(found, count, few=FETCHING)
    if not len(rows):
        return
    found.cache.gather(encoding, rows)  # raises if the cache is damaged
    replayed = replay(found, rows)
    exact, same = int(replayed.exact.sum()), int(replayed.same_image.sum())
    wrong = rows[~replayed.exact]
    if len(wrong) and drift != "warn":
        found.renderer.render(wrong)  # raises
    line = f"checked {len(rows)} views of the cache: {exact} are reproduced bit for bit"
    if exact == len(rows):
        log.info(line)
    else:
        log.warning(
            f"{line}, {same - exact} differ by rounding, {len(rows) - same} are of other images"
        )


def _identity(cache: Cache) -> str:
    """Return a digest of a cache's first block of views, which does not change as it grows."""
    first = np.zeros_like(cache.done())
    first[0] = True
    return root_digest(cache.lineage, cache.manifest.view_block, cache.unit_digests(first))
