"""``sampled``: unbiased draws of the soft target, at every ratio r, in about 300 bytes a draw.

With Gumbel noise on its logits, a location's envelope is an exact draw from softmax(fused(r) / tau)
at every r (:mod:`cskd_pipeline.distill.gumbel`); at r = 0 all locations hold draws from the global
target, softmax(g / tau). Number of draws and tau are fixed when the cache is dumped, and stand in
its manifest. Noise is independent between draws, locations and views, and comes from the views'
seeds: with the logits at hand anyone can make the draws again.

The loss is the cross entropy with the drawn labels, mean over draws. Its expectation is the cross
entropy with the soft target: its gradient is that of the KL divergence, its value is larger by the
target's entropy.

Stored as ``envelope`` is, the draws' grids one below the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from cskd_pipeline.distill.encodings.base import ArraySpec, Encoding, ResponseShape, Rows
from cskd_pipeline.distill.encodings.envelope import (
    lines_of,
    lines_spec,
    packed_lines,
    planes_of,
    unpacked_lines,
)
from cskd_pipeline.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from cskd_pipeline.distill.targets import Targets

LINES = "sampled/lines"


class Sampled(Encoding):
    """(B, L, 2, draws * h, w) uint16 lines, as those of ``envelope``.

    Args:
        draws: of each location of a view, 1 to 8.
        temperature: tau of the soft targets that are drawn from, 0.01 to 1000, the only one that is
            served.

    Raises:
        UsageError: draws or a temperature out of range.
    """

    name = "sampled"
    serves = ("soft",)
    exact = False

    def __init__(self, draws: int = 1, temperature: float = 1.0) -> None:
        if not (1 <= draws <= 8 and 0.01 <= temperature <= 1000.0):
            raise UsageError(
                "the sampled encoding cannot draw like this",
                found=f"{draws} draws at temperature {temperature}",
                expected="1 to 8 draws at a temperature of 0.01 to 1000",
            )
        self.draws, self.temperature = draws, float(temperature)
        self.temperatures = (self.temperature, self.temperature)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sampled) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.draws, self.temperature))

    def to_json(self) -> dict[str, float]:
        """Return what a manifest states: ``draws`` and ``temperature``."""
        return {"draws": self.draws, "temperature": self.temperature}

    def arrays(self, shape: ResponseShape) -> tuple[ArraySpec, ...]:
        """Return the lines, in chunks of a few."""
        return (lines_spec(LINES, self._below_each_other(shape)),)

    def encode(self, spatial: Tensor, global_: Tensor, seeds: np.ndarray) -> dict[str, Tensor]:
        """March along the upper envelope of every location's noisy lines."""
        from cskd_pipeline.distill.gumbel import noisy_envelopes

        return {
            LINES: lines_of(noisy_envelopes(spatial, global_, seeds, self.draws, self.temperature))
        }

    def targets(self, arrays: Mapping[str, Tensor]) -> Targets:
        """Return draws of the soft targets at every r."""
        from cskd_pipeline.distill.targets import SampledTargets

        return SampledTargets(planes_of(arrays[LINES]), self.draws, self.temperature)

    def pack(self, rows: Rows) -> Rows:
        """Move the crossings of each line to the front of its plane."""
        return {LINES: packed_lines(rows[LINES])}

    def unpack(self, rows: Rows, shape: ResponseShape) -> Rows:
        """Put the crossings back where the next line's classes are; refuse other classes."""
        return {LINES: unpacked_lines(rows[LINES], self._below_each_other(shape))}

    def _below_each_other(self, shape: ResponseShape) -> ResponseShape:
        return shape._replace(height=self.draws * shape.height)
