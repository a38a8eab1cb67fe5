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
from cskd_pipeline.tools.report.plots import Series

RATIOS = np.linspace(0.0, 1.0, 101)
RATIO_AXIS = "r: 0 is the global response, 1 the local one"
SLABS = 64  # (view, shard) pairs that are read; of a remote cache as many files
_LINES_SHOWN = 8


@dataclass(frozen=True)
class Statistics:
    """Figures over all locations of the sampled views.

    Args:
        views: how many were sampled.
        encoding, exact: of the labels, as in :class:`Labels`.
        agreement, either: (101,) share of locations whose label at ``RATIOS`` is the class of the
            larger image, or of one of the two.
        lines: ``lines[n]`` locations have n labels between r = 0 and r = 1.
        balance: (3, K) shares of each class among the views' larger classes, the labels at r = 1
            and those at r = 0.
    """

    views: int
    encoding: str
    exact: bool
    agreement: np.ndarray
    either: np.ndarray
    lines: np.ndarray
    balance: np.ndarray

    @property
    def mean_lines(self) -> float:
        """Return the mean number of labels of a location."""
        return float((np.arange(len(self.lines)) * self.lines).sum() / self.lines.sum())


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
    chosen = _spread(len(pairs), min(SLABS, count))
    each, rows = -(-count // len(chosen)), []
    for view, shard in (pairs[i] for i in chosen):
        offsets = samples[samples[:, 0] == shard, 1]
        rows += [(view, shard, int(offsets[i])) for i in _spread(len(offsets), each)]
    return np.array(rows[:count], np.int64)


def _spread(total: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(int)).tolist()


def measure(found: Join, rows: np.ndarray) -> Statistics:
    """Count the labels of the views ``rows``, (n, 3) view, shard, offset, n > 0."""
    cache = cache_of(found)
    parts: list[Labels] = []
    with progress(len(rows), "views", "reading labels") as meter:
        for part in np.split(rows, np.flatnonzero(np.diff(rows[:, :2], axis=0).any(axis=1)) + 1):
            parts.append(read_labels(cache, part))
            meter.advance(len(part))
    known = ground_truth(cache, rows)
    at = [np.concatenate([labels.at(r) for labels in parts]) for r in RATIOS]
    larger, smaller = (x[:, None, None] for x in (known.larger, known.smaller))
    classes = cache.manifest.dataset.num_classes
    lines = np.concatenate([labels.lines() for labels in parts])
    counted = [known.larger, at[-1].ravel(), at[0].ravel()]
    return Statistics(
        views=len(rows),
        encoding=parts[0].encoding,
        exact=parts[0].exact,
        agreement=np.array([(x == larger).mean() for x in at]),
        either=np.array([((x == larger) | (x == smaller)).mean() for x in at]),
        lines=np.bincount(lines.ravel()),
        balance=np.stack([np.bincount(x, minlength=classes) / len(x) for x in counted]),
    )


def draw_statistics(found: Statistics) -> list[Plot]:
    """Draw agreement with the ground truth, labels of a location, and class balance."""
    shares = (100 * found.lines / found.lines.sum())[1:].tolist()
    names = [f"{n} label{'s' * (n > 1)}" for n in range(1, len(shares) + 1)]
    if len(shares) > _LINES_SHOWN:
        names[_LINES_SHOWN - 1 :] = [f"{_LINES_SHOWN} or more"]
        shares[_LINES_SHOWN - 1 :] = [sum(shares[_LINES_SHOWN - 1 :])]
    agreement = {"the larger image's class": found.agreement, "either image's class": found.either}
    kinds = ("ground truth", "labels at r = 1", "labels at r = 0")
    balance = {kind: np.sort(one)[::-1] for kind, one in zip(kinds, found.balance, strict=True)}
    over = f"Over all locations of {found.views} views, labels from {found.encoding}"
    return [
        Plot(
            "agreement",
            "Agreement with the ground truth",
            plots.lines(_percent(RATIOS, agreement), x_label=RATIO_AXIS, y_label="locations, %"),
            f"{over}. Views are mixed of two images, so no label is right everywhere.",
        ),
        Plot(
            "labels",
            "Labels of a location as r falls from 1 to 0",
            plots.bars(names, shares, x_label="locations, %"),
            f"{over}: {found.mean_lines:.2f} on average, the lines of the upper envelope.",
        ),
        Plot(
            "balance",
            "Class balance",
            plots.lines(
                _percent(np.arange(1, found.balance.shape[1] + 1), balance),
                x_label="class, by its rank",
                y_label="share, %",
            ),
            f"{over}. Ground truth is the class of the larger image; each curve is sorted.",
        ),
    ]


def _percent(x: np.ndarray, curves: dict[str, np.ndarray]) -> list[Series]:
    return [
        Series(name, x.tolist(), (100 * shares).tolist(), style)
        for style, (name, shares) in enumerate(curves.items())
    ]


def most_displaced(found: Statistics, count: int) -> list[int]:
    """Return the classes whose share of labels at r = 1 is furthest from the ground truth's."""
    gap = np.abs(found.balance[1] - found.balance[0])
    return [k for k in np.argsort(-gap, kind="stable").tolist() if gap[k] > 0][:count]
