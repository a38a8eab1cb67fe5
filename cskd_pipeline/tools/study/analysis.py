"""Measures of trained networks in addition to top-1: local accuracy and attention distance."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cskd_pipeline.data.assemble import normalise
from cskd_pipeline.data.evalset import eval_loader
from cskd_pipeline.data.index import Dataset
from cskd_pipeline.models.checkpoint import load_student
from cskd_pipeline.models.cut import head_per_location
from cskd_pipeline.models.student import Student

BATCH = 256


@torch.inference_mode()
def local_accuracy(teacher: Path, validation: Dataset, device: torch.device) -> float:
    """Return the percentage of locations whose largest spatial logit is the image's class.

    Args:
        teacher: ``.safetensors`` file of a CNN, written by ``train``.
    """
    network, _ = load_student(teacher, device)
    correct = locations = 0
    for images, labels in _images(network, validation, device):
        model: Any = network.model
        predicted = head_per_location(model, model.forward_features(images)).argmax(1)  # (B, h, w)
        correct += int((predicted == labels[:, None, None]).sum())
        locations += predicted.numel()
    return 100 * correct / locations


@torch.inference_mode()
def attention_distances(student: Path, validation: Dataset, device: torch.device) -> list[float]:
    """Return each layer's mean attention distance in pixels, over heads and patches.

    A patch's distance to the others is weighted by its attention to them (arXiv 2010.11929, section
    4.5), excluding tokens that are not patches. Measured on the first 256 images.
    """
    network, _ = load_student(student, device)
    model: Any = network.model.eval()
    layers: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False  # fused attention exposes no attention map
        block.attn.attn_drop.register_forward_hook(
            partial(_keep_distance, layers, _patch_distances(model, device), model)
        )
    images, _ = next(_images(network, validation, device))
    model(images)
    return [float(layer) for layer in layers]


def _keep_distance(
    layers: list[Tensor], distances: Tensor, model: Any, layer: object, given: object, out: Tensor
) -> None:
    """Append the mean distance of a layer's attention map ``out``, (B, heads, N, N)."""
    patches = out[:, :, model.num_prefix_tokens :, model.num_prefix_tokens :].float()
    layers.append(((patches * distances).sum(-1) / patches.sum(-1)).mean())


def _patch_distances(model: Any, device: torch.device) -> Tensor:
    """Return the distances in pixels between all patch centres, (N, N)."""
    (rows, columns), (height, width) = model.patch_embed.grid_size, model.patch_embed.patch_size
    corners = torch.cartesian_prod(
        height * torch.arange(rows, device=device), width * torch.arange(columns, device=device)
    ).float()
    return torch.cdist(corners, corners)


def _images(
    network: Student, validation: Dataset, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of normalised images, (B, 3, S, S), and their labels, (B,)."""
    network.eval()
    for batch in eval_loader(validation, network.preprocessing, batch_size=BATCH):
        pixels = batch.pixels.to(device).permute(0, 3, 1, 2).float() / 255
        yield normalise(pixels, network.mean, network.std), batch.label.to(device)
