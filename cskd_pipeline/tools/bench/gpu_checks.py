"""Exactness that must hold on every device, checked on this one with the user's own images."""

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
"""Views per image in the cache that is compared with its teacher."""


def check_teacher(recipe: DumpRecipe, images: int) -> dict[str, Any]:
    """Run both checks with a recipe's teacher on ``images`` images sampled from its shards.

    Returns:
        ``companions`` and ``cache``: how many values were ``compared`` and how many ``differ``.
    """
    recipe = replace(recipe, cache=replace(recipe.cache, encodings=("envelope",)))
    sampled = SampledDump.of(recipe, *open_stage_one(recipe), images)
    return {
        "teacher": sampled.teacher.name,
        "precision": sampled.teacher.precision,
        "companions": check_companions(sampled),
        "cache": check_cache(sampled),
    }


def check_companions(sampled: SampledDump) -> dict[str, int]:
    """Count logits that change with the other views of their batch; there must be none.

    The same views are run in order, in reverse, with either half replaced by zeros, and one alone.
    """
    views = resident_views(sampled)[0]
    half, zeros = len(views) // 2, torch.zeros_like(views)
    upper, lower = views.clone(), views.clone()
    upper[half:], lower[:half] = zeros[half:], zeros[:half]
    respond = sampled.teacher.respond
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


def check_cache(sampled: SampledDump) -> dict[str, int]:
    """Count cached hard labels that differ from the live teacher's; there must be none.

    Global labels and local ones at five r are compared. The cache is dumped and read as in the two
    stages; the live teacher runs on the training batches, assembled on the device.
    """
    with tempfile.TemporaryDirectory(prefix="cskd-check-") as folder:
        path = Path(folder) / "cache"
        for _ in sampled.dump_to(path, VIEWS):
            pass
        views = open_views(sampled.recipe.data.shards, path)
        size = min(sampled.recipe.dump.batch_size, sampled.dataset.samples) // 2 * 2
        loader = CachedLoader(views, size, repeats=1, device=sampled.teacher.device)
        pairs = []
        for batch in loader.batches(VIEWS * len(loader)):
            batch = batch.to(sampled.teacher.device)
            cached, logits = views.targets(batch), logits_of(sampled.teacher, batch, views.policy)
            assert cached is not None
            live = LogitTargets(*logits)
            pairs.append((cached.hard_global(), live.hard_global()))
            pairs += [(cached.hard_spatial(r), live.hard_spatial(r)) for r in RATIOS]
    return count_differences(pairs)


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the number of differing values of each check; the goal is 0."""
    texts = {
        "companions": "logits that change with the other views of a batch",
        "cache": "cached hard labels that differ from the live teacher's",
    }
    for check, text in texts.items():
        found = report[check]
        counts = f"{found['differ']:,} of {found['compared']:,}"
        name = f"{text}: {report['teacher']}, {report['precision']}"
        yield Figure(name, counts, "0", found["differ"] == 0)
