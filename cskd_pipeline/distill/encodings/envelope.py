"""``envelope``: what every hard CKF label needs, at every ratio r, in about 200 bytes a view.

At one location class k is a line in r from its global to its spatial logit; the hard label is the
line on top. Only lines of the upper envelope are ever on top: they are stored, with the crossings
between them (:func:`cskd_pipeline.distill.ckf.upper_envelope`), and nothing is lost.

In memory a row of ``envelope/lines`` is (L, 2, h, w): the class of each line, and the crossing at
which the next one takes over, unused entries 65535. Stored, the crossings of one line stand next to
each other in front (:meth:`Envelope.pack`): the next line's classes say where they belong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from cskd_pipeline.distill.encodings.base import ArraySpec, ResponseShape, Rows
from cskd_pipeline.errors import CacheError

if TYPE_CHECKING:
    from torch import Tensor

    from cskd_pipeline.distill.targets import Targets

LINES = "envelope/lines"
GLOBAL_LABEL = "envelope/global_label"

UNUSED = 65535
_LINES_PER_CHUNK = 8  # no location needed more of 61,299 (K = 1000, augmented and mixed images)
_CHUNKS_PER_VIEW = 256  # at most, so that a shard's index stays small for very many classes

# Bytes per view at 2.3 lines a location, K = 1000, 7x7: lines as they are 269 at level 3, 258 at
# level 8; classes apart from crossings 253; crossings in front 235; level 19 224, at 25 times the
# time. Splitting high and low bytes costs 22; line 0 as a difference to global_label saves 2.
_LEVEL = 8


class Envelope:
    """(B, L, 2, h, w) lines and the (B,) class of the largest global logit, uint16."""

    name = "envelope"
    serves: tuple[str, ...] = ("hard",)
    exact = True
    min_temperature = 0.0

    def arrays(self, shape: ResponseShape) -> tuple[ArraySpec, ...]:
        """Return lines, in chunks of a few lines, and the global labels."""
        if shape.classes > UNUSED:
            raise CacheError(
                "the envelope encoding cannot hold so many classes",
                found=f"{shape.classes} classes",
                expected=f"at most {UNUSED}",
                action="use the encoding dense or dense-q8",
            )
        lines = max(_LINES_PER_CHUNK, -(-shape.classes // _CHUNKS_PER_VIEW))
        grid = (shape.height, shape.width)
        return (
            ArraySpec(
                name=LINES,
                dtype="uint16",
                axes=("line", "class_and_crossing", "row", "column"),
                tail=(shape.classes, 2, *grid),
                fill=UNUSED,
                level=_LEVEL,
                tail_chunk=(min(lines, shape.classes), 2, *grid),
                order=(0, 1, 4, 3, 2, 5, 6),  # all classes, then all crossings, line by line
                ragged=True,
            ),
            ArraySpec(
                name=GLOBAL_LABEL, dtype="uint16", axes=(), tail=(), fill=UNUSED, level=_LEVEL
            ),
        )

    def encode(self, spatial: Tensor, global_: Tensor) -> dict[str, Tensor]:
        """March along the upper envelope of every location."""
        import torch

        from cskd_pipeline.distill.ckf import hard_global_labels, upper_envelope

        planes = upper_envelope(spatial, global_)  # c0, q1, c1, q2, c2: one short of pairs
        samples, count, height, width = planes.shape
        last = planes.new_empty(samples, 1, height, width).fill_(UNUSED)
        pairs = torch.cat([planes.view(torch.int16), last.view(torch.int16)], dim=1)
        lines = pairs.reshape(samples, (count + 1) // 2, 2, height, width).view(torch.uint16)
        return {LINES: lines, GLOBAL_LABEL: hard_global_labels(global_).to(torch.uint16)}

    def targets(self, arrays: Mapping[str, Tensor]) -> Targets:
        """Return hard targets at every r."""
        import torch

        from cskd_pipeline.distill.targets import EnvelopeTargets

        planes = arrays[LINES].flatten(1, 2)[:, :-1]
        return EnvelopeTargets(planes, arrays[GLOBAL_LABEL].to(torch.int64))

    def pack(self, rows: Rows) -> Rows:
        """Move the crossings of each line to the front of its plane."""
        lines = rows[LINES].copy()
        used = lines[..., 1:, 0, :, :] != UNUSED
        crossings = lines[..., :-1, 1, :, :]
        locations = used.shape[-2] * used.shape[-1]
        front = np.arange(locations) < used.sum((-2, -1))[..., None]
        packed = np.full((*used.shape[:-2], locations), UNUSED, np.uint16)
        packed[front] = crossings[used]
        lines[..., :-1, 1, :, :] = packed.reshape(used.shape)
        return {**rows, LINES: lines}

    def unpack(self, rows: Rows, shape: ResponseShape) -> Rows:
        """Put the crossings back where the next line's classes are; refuse other classes."""
        lines = rows[LINES].copy()
        classes = lines[..., 0, :, :]
        used = classes[..., 1:, :, :] != UNUSED
        for found in (rows[GLOBAL_LABEL], classes[..., :1, :, :], classes[..., 1:, :, :][used]):
            if found.size and found.max() >= shape.classes:
                raise ValueError(f"class {found.max()} of {shape.classes}")
        packed = rows[LINES][..., :-1, 1, :, :]
        crossings = np.full(used.shape, UNUSED, np.uint16)
        crossings[used] = packed[packed != UNUSED]
        lines[..., :-1, 1, :, :] = crossings
        return {**rows, LINES: lines}
