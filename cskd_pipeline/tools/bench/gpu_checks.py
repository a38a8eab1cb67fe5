"""Promises that must hold on every device, counted on this one with the user's own images."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cskd_pipeline.config.sections import DumpRecipe
from cskd_pipeline.data.cached_loader import CachedLoader
from cskd_pipeline.data.full_batches import logits_of
from cskd_pipeline.data.training_views import open_views
from cskd_pipeline.distill.targets import LogitTargets
from cskd_pipeline.pipeline.dump import open_stage_one
from cskd_pipeline.tools.bench.bench_dump import RATIOS, count_differences, resident_views
from cskd_pipeline.tools.bench.sampled_dump import SampledDump
from cskd_pipeline.tools.bench.timing import Figure

VIEWS = 2
"""Of every image, in the cache that is compared with its teacher."""


def check_teacher(recipe: DumpRecipe, images: int) -> dict[str, Any]:
    """Run both checks with a recipe's teacher, on ``images`` sampled images of its shards.

    Returns:
        ``companions`` and ``cache``: how many values were ``compared``, and how many ``differ``.
    """
    recipe = replace(recipe, cache=replace(recipe.cache, encodings=("envelope",)))
    few = SampledDump.of(recipe, *open_stage_one(recipe), images)
    return {
        "teacher": few.teacher.name,
        "precision": few.teacher.precision,
        "companions": check_companions(few),
        "cache": check_cache(few),
    }


def check_companions(few: SampledDump) -> dict[str, int]:
    """Count logits of views that change with the other views of their batch; there must be none.

    The same views come in order, in reverse, each half among views of zeros, and one alone.
    """
    views = resident_views(few)[0]
    half, nothing = len(views) // 2, torch.zeros_like(views)
    upper, lower = views.clone(), views.clone()
    upper[half:], lower[:half] = nothing[half:], nothing[:half]
    respond = few.teacher.respond
    expected = respond(views)
    found = [
        (slice(None), [logits.flip(0) for logits in respond(views.flip(0))]),
        (slice(half), respond(upper)),
        (slice(half, None), respond(lower)),
        (slice(1), respond(views[:1])),
    ]
    return count_differences(
        (one[rows].view(torch.int16), other[rows].view(torch.int16))
        for rows, responses in found
        for one, other in zip(expected, responses, strict=True)
    )


def check_cache(few: SampledDump) -> dict[str, int]:
    """Count hard labels, local at five r and global, that a cache has unlike its teacher run live.

    The cache is dumped and read as the two stages do; the live teacher sees the training batches,
    assembled on the device. There must be none.
    """
    with tempfile.TemporaryDirectory(prefix="cskd-check-") as folder:
        path = Path(folder) / "cache"
        for _ in few.dump_to(path, VIEWS):
            pass
        views = open_views(few.recipe.data.shards, path)
        size = min(few.recipe.dump.batch_size, few.dataset.samples) // 2 * 2
        loader = CachedLoader(views, size, repeats=1, device=few.teacher.device)
        pairs = []
        for batch in loader.batches(VIEWS * len(loader)):
            batch = batch.to(few.teacher.device)
            cached, logits = views.targets(batch), logits_of(few.teacher, batch, views.policy)
            assert cached is not None
            live = LogitTargets(*logits)
            pairs.append((cached.hard_global(), live.hard_global()))
            pairs += [(cached.hard_spatial(r), live.hard_spatial(r)) for r in RATIOS]
    return count_differences(pairs)


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield how many values differ that must not."""
    texts = {
        "companions": "logits that change with the other views of a batch",
        "cache": "hard labels of a cache that are not the live teacher's",
    }
    for name, text in texts.items():
        found = report[name]
        counts = f"{found['differ']:,} of {found['compared']:,}"
        what = f"{text}: {report['teacher']}, {report['precision']}"
        yield Figure(what, counts, "0", found["differ"] == 0)
