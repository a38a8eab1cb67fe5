"""``envelope``: the exact hard CKF labels at every ratio r, in about 200 bytes per view.

At one location, class k is a straight line in r from its global to its spatial logit, and the hard
label is the class of the highest line. The lines of the upper envelope and the crossings between
them (:func:`cskd_pipeline.distill.ckf.upper_envelope`) thus store every label without loss.

In memory a row of ``envelope/lines`` is (L, 2, h, w) for L lines: each line's class and its
crossing with the next line; unused entries are 65535. On disk the used crossings of each plane are
contiguous at its start (:meth:`Envelope.pack`); the next line's classes give their locations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from cskd_pipeline.distill.encodings.base import UNUSED, ArraySpec, Encoding, ResponseShape, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from cskd_pipeline.distill.targets import Targets

LINES = "envelope/lines"
GLOBAL_LABEL = "envelope/global_label"

_LINES_PER_CHUNK = 8  # enough for all of 61,299 locations (K = 1000, augmented and mixed images)
_CHUNKS_PER_VIEW = 256  # upper limit, so that a shard's index stays small for very many classes

# Bytes per view at 2.3 lines per location, K = 1000, 7x7: unpacked lines 269 at level 3 and 258 at
# level 8; classes separate from crossings 253; packed crossings 235; level 19 224, in 25 times the
# time. Splitting high and low bytes adds 22; line 0 relative to global_label saves 2.
_LEVEL = 8


class Envelope(Encoding):
    """(B, L, 2, h, w) lines and the (B,) class of the largest global logit, uint16."""

    name = "envelope"
    serves = ("hard",)
    exact = True
    temperatures = (0.0, math.inf)

    def arrays(self, shape: ResponseShape) -> tuple[ArraySpec, ...]:
        """Return lines, in chunks of a few lines, and the global labels."""
        return (
            lines_spec(LINES, shape),
            ArraySpec(GLOBAL_LABEL, "uint16", (), (), UNUSED, _LEVEL),
        )

    def encode(self, spatial: Tensor, global_: Tensor, seeds: np.ndarray) -> dict[str, Tensor]:
        """Return the upper envelope of every location and the global labels."""
        import torch

        from cskd_pipeline.distill.ckf import hard_global_labels, upper_envelope

        label = hard_global_labels(global_).to(torch.uint16)
        return {LINES: lines_of(upper_envelope(spatial, global_)), GLOBAL_LABEL: label}

    def targets(self, arrays: Mapping[str, Tensor]) -> Targets:
        """Return targets with the hard labels at every r."""
        import torch

        from cskd_pipeline.distill.targets import EnvelopeTargets

        return EnvelopeTargets(planes_of(arrays[LINES]), arrays[GLOBAL_LABEL].to(torch.int64))

    def pack(self, rows: Rows) -> Rows:
        """Move each plane's used crossings to its start."""
        return {**rows, LINES: packed_lines(rows[LINES])}

    def unpack(self, rows: Rows, shape: ResponseShape) -> Rows:
        """Move the crossings back to their locations; refuse classes that do not exist."""
        shape.require_classes(rows[GLOBAL_LABEL])
        return {**rows, LINES: unpacked_lines(rows[LINES], shape)}


def lines_spec(name: str, shape: ResponseShape) -> ArraySpec:
    """Return the specification of an array of envelope lines, in chunks of a few lines."""
    shape.require_numbered(name.partition("/")[0])
    lines = max(_LINES_PER_CHUNK, -(-shape.classes // _CHUNKS_PER_VIEW))
    grid = (shape.height, shape.width)
    return ArraySpec(
        name=name,
        dtype="uint16",
        axes=("line", "class_and_crossing", "row", "column"),
        tail=(shape.classes, 2, *grid),
        fill=UNUSED,
        level=_LEVEL,
        tail_chunk=(min(lines, shape.classes), 2, *grid),
        order=(0, 1, 4, 3, 2, 5, 6),  # in a chunk: all classes, then all crossings, line by line
        ragged=True,
    )


def lines_of(planes: Tensor) -> Tensor:
    """Convert planes (B, P, h, w) of an upper envelope to rows (B, L, 2, h, w), P = 2 * L - 1.

    The last line of ``c0, q1, c1, q2, c2`` has no crossing: a plane of fill completes the pairs.
    """
    import torch

    samples, count, height, width = planes.shape
    last = planes.new_empty(samples, 1, height, width).fill_(UNUSED)
    pairs = torch.cat([planes.view(torch.int16), last.view(torch.int16)], dim=1)
    return pairs.reshape(samples, (count + 1) // 2, 2, height, width).view(torch.uint16)


def planes_of(lines: Tensor) -> Tensor:
    """Convert rows (B, L, 2, h, w) back to planes (B, 2 * L - 1, h, w)."""
    return lines.flatten(1, 2)[:, :-1]


def packed_lines(rows: np.ndarray) -> np.ndarray:
    """Move the used crossings of each plane of (..., L, 2, h, w) lines to its start."""
    lines = rows.copy()
    used = lines[..., 1:, 0, :, :] != UNUSED
    crossings = lines[..., :-1, 1, :, :]
    locations = used.shape[-2] * used.shape[-1]
    front = np.arange(locations) < used.sum((-2, -1))[..., None]
    packed = np.full((*used.shape[:-2], locations), UNUSED, np.uint16)
    packed[front] = crossings[used]
    lines[..., :-1, 1, :, :] = packed.reshape(used.shape)
    return lines


def unpacked_lines(rows: np.ndarray, shape: ResponseShape) -> np.ndarray:
    """Undo :func:`packed_lines`; raise ``ValueError`` for classes that do not exist."""
    lines = rows.copy()
    classes = lines[..., 0, :, :]
    used = classes[..., 1:, :, :] != UNUSED
    shape.require_classes(classes[..., :1, :, :])
    shape.require_classes(classes[..., 1:, :, :][used])
    packed = rows[..., :-1, 1, :, :]
    crossings = np.full(used.shape, UNUSED, np.uint16)
    crossings[used] = packed[packed != UNUSED]
    lines[..., :-1, 1, :, :] = crossings
    return lines
