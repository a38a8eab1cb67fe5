"""The teacher run again on a sample of a cache's views."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cskd_pipeline.cache.check import Problem
from cskd_pipeline.cache.manifest import TeacherInfo
from cskd_pipeline.config.sections import is_factory
from cskd_pipeline.data.batches import render_batch
from cskd_pipeline.data.full_batches import logits_of
from cskd_pipeline.data.join import Join
from cskd_pipeline.data.replay import Replay, cache_of, renderer_of, same_images
from cskd_pipeline.distill.encodings import Encoding, temperature_near
from cskd_pipeline.distill.targets import SampledTargets
from cskd_pipeline.models.teacher import Teacher, load_teacher
from cskd_pipeline.models.timm_models import TeacherSource
from cskd_pipeline.runtime.device import pick_device
from cskd_pipeline.runtime.progress import progress

log = logging.getLogger(__name__)

MEAN_AGREEMENT = 0.98
"""The least, see :func:`agreement`. Logits rounded to float16 tie at 0.4 % of the locations
(K = 1000), where another machine's last bits change the label; other weights, or other pixels,
change far more."""
VIEW_AGREEMENT = 0.5
"""The least of one view: a tie of its global logits costs a third."""
RATIOS = (1.0, 0.5)
COMPARED = ("weights_sha256", "mean", "std", "grid", "num_classes", "size", "precision")
"""Of a manifest's teacher, what the one at hand must share; its name may differ."""


class Check(NamedTuple):
    """Hold what was looked at, as numbers by name, and what is wrong."""

    depth: str
    counts: dict[str, Any]
    problems: Sequence[Problem]


@dataclass(frozen=True)
class TeacherChoice:
    """Choose the teacher; ``name``, ``weights``, ``mean`` and ``std`` as for dump-teacher."""

    name: str
    weights: str = "hub"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    batch_size: int = 32
    device: str = "auto"


def check_teacher(found: Join, replayed: Replay, choice: TeacherChoice) -> list[Check]:
    """Compare the teacher with the cache's and, where they are one, its logits with the stored.

    Raises:
        TeacherError, WeightsError: there is no such teacher.
    """
    recorded = cache_of(found).manifest.teacher
    teacher = _load(choice, recorded)
    problems = [
        Problem("teacher", teacher.name, f"{name} is {here}, in the cache's manifest {its}")
        for name in COMPARED
        if (here := getattr(teacher, name)) != (its := getattr(recorded, name))
    ]
    counts = {"compared": len(COMPARED), "equal": len(COMPARED) - len(problems)}
    identity = Check("teacher", counts, problems)
    if problems:
        return [identity]
    return [identity, _check_responses(found, replayed, teacher)]


def _check_responses(found: Join, replayed: Replay, teacher: Teacher) -> Check:
    """Run it on the views that were replayed to the bit, and whose partners' images are equal."""
    cache = cache_of(found)
    renderer = renderer_of(found, strict=False)
    rows = replayed.rows[replayed.exact & replayed.same_seed]
    rows = rows[same_images(found, renderer.pair(rows).partner)] if len(rows) else rows
    parts: dict[str, list[np.ndarray]] = {name: [] for name in cache.encodings}
    with progress(len(rows), "views", "running the teacher again") as meter:
        for start in range(0, len(rows), teacher.batch_size):
            part = rows[start : start + teacher.batch_size]
            batch = render_batch(renderer, part).to(teacher.device)
            logits = logits_of(teacher, batch, cache.manifest.policy)
            seeds = np.array([cache.seeds(v, s)[o] for v, s, o in part.tolist()], np.uint64)
            for name, encoding in cache.encodings.items():
                live = encoding.encode(logits.spatial.cpu(), logits.global_.cpu(), seeds)
                stored = cache.gather(name, part)
                tensors = {n: torch.from_numpy(values) for n, values in stored.items()}
                parts[name].append(agreement(encoding, live, tensors))
            meter.advance(len(part))
    means: dict[str, float] = {}
    problems: list[Problem] = []
    for name, found_parts in parts.items() if len(rows) else ():
        values = np.concatenate(found_parts)
        means[name] = float(values.mean())
        problems += _problems(found, rows, name, values)
    return Check("answers", {"views": len(rows), **means}, problems)


def agreement(
    encoding: Encoding, live: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> np.ndarray:
    """Return how far two responses to each view agree, 0 to 1: (B,) float64.

    The share of equal hard labels, where the encoding has them, or of equal draws, else the overlap
    of the distributions (1 - total variation); the mean of that at r = 1, at 0.5, and of the global
    one.

    Args:
        live, stored: rows of the same views, see :meth:`Encoding.encode`.
    """
    measures = []
    for a, b in zip(*(_responses(encoding, rows) for rows in (live, stored)), strict=True):
        same = torch.minimum(a, b).exp().sum(1) if a.is_floating_point() else a == b
        measures.append(same.double().reshape(len(same), -1).mean(1))
    return torch.stack(measures).mean(0).numpy()


def _responses(encoding: Encoding, rows: Mapping[str, Tensor]) -> list[Tensor]:
    """Return labels or draws, else log probabilities: local at each of ``RATIOS``, then global."""
    targets, tau = encoding.targets(rows), temperature_near(encoding)
    if "hard" in encoding.serves:
        return [*map(targets.hard_spatial, RATIOS), targets.hard_global()]
    if isinstance(targets, SampledTargets):
        return [*(targets.drawn_spatial(r, tau) for r in RATIOS), targets.drawn_global(tau)]
    spatial = (targets.spatial_log_probabilities(r, tau) for r in RATIOS)
    return [*spatial, targets.global_log_probabilities(tau)]


def _problems(found: Join, rows: np.ndarray, name: str, values: np.ndarray) -> list[Problem]:
    problems = [
        Problem(
            "answers",
            found.images.where(shard, offset),
            f"{name}, view {view}: agrees by {value:.3f}, expected {VIEW_AGREEMENT} at least",
        )
        for (view, shard, offset), value in zip(rows.tolist(), values.tolist(), strict=True)
        if value < VIEW_AGREEMENT
    ]
    if not problems and values.mean() < MEAN_AGREEMENT:
        mean = f"{name} agrees by {values.mean():.4f}, expected {MEAN_AGREEMENT} at least"
        problems = [Problem("answers", "the mean of all views", mean)]
    return problems


def _load(choice: TeacherChoice, recorded: TeacherInfo) -> Teacher:
    """A factory is called without the cache's arguments: timm's and torchvision's models are known
    to do no harm with a stranger's, the user's own code is not.
    """
    kwargs = {} if is_factory(choice.name) else recorded.kwargs
    if kwargs != recorded.kwargs:
        log.warning(
            f"{choice.name} is called without the arguments that the cache records: a factory that "
            "needs some passes them itself"
        )
    source = TeacherSource(
        choice.name,
        choice.weights,
        recorded.num_classes,
        kwargs,
        mean=choice.mean or (),
        std=choice.std or (),
        precision=recorded.precision,
    )
    return load_teacher(
        source, size=recorded.size, batch_size=choice.batch_size, device=pick_device(choice.device)
    )
