"""The order of training, which sample in which view comes when: a function of layout and seed.

The order is global. Ranks, micro-batches and loader processes only cut it, so a run is described by
its recipe and not by the machines it happens to have.

Epochs come in cycles of R (``repeats``, repeated augmentation). A cycle shows every image in R
views, its rows ordered once and cut into R epochs of equal length: an epoch shows 1/R of the
images, each in R views. What shares pixels stays together: the members of a pair (their views mix)
and an image's R views are neighbours, so that a batch decodes and renders nearly nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

import numpy as np

from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.data.index import Dataset
from cskd_pipeline.errors import CacheError, DataError
from cskd_pipeline.views.bits import BitStream, derive_seed
from cskd_pipeline.views.mixing import matching
from cskd_pipeline.views.policy import ViewPolicy

NOBODY = -1  # stands for the partner of a sample that has none


@dataclass(frozen=True)
class SampleSet:
    """Name the layout that shard and offset refer to: each tar's samples, its keys' SHA-256."""

    counts: tuple[int, ...]
    shard_ids: tuple[str, ...]

    @classmethod
    def of(cls, layout: Dataset | Cache) -> SampleSet:
        """Return the layout of a data set or a cache."""
        return cls(tuple(layout.counts), tuple(layout.shard_ids))

    @property
    def total(self) -> int:
        """Return the number of samples."""
        return sum(self.counts)

    def every(self) -> np.ndarray:
        """Return (n, 2) int64 shard and offset of all samples, in order."""
        shard = np.repeat(np.arange(len(self.counts)), self.counts)
        offset = np.concatenate([np.arange(count) for count in self.counts])
        return np.stack([shard, offset], axis=1)


@dataclass(eq=False)
class EpochPlan:
    """Plan the order of training; ``steps`` are the batches of an epoch.

    Args:
        samples: the cache's layout, or the shards' where there is no cache.
        root_seed: of the views; it decides the partners.
        views: how many there are, reused in turn; None: as many as epochs need.
        repeats: R, views of an image in one epoch.
        batch_size: rows in one optimizer update, over all ranks and micro-batches.
        seed: of the order.
        shuffle_shards: samples are shuffled within blocks of so many shards; shards over all.
        allowed: per shard (count,) bool, samples that can be read; None: all. A sample is left out
            together with those whose view would contain its pixels.

    Raises:
        CacheError: fewer views than repeats.
        DataError: fewer samples than one batch.
    """

    samples: SampleSet
    policy: ViewPolicy
    root_seed: int
    _: KW_ONLY
    views: int | None
    repeats: int
    batch_size: int
    seed: int
    shuffle_shards: int = 16
    allowed: Sequence[np.ndarray] | None = None
    steps: int = field(init=False)

    def __post_init__(self) -> None:
        counts = np.array(self.samples.counts, np.int64)
        self._shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._start = np.cumsum(counts) - counts
        if self.views is not None and self.views < self.repeats:
            raise CacheError(
                "the cache has fewer views than an epoch shows of an image",
                found=f"{self.views} views",
                expected=f"at least {self.repeats}",
                action="extend the cache with more views, or set batch.repeats=1",
            )
        self.steps = self._usable() // self.batch_size
        if self.steps == 0:
            raise DataError(
                "fewer samples than one batch",
                found=f"{self._usable()} samples",
                expected=f"at least batch_size = {self.batch_size}",
            )
        self._built: dict[int, np.ndarray] = {}  # of two epochs: one in use, one looked ahead to

    def cycle_views(self, cycle: int) -> list[int]:
        """Return the R views in which cycle number ``cycle`` shows every image."""
        every = [cycle * self.repeats + j for j in range(self.repeats)]
        return [view % self.views for view in every] if self.views else every

    def epoch(self, number: int) -> np.ndarray:
        """Return the rows of epoch ``number``, from 0, in the order of training: view, shard,
        offset, (steps * batch_size, 3) int32. What does not fill a batch is dropped.
        """
        built = self._built  # a thread that reads ahead may replace it meanwhile
        rows = built.get(number)
        if rows is None:
            rows = self._build(number)
            kept = sorted(built, key=lambda other: abs(other - number))[:1]
            self._built = {n: built[n] for n in kept} | {number: rows}
        return rows

    def batch(self, epoch: int, step: int, *, part: int = 0, parts: int = 1) -> np.ndarray:
        """Return (n, 3) view, shard, offset: one of ``parts`` equal parts of a batch."""
        assert 0 <= step < self.steps
        assert 0 <= part < parts
        size, rest = divmod(self.batch_size, parts)
        assert rest == 0, parts
        start = step * self.batch_size + part * size
        return self.epoch(epoch)[start : start + size]

    # -- how an epoch is built ---------------------------------------------------------------------

    def _usable(self) -> int:
        """Rows that every epoch has at least; exact when every sample can be read."""
        if self.allowed is None:
            return self.samples.total
        if not self.policy.mixes:
            return int(sum(mask.sum() for mask in self.allowed))
        total = 0
        for mask in self.allowed:  # each missing sample costs its window at most one other
            edges = np.arange(0, len(mask), self.policy.window)
            sizes = np.add.reduceat(np.ones(len(mask), np.int64), edges)
            missing = np.add.reduceat(~mask, edges, dtype=np.int64)
            total += int(np.maximum(sizes - 2 * missing, 0).sum())
        return total

    def _build(self, number: int) -> np.ndarray:
        """The rows of an epoch, without those of the rest of its cycle.

        A cycle is a list of items in random order. An item is a pair of samples that are mixed with
        each other (or a sample that has no partner), and stands for up to 2 R rows: both members in
        each of R views. Written out, the cycle is one long list of rows, of which this epoch has
        the ``phase``-th of R equal parts. Only the items that lie in that part are written out: of
        ImageNet with R = 3 the list has 3.8 million rows.
        """
        cycle, phase = divmod(number, self.repeats)
        views = self.cycle_views(cycle)
        partner = self._partners(views[0])  # policy.repeats views share their partners
        members = self._ordered_items(partner, cycle)  # (items, 2) sample numbers
        shown = self._shown(members, views, partner)  # (items, R, 2) bool: which rows there are
        ends = np.cumsum(shown.sum(axis=(1, 2)))  # of the whole list: where each item's rows end
        # The epoch's part of the list, rows first..last - 1, and the items low..high - 1 that have
        # them. An edge may lie within an item, which then shows in two epochs.
        first, last = (int(ends[-1]) * p // self.repeats for p in (phase, phase + 1))
        low = int(np.searchsorted(ends, first, side="right"))
        high = int(np.searchsorted(ends, last, side="left")) + 1
        # nonzero runs over item, view, member: of an item both members in one view, then the next
        # view. So a batch renders each view of a pair once, and decodes each image once.
        item, j, member = np.nonzero(shown[low:high])
        sample = members[low:high][item, member]
        shard = self._shard[sample]
        rows = np.stack([np.array(views)[j], shard, sample - self._start[shard]], axis=1)
        skipped = first - (int(ends[low - 1]) if low else 0)  # rows of item low before the edge
        length = self.steps * self.batch_size  # what does not fill a batch is dropped
        assert last - first >= length
        return np.ascontiguousarray(rows[skipped : skipped + length].astype(np.int32))

    def _partners(self, view: int) -> np.ndarray:
        """(N,) the number of each sample's partner in a view; its own where it has none."""
        parts = [
            matching(self.root_seed, shard_id, count, view, self.policy) + start
            for shard_id, count, start in zip(
                self.samples.shard_ids, self.samples.counts, self._start, strict=True
            )
        ]
        return np.concatenate(parts)

    def _ordered_items(self, partner: np.ndarray, cycle: int) -> np.ndarray:
        """(items, 2) int64 the pairs of a cycle in its order; single samples with ``NOBODY``.

        Items are sorted by (block of shards, random number): shards are shuffled over all, samples
        within blocks of ``shuffle_shards`` shards, so that a batch reads few tars.
        """
        own = np.arange(len(partner))
        first = np.flatnonzero(own <= partner)  # each pair once, by its lower number
        second = np.where(partner[first] == first, NOBODY, partner[first])
        bits = BitStream(derive_seed("order", self.seed, cycle))
        place = np.argsort(np.argsort(bits.raw(len(self.samples.counts)), kind="stable"))
        block = (place // self.shuffle_shards)[self._shard[first]].astype(np.uint64)
        within = bits.raw(len(first)) >> np.uint64(24)
        order = np.argsort(block << np.uint64(40) | within, kind="stable")
        return np.stack([first, second], axis=1)[order]

    def _shown(self, members: np.ndarray, views: list[int], partner: np.ndarray) -> np.ndarray:
        """(items, R, 2) whether a member is shown in a view; ``partner``: in the first view."""
        shown = np.repeat((members != NOBODY)[:, None], self.repeats, axis=1)
        if self.allowed is None:
            return shown
        allowed = np.concatenate(list(self.allowed))
        group = views[0] // self.policy.repeats
        for j, view in enumerate(views):
            if view // self.policy.repeats != group:
                group, partner = view // self.policy.repeats, self._partners(view)
            shown[:, j] &= (allowed & allowed[partner])[members]
        return shown
