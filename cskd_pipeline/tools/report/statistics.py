"""Figures of a cache's labels, counted over a sample of its views."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cskd_pipeline.data.join import Join
from cskd_pipeline.data.replay import cache_of
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.tools.report import plots
from cskd_pipeline.tools.report.gallery import ground_truth
from cskd_pipeline.tools.report.labels import Labels, read_labels
from cskd_pipeline.tools.report.plot_files import Plot

RATIOS = np.linspace(0.0, 1.0, 101)
RATIO_AXIS = "r, from local (1) to global (0)"
SLABS = 64  # (view, shard) pairs that are read; of a remote cache as many files


@dataclass(frozen=True)
class Statistics:
    """Figures over all locations of the sampled views.

    Args:
        views: how many were sampled.
        encoding, exact: of the labels, as in :class:`Labels`.
        agreement, either: (101,) share of locations whose label at ``RATIOS`` is the class of the
            larger image, or of one of the two.
        mean_lines: labels that a location has between r = 0 and r = 1, on average.
    """

    views: int
    encoding: str
    exact: bool
    agreement: np.ndarray
    either: np.ndarray
    mean_lines: float


def sample_rows(found: Join, count: int) -> np.ndarray:
    """Choose about ``count`` views of finished units from at most ``SLABS`` (view, shard) pairs.

    Returns:
        (n, 3) int64 view, shard, offset; of samples that are there.
    """
    cache = cache_of(found)
    done, block, samples = cache.done(), cache.manifest.view_block, found.usable()
    pairs = [
        (int(b) * block + v, int(shard))
        for shard in np.unique(samples[:, 0])
        for b in np.flatnonzero(done[:, shard])
        for v in range(block)
    ]
    if not pairs or not count:
        return np.empty((0, 3), np.int64)
    chosen = spread(len(pairs), min(SLABS, count))
    each, rows = -(-count // len(chosen)), []
    for view, shard in (pairs[i] for i in chosen):
        offsets = samples[samples[:, 0] == shard, 1]
        rows += [(view, shard, int(offsets[i])) for i in spread(len(offsets), each)]
    return np.array(rows[:count], np.int64)


def spread(total: int, count: int) -> list[int]:
    """Return ``count`` of the numbers below ``total``, or all, evenly spread."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(int)).tolist()


def measure(found: Join, rows: np.ndarray) -> Statistics:
    """Count the labels of the views ``rows``, (n, 3) view, shard, offset, n > 0."""
    cache = cache_of(found)
    parts: list[Labels] = []
    with progress(len(rows), "views", "reading labels") as meter:
        for part in np.split(rows, np.flatnonzero(np.diff(rows[:, :2], axis=0).any(axis=1)) + 1):
            parts.append(read_labels(cache, part))
            meter.advance(len(part))
    truth = ground_truth(cache, rows)
    at = [np.concatenate([labels.at(r) for labels in parts]) for r in RATIOS]
    own, partner, larger = (x[:, None, None] for x in (truth.own, truth.partner, truth.larger))
    return Statistics(
        views=len(rows),
        encoding=parts[0].encoding,
        exact=parts[0].exact,
        agreement=np.array([(x == larger).mean() for x in at]),
        either=np.array([((x == own) | (x == partner)).mean() for x in at]),
        mean_lines=float(np.concatenate([labels.lines() for labels in parts]).mean()),
    )


def draw_truth(found: Statistics) -> Plot:
    """Draw agreement with the ground truth over r."""
    agreement = {"the larger image's class": found.agreement, "either image's class": found.either}
    if np.array_equal(found.agreement, found.either):
        agreement = {"the image's class": found.agreement}
    return Plot(
        "agreement",
        "Agreement with the ground truth",
        plots.lines(
            [
                plots.Series(name, RATIOS.tolist(), (100 * shares).tolist(), style)
                for style, (name, shares) in enumerate(agreement.items())
            ],
            x_label=RATIO_AXIS,
            y_label="locations, %",
            x_limits=(1, 0),
            y_limits=(0, 105 * max(one.max() for one in agreement.values()) or 1),
        ),
        f"Over all locations of {found.views} views, labels from {found.encoding}.",
    )
