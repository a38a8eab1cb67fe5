"""The teacher's label at every location, for all ratios r at once.

The label of a location changes at a few values of r. Exact encodings know them all. Approximate
ones give a label at some ratios, and a change between two of these is put in the middle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.distill import ckf
from cskd_pipeline.distill.encodings import temperature_near
from cskd_pipeline.distill.targets import EnvelopeTargets, LogitTargets, SampledTargets, Targets

RATIOS = np.linspace(0.0, 1.0, 21)
_AT_ONCE = 32  # views whose logits are held


@dataclass(frozen=True)
class Labels:
    """The labels of n views.

    Args:
        encoding: where they come from.
        exact: whether these are the labels of the teacher's own logits.
        planes: (n, P, h, w) uint16, see :func:`cskd_pipeline.distill.ckf.upper_envelope`.
    """

    encoding: str
    exact: bool
    planes: np.ndarray

    def at(self, r: float) -> np.ndarray:
        """Return the labels at one ratio: (n, h, w) int64."""
        return ckf.envelope_labels(torch.from_numpy(self.planes), r).numpy()

    def lines(self) -> np.ndarray:
        """Count the labels that a location has between r = 0 and r = 1: (n, h, w) int64."""
        return (self.planes[:, 0::2] != ckf.UNUSED).sum(axis=1)

    def classes(self) -> np.ndarray:
        """Return the classes among the labels, each once."""
        lines = self.planes[:, 0::2]
        return np.unique(lines[lines != ckf.UNUSED])

    def by_location(self) -> list[list[list[int]]]:
        """Return, of every view and then location, row by row, the planes in use.

        These are ``[c0, q1, c1, q2, c2, ...]``: class c1 takes over at r = (q1 + 0.5) / QUANTUM.
        """
        count, planes = self.planes.shape[:2]
        used = 2 * self.lines().reshape(count, -1) - 1
        flat = self.planes.reshape(count, planes, -1).transpose(0, 2, 1)
        return [
            [values[:n].tolist() for values, n in zip(view, ends, strict=True)]
            for view, ends in zip(flat, used, strict=True)
        ]


def read_labels(cache: Cache, rows: np.ndarray) -> Labels:
    """Read the labels of the views ``rows``, (n, 3) view, shard, offset, n > 0.

    Raises:
        CacheError: a unit is not done, or damaged.
    """
    name = (cache.serving({"hard"}) or cache.serving({"soft"}, None))[0]
    parts = [
        _planes(cache, name, part) for part in np.split(rows, range(_AT_ONCE, len(rows), _AT_ONCE))
    ]
    count, height, width = len(rows), *parts[0].shape[2:]
    planes = np.full((count, max(p.shape[1] for p in parts), height, width), ckf.UNUSED, np.uint16)
    for start, part in zip(range(0, count, _AT_ONCE), parts, strict=True):
        planes[start : start + len(part), : part.shape[1]] = part
    return Labels(name, cache.encodings[name].exact, planes)


def read_targets(cache: Cache, name: str, rows: np.ndarray) -> Targets:
    """Read the targets that the encoding ``name`` has of the views ``rows``."""
    arrays = {n: torch.from_numpy(values) for n, values in cache.gather(name, rows).items()}
    return cache.encodings[name].targets(arrays)


def _planes(cache: Cache, name: str, rows: np.ndarray) -> np.ndarray:
    encoding, targets = cache.encodings[name], read_targets(cache, name, rows)
    if isinstance(targets, EnvelopeTargets):
        return targets.planes.numpy()
    if isinstance(targets, LogitTargets) and encoding.exact:
        return ckf.upper_envelope(targets.spatial, targets.global_).numpy()
    if isinstance(targets, SampledTargets):  # the first draw of each location
        return targets.planes.unflatten(2, (targets.draws, -1))[:, :, 0].numpy()
    if "hard" in encoding.serves:
        found = [targets.hard_spatial(float(r)) for r in RATIOS]
    else:
        tau = temperature_near(encoding)
        found = [targets.spatial_log_probabilities(float(r), tau).argmax(1) for r in RATIOS]
    return planes_of(torch.stack(found, dim=1).numpy())


def planes_of(labels: np.ndarray) -> np.ndarray:
    """Return planes that give the labels at ``RATIOS``: (n, R, h, w) -> (n, P, h, w) uint16."""
    count, _, height, width = labels.shape
    changes = labels[:, 1:] != labels[:, :-1]
    most = int(changes.sum(axis=1).max(initial=0))
    planes = np.full((count, 2 * most + 1, height, width), ckf.UNUSED, np.uint16)
    planes[:, 0] = labels[:, 0]
    middle = ((RATIOS[1:] + RATIOS[:-1]) / 2 * ckf.QUANTUM - 0.5).round()
    for i, step, row, column in np.argwhere(changes).tolist():
        at = 2 * int(changes[i, : step + 1, row, column].sum()) - 1
        planes[i, at, row, column] = middle[step]
        planes[i, at + 1, row, column] = labels[i, step + 1, row, column]
    return planes
