"""Cache, shards and the recipe brought together; every misfit is refused here."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cskd_pipeline.cache.digests import root_digest
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.config import TrainRecipe
from cskd_pipeline.data.batches import Batch, Position, TrainBatches, train_loader
from cskd_pipeline.data.corrupt import without_corrupt
from cskd_pipeline.data.evalset import EvalBatch, eval_loader
from cskd_pipeline.data.images import ImageSource
from cskd_pipeline.data.index import Dataset, load_dataset
from cskd_pipeline.data.join import Join, classes_of, join
from cskd_pipeline.data.left_out import LeftOuts
from cskd_pipeline.data.plan import EpochPlan, SampleSet
from cskd_pipeline.distill.encodings import Encoding
from cskd_pipeline.distill.targets import Targets
from cskd_pipeline.errors import CacheError, DataError, UsageError
from cskd_pipeline.models.student import Preprocessing
from cskd_pipeline.pipeline.settle import settle
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.classes import TRAIN_SWITCH, Classes, ClassGuard
from cskd_pipeline.runtime.device import worker_count
from cskd_pipeline.runtime.distributed import ALONE, Ranks
from cskd_pipeline.views.policy import ViewPolicy

log = logging.getLogger(__name__)

SHARDS = "the training shards"


@dataclass(frozen=True)
class TrainingData:
    """What a run reads.

    ``encoding`` is the one that targets are read in and ``grid`` the cache's (rows, columns); both
    are None for method ``none``. ``identity`` has all that decides batches or targets, as digests.
    ``name`` is the data set's. ``guard`` compares classes, and keeps what was accepted. ``joined``:
    where the cache's samples are; None without a cache. ``cache_digest`` names the contents of a
    finished cache. ``left_out``: of the images for training, and for validation.
    """

    name: str
    plan: EpochPlan
    source: TrainBatches
    policy: ViewPolicy
    num_classes: int
    class_names: tuple[str, ...] | None
    guard: ClassGuard
    encoding: Encoding | None
    grid: tuple[int, int] | None
    identity: dict[str, Any]
    validation_set: Dataset | None
    workers: int
    eval_batch_size: int
    ranks: Ranks
    joined: Join | None
    cache_digest: str | None
    left_out: tuple[LeftOuts, ...]

    @property
    def cache(self) -> Cache | None:
        return None if self.joined is None else self.joined.images.cache

    @property
    def classes(self) -> Classes:
        return Classes(SHARDS, self.name, self.num_classes, self.class_names)

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps

    def batches(self, positions: Iterable[Position], device: torch.device) -> Iterator[Batch]:
        """The micro-batches at ``positions``, in that order, from loader processes."""
        return self.ranks.heeding(
            train_loader(
                self.source, positions, workers=self.workers, pin_memory=device.type == "cuda"
            )
        )

    def targets(self, batch: Batch) -> Targets | None:
        """What the teacher said of a batch, on the batch's device; None for method ``none``."""
        return None if self.encoding is None else self.encoding.targets(batch.targets)

    @property
    def validation_samples(self) -> int:
        """How many validation images are this rank's."""
        assert self.validation_set is not None
        starts = range(0, self.validation_set.samples, self.eval_batch_size)
        mine = starts[self.ranks.rank :: self.ranks.world]
        return sum(min(self.eval_batch_size, self.validation_set.samples - s) for s in mine)

    def validation(self, preprocessing: Preprocessing) -> Iterable[EvalBatch]:
        """The validation images, resized and cropped as the student wants them."""
        assert self.validation_set is not None
        return eval_loader(
            self.validation_set,
            preprocessing,
            batch_size=self.eval_batch_size,
            workers=self.workers,
            ranks=self.ranks,
        )


