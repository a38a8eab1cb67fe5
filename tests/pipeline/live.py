"""The live teacher, run by code that shares nothing with loader, device and cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cskd_pipeline.cache.manifest import CacheManifest
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.models.teacher import Teacher, TeacherSource, load_teacher
from cskd_pipeline.views.apply import mix_pixels, render, to_float
from cskd_pipeline.views.bits import view_seed
from cskd_pipeline.views.decode import decode
from cskd_pipeline.views.draw import draw
from cskd_pipeline.views.mixing import draw_mix, matching


def teacher_of(manifest: CacheManifest, batch_size: int = 16) -> Teacher:
    """Return the teacher of a cache that was dumped with random weights of seed 0."""
    info = manifest.teacher
    source = TeacherSource(
        info.name, "random", info.num_classes, info.kwargs, mean=info.mean, std=info.std
    )
    teacher = load_teacher(source, size=info.size, batch_size=batch_size)
    assert teacher.weights_sha256 == info.weights_sha256
    return teacher


@dataclass(frozen=True)
class LiveResponse:
    """float16 logits of one view of a tar shard: ``spatial`` (n, K, h, w), ``global_`` (n, K)."""

    view: int
    shard: int
    spatial: np.ndarray
    global_: np.ndarray


def live_responses(shards: Path, cache: Path) -> Iterator[LiveResponse]:
    """Yield the teacher's logits for every view in the cache, computed from the image bytes."""
    manifest = open_cache(cache).manifest
    policy, root = manifest.policy, manifest.root_seed
    teacher = teacher_of(manifest)
    mean = np.array(teacher.mean, np.float32)
    std = np.array(teacher.std, np.float32)
    for number, shard in enumerate(load_dataset(str(shards)).shards):
        count = len(shard)
        images = [decode(next(shard.read_images([i])), shard.key(i)) for i in range(count)]
        for view in range(manifest.views):
            seeds = [view_seed(root, key, view) for key in shard.keys]
            sizes = [(im.shape[1], im.shape[0]) for im in images]
            params = [draw(s, policy, *size) for s, size in zip(seeds, sizes, strict=True)]
            views = [
                to_float(render(im, p, policy), p, policy)
                for im, p in zip(images, params, strict=True)
            ]
            partner = matching(root, shard.keys_sha256, count, view, policy)
            mixed = [
                mix_pixels(views[i], views[j], draw_mix(seeds[i], seeds[j], policy))
                for i, j in enumerate(partner.tolist())
            ]
            pixels = (np.stack(mixed) - mean) / std
            with torch.inference_mode():
                response = teacher.respond(torch.from_numpy(pixels).permute(0, 3, 1, 2))
            yield LiveResponse(view, number, response.spatial.numpy(), response.global_.numpy())
