"""Images for evaluation: resized and cropped as timm does it, every sample exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cskd_pipeline.data.index import Dataset
from cskd_pipeline.data.read_ahead import ReadAhead, uses_of
from cskd_pipeline.data.workers import Loader
from cskd_pipeline.models.student import Preprocessing
from cskd_pipeline.runtime.distributed import ALONE, Ranks
from cskd_pipeline.views.decode import decode


@dataclass(frozen=True)
class EvalBatch:
    """``pixels``: (B, S, S, 3) uint8. ``label``: (B,) int64."""

    pixels: Tensor
    label: Tensor

    def pin_memory(self) -> EvalBatch:
        """Return the batch in memory that a GPU reads while it computes."""
        return EvalBatch(self.pixels.pin_memory(), self.label.pin_memory())


class EvalImages(TorchDataset[EvalBatch]):
    """Batch number -> batch of consecutive samples."""

    def __init__(self, dataset: Dataset, preprocessing: Preprocessing, batch_size: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.size = preprocessing.size
        # timm's own transform up to uint8: it leaves floats to the device.
        self.transform: Callable[[Image.Image], Tensor] = create_transform(
            preprocessing.size,
            is_training=False,
            use_prefetcher=True,
            interpolation=preprocessing.interpolation,
            crop_pct=preprocessing.crop_pct,
        )

    def __len__(self) -> int:
        return -(-self.dataset.samples // self.batch_size)

    def __getitem__(self, number: int) -> EvalBatch:
        start = number * self.batch_size
        stop = min(start + self.batch_size, self.dataset.samples)
        pixels = np.empty((stop - start, self.size, self.size, 3), np.uint8)
        labels = np.empty(stop - start, np.int64)
        done = first = 0  # samples read; number of the tar's first sample
        for shard, count in zip(self.dataset.shards, self.dataset.counts, strict=True):
            rows = range(max(start - first, 0), min(stop - first, count))
            first += count
            for row, data in zip(rows, shard.read_images(rows) if rows else (), strict=True):
                image = Image.fromarray(decode(data, shard.where(row)))
                planes = self.transform(image)  # (3, S, S)
                pixels[done] = np.asarray(planes).transpose(1, 2, 0)
                labels[done] = shard.label(row)
                done += 1
        assert done == len(labels)
        return EvalBatch(torch.from_numpy(pixels), torch.from_numpy(labels))


def eval_loader(
    dataset: Dataset,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int = 0,
    pin_memory: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[EvalBatch]:
    """Yield every sample once, in order; a rank has every ``world``-th batch.

    The last batch may be short.
    """
    images = EvalImages(dataset, preprocessing, batch_size)
    mine = range(ranks.rank, len(images), ranks.world)
    loader = Loader(images, mine, workers=workers, pin_memory=pin_memory)
    tars = [shard.path for shard in dataset.shards]
    numbers = np.repeat(np.arange(len(tars)), dataset.counts)
    uses = uses_of(tars, numbers, np.arange(len(numbers)) // (batch_size * ranks.world))
    yield from ReadAhead(tars, uses).over(loader)


def images_of_rank(dataset: Dataset, *, batch_size: int, ranks: Ranks = ALONE) -> int:
    """Count the images of a rank's batches from :func:`eval_loader`."""
    starts = range(0, dataset.samples, batch_size)[ranks.rank :: ranks.world]
    return sum(min(batch_size, dataset.samples - start) for start in starts)
