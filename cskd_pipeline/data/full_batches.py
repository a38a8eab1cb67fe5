"""Full batches for a teacher, regrouped from the loader's batches of any size.

The teacher always runs on a full batch and pads a short one with zeros. Loaders cut batches at the
windows of a tar shard, so the remainder is kept on the device for the next batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cskd_pipeline.data.assemble import assemble, normalise
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.models.teacher import Logits, Teacher
from cskd_pipeline.views.policy import ViewPolicy


@dataclass(frozen=True)
class TeacherViews:
    """n views for a teacher, and the record of each.

    - ``images``: (n, 3, S, S) float32 on the device, not normalised; in [0, 1] except for noise in
      erased boxes.
    - ``label``: (n,) int64 on the device, label of the image with the larger share of the view.
    - ``index``: (n, 3) int32 view, shard, offset, on the host, like the following fields.
    - ``seed``: (n,) uint64; ``image_crc32``, ``view_digest``: (n,) uint32.
    """

    images: Tensor
    label: Tensor
    index: np.ndarray
    seed: np.ndarray
    image_crc32: np.ndarray
    view_digest: np.ndarray

    @classmethod
    def of(cls, batch: Batch, policy: ViewPolicy, device: torch.device | str) -> TeacherViews:
        """Return the views of a host batch on ``device``, without synchronising."""
        moved = batch.to(device)
        own = batch.own.numpy()
        return cls(
            images=assemble(moved, policy),
            label=torch.where(moved.lam >= 0.5, moved.label, moved.partner_label),
            index=batch.index.numpy(),
            seed=batch.seed.numpy()[own],
            image_crc32=batch.image_crc32.numpy()[own],
            view_digest=batch.view_digest.numpy()[own],
        )

    @classmethod
    def join(cls, parts: Sequence[TeacherViews]) -> TeacherViews:
        """Concatenate ``parts``; a single part is not copied."""
        if len(parts) == 1:
            return parts[0]
        columns: Any = zip(*map(TeacherViews._columns, parts), strict=True)
        return cls(*map(_concatenate, columns))

    def _columns(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice) -> TeacherViews:
        return TeacherViews(*(column[rows] for column in self._columns()))


def _concatenate(column: Any) -> Any:
    return torch.cat(column) if torch.is_tensor(column[0]) else np.concatenate(column)


def full_batches(pieces: Iterable[TeacherViews], size: int) -> Iterator[TeacherViews]:
    """Yield the same views in the same order, in batches of ``size``; the last may be short."""
    kept: list[TeacherViews] = []
    for piece in pieces:
        kept.append(piece)
        if sum(map(len, kept)) < size:
            continue
        views = TeacherViews.join(kept)
        end = len(views) - len(views) % size
        for start in range(0, end, size):
            yield views[start : start + size]
        kept = [views[end:]] if end < len(views) else []
    if kept:
        yield TeacherViews.join(kept)


def logits_of(teacher: Teacher, batch: Batch, policy: ViewPolicy) -> Logits:
    """Return the teacher's checked logits for the views of a batch on its device."""
    return teacher.respond(normalise(assemble(batch, policy), teacher.mean, teacher.std))