def open_training_data(recipe: TrainRecipe, ranks: Ranks = ALONE) -> TrainingData:
    """Open shards and cache, and check that they fit the recipe and each other.

    Raises:
        CskdError: whatever does not fit: classes, policy, views, encoding, samples.
    """
    cache = None if recipe.distill.method == "none" else _open_cache(recipe)
    guard = ClassGuard(TRAIN_SWITCH, accept=recipe.data.classes == "accept")
    dataset, classes = _open_shards(recipe, cache, guard)
    num_classes = dataset.num_classes
    assert num_classes is not None
    folder = Path(recipe.run.out) if recipe.run.out else None
    left_out = LeftOuts(folder, ranks)
    left_out_of_validation = LeftOuts(folder, ranks, part="validation")
    validation_set = _open_validation(recipe, classes, guard, left_out_of_validation)
    if cache is None:
        if recipe.data.corrupt == "skip":
            dataset = without_corrupt(dataset, left_out, workers=worker_count(recipe.run.workers))
        policy, root_seed, views = recipe.views or ViewPolicy(), recipe.run.seed, None
        samples, images, allowed = SampleSet.of(dataset), ImageSource(dataset.shards), None
        encoding_name, encoding, grid, joined = None, None, None, None
    else:
        policy, root_seed = cache.manifest.policy, cache.manifest.root_seed
        views, grid = cache.views, cache.manifest.grid
        encoding_name = choose_encoding(recipe, cache)
        encoding = cache.encodings[encoding_name]
        if not encoding.exact:
            log.info(f"targets from {encoding_name}: an approximation of the teacher's answer")
        _check_views(recipe, cache)
        joined = join(
            dataset,
            cache,
            guard,
            missing=recipe.data.missing,
            drift=recipe.data.drift,
        )
        joined = settle(recipe, joined, encoding_name, left_out)
        samples, images, allowed = joined.samples, joined.images, joined.allowed
    guard.report()
    plan = EpochPlan(
        samples,
        policy,
        root_seed,
        views=views,
        repeats=recipe.batch.repeats,
        batch_size=recipe.batch.batch_size,
        seed=recipe.run.seed,
        shuffle_shards=recipe.batch.shuffle_shards,
        allowed=allowed,
    )
    return TrainingData(
        name=dataset.name,
        plan=plan,
        source=TrainBatches(
            plan,
            images,
            cache=cache,
            encoding=encoding_name,
            accumulation=recipe.batch.accumulation,
            rank=ranks.rank,
            world=ranks.world,
            drift=recipe.data.drift,
        ),
        policy=policy,
        num_classes=num_classes,
        class_names=classes.names,
        guard=guard,
        encoding=encoding,
        grid=grid,
        identity={
            "shards": schemas.sha256(list(samples.shard_ids)),
            "left_out": None if allowed is None else _hash(allowed),
            "policy": schemas.sha256(policy.to_json()),
            "root_seed": root_seed,
            "cache": None if cache is None else _identity(cache),
            "encoding": encoding_name,
        },
        validation_set=validation_set,
        workers=worker_count(recipe.run.workers),
        eval_batch_size=recipe.run.eval_batch_size,
        ranks=ranks,
        joined=joined,
        cache_digest=None if cache is None else cache.digest(),
        left_out=(left_out, left_out_of_validation),
    )


def _identity(cache: Cache) -> str:
    """Name a cache by its first block of views, which stays the same while it grows."""
    first = np.zeros_like(cache.done())
    first[0] = True
    return root_digest(cache.lineage, cache.manifest.view_block, cache.unit_digests(first))


def _hash(masks: Iterable[np.ndarray]) -> str:
    packed = (np.packbits(mask).tobytes() for mask in masks)
    return schemas.sha256([hashlib.sha256(mask).hexdigest() for mask in packed])


