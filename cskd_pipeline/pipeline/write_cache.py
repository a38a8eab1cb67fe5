"""Write a cache from any network's logits; ``dump-teacher`` is the first user.

:func:`write_cache` opens the shards, creates or resumes the cache, and returns a writer that yields
the missing views and takes their logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cskd_pipeline.cache.manifest import (
    CacheManifest,
    DatasetManifest,
    TeacherInfo,
    library_versions,
    utc_now,
)
from cskd_pipeline.cache.units import Unit, choose_view_block
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.config.sections import CacheSection
from cskd_pipeline.data.describe import describe
from cskd_pipeline.data.index import Dataset, load_dataset, refuse_repeated_keys
from cskd_pipeline.data.unit_views import Loading
from cskd_pipeline.distill.encodings import Sampled
from cskd_pipeline.errors import UsageError
from cskd_pipeline.pipeline.unit_writer import UndoneUnits, UnitWriter
from cskd_pipeline.runtime.classes import ClassGuard
from cskd_pipeline.runtime.distributed import ALONE, Ranks
from cskd_pipeline.views.policy import ViewPolicy


@dataclass(frozen=True)
class WriteOptions:
    """Say which units this process writes, and which differences from a cache it accepts.

    Args:
        shard_range, view_range: only the tar shards and views from, up to and not including: for
            caches of parts, that ``cache merge`` joins. Processes that fill one cache need no
            ranges, for each claims the units that it makes.
        accept_versions: resume a cache that was started with different library versions.
        guard: compares the names of classes; by default they must be the same.
        ranks: of one job, who draw units from one counter.
        patience: seconds without a sign of life after which another process's unit is taken over.
    """

    shard_range: tuple[int, int] | None = None
    view_range: tuple[int, int] | None = None
    accept_versions: bool = False
    guard: ClassGuard | None = None
    ranks: Ranks = ALONE
    patience: float = 300.0


_ALL, _IN_PROCESS = WriteOptions(), Loading()


def write_cache(
    cache: CacheSection,
    shards: str | Path | Sequence[str | Path] | Dataset,
    teacher: TeacherInfo,
    policy: ViewPolicy,
    *,
    loading: Loading = _IN_PROCESS,
    options: WriteOptions = _ALL,
) -> UnitWriter:
    """Create the cache of ``teacher``'s logits, resume it, or extend it to more views::

        with write_cache(CacheSection("cache", views=4), "train-*.tar", teacher, policy) as writer:
            for batch in writer.views():               # images (n, 3, S, S) float32, in [0, 1]
                spatial, global_ = network(batch.images)
                writer.put(batch, spatial, global_)    # (n, K, h, w) and (n, K)

    Units (block of views, tar shard) are committed one by one, and survive whatever ends the block.
    The same call resumes with the missing ones: the finished cache has the same bytes however often
    it was stopped, if the logits of a view do not depend on the others in its batch.

    Args:
        cache: path, encodings, number of views, root seed: the keys of a recipe's ``[cache]``.
        shards: as ``--shards``, or a data set that is open already.
        teacher: what the manifest states of the network; K, h and w are its ``num_classes`` and
            ``grid``.
        policy: the augmentation.
        loading: batch size, loader processes, and the device on which views come.
        options: a share of the units, and what is accepted.

    Returns:
        A writer that yields batches of views and takes their logits. A batch has ``images`` and
        ``label`` (n,) int64, of the image that fills more of a mixed view.

    Raises:
        CskdError: the shards cannot be used, or the folder holds something else: also a cache whose
            data set, teacher, policy, seed or encodings differ.
    """
    if not isinstance(shards, Dataset):
        shards = load_dataset(shards, num_classes=teacher.num_classes)
    ranks, units = options.ranks, list[Unit]()
    if ranks.first:
        refuse_repeated_keys(shards)
        dataset = replace(describe(shards), name=shards.name)
        manifest = cache_manifest(cache, dataset, teacher, policy, options.view_range)
        guard = options.guard or ClassGuard()
        writer = CacheWriter.create(
            cache.path, manifest, accept_versions=options.accept_versions, guard=guard
        )
        guard.report_new()
        if cache.views > writer.manifest.views:
            writer.extend(cache.views)
        chosen = (options.shard_range, options.view_range)
        units = writer.todo(*(None if ends is None else range(*ends) for ends in chosen))
    # One list for all, in which they count: a rank that looks later would find some units done.
    units = ranks.gather(units)[0]
    if not ranks.first:
        writer = CacheWriter.open(cache.path)
    shards = shards.held_to(writer.manifest.dataset)
    undone = UndoneUnits(writer, units, options.patience, ranks)
    return UnitWriter(writer, shards, undone, loading)


def cache_manifest(
    cache: CacheSection,
    dataset: DatasetManifest,
    teacher: TeacherInfo,
    policy: ViewPolicy,
    view_range: tuple[int, int] | None = None,
) -> CacheManifest:
    """Return the manifest of the finished cache; refuse views that are no whole number of blocks.

    Args:
        view_range: the views to be made now; the block that is chosen divides its ends, so that
            equal ranges next to each other agree on it.
    """
    made = CacheManifest(
        dataset=dataset,
        teacher=teacher,
        policy=policy,
        root_seed=cache.root_seed,
        views=cache.views,
        view_block=cache.view_block or 1,
        encodings=cache.encodings,
        versions=library_versions(),
        created=utc_now(),
        license=cache.license,
        notes=cache.notes,
        sampled=Sampled(cache.sampled_draws, cache.sampled_temperature),
    )
    ends = (cache.views, *(view_range or ()))
    block = cache.view_block or choose_view_block(made, math.gcd(*ends))
    if any(end % block for end in ends):
        part = "" if view_range is None else f", of which {view_range[0]}:{view_range[1]} now,"
        raise UsageError(
            "views come in whole blocks",
            where="cache.view_block",
            found=f"{cache.views} views{part} in blocks of {block}",
            expected="a divisor of the number of views, and of where their range begins and ends",
        )
    return replace(made, view_block=block)
