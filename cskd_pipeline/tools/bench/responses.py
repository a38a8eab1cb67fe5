"""A teacher's responses to a few hundred views, read from a cache or computed, and stored again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cskd_pipeline.cache.layout import encodings_of
from cskd_pipeline.cache.manifest import CacheManifest, ShardInfo
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.units import UnitBuffer, UnitData
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.config.sections import DumpRecipe
from cskd_pipeline.distill.encodings import ENCODINGS, Encoding, ResponseShape, Rows
from cskd_pipeline.errors import CacheError
from cskd_pipeline.models.teacher import Logits
from cskd_pipeline.pipeline.dump import open_stage_one
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.tools.bench.sampled_dump import SampledDump
from cskd_pipeline.tools.bench.timing import wait_for
from cskd_pipeline.views.bits import BitStream, derive_seed

SEED = derive_seed("bench")
BATCH = 32


@dataclass(frozen=True)
class Responses:
    """Responses to n views: ``spatial`` (n, K, h, w) and ``global_`` (n, K), float16, on the CPU.

    ``manifest`` describes the cache they come from, or the one the teacher would write.
    """

    spatial: Tensor
    global_: Tensor
    manifest: CacheManifest
    source: str

    @classmethod
    def join(cls, parts: Sequence[Logits], manifest: CacheManifest, source: str) -> Responses:
        """Return the logits of several batches as one."""
        spatial, global_ = (torch.cat(arrays) for arrays in zip(*parts, strict=True))
        return cls(spatial, global_, manifest, source)

    def __len__(self) -> int:
        return len(self.global_)

    def encodings(self, names: Sequence[str] = ()) -> dict[str, Encoding]:
        """Return the named encodings, or all of them; ``sampled`` has the manifest's draws."""
        return encodings_of(replace(self.manifest, encodings=tuple(names or ENCODINGS)))

    @property
    def seeds(self) -> np.ndarray:
        """Return substitutes for the views' seeds, (n,) uint64, as incompressible as real ones."""
        return BitStream(SEED).raw(len(self))


def from_cache(path: Path | str, views: int) -> Responses:
    """Draw ``views`` random views from the finished units of a cache with ``dense``."""
    reader = open_cache(path)
    if "dense" not in reader.encodings:
        raise CacheError(
            "the cache has no logits to compare encodings with",
            where=path,
            found=f"encodings {', '.join(reader.encodings)}",
            expected="dense",
            action="use a cache dumped with --encoding dense, or name the teacher and --shards",
        )
    done = np.argwhere(reader.done())
    if not len(done):
        raise CacheError("the cache has no finished unit", where=path, expected="at least one")
    stream, block = BitStream(SEED), reader.manifest.view_block
    index = []
    for _ in range(views):
        block_index, shard = done[stream.below(len(done))].tolist()
        view = block_index * block + stream.below(block)
        index.append((view, shard, stream.below(reader.counts[shard])))
    arrays = reader.gather("dense", np.array(index))
    spatial, global_ = (torch.from_numpy(arrays[f"dense/{name}"]) for name in ("spatial", "global"))
    return Responses(spatial, global_, reader.manifest, str(path))


def from_teacher(recipe: DumpRecipe, views: int) -> Responses:
    """Run the recipe's teacher on ``views`` views of samples spread over its shards.

    Every sample contributes one view, or several if there are fewer samples than views.
    """
    # The teacher always runs on full batches, so no part is smaller than one.
    parts = max(1, min(4, views // recipe.dump.batch_size))
    sampled = SampledDump.of(recipe, *open_stage_one(recipe), views, parts)
    each = -(-views // sampled.dataset.samples)
    logits = []
    with progress(each * sampled.dataset.samples, "views", "running the teacher") as meter:
        for batch in sampled.batches(each):
            logits.append(sampled.logits(batch))
            meter.advance(len(batch))
    found = Responses.join(logits, sampled.manifest, sampled.teacher.name)
    return replace(found, spatial=found.spatial[:views], global_=found.global_[:views])


def encode(encoding: Encoding, responses: Responses, device: torch.device) -> tuple[Rows, float]:
    """Return the encoded rows by array, and the median milliseconds per view on the device."""
    specs = encoding.arrays(ResponseShape(*responses.spatial.shape[1:]))
    buffer = UnitBuffer(1, len(responses), {spec.name: spec.fill for spec in specs})
    per_view = []  # in ms
    for start in range(0, len(responses), BATCH):
        part = slice(start, start + BATCH)
        d, g = (logits[part].to(device) for logits in (responses.spatial, responses.global_))
        seeds = responses.seeds[part]
        if start == 0:
            encoding.encode(d, g, seeds)  # the first call selects kernels
        wait_for(device)
        started = time.perf_counter()
        encoded = encoding.encode(d, g, seeds)
        wait_for(device)
        per_view.append(1e3 * (time.perf_counter() - started) / len(g))
        values = {name: rows.cpu().numpy() for name, rows in encoded.items()}
        buffer.put(0, np.arange(start, start + len(g)), values)
    return {name: rows[0] for name, rows in buffer.arrays.items()}, statistics.median(per_view)


def store(
    path: Path,
    responses: Responses,
    rows: Mapping[str, Rows],
    *,
    shard_length: int | None = None,
    view_block: int = 1,
) -> int:
    """Write a cache of these responses, laid out in tar shards and blocks of the given sizes.

    Args:
        rows: encoding name -> rows, as returned by :func:`encode`.
        shard_length: samples per tar shard; None: all responses form one shard.

    Returns:
        The number of responses stored: the first ones, as many as fill complete shards.
    """
    length = min(shard_length or len(responses), len(responses))
    block = max(n for n in range(1, view_block + 1) if n * length <= len(responses))
    shards = len(responses) // (block * length)
    keys = [[f"{shard:06}/{i:06}" for i in range(length)] for shard in range(shards)]
    infos = tuple(
        ShardInfo.of(f"sampled-{shard}.tar", names, length, f"{shard:064x}")
        for shard, names in enumerate(keys)
    )
    manifest = replace(
        responses.manifest,
        dataset=replace(responses.manifest.dataset, shards=infos),
        views=block,
        view_block=block,
        encodings=tuple(rows),
    )
    used = shards * block * length

    def by_shard(values: np.ndarray) -> np.ndarray:
        return values[:used].reshape(shards, block, length, *values.shape[1:])

    seeds = by_shard(responses.seeds)
    arrays = {name: by_shard(v) for encoded in rows.values() for name, v in encoded.items()}
    writer = CacheWriter.create(path, manifest)
    for unit in writer.todo():
        number = unit.shard
        writer.write_unit(
            unit,
            UnitData(
                keys=keys[number],
                labels=np.zeros(length, np.int32),
                image_crc32=np.zeros(length, np.uint32),
                seeds=seeds[number],
                view_digests=seeds[number].astype(np.uint32),
                arrays={name: values[number] for name, values in arrays.items()},
                top1=np.zeros((block, 2), np.uint32),
            ),
        )
    return used
