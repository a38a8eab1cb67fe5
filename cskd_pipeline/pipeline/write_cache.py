"""Write a cache of any network's logits, as ``dump-teacher`` does."""

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
from cskd_pipeline.data.index import Dataset, load_dataset, refuse_duplicate_keys
from cskd_pipeline.data.unit_views import Loading
from cskd_pipeline.distill.encodings import Sampled
from cskd_pipeline.errors import UsageError
from cskd_pipeline.pipeline.unit_writer import UndoneUnits, UnitWriter
from cskd_pipeline.runtime.classes import ClassGuard
from cskd_pipeline.runtime.distributed import ALONE, Ranks
from cskd_pipeline.views.policy import ViewPolicy


@dataclass(frozen=True)
class WriteOptions:
    """Options for writing a cache: which units to write, and which differences to accept.

    Args:
        shard_range, view_range: half-open ranges of tar shards and views to write, for partial
            caches that ``cache merge`` joins. Processes that fill one cache need no ranges: each
            claims the units that it writes.
        accept_versions: resume a cache that was started with different library versions.
        guard: compares class names; None: they must be equal.
        ranks: the ranks of this job, which draw units from one counter.
        patience: seconds without a heartbeat after which another process's unit is taken over.
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

    Units (block of views, tar shard) are committed one by one, and stay however the block ends. The
    same call resumes with the missing units. If a view's logits do not depend on the rest of its
    batch, the finished cache has the same bytes however often it was interrupted.

    Args:
        cache: path, encodings, number of views, root seed: the keys of a recipe's ``[cache]``.
        shards: as for ``--shards``, or an open data set.
        teacher: the manifest's entry for the network; K, h and w are its ``num_classes`` and
            ``grid``.
        policy: the augmentation.
        loading: batch size, loader processes, and the device of the views.
        options: which units to write, and which differences to accept.

    Returns:
        A writer that yields batches of views and takes their logits. A batch has ``images`` and
        ``label``: (n,) int64, the label of the image that fills more of a mixed view.

    Raises:
        CskdError: the shards are unusable, or the folder has other contents, such as a cache with
            another data set, teacher, policy, seed or encoding.
    """
    if not isinstance(shards, Dataset):
        shards = load_dataset(shards, num_classes=teacher.num_classes)
    ranks, units = options.ranks, list[Unit]()
    if ranks.first:
        refuse_duplicate_keys(shards)
        dataset = replace(describe(shards), name=shards.name)
        manifest = cache_manifest(cache, dataset, teacher, policy, options.view_range)
        guard = options.guard or ClassGuard()
        writer = CacheWriter.create(
            cache.path, manifest, accept_versions=options.accept_versions, guard=guard
        )
        guard.report_new()
        if cache.views > writer.manifest.views:
            writer.extend(cache.views)
        ranges = (options.shard_range, options.view_range)
        units = writer.todo(*(None if ends is None else range(*ends) for ends in ranges))
    # The ranks' counter indexes one list: a rank that listed units later would find fewer undone.
    units = ranks.gather(units)[0]
    if not ranks.first:
        writer = CacheWriter.open(cache.path)
    shards = shards.with_infos_of(writer.manifest.dataset)
    undone = UndoneUnits(writer, units, options.patience, ranks)
    return UnitWriter(writer, shards, undone, loading)


def cache_manifest(
    cache: CacheSection,
    dataset: DatasetManifest,
    teacher: TeacherInfo,
    policy: ViewPolicy,
    view_range: tuple[int, int] | None = None,
) -> CacheManifest:
    """Return the manifest of the finished cache; refuse views that do not divide into blocks.

    Args:
        view_range: the views to write now; the chosen block size divides both ends, so that
            consecutive ranges of equal length choose the same one.
    """
    manifest = CacheManifest(
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
    block = cache.view_block or choose_view_block(manifest, math.gcd(*ends))
    if any(end % block for end in ends):
        part = "" if view_range is None else f", of which {view_range[0]}:{view_range[1]} now,"
        raise UsageError(
            "the views do not divide into blocks",
            where="cache.view_block",
            found=f"{cache.views} views{part} in blocks of {block}",
            expected="a divisor of the number of views, and of both ends of the view range",
        )
    return replace(manifest, view_block=block)
