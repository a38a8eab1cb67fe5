"""A student's accuracy on labelled shards: top-1 and top-5 of each head and of their mean."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import accuracy
from torch import Tensor

from cskd_pipeline.data.assemble import normalise
from cskd_pipeline.data.evalset import EvalBatch, eval_loader
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.errors import DataError
from cskd_pipeline.models.checkpoint import load_student, student_file
from cskd_pipeline.models.student import Grid, Student, inference_logits
from cskd_pipeline.runtime.classes import COMMAND_SWITCH, ClassGuard
from cskd_pipeline.runtime.device import pick_device, worker_count
from cskd_pipeline.runtime.distributed import ALONE, Ranks
from cskd_pipeline.runtime.progress import Meter, progress

log = logging.getLogger(__name__)

Metrics = dict[str, dict[str, float]]


@torch.inference_mode()
def measure(
    student: Student,
    batches: Iterable[EvalBatch],
    heads: tuple[str, ...],
    grid: Grid | None,
    *,
    amp: torch.dtype | None = None,
    ranks: Ranks = ALONE,
) -> Metrics:
    """Return top-1 and top-5 in percent of each of ``heads`` and of ``mean``.

    ``mean`` averages the logits of ``heads``, those that were trained (CSKD §4: class,
    distillation, and the mean over patches of the dense logits). Each rank passes its part of the
    samples and gets the metrics over all of them.
    """
    student.eval()
    device = next(student.parameters()).device
    count, sums = 0, dict[str, Tensor]()  # (top-1, top-5) in percent, times images
    for batch in batches:
        pixels = batch.pixels.to(device, non_blocking=True)
        labels = batch.label.to(device, non_blocking=True)
        images = normalise(pixels.permute(0, 3, 1, 2).float() / 255, student.mean, student.std)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            predicted = student(images, grid)
        by_head = predicted.logits()
        logits = {name: by_head[name].float() for name in heads}
        logits["mean"] = inference_logits(predicted, heads).float()
        count += len(labels)
        for name, value in logits.items():
            both = torch.stack(accuracy(value, labels, topk=(1, 5)))
            sums[name] = sums.get(name, 0) + both * len(labels)
    own = (count, {name: both.tolist() for name, both in sums.items()})
    parts = [part for part in ranks.gather(own) if part[0]]
    if not parts:
        raise DataError("no samples to evaluate on")
    total = sum(count for count, _ in parts)
    metrics: Metrics = {}
    for name in parts[0][1]:
        top1, top5 = (sum(part[name][k] for _, part in parts) / total for k in (0, 1))
        metrics[name] = {"top1": top1, "top5": top5}
    return metrics


@dataclass(frozen=True)
class EvalOptions:
    """Options for evaluating a checkpoint.

    Args:
        crop_pct: see :class:`Preprocessing`; None: the value of the checkpoint's own run.
        accept_classes: evaluate even if the class names of shards and student differ.
    """

    split: str | None = None
    crop_pct: float | None = None
    batch_size: int = 256
    workers: int = -1
    device: str = "auto"
    accept_classes: bool = False


def evaluate(checkpoint: Path, shards: str, options: EvalOptions = EvalOptions()) -> dict[str, Any]:
    """Evaluate a checkpoint (or a run folder's best) on shards: ``cskd-pipeline evaluate``."""
    path = student_file(Path(checkpoint))
    device = pick_device(options.device)
    student, header = load_student(path, device)
    prefer = ("validation", "val", "test")
    dataset = load_dataset(shards, split=options.split, prefer=prefer)
    guard = ClassGuard(COMMAND_SWITCH, accept=options.accept_classes)
    dataset = dataset.with_classes_of(header.classes(path), "the shards", guard)
    guard.report_new()
    preprocessing = student.preprocessing.override(options.crop_pct, None)
    loader = eval_loader(
        dataset,
        preprocessing,
        batch_size=options.batch_size,
        workers=worker_count(options.workers),
        pin_memory=device.type == "cuda",
    )
    started = time.perf_counter()
    with progress(dataset.samples, "images", "evaluating") as meter:
        batches = count_images(meter.timed(loader), meter)
        metrics = measure(student, batches, header.heads, header.grid)
    return {
        "checkpoint": str(path),
        "model": header.model,
        "method": header.method,
        "heads": list(header.heads),
        "crop_pct": preprocessing.crop_pct,
        "interpolation": preprocessing.interpolation,
        "samples": dataset.samples,
        "accepted_classes": guard.accepted,
        "seconds": time.perf_counter() - started,
        "top1": metrics["mean"]["top1"],
        "top5": metrics["mean"]["top5"],
        "per_head": metrics,
    }


def count_images(batches: Iterable[EvalBatch], meter: Meter) -> Iterator[EvalBatch]:
    """Yield ``batches``; advance ``meter`` by each one's images when the next is requested."""
    for batch in batches:
        yield batch
        meter.advance(len(batch.label))
