"""Assembling on the device equals the numpy reference, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cskd_pipeline.data.assemble import assemble, normalise
from cskd_pipeline.data.batches import Batch, Renderer, render_batch
from cskd_pipeline.data.images import ImageSource
from cskd_pipeline.data.index import Dataset
from cskd_pipeline.data.plan import SampleSet
from cskd_pipeline.views.apply import mix_pixels, to_float
from cskd_pipeline.views.policy import ViewPolicy
from tests.data.factories import ROOT_SEED

POLICIES = {
    "both": {},
    "erased": {"erase": 1.0},
    "plain": {"erase": 0.0, "mix": 0.0},
    "mixup": {"cutmix_alpha": 0.0, "erase": 0.5},
    "cutmix": {"mixup_alpha": 0.0, "erase": 0.5},
}


def rendered(dataset: Dataset, policy: ViewPolicy) -> tuple[Renderer, np.ndarray, Batch]:
    renderer = Renderer(SampleSet.of(dataset), ImageSource(dataset.shards), policy, ROOT_SEED)
    rows = [(view, shard, o) for shard, o in ((0, 3), (0, 9), (0, 20), (1, 1), (2, 5), (3, 0))
            for view in range(3)]  # fmt: skip
    rows_array = np.array(rows, np.int32)
    return renderer, rows_array, render_batch(renderer, rows_array)


def reference(renderer: Renderer, rows: np.ndarray) -> np.ndarray:
    """Return (B, S, S, 3) images by the functions of ``views``, sample by sample."""
    pairing = renderer.pair(rows)
    views = renderer.render(np.concatenate([pairing.own, pairing.partner]))

    def floats(row: np.ndarray) -> np.ndarray:
        number = int(views.find(row[None])[0])
        return to_float(views.pixels[number], views.params[number], renderer.policy)

    return np.stack(
        [
            mix_pixels(floats(own), floats(partner), mix)
            for own, partner, mix in zip(pairing.own, pairing.partner, pairing.mixes, strict=True)
        ]
    )


@pytest.mark.parametrize("name", POLICIES)
def test_the_device_computes_the_same_as_the_reference(dataset: Dataset, name: str) -> None:
    policy = ViewPolicy(size=32, window=6, repeats=2, crop_area=(0.3, 1.0), **POLICIES[name])  # type: ignore[arg-type]
    renderer, rows, batch = rendered(dataset, policy)
    images = assemble(batch, policy)
    assert images.dtype == torch.float32
    assert images.shape == (len(rows), 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(reference(renderer, rows)))
    if name == "erased":
        assert len(batch.erase_box) >= len(batch.pixels) - 3
        assert images.min() < 0


def test_assembling_leaves_the_batch_unchanged(dataset: Dataset) -> None:
    policy = ViewPolicy(size=32, window=6, erase=1.0)
    _, _, batch = rendered(dataset, policy)
    before = batch.pixels.clone()
    first = assemble(batch, policy)
    assert torch.equal(first, assemble(batch, policy))
    assert torch.equal(batch.pixels, before)


def test_normalising_uses_mean_and_std_of_each_channel() -> None:
    images = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    normal = normalise(images, mean, std)
    for channel in range(3):
        expected = (images[:, channel] - torch.tensor(mean[channel])) / torch.tensor(std[channel])
        assert torch.equal(normal[:, channel], expected)
    assert normal.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_computes_the_same_without_synchronising(dataset: Dataset, tmp_path: Path) -> None:
    policy = ViewPolicy(size=32, window=6, repeats=2, erase=0.5)
    _, _, batch = rendered(dataset, policy)
    pinned = batch.pin_memory()
    assemble(pinned.to("cuda"), policy)  # constants are copied at the first use
    normalise(assemble(pinned.to("cuda"), policy), policy.mean, policy.std)
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = assemble(pinned.to("cuda"), policy)
        normal = normalise(images, policy.mean, policy.std)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(images.cpu(), assemble(batch, policy))
    assert torch.equal(normal.cpu(), normalise(assemble(batch, policy), policy.mean, policy.std))
