"""All views of a cache's units, for the teacher: each image decoded once for a block of views.

A unit is (tar shard, block of views). It is cut into items, windows of neighbouring samples in all
the block's views, and an item into batches. Partners never leave their window, so an item needs
nothing from outside. Both cuts depend on the unit, the policy and the batch size alone, not on the
number of processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from cskd_pipeline.data.batches import Batch, Renderer, render_batch
from cskd_pipeline.data.images import ImageSource
from cskd_pipeline.data.index import Dataset
from cskd_pipeline.data.plan import SampleSet
from cskd_pipeline.data.read_ahead import ReadAhead, Use
from cskd_pipeline.data.remote_tar import RemoteTar, room_of
from cskd_pipeline.data.workers import Loader
from cskd_pipeline.views.policy import ViewPolicy

EARLY = 2  # units that are taken before they are needed where tars lie elsewhere, to fetch those
ITEM_BYTES = 2**28  # of rendered pixels that a process holds at a time

UnitViews = tuple[int, range]
"""Tar shard, and views."""


@dataclass(frozen=True)
class Loading:
    """Say how views are made, which changes none of them: batches, processes, device.

    Args:
        batch_size: views in a batch.
        workers: loader processes; 0: none.
        device: where the views go; for CUDA they come in pinned memory.
    """

    batch_size: int = 128
    workers: int = 0
    device: torch.device | str = "cpu"


def items_of(unit: UnitViews, count: int, policy: ViewPolicy, batch_size: int) -> list[np.ndarray]:
    """Cut a unit whose shard has ``count`` samples into items.

    Few views: several windows make an item, enough for a batch. Many or large views: a part of them
    makes an item, which then decodes its images for that part only.

    Returns:
        Each item's rows, view by view: (n, 3) int32 view, shard, offset.
    """
    shard, views = unit
    window_bytes = policy.window * policy.size * policy.size * 3
    parts = -(-len(views) // max(1, ITEM_BYTES // window_bytes))
    chunks = [chunk for chunk in np.array_split(np.array(views), parts) if len(chunk)]
    longest = len(chunks[0])
    windows = -(-batch_size // (policy.window * longest))
    windows = max(1, min(windows, ITEM_BYTES // (window_bytes * longest)))
    span = windows * policy.window
    grids = [
        np.meshgrid(chunk, shard, np.arange(start, min(start + span, count)), indexing="ij")
        for start in range(0, count, span)
        for chunk in chunks
    ]
    return [np.stack(grid, axis=-1).reshape(-1, 3).astype(np.int32) for grid in grids]


class _Items(TorchDataset[list[Batch]]):
    """Item -> its batches."""

    def __init__(self, renderer: Renderer, batch_size: int) -> None:
        self.renderer, self.batch_size = renderer, batch_size

    def __getitem__(self, item: np.ndarray) -> list[Batch]:
        views = self.renderer.render(item)
        parts = np.split(item, range(self.batch_size, len(item), self.batch_size))
        return [render_batch(self.renderer, part, views) for part in parts]


def unit_batches(
    dataset: Dataset,
    units: Iterable[UnitViews],
    policy: ViewPolicy,
    root_seed: int,
    loading: Loading,
) -> Iterator[Batch]:
    """Yield every view of every unit exactly once, in batches of at most ``loading.batch_size``.

    Units are taken from ``units`` when a process can start on them (a little earlier where their
    tars are fetched meanwhile), and come in that order, each complete before the next.
    ``Batch.index`` says where each row belongs. They lie on the host.
    """
    images = ImageSource(dataset.shards)
    renderer = Renderer(SampleSet.of(dataset), images, policy, root_seed)
    tars = images.tars
    early = 0 if room_of(tars) is None else EARLY
    ahead = ReadAhead(tars, None)

    def items() -> Iterator[np.ndarray]:
        taken, number = deque[list[np.ndarray]](), 0
        for shard, views in units:
            cut = items_of((shard, views), dataset.counts[shard], policy, loading.batch_size)
            if isinstance(tar := tars[shard], RemoteTar):
                ahead.add(Use(tar, number, number + len(cut) - 1))
            number += len(cut)
            taken.append(cut)
            if len(taken) > early:
                yield from taken.popleft()
        for cut in taken:
            yield from cut

    loader: Loader[list[Batch]] = Loader(
        _Items(renderer, loading.batch_size),
        items(),
        workers=loading.workers,
        pin_memory=torch.device(loading.device).type == "cuda",
    )
    for batches in ahead.over(loader):
        yield from batches
