"""Measuring a student on labelled shards: top-1 and top-5 of each head and of their mean."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.utils import AverageMeter, accuracy

from cskd_pipeline.data.assemble import normalise
from cskd_pipeline.data.evalset import EvalBatch, eval_loader
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.errors import DataError
from cskd_pipeline.models.checkpoint import load_student, student_file
from cskd_pipeline.models.student import Student, inference_logits
from cskd_pipeline.runtime.classes import ClassGuard
from cskd_pipeline.runtime.device import pick_device, worker_count
from cskd_pipeline.runtime.distributed import ALONE, Ranks
from cskd_pipeline.runtime.progress import progress

log = logging.getLogger(__name__)

Metrics = dict[str, dict[str, float]]


@torch.inference_mode()
def measure(
    student: Student,
    loader: Iterable[EvalBatch],
    *,
    heads: tuple[str, ...],
    grid: tuple[int, int] | None,
    device: torch.device,
    amp: torch.dtype | None = None,
    on_batch: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Metrics:
    """Return top-1 and top-5 in percent of each of ``heads`` and of ``mean``.

    ``mean`` averages the logits of ``heads`` (CSKD §4: class, distillation, and the mean over
    patches of the dense logits). A head that was not trained is not measured. Ranks
    that each have a part of the samples all get the figures of the whole. ``on_batch`` is told
    after every batch how many images it had.

    Raises:
        DataError: no samples.
    """
    student.eval()
    meters: dict[str, tuple[AverageMeter, AverageMeter]] = {}
    autocast = torch.autocast(device.type, amp) if amp else nullcontext()
    for batch in loader:
        pixels = batch.pixels.to(device, non_blocking=True)
        labels = batch.label.to(device, non_blocking=True)
        images = normalise(pixels.permute(0, 3, 1, 2).float() / 255, student.mean, student.std)
        with autocast:
            predicted = student(images, grid)
        every = predicted.logits()
        logits = {name: every[name].float() for name in heads}
        logits["mean"] = inference_logits(predicted, heads).float()
        for name, value in logits.items():
            top1, top5 = accuracy(value, labels, topk=(1, 5))
            one, five = meters.setdefault(name, (AverageMeter(), AverageMeter()))
            one.update(top1, len(labels))
            five.update(top5, len(labels))
        if on_batch is not None:
            on_batch(len(labels))
    sums = {
        name: (float(one.sum), float(five.sum), one.count) for name, (one, five) in meters.items()
    }
    parts = [part for part in ranks.gather(sums) if part]
    if not parts:
        raise DataError("no samples to evaluate on")
    found: Metrics = {}
    for name in parts[0]:
        first, fifth, count = map(sum, zip(*(part[name] for part in parts), strict=True))
        found[name] = {"top1": first / count, "top5": fifth / count}
    return found


def evaluate(
    checkpoint: Path,
    shards: str,
    *,
    split: str = "",
    crop_pct: float | None = None,
    batch_size: int = 256,
    workers: int = -1,
    device: str = "auto",
    accept_classes: bool = False,
) -> dict[str, Any]:
    """``cskd-pipeline evaluate``: measure a checkpoint (or a run folder's best) on shards.

    Args:
        crop_pct: see :class:`Preprocessing`; None: as the run that made the checkpoint evaluated.
        accept_classes: class k of the shards is the student's, whatever the names say.

    Raises:
        CskdError: student or shards cannot be used, or do not have the same classes.
    """
    path = student_file(Path(checkpoint))
    target = pick_device(device)
    student, card = load_student(path, target)
    dataset = load_dataset(
        shards,
        split=split or None,
        prefer=("validation", "val", "test"),
    )
    guard = ClassGuard(accept=accept_classes)
    dataset = dataset.fitting(card.classes(path), "the shards", guard)
    guard.report()
    shown = student.preprocessing.changed(crop_pct, None)
    loader = eval_loader(
        dataset,
        shown,
        batch_size=batch_size,
        workers=worker_count(workers),
        pin_memory=target.type == "cuda",
    )
    started = time.perf_counter()
    with progress(dataset.samples, "images", "evaluating") as meter:
        metrics = measure(
            student,
            meter.timed(loader),
            heads=card.heads,
            grid=card.grid,
            device=target,
            on_batch=meter.advance,
        )
    return {
        "checkpoint": str(path),
        "model": card.model,
        "method": card.method,
        "heads": list(card.heads),
        "crop_pct": shown.crop_pct,
        "interpolation": shown.interpolation,
        "samples": dataset.samples,
        "accepted_classes": guard.accepted,
        "seconds": time.perf_counter() - started,
        "top1": metrics["mean"]["top1"],
        "top5": metrics["mean"]["top5"],
        "per_head": metrics,
    }
