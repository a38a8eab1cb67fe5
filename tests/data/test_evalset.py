"""Evaluation images: timm's transform, every sample once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

from cskd_pipeline.config.reading import load_recipe
from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.data.evalset import eval_loader, images_of_rank
from cskd_pipeline.data.index import Dataset
from cskd_pipeline.runtime.distributed import Ranks
from cskd_pipeline.views.decode import decode


@dataclass(frozen=True)
class Preprocessing:
    size: int = 32
    crop_pct: float = 0.9
    interpolation: str = "bicubic"


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_is_yielded_once_in_order_as_timm_transforms_it(
    dataset: Dataset, workers: int
) -> None:
    loader = eval_loader(dataset, Preprocessing(), batch_size=10, workers=workers)
    batches = list(loader)
    assert [len(batch.label) for batch in batches] == [10, 10, 10, 10, 3]
    pixels = torch.cat([batch.pixels for batch in batches])
    labels = torch.cat([batch.label for batch in batches])
    assert pixels.dtype == torch.uint8
    transform = create_transform(
        32, is_training=False, interpolation="bicubic", crop_pct=0.9, mean=(0,) * 3, std=(1,) * 3
    )
    i = 0
    for shard in dataset.shards:
        for row in range(len(shard)):
            image = Image.fromarray(decode(next(shard.read_images([row])), ""))
            expected = transform(image).permute(1, 2, 0)
            assert torch.equal(pixels[i].float() / 255, expected)
            assert labels[i] == shard.label(row)
            i += 1
    assert i == len(pixels)


def test_batches_are_distributed_over_ranks(dataset: Dataset) -> None:
    full = [b.label.tolist() for b in eval_loader(dataset, Preprocessing(), batch_size=10)]
    parts = [
        [b.label.tolist() for b in eval_loader(
            dataset, Preprocessing(), batch_size=10, ranks=Ranks(rank, 2)
        )]
        for rank in range(2)
    ]  # fmt: skip
    assert parts == [full[0::2], full[1::2]]
    for rank, batches in enumerate(parts):
        count = images_of_rank(dataset, batch_size=10, ranks=Ranks(rank, 2))
        assert count == sum(map(len, batches))


def test_the_papers_images_are_resized_to_256_and_cropped_to_224(dataset: Dataset) -> None:
    """As the authors do with torchvision; timm's default crop of 0.9 for these students differs."""
    recipe = load_recipe(TrainRecipe, "paper_tiny")
    preprocessing = Preprocessing(224, recipe.eval.crop_pct, recipe.eval.interpolation)
    theirs = Compose([Resize(256, InterpolationMode.BICUBIC), CenterCrop(224), PILToTensor()])
    found = next(iter(eval_loader(dataset, preprocessing, batch_size=3))).pixels
    for row, pixels in enumerate(found):
        image = Image.fromarray(decode(next(dataset.shards[0].read_images([row])), ""))
        assert torch.equal(pixels.permute(2, 0, 1), theirs(image))


def test_crop_and_interpolation_are_applied(dataset: Dataset) -> None:
    variants = [
        Preprocessing(),
        Preprocessing(crop_pct=0.5),
        Preprocessing(interpolation="nearest"),
    ]
    pixels = [
        next(iter(eval_loader(dataset, variant, batch_size=4))).pixels.numpy()
        for variant in variants
    ]
    assert not np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
