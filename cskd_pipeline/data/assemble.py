"""Views on the device: uint8 to floats, erased, mixed, normalised, without synchronising."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from cskd_pipeline.data.batches import Batch
from cskd_pipeline.views.policy import ViewPolicy


def assemble(batch: Batch, policy: ViewPolicy) -> Tensor:
    """Return the images of ``batch`` on its device, not normalised.

    Every image equals ``mix_pixels(to_float(own), to_float(partner), mix)`` of
    :mod:`cskd_pipeline.views.apply`, bit for bit on CPU.

    Returns:
        (B, 3, S, S) float32 in channels_last memory; in [0, 1] outside erased boxes.
    """
    views = batch.pixels.to(torch.float32) / _constant((255.0,), batch.pixels.device)
    _erase(views, batch, policy)
    size = views.shape[1]
    top, left, height, width = batch.cutmix_box.unsqueeze(-1).unbind(1)  # (B, 1) each
    index = torch.arange(size, device=views.device)
    inside_rows = (index >= top) & (index < top + height)
    inside_columns = (index >= left) & (index < left + width)
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]  # (B, S, S)
    # A weight of exactly 0 or 1 copies: own * 1 + partner * 0 is bit-identical to own.
    is_cutmix = (height * width > 0)[:, :, None]
    weight = torch.where(is_cutmix, (~inside).to(torch.float32), batch.lam[:, None, None])
    weight = weight.unsqueeze(-1)  # (B, S, S, 1)
    mixed = views[batch.own] * weight + views[batch.partner] * (1.0 - weight)
    return mixed.permute(0, 3, 1, 2)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return ``(images - mean) / std`` for (B, 3, S, S) images."""
    shape = (1, len(mean), 1, 1)
    means = _constant(tuple(mean), images.device).view(shape)
    stds = _constant(tuple(std), images.device).view(shape)
    return (images - means) / stds


def _erase(views: Tensor, batch: Batch, policy: ViewPolicy) -> None:
    """Write mean + std * z into the erased boxes of ``views``, (U, S, S, 3), in place."""
    pixels = batch.erase_noise.numel() // 3
    if pixels == 0:
        return
    device, size = views.device, views.shape[1]
    source, top, left, height, width = batch.erase_box.to(torch.int64).unbind(1)
    area = height * width
    box = torch.repeat_interleave(torch.arange(len(area), device=device), area, output_size=pixels)
    within = torch.arange(pixels, device=device) - (area.cumsum(0) - area)[box]
    row = top[box] + torch.div(within, width[box], rounding_mode="floor")
    column = left[box] + within % width[box]
    z = batch.erase_noise.view(pixels, 3).to(torch.float32) / _constant((256.0,), device)
    noise = z * _constant(policy.std, device) + _constant(policy.mean, device)
    views.view(-1, 3)[(source[box] * size + row) * size + column] = noise


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a tensor of ``values``, cached per device: each copy to a GPU would synchronise."""
    return torch.tensor(values, dtype=torch.float32, device=device)
