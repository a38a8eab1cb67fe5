"""What must hold on every device, counted on this one with the user's own images."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cskd_pipeline.config import DumpRecipe
from cskd_pipeline.data.assemble import assemble, normalise
from cskd_pipeline.data.cached_loader import CachedLoader
from cskd_pipeline.data.training_views import open_views
from cskd_pipeline.distill.targets import LogitTargets
from cskd_pipeline.models.teacher import Logits
from cskd_pipeline.pipeline.dump import open_stage_one
from cskd_pipeline.tools.bench.bench_dump import RATIOS, resident_views
from cskd_pipeline.tools.bench.sampled_dump import SampledDump

VIEWS = 2
"""Of every image, in the cache that is compared with its teacher."""


def check_companions(recipe: DumpRecipe, images: int) -> dict[str, Any]:
    """Count logits of views that change with the other views of their batch; there must be none.

    The same views come in order, in reverse, each half among views of zeros, and one alone.

    Returns:
        ``logits``: how many float16 values were compared; ``differ``: how many were others.
    """
    few = _few(recipe, images)
    views = resident_views(few)[0]
    half, nothing = len(views) // 2, torch.zeros_like(views)
    upper, lower = views.clone(), views.clone()
    upper[half:], lower[:half] = nothing[half:], nothing[:half]
    expected = few.teacher.respond(views)
    pairs = [
        (expected, _flipped(few.teacher.respond(views.flip(0)))),
        (_rows(expected, slice(half)), _rows(few.teacher.respond(upper), slice(half))),
        (_rows(expected, slice(half, None)), _rows(few.teacher.respond(lower), slice(half, None))),
        (_rows(expected, slice(1)), few.teacher.respond(views[:1])),
    ]
    counts = [_differing(a, b) for pair in pairs for a, b in zip(*pair, strict=True)]
    return _about(few) | {
        "logits": sum(total for total, _ in counts),
        "differ": sum(differ for _, differ in counts),
    }


def check_cache(recipe: DumpRecipe, images: int) -> dict[str, Any]:
    """Count hard labels, local at five r and global, that a cache has unlike its teacher run live.

    The cache is dumped and read as the two stages do; the live teacher sees the training batches,
    assembled on the device.

    Returns:
        ``labels``: how many were compared; ``differ``: how many were others; there must be none.
    """
    recipe = replace(recipe, cache=replace(recipe.cache, encodings=("envelope",)))
    few = _few(recipe, images)
    teacher, labels, differ = few.teacher, 0, 0
    with tempfile.TemporaryDirectory(prefix="cskd-check-") as folder:
        path = Path(folder) / "cache"
        few.write_to(path, VIEWS, lambda count: None)
        views = open_views(recipe.data.shards, path)
        size = min(recipe.dump.batch_size, few.dataset.samples) // 2 * 2
        loader = CachedLoader(views, size, repeats=1, device=teacher.device)
        for batch in loader.batches(VIEWS * len(loader)):
            batch = batch.to(teacher.device)
            pixels = assemble(batch, views.policy)
            live = LogitTargets(*teacher.respond(normalise(pixels, teacher.mean, teacher.std)))
            cached = views.targets(batch)
            assert cached is not None
            pairs = [(cached.hard_global(), live.hard_global())]
            pairs += [(cached.hard_spatial(r), live.hard_spatial(r)) for r in RATIOS]
            for found, expected in pairs:
                labels += found.numel()
                differ += int((found != expected).sum())
    return _about(few) | {"labels": labels, "differ": differ}


def _few(recipe: DumpRecipe, images: int) -> SampledDump:
    dataset, teacher = open_stage_one(recipe)
    return SampledDump.of(recipe, dataset, teacher, min(images, dataset.samples))


def _about(few: SampledDump) -> dict[str, Any]:
    return {"teacher": few.teacher.name, "precision": few.teacher.precision}


def _flipped(logits: Logits) -> Logits:
    return Logits(*(values.flip(0) for values in logits))


def _rows(logits: Logits, rows: slice) -> Logits:
    return Logits(*(values[rows] for values in logits))


def _differing(expected: Tensor, found: Tensor) -> tuple[int, int]:
    return expected.numel(), int((expected.view(torch.int16) != found.view(torch.int16)).sum())