def _open_cache(recipe: TrainRecipe) -> Cache:
    """The recipe's cache, if it is of the recipe's class count and view policy."""
    if not recipe.data.cache:
        raise UsageError(
            f"method {recipe.distill.method} learns from a teacher's cache",
            action="pass --cache DIR, made by cskd-pipeline dump-teacher, or --method none",
        )
    cache = open_cache(recipe.data.cache)
    classes, found = recipe.data.num_classes, cache.manifest.dataset.num_classes
    if classes and classes != found:
        raise CacheError(
            "the cache is of another number of classes",
            where=cache.path,
            found=f"{found} classes",
            expected=f"data.num_classes = {classes}",
            action="use a cache whose teacher knows these classes",
        )
    if recipe.views is not None and recipe.views != cache.manifest.policy:
        raise CacheError(
            "the cache is of another view policy (recipe's value and cache's)",
            where=cache.path,
            problems=recipe.views.difference(cache.manifest.policy),
            action="leave [views] out of the recipe to take the cache's, or use another cache",
        )
    return cache


def choose_encoding(recipe: TrainRecipe, cache: Cache) -> str:
    """Return the encoding asked for; for ``auto`` the smallest exact one that serves the loss, else
    the closest approximation, which is the largest.
    """
    kinds, tau = recipe.distill.kinds, recipe.distill.temperature
    asked, wanted = recipe.distill.encoding, set(kinds.values())
    serving = {
        name: sum(spec.row_bytes for spec in cache.specs(name))
        for name, encoding in cache.encodings.items()
        if wanted <= set(encoding.serves)
        and ("soft" not in wanted or tau >= encoding.min_temperature)
    }
    if asked == "auto" and serving:
        exact = [name for name in serving if cache.encodings[name].exact]
        size = serving.__getitem__
        return min(exact, key=size) if exact else max(serving, key=size)
    if asked in serving:
        return asked
    known = asked == "auto" or asked in cache.encodings
    told = {"hard": "hard targets", "soft": f"soft targets at temperature {tau:g}"}
    targets = " and ".join(told[kind] for kind in sorted(wanted))
    to_hard = " ".join(f"--set distill.{key}=hard" for key in kinds if kinds[key] == "soft")
    raise CacheError(
        f"the cache cannot serve {targets}" if known else f"the cache has no encoding {asked}",
        where=cache.path,
        found=f"encodings {', '.join(cache.encodings)}",
        expected=f"one that serves {targets}" if known else asked,
        action=f"use {to_hard}, or a cache dumped with --encoding dense"
        if to_hard
        else "use --set distill.encoding=auto, or a cache dumped with --encoding envelope",
    )


def _check_views(recipe: TrainRecipe, cache: Cache) -> None:
    """All views that the run will show are there; says so if epochs share them."""
    epochs, repeats = recipe.schedule.epochs, recipe.batch.repeats
    cycles, fresh = -(-epochs // repeats), cache.views // repeats
    cache.require_done(range(min(cycles * repeats, cache.views)))
    if cycles > fresh:
        log.warning(
            f"{epochs} epochs show every image {cycles * repeats} times in {cache.views} views: "
            f"views come again from epoch {fresh * repeats + 1} on"
        )


def _open_shards(
    recipe: TrainRecipe, cache: Cache | None, guard: ClassGuard
) -> tuple[Dataset, Classes]:
    """The training shards, and their classes, named by the cache where they have no names."""
    dataset = load_dataset(
        recipe.data.shards,
        split=recipe.data.split or None,
        num_classes=recipe.data.num_classes or None,
        empty="pass" if recipe.data.corrupt == "skip" else "error",
    )
    names = dataset.class_names
    if cache is not None:
        dataset = dataset.fitting(classes_of(cache), SHARDS, guard)
        names = names or cache.manifest.dataset.class_names
    if dataset.num_classes is None:
        raise DataError(
            "nothing states the number of classes",
            where=dataset.name,
            action="put classes.json beside the shards, or pass --set data.num_classes=N",
        )
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
    dataset = dataset.fitting(classes, "the validation shards", guard)
    if not skip:
        return dataset
    workers = worker_count(recipe.run.workers)
    return without_corrupt(dataset, left_out, workers=workers, doing="evaluating")
