"""The teacher's label at every location, for all ratios r at once.

The label of a location changes at a few values of r. Exact encodings give all of them. Approximate
ones are read at a few ratios, and a change between two of these is placed halfway.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.distill import ckf
from cskd_pipeline.distill.encodings import Encoding, temperature_near
from cskd_pipeline.distill.targets import EnvelopeTargets, LogitTargets, SampledTargets, Targets
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.views.bits import BitStream, derive_seed

RATIOS = np.linspace(0.0, 1.0, 101)
RATIO_AXIS = "r, from local (1) to global (0)"
APPROXIMATED = np.linspace(0.0, 1.0, 21)
"""Ratios at which approximate encodings are read."""
SLABS = 64  # slabs that views are drawn from; as many files of a remote cache
_BATCH = 32  # views whose logits are in memory


@dataclass(frozen=True)
class Labels:
    """The labels of n views.

    Args:
        encoding: name of the encoding they come from.
        exact: whether they are exactly the labels of the teacher's logits.
        planes: (n, P, h, w) uint16, see :func:`cskd_pipeline.distill.ckf.upper_envelope`.
    """

    encoding: str
    exact: bool
    planes: np.ndarray

    def at(self, r: float) -> np.ndarray:
        """Return the labels at one ratio: (n, h, w) int64."""
        return ckf.envelope_labels(torch.from_numpy(self.planes), r).numpy()

    def agreement(self, *classes: np.ndarray) -> np.ndarray:
        """Return the share of locations whose label is one of ``classes``, at ``RATIOS``: (101,).

        Args:
            classes: class arrays, each (n, h, w), or (n, 1, 1) for whole views.
        """
        labels = (self.at(r) for r in RATIOS)
        return np.array([np.any([at == each for each in classes], 0).mean() for at in labels])

    def lines(self) -> np.ndarray:
        """Count the labels of each location between r = 0 and r = 1: (n, h, w) int64."""
        return (self.planes[:, 0::2] != ckf.UNUSED).sum(axis=1)

    def classes(self) -> np.ndarray:
        """Return the distinct classes among the labels."""
        lines = self.planes[:, 0::2]
        return np.unique(lines[lines != ckf.UNUSED])

    def by_location(self) -> list[list[list[int]]]:
        """Return for each view, and each location row by row, ``[c0, q1, c1, q2, c2, ...]``.

        Class c1 takes over from c0 at r = (q1 + 0.5) / QUANTUM.
        """
        count, planes = self.planes.shape[:2]
        used = 2 * self.lines().reshape(count, -1) - 1
        flat = self.planes.reshape(count, planes, -1).transpose(0, 2, 1)
        return [
            [values[:n].tolist() for values, n in zip(view, ends, strict=True)]
            for view, ends in zip(flat, used, strict=True)
        ]


def read_labels(cache: Cache, rows: np.ndarray) -> Labels:
    """Read the labels of views, (n, 3) view, shard, offset, n > 0."""
    name = (cache.serving({"hard"}) or cache.serving({"soft"}, None))[0]
    encoding = cache.encodings[name]
    parts: list[np.ndarray] = []
    with progress(len(rows), "views", "reading labels") as meter:
        for targets in read_targets(cache, name, rows):
            parts.append(_planes(encoding, targets))
            meter.advance(len(parts[-1]))
    deepest = max(part.shape[1] for part in parts)
    planes = [
        np.pad(
            part,
            ((0, 0), (0, deepest - part.shape[1]), (0, 0), (0, 0)),
            constant_values=ckf.UNUSED,
        )
        for part in parts
    ]
    return Labels(name, encoding.exact, np.concatenate(planes))


def read_targets(cache: Cache, name: str, rows: np.ndarray) -> Iterator[Targets]:
    """Yield the targets of views from the encoding ``name``, in batches."""
    for part in np.split(rows, range(_BATCH, len(rows), _BATCH)):
        arrays = cache.gather(name, part)
        tensors = {array: torch.from_numpy(values) for array, values in arrays.items()}
        yield cache.encodings[name].targets(tensors)


def _planes(encoding: Encoding, targets: Targets) -> np.ndarray:
    if isinstance(targets, EnvelopeTargets):
        return targets.planes.numpy()
    if isinstance(targets, LogitTargets) and encoding.exact:
        return ckf.upper_envelope(targets.spatial, targets.global_).numpy()
    if isinstance(targets, SampledTargets):  # the first draw of each location
        return targets.planes.unflatten(2, (targets.draws, -1))[:, :, 0].numpy()
    if "hard" in encoding.serves:
        found = [targets.hard_spatial(float(r)) for r in APPROXIMATED]
    else:
        tau = temperature_near(encoding)
        found = [targets.spatial_log_probabilities(float(r), tau).argmax(1) for r in APPROXIMATED]
    return planes_of(torch.stack(found, dim=1).numpy())


def planes_of(labels: np.ndarray) -> np.ndarray:
    """Return planes, (n, P, h, w) uint16, that give labels (n, R, h, w) at ``APPROXIMATED``."""
    count, _, height, width = labels.shape
    changes = labels[:, 1:] != labels[:, :-1]
    deepest = int(changes.sum(axis=1).max(initial=0))
    planes = np.full((count, 2 * deepest + 1, height, width), ckf.UNUSED, np.uint16)
    planes[:, 0] = labels[:, 0]
    middle = ((APPROXIMATED[1:] + APPROXIMATED[:-1]) / 2 * ckf.QUANTUM - 0.5).round()
    for i, step, row, column in np.argwhere(changes).tolist():
        at = 2 * int(changes[i, : step + 1, row, column].sum()) - 1
        planes[i, at, row, column] = middle[step]
        planes[i, at + 1, row, column] = labels[i, step + 1, row, column]
    return planes


def draw_rows(cache: Cache, count: int, seed: int = 0) -> np.ndarray:
    """Draw up to ``count`` views of finished units from a seed, from few slabs.

    Returns:
        (n, 3) int64 view, shard, offset, sorted.
    """
    block, units = cache.manifest.view_block, np.argwhere(cache.done()).tolist()
    pairs = [(b * block + v, shard) for b, shard in units for v in range(block)]
    bits = BitStream(derive_seed("preview", seed))
    rows: list[tuple[int, int, int]] = []
    for number, i in enumerate(np.argsort(bits.raw(len(pairs)), kind="stable").tolist()):
        if number >= SLABS and len(rows) >= count:
            break
        view, shard = pairs[i]
        rows += [(view, shard, offset) for offset in range(cache.counts[shard])]
    chosen = np.argsort(bits.raw(len(rows)), kind="stable")[:count]
    return np.array(sorted(rows[i] for i in chosen), np.int64)
