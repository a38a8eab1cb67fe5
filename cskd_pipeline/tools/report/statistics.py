"""What a sample of a cache's labels says of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from cskd_pipeline.data.join import Join
from cskd_pipeline.data.replay import cache_of, renderer_of
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.tools.report import plots
from cskd_pipeline.tools.report.labels import Labels, read_labels

RATIOS = np.linspace(0.0, 1.0, 101)
SLABS = 64  # (view, shard) pairs that are read, which far away are as many files
_LINES_SHOWN = 8


@dataclass(frozen=True)
class Truth:
    """The labels of n mixed views: the class that fills more of each, and the other one.

    ``larger``, ``smaller``: (n,) int64, equal where nothing is mixed in. ``share``: (n,) float, of
    the larger.
    """

    larger: np.ndarray
    smaller: np.ndarray
    share: np.ndarray


@dataclass(frozen=True)
class Statistics:
    """Over all places of the sampled views.

    ``agreement``, ``either``: (101,) share of places whose label at ``RATIOS`` is the larger
    picture's class, or one of the two. ``lines``: ``lines[n]`` places have n labels between r = 0
    and r = 1. ``balance``: (3, K) shares of each class among the views' larger classes, the labels
    at r = 1 and those at r = 0.
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
        return float((np.arange(len(self.lines)) * self.lines).sum() / self.lines.sum())


def sample_rows(found: Join, count: int) -> np.ndarray:
    """About ``count`` views of finished units from at most ``SLABS`` (view, shard) pairs.

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
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(SLABS, len(pairs), count)).astype(int))
    each, rows = -(-count // len(chosen)), []
    for view, shard in (pairs[i] for i in chosen):
        offsets = samples[samples[:, 0] == shard, 1]
        picked = np.unique(np.linspace(0, len(offsets) - 1, min(each, len(offsets))).astype(int))
        rows += [(view, shard, int(offsets[i])) for i in picked]
    return np.array(rows[:count], np.int64)


def truth(found: Join, rows: np.ndarray) -> Truth:
    """What is in the views ``rows``, by the cache's labels."""
    cache = cache_of(found)
    pairing = renderer_of(found, strict=False).pair(rows)
    own, partner = (
        np.array([cache.labels(shard)[offset] for _, shard, offset in part.tolist()], np.int64)
        for part in (pairing.own, pairing.partner)
    )
    share = np.array([mix.lam for mix in pairing.mixes])
    first = share >= 0.5
    return Truth(
        larger=np.where(first, own, partner),
        smaller=np.where(first, partner, own),
        share=np.maximum(share, 1 - share),
    )


def measure(found: Join, rows: np.ndarray) -> Statistics:
    """Labels of the views ``rows``, (n, 3), n > 0, counted."""
    cache = cache_of(found)
    parts: list[Labels] = []
    with progress(len(rows), "views", "reading labels") as meter:
        for part in np.split(rows, np.flatnonzero(np.diff(rows[:, :2], axis=0).any(axis=1)) + 1):
            parts.append(read_labels(cache, part))
            meter.advance(len(part))
    known = truth(found, rows)
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


def agreement_plot(found: Statistics) -> Figure:
    return plots.lines(
        [
            plots.Series("the larger picture's class", RATIOS.tolist(), _percent(found.agreement)),
            plots.Series("either picture's class", RATIOS.tolist(), _percent(found.either), 1),
        ],
        x_label="r: 0 is the global answer, 1 the local one",
        y_label="places, %",
    )


def lines_plot(found: Statistics) -> Figure:
    shares = (100 * found.lines / found.lines.sum())[1:]
    names = [f"{n} label{'s' * (n > 1)}" for n in range(1, len(shares) + 1)][:_LINES_SHOWN]
    values = shares[:_LINES_SHOWN].tolist()
    if len(shares) > _LINES_SHOWN:
        names[-1] = f"{_LINES_SHOWN} or more"
        values[-1] = float(shares[_LINES_SHOWN - 1 :].sum())
    return plots.bars(names, values, x_label="places, %")


def balance_plot(found: Statistics) -> Figure:
    """Each curve's classes from the most frequent to the least."""
    ranks = list(range(1, found.balance.shape[1] + 1))
    names = ("ground truth", "labels at r = 1", "labels at r = 0")
    curves = [
        plots.Series(name, ranks, _percent(np.sort(shares)[::-1]), style)
        for style, (name, shares) in enumerate(zip(names, found.balance, strict=True))
    ]
    return plots.lines(curves, x_label="class, by its rank", y_label="share, %")


def most_displaced(found: Statistics, count: int) -> list[int]:
    """The classes whose share among the labels at r = 1 is furthest from the ground truth's."""
    gap = np.abs(found.balance[1] - found.balance[0])
    order: Sequence[int] = np.argsort(-gap, kind="stable").tolist()
    return [k for k in order if gap[k] > 0][:count]


def _percent(shares: np.ndarray) -> list[float]:
    return (100 * shares).tolist()
