"""Images for evaluation: resized and cropped like timm's, every sample exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cskd_pipeline.data.images import ImageSource
from cskd_pipeline.data.index import Dataset
from cskd_pipeline.data.plan import SampleSet
from cskd_pipeline.data.read_ahead import ReadAhead, uses_of
from cskd_pipeline.data.workers import Loader
from cskd_pipeline.models.student import Preprocessing
from cskd_pipeline.runtime.distributed import ALONE, Ranks
from cskd_pipeline.views.decode import decode


@dataclass(frozen=True)
class EvalBatch:
    """B images for evaluation: ``pixels`` (B, S, S, 3) uint8, ``label`` (B,) int64."""

    pixels: Tensor
    label: Tensor

    def pin_memory(self) -> EvalBatch:
        """Return the batch in pinned memory."""
        return EvalBatch(self.pixels.pin_memory(), self.label.pin_memory())


class EvalImages(TorchDataset[EvalBatch]):
    """Data set from samples, (B, 2) shard and offset, to their batch."""

    def __init__(self, dataset: Dataset, preprocessing: Preprocessing) -> None:
        self.images, self.size = ImageSource(dataset.shards), preprocessing.size
        # With use_prefetcher, timm's transform returns uint8, which is converted on the device.
        self.transform: Callable[[Image.Image], Tensor] = create_transform(
            preprocessing.size,
            is_training=False,
            use_prefetcher=True,
            interpolation=preprocessing.interpolation,
            crop_pct=preprocessing.crop_pct,
        )

    def __getitem__(self, samples: np.ndarray) -> EvalBatch:
        pixels = np.empty((len(samples), self.size, self.size, 3), np.uint8)
        for i, data, _ in self.images.read(samples):
            image = Image.fromarray(decode(data, self.images.where(*samples[i].tolist())))
            pixels[i] = np.asarray(self.transform(image)).transpose(1, 2, 0)  # from (3, S, S)
        return EvalBatch(torch.from_numpy(pixels), torch.from_numpy(self.images.labels(samples)))


def eval_loader(
    dataset: Dataset,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int = 0,
    pin_memory: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[EvalBatch]:
    """Yield a rank's batches, every ``world``-th of all samples in order; the last may be short."""
    images, samples = EvalImages(dataset, preprocessing), SampleSet.of(dataset).all_samples()
    starts = range(0, len(samples), batch_size)[ranks.rank :: ranks.world]
    batches = (samples[start : start + batch_size] for start in starts)
    loader = Loader(images, batches, workers=workers, pin_memory=pin_memory)
    tars, position = images.images.tars, np.arange(len(samples)) // (batch_size * ranks.world)
    yield from ReadAhead(tars, uses_of(tars, samples[:, 0], position)).over(loader)


def images_of_rank(dataset: Dataset, *, batch_size: int, ranks: Ranks = ALONE) -> int:
    """Count the images in a rank's batches from :func:`eval_loader`."""
    starts = range(0, dataset.samples, batch_size)[ranks.rank :: ranks.world]
    return sum(min(batch_size, dataset.samples - start) for start in starts)
