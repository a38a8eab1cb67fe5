"""A teacher's responses to some hundred views, from a cache or computed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cskd_pipeline.cache.layout import encodings_of
from cskd_pipeline.cache.manifest import CacheManifest
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.config.sections import DumpRecipe
from cskd_pipeline.data.full_batches import logits_of
from cskd_pipeline.distill.encodings import ENCODINGS, Encoding
from cskd_pipeline.errors import CacheError
from cskd_pipeline.models.teacher import Logits
from cskd_pipeline.pipeline.dump import open_stage_one
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.tools.bench.sampled_dump import SampledDump
from cskd_pipeline.views.bits import BitStream, derive_seed

SEED = derive_seed("bench")


@dataclass(frozen=True)
class Responses:
    """Hold ``spatial`` (n, K, h, w) and ``global_`` (n, K) float16 on the CPU, of n views.

    ``manifest`` is that of the cache which they are from, or which the teacher would make.
    """

    spatial: Tensor
    global_: Tensor
    manifest: CacheManifest
    source: str

    @classmethod
    def joined(cls, parts: Sequence[Logits], manifest: CacheManifest, source: str) -> Responses:
        """Join the logits of several batches."""
        spatial, global_ = (torch.cat(arrays) for arrays in zip(*parts, strict=True))
        return cls(spatial, global_, manifest, source)

    def __len__(self) -> int:
        return len(self.global_)

    def encodings(self, names: Sequence[str] = ()) -> dict[str, Encoding]:
        """Return these encodings, or every one, ``sampled`` with the manifest's draws."""
        return encodings_of(replace(self.manifest, encodings=tuple(names or ENCODINGS)))

    @property
    def seeds(self) -> np.ndarray:
        """Return stand-ins for the views' seeds, (n,) uint64: as incompressible as real ones."""
        return BitStream(SEED).raw(len(self))


def from_cache(path: Path | str, views: int) -> Responses:
    """Draw ``views`` views at random from all that a cache with the encoding ``dense`` has.

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
    """Run the recipe's teacher on ``views`` views of samples from all over its shards.

    They are of as many samples as there are, in one view each or, of a small data set, in several.

    Raises:
        CskdError: data or teacher cannot be used.
    """
    dataset, teacher = open_stage_one(recipe)
    # A teacher always runs on whole batches: parts are no smaller than one.
    parts = max(1, min(4, views // recipe.dump.batch_size))
    few = SampledDump.of(recipe, dataset, teacher, views, parts)
    each = -(-views // few.dataset.samples)
    logits = []
    with progress(each * few.dataset.samples, "views", "running the teacher") as meter:
        for batch in few.batches(each):
            found = logits_of(teacher, batch.to(teacher.device), recipe.views)
            logits.append(Logits(found.spatial.cpu(), found.global_.cpu()))
            meter.advance(len(found.global_))
    all_ = Responses.joined(logits, few.manifest, teacher.name)
    return replace(all_, spatial=all_.spatial[:views], global_=all_.global_[:views])
