"""A teacher's answers to some hundred views, and what a cache that holds them says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cskd_pipeline.cache.manifest import CacheManifest
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.config import DumpRecipe
from cskd_pipeline.data.full_batches import logits_of
from cskd_pipeline.data.index import describe, sample
from cskd_pipeline.data.left_out import LeftOuts
from cskd_pipeline.data.unit_views import unit_batches
from cskd_pipeline.errors import CacheError
from cskd_pipeline.pipeline.dump import loading_for, open_stage_one, teacher_info, usable
from cskd_pipeline.pipeline.write_cache import cache_manifest
from cskd_pipeline.runtime.distributed import ALONE
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.views.bits import BitStream, derive_seed

SEED = derive_seed("bench")


@dataclass(frozen=True)
class Responses:
    """``spatial`` (n, K, h, w) and ``global_`` (n, K) float16 on the CPU, of n views.

    ``manifest`` is that of the cache which they are from, or which the teacher would make.
    """

    spatial: Tensor
    global_: Tensor
    manifest: CacheManifest
    source: str

    def __len__(self) -> int:
        return len(self.global_)


def from_cache(path: Path | str, views: int) -> Responses:
    """``views`` views of a cache with the encoding ``dense``, drawn at random from all it has.

    Raises:
        CacheError: there is no such cache, it lacks ``dense``, or has no finished unit.
    """
    reader = open_cache(path)
    if "dense" not in reader.encodings:
        raise CacheError(
            "the cache does not hold the logits that encodings are compared with",
            where=path,
            found=f"encodings {', '.join(reader.encodings)}",
            expected="dense",
            action="use a cache dumped with --encoding dense, or name the teacher and --shards",
        )
    done = np.argwhere(reader.done())
    if not len(done):
        raise CacheError("the cache has no finished unit yet", where=path, expected="at least one")
    stream, block = BitStream(SEED), reader.manifest.view_block
    index = []
    for _ in range(views):
        which, shard = done[stream.below(len(done))].tolist()
        view = which * block + stream.below(block)
        index.append((view, shard, stream.below(reader.counts[shard])))
    rows = reader.gather("dense", np.array(index))
    return Responses(
        torch.from_numpy(rows["dense/spatial"]),
        torch.from_numpy(rows["dense/global"]),
        reader.manifest,
        str(path),
    )


def from_teacher(recipe: DumpRecipe, views: int) -> Responses:
    """The recipe's teacher asked about ``views`` views of samples from all over its shards.

    They are of as many samples as there are, in one view each or, of a small data set, in several.

    Raises:
        CskdError: data or teacher cannot be used.
    """
    dataset, teacher = open_stage_one(recipe)
    # A teacher always answers whole batches: parts are no smaller than one.
    few = sample(dataset, views, parts=max(1, min(4, views // recipe.dump.batch_size)))
    loading = loading_for(recipe, teacher)
    few = usable(few, recipe.data.corrupt, LeftOuts(None, ALONE), loading.workers)
    each = range(-(-views // few.samples))
    units = [(shard, each) for shard in range(len(few.shards))]
    spatial, global_ = [], []
    with progress(len(each) * few.samples, "views", "asking the teacher") as meter:
        for batch in unit_batches(few, units, recipe.views, recipe.cache.root_seed, loading):
            answer = logits_of(teacher, batch.to(teacher.device), recipe.views)
            spatial.append(answer.spatial.cpu())
            global_.append(answer.global_.cpu())
            meter.advance(len(answer.global_))
    return Responses(
        torch.cat(spatial)[:views],
        torch.cat(global_)[:views],
        cache_manifest(
            recipe.cache, describe(few), teacher_info(teacher, recipe.teacher.kwargs), recipe.views
        ),
        teacher.name,
    )
