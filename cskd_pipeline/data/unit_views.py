"""All views of a cache's units, for the teacher: each image decoded once per block of views.

A unit is (tar shard, block of views). It is cut into items, windows of neighbouring samples in all
the block's views, and items into batches. Partners share a window, so an item is self-contained.
Both cuts depend only on the unit, the policy and the batch size, not on the number of processes.
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

UNITS_AHEAD = 2  # units taken early if their tars are remote, to fetch the tars meanwhile
ITEM_BYTES = 2**28  # maximum bytes of rendered pixels in an item

UnitViews = tuple[int, range]
"""Tar shard and views."""


@dataclass(frozen=True)
class Loading:
    """Options for rendering views, none of which changes the views.

    Args:
        batch_size: views per batch.
        workers: number of loader processes; 0: load in this process.
        device: device the views are for; CUDA: batches are in pinned memory.
    """

    batch_size: int = 128
    workers: int = 0
    device: torch.device | str = "cpu"


def items_of(unit: UnitViews, count: int, policy: ViewPolicy, batch_size: int) -> list[np.ndarray]:
    """Cut a unit whose shard has ``count`` samples into items.

    With few views, an item has several windows, enough for a batch. With many or large views, it
    has only some of the views, and each such item decodes the images again.

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
    """Data set from an item to its batches."""

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

    Units are taken from ``units`` when a process can start on them (slightly earlier if their tars
    are remote) and yielded in that order, each complete before the next. The batches are on the
    host; ``Batch.index`` identifies their rows.
    """
    images = ImageSource(dataset.shards)
    renderer = Renderer(SampleSet.of(dataset), images, policy, root_seed)
    tars = images.tars
    units_ahead = 0 if room_of(tars) is None else UNITS_AHEAD
    ahead = ReadAhead(tars, None)

    def items() -> Iterator[np.ndarray]:
        taken, number = deque[list[np.ndarray]](), 0
        for shard, views in units:
            cut = items_of((shard, views), dataset.counts[shard], policy, loading.batch_size)
            if isinstance(tar := tars[shard], RemoteTar):
                ahead.add(Use(tar, number, number + len(cut) - 1))
            number += len(cut)
            taken.append(cut)
            if len(taken) > units_ahead:
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
