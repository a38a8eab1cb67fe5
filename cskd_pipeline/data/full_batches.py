"""Full batches for a teacher, whatever pieces the loader delivers.

The model always sees a whole batch, and fills a short one up with zeros. Loaders cut where windows
of a tar shard end, so what they leave over is kept here, on the device, for the next batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cskd_pipeline.data.assemble import assemble
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.views.policy import ViewPolicy


@dataclass(frozen=True)
class TeacherViews:
    """n views as a teacher sees them, and what is recorded of each.

    - ``images``: (n, 3, S, S) float32 on the device, not yet normalised.
    - ``label``: (n,) int64 on the device, of the picture that fills more of the view.
    - ``index``: (n, 3) int32 view, shard, offset, on the host as all that follows.
    - ``seed``: (n,) uint64; ``image_crc32``, ``view_digest``: (n,) uint32.
    """

    images: Tensor
    label: Tensor
    index: np.ndarray
    seed: np.ndarray
    image_crc32: np.ndarray
    view_digest: np.ndarray

    @classmethod
    def of(cls, batch: Batch, policy: ViewPolicy, device: torch.device) -> TeacherViews:
        """The views of a batch that lies on the host, which waits for nothing."""
        there = batch.to(device)
        own = batch.own.numpy()
        return cls(
            images=assemble(there, policy),
            label=torch.where(there.lam >= 0.5, there.label, there.partner_label),
            index=batch.index.numpy(),
            seed=batch.seed.numpy()[own],
            image_crc32=batch.image_crc32.numpy()[own],
            view_digest=batch.view_digest.numpy()[own],
        )

    @classmethod
    def join(cls, parts: Sequence[TeacherViews]) -> TeacherViews:
        """One after the other; a single part is not copied."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            images=torch.cat([part.images for part in parts]),
            label=torch.cat([part.label for part in parts]),
            index=np.concatenate([part.index for part in parts]),
            seed=np.concatenate([part.seed for part in parts]),
            image_crc32=np.concatenate([part.image_crc32 for part in parts]),
            view_digest=np.concatenate([part.view_digest for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice) -> TeacherViews:
        return TeacherViews(
            images=self.images[rows],
            label=self.label[rows],
            index=self.index[rows],
            seed=self.seed[rows],
            image_crc32=self.image_crc32[rows],
            view_digest=self.view_digest[rows],
        )


def full_batches(pieces: Iterable[TeacherViews], size: int) -> Iterator[TeacherViews]:
    """The same views in the same order, ``size`` at a time; only the last batch may be shorter."""
    kept: list[TeacherViews] = []
    for piece in pieces:
        kept.append(piece)
        if sum(map(len, kept)) < size:
            continue
        views = TeacherViews.join(kept)
        whole = len(views) - len(views) % size
        for start in range(0, whole, size):
            yield views[start : start + size]
        kept = [views[whole:]] if whole < len(views) else []
    if kept:
        yield TeacherViews.join(kept)
