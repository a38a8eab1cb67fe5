"""All views of a cache's units, for the teacher: each image decoded once for a block of views.

A unit is (tar shard, block of views). It is cut into items, windows of neighbouring samples in all
the block's views, and an item into batches. Partners never leave their window, so an item needs
nothing from outside. Both cuts depend on the unit, the policy and the batch size alone, not on the
number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from cskd_pipeline.data.batches import Batch, compose
from cskd_pipeline.data.images import ImageSource
from cskd_pipeline.data.index import Dataset
from cskd_pipeline.data.plan import SampleSet
from cskd_pipeline.data.read_ahead import ReadAhead, uses_of
from cskd_pipeline.data.render import Renderer
from cskd_pipeline.data.workers import Loader
from cskd_pipeline.views.policy import ViewPolicy

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


class _UnitStream(IterableDataset[Batch | None]):
    """Yield one process's share of every unit's items, in batches, padded with None.

    The loader takes from its processes in turn. Padding keeps them level at the end of every unit,
    so that all batches of a unit come before those of the next.
    """

    def __init__(self, renderer: Renderer, units: Sequence[UnitViews], batch_size: int) -> None:
        self.renderer, self.units, self.batch_size = renderer, units, batch_size

    def items(self, unit: UnitViews) -> list[np.ndarray]:
        """Cut a unit; see :func:`items_of`."""
        count = self.renderer.samples.counts[unit[0]]
        return items_of(unit, count, self.renderer.policy, self.batch_size)

    def batches(self, item: np.ndarray) -> int:
        """Count the batches that an item makes."""
        return -(-len(item) // self.batch_size)

    def __iter__(self) -> Iterator[Batch | None]:
        worker = get_worker_info()
        lane, lanes = (worker.id, worker.num_workers) if worker else (0, 1)
        first = (
            0  # carried from unit to unit: else one process would get all the short last windows
        )
        for unit in self.units:
            items = self.items(unit)
            # Item i of all units is made by process i % lanes.
            shares = [items[(process - first) % lanes :: lanes] for process in range(lanes)]
            first += len(items)
            lengths = [sum(map(self.batches, share)) for share in shares]
            for item in shares[lane]:
                views = self.renderer.render(item)
                for start in range(0, len(item), self.batch_size):
                    part = item[start : start + self.batch_size]
                    yield compose(self.renderer, self.renderer.pair(part), views)
            yield from [None] * (max(lengths) - lengths[lane])


def unit_batches(
    dataset: Dataset,
    units: Sequence[UnitViews],
    policy: ViewPolicy,
    root_seed: int,
    loading: Loading,
) -> Iterator[Batch]:
    """Yield every view of every unit exactly once, in batches of at most ``loading.batch_size``.

    Units come in order, each complete before the next; within a unit the order of batches depends
    on ``loading.workers``, the batches do not. ``Batch.index`` says where each row belongs. They
    lie on the host.

    Raises:
        CskdError: an image or a tar that cannot be read.
    """
    renderer = Renderer(SampleSet.of(dataset), ImageSource(dataset.shards), policy, root_seed)
    stream = _UnitStream(renderer, units, loading.batch_size)
    kinds = {(renderer.samples.counts[shard], len(views)): (shard, views) for shard, views in units}
    items = [item for unit in kinds.values() for item in stream.items(unit)]
    ahead = max(map(stream.batches, items), default=1)
    loader: Loader[Batch | None] = Loader(
        stream,
        workers=loading.workers,
        pin_memory=torch.device(loading.device).type == "cuda",
        prefetch=max(2, ahead),  # all of an item: its process can start on the next one
    )
    tars = renderer.images.tars
    numbers = np.array([shard for shard, _ in units], np.int64)
    reader = ReadAhead(tars, uses_of(tars, numbers, np.arange(len(units))), len(units))
    unit = 0

    def position(batch: Batch | None) -> int:
        nonlocal unit
        if batch is not None:
            view, shard, _ = batch.index[-1].tolist()
            while shard != units[unit][0] or view not in units[unit][1]:
                unit += 1
        return unit

    yield from (batch for batch in reader.over(loader, position) if batch is not None)
