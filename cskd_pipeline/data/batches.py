"""Batches as they are loaded: uint8 views, the numbers that mix them, labels, encoded targets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cskd_pipeline.data.render import Pairing, RenderedViews, Renderer
from cskd_pipeline.views.apply import erase_noise


@dataclass(frozen=True)
class Batch:
    """Hold B samples in one view each, made of U rendered views of S x S pixels.

    On the device after :meth:`to`:

    - ``pixels``: (U, S, S, 3) uint8, cropped, flipped and recoloured; not yet erased or mixed.
    - ``own``, ``partner``: (B,) int64 into ``pixels``; equal where nothing is mixed in.
    - ``lam``: (B,) float32, the share of the sample's own pixels.
    - ``cutmix_box``: (B, 4) int32 top, left, height, width taken from the partner; of no area for
      mixup.
    - ``label``, ``partner_label``: (B,) int64.
    - ``erase_box``: (E, 5) int32 number in ``pixels``, top, left, height, width.
    - ``erase_noise``: (sum of 3 * height * width,) int16, standard normal times 256, box by box.
    - ``targets``: the teacher's response, encoded: array name -> (B, ...).

    On the host always: ``index`` (B, 3) int32 view, shard, offset; ``seed`` (U,) uint64,
    ``image_crc32`` and ``view_digest`` (U,) uint32 of each rendered view; ``drifted``, how many of
    them are not as the cache recorded them.
    """

    pixels: Tensor
    own: Tensor
    partner: Tensor
    lam: Tensor
    cutmix_box: Tensor
    label: Tensor
    partner_label: Tensor
    erase_box: Tensor
    erase_noise: Tensor
    index: Tensor
    seed: Tensor
    image_crc32: Tensor
    view_digest: Tensor
    drifted: int = 0
    targets: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.own)

    def to(self, device: torch.device | str) -> Batch:
        """Return it with the first group of fields on ``device``; does not wait for pinned ones."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return it with the first group of fields in pinned memory, for a GPU to copy from."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Any) -> Batch:
        moved = {name: change(getattr(self, name)) for name in _ON_DEVICE}
        targets = {name: change(tensor) for name, tensor in self.targets.items()}
        return replace(self, targets=targets, **moved)


_ON_DEVICE = (
    *("pixels", "own", "partner", "lam", "cutmix_box", "label", "partner_label"),
    *("erase_box", "erase_noise"),
)


def render_batch(renderer: Renderer, rows: np.ndarray) -> Batch:
    """Render the samples ``rows``, (B, 3) view, shard, offset: see :class:`Batch`; no targets yet.

    Raises:
        CskdError: whatever :meth:`Renderer.render` raises.
    """
    pairing = renderer.pair(rows)
    views = renderer.render(np.concatenate([pairing.own, pairing.partner]))
    return compose(renderer.labels(pairing), pairing, views)


def compose(labels: np.ndarray, pairing: Pairing, views: RenderedViews) -> Batch:
    """Make a batch of rendered views; of more than it needs, only what it needs is copied.

    Args:
        labels: (2, B) int64, of the samples and of their partners.
    """
    needed, number = np.unique(
        np.concatenate([views.find(pairing.own), views.find(pairing.partner)]), return_inverse=True
    )
    own, partner = np.split(number, 2)
    everything = len(needed) == len(views.rows)
    pixels = views.pixels if everything else views.pixels[needed]
    params = [views.params[i] for i in needed]
    boxes = [(i, *box) for i, param in enumerate(params) for box in param.erase]
    noise = [erase_noise(param) for param in params if param.erase]
    cutmix = [mix.box if mix.cutmix else (0, 0, 0, 0) for mix in pairing.mixes]
    arrays: dict[str, np.ndarray] = {
        "pixels": pixels,
        "own": own,
        "partner": partner,
        "lam": np.array([mix.lam for mix in pairing.mixes], np.float32),
        "cutmix_box": np.array(cutmix, np.int32),
        "label": labels[0],
        "partner_label": labels[1],
        "erase_box": np.array(boxes, np.int32).reshape(-1, 5),
        "erase_noise": np.concatenate([np.empty(0, np.int16), *noise]),
        "index": pairing.own.astype(np.int32),
        "seed": views.seed[needed],
        "image_crc32": views.image_crc32[needed],
        "view_digest": views.digest[needed],
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(drifted=views.drifted, targets={}, **tensors)
