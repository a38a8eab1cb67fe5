"""The training order, which view of which sample comes when, as a function of layout and seed.

The order is global: ranks, micro-batches and loader processes only split it, so the recipe alone
determines a run, whatever the machines.

Epochs come in cycles of R (``repeats``, repeated augmentation). A cycle shows every image in R
views; its rows are ordered once and cut into R epochs of equal length, so an epoch shows 1/R of the
images, each in R views. Rows that share pixels are neighbours: the members of a pair (their views
are mixed) and the R views of an image. So a batch decodes and renders almost nothing twice.
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

NO_PARTNER = -1


@dataclass(frozen=True)
class SampleSet:
    """The layout that shard and offset refer to: each tar's sample count and SHA-256 of keys."""

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

    def all_samples(self) -> np.ndarray:
        """Return (n, 2) int64 shard and offset of all samples, in order."""
        shard = np.repeat(np.arange(len(self.counts)), self.counts)
        offset = np.concatenate([np.arange(count) for count in self.counts])
        return np.stack([shard, offset], axis=1)


@dataclass(eq=False)
class EpochPlan:
    """The training order of every epoch; ``steps`` is the number of batches per epoch.

    Args:
        samples: the cache's layout, or without a cache the shards' layout.
        root_seed: seed of the views, which determines the partners.
        views: number of views, reused in turn; None: as many as the epochs need.
        repeats: R, views per image in one epoch.
        batch_size: rows per optimizer update, over all ranks and micro-batches.
        seed: order seed.
        shuffle_shards: shards are shuffled globally, samples within blocks of this many shards.
        allowed: per shard (count,) bool, samples to use; None: all. A view that is mixed with a
            disallowed sample is dropped too.

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
                "the cache has fewer views than an epoch shows of each image",
                found=f"{self.views} views",
                expected=f"at least {self.repeats}",
                action="extend the cache with more views, or set batch.repeats=1",
            )
        rows = self._min_rows()
        self.steps = rows // self.batch_size
        if self.steps == 0:
            raise DataError(
                "fewer samples than one batch",
                found=f"{rows} samples",
                expected=f"at least batch_size = {self.batch_size}",
            )
        self._built: dict[int, np.ndarray] = {}  # two epochs: the current one and one read ahead

    def cycle_views(self, cycle: int) -> list[int]:
        """Return the R views in which cycle number ``cycle`` shows every image."""
        views = range(cycle * self.repeats, (cycle + 1) * self.repeats)
        return [view % self.views for view in views] if self.views else list(views)

    def epoch(self, number: int) -> np.ndarray:
        """Return the rows of epoch ``number``, counted from 0, in training order, without a last
        incomplete batch: (steps * batch_size, 3) int32 view, shard, offset.
        """
        built = self._built  # the read-ahead thread may replace it meanwhile
        rows = built.get(number)
        if rows is None:
            rows = self._build(number)
            kept = sorted(built, key=lambda other: abs(other - number))[:1]
            self._built = {n: built[n] for n in kept} | {number: rows}
        return rows

    def batch(self, epoch: int, step: int, *, part: int = 0, parts: int = 1) -> np.ndarray:
        """Return one of ``parts`` equal parts of a batch: (n, 3) view, shard, offset."""
        assert 0 <= step < self.steps
        assert 0 <= part < parts
        size, rest = divmod(self.batch_size, parts)
        assert rest == 0, parts
        start = step * self.batch_size + part * size
        return self.epoch(epoch)[start : start + size]

    def _min_rows(self) -> int:
        """Return a lower bound on the rows of any epoch; exact if all samples are allowed."""
        if self.allowed is None:
            return self.samples.total
        if not self.policy.mixes:
            return int(sum(mask.sum() for mask in self.allowed))
        total = 0
        for mask in self.allowed:  # each missing sample drops at most one other in its window
            edges = np.arange(0, len(mask), self.policy.window)
            sizes = np.add.reduceat(np.ones(len(mask), np.int64), edges)
            missing = np.add.reduceat(~mask, edges, dtype=np.int64)
            total += int(np.maximum(sizes - 2 * missing, 0).sum())
        return total

    def _build(self, number: int) -> np.ndarray:
        """Build the rows of one epoch without building the rest of its cycle.

        A cycle is a list of items in random order. An item is a pair of samples that are mixed with
        each other (or a sample without partner) and expands to up to 2 R rows: both members in each
        of R views. Expanded, the cycle is one list of rows (3.8 million for ImageNet with R = 3),
        and the epoch is the ``phase``-th of its R equal parts. Only the items of that part are
        expanded.
        """
        cycle, phase = divmod(number, self.repeats)
        views = self.cycle_views(cycle)
        partner = self._partners(views[0])  # policy.repeats views share their partners
        members = self._ordered_items(partner, cycle)  # (items, 2) sample numbers
        shown = self._shown(members, views, partner)  # (items, R, 2) bool: the rows that exist
        ends = np.cumsum(shown.sum(axis=(1, 2)))  # in the expanded list: the end of each item
        # The epoch is rows first..last - 1 of that list, from items low..high - 1. A cut may fall
        # within an item, which then appears in two epochs.
        first, last = (int(ends[-1]) * p // self.repeats for p in (phase, phase + 1))
        low = int(np.searchsorted(ends, first, side="right"))
        high = int(np.searchsorted(ends, last, side="left")) + 1
        # nonzero iterates over item, view, member: both members of an item in one view, then in the
        # next view. So a batch renders each view of a pair once and decodes each image once.
        item, j, member = np.nonzero(shown[low:high])
        sample = members[low:high][item, member]
        shard = self._shard[sample]
        rows = np.stack([np.array(views)[j], shard, sample - self._start[shard]], axis=1)
        skipped = first - (int(ends[low - 1]) if low else 0)  # rows of item low before the cut
        length = self.steps * self.batch_size
        assert last - first >= length
        return np.ascontiguousarray(rows[skipped : skipped + length].astype(np.int32))

    def _partners(self, view: int) -> np.ndarray:
        """Return (N,) the number of each sample's partner in a view, or its own if it has none."""
        parts = [
            matching(self.root_seed, shard_id, count, view, self.policy) + start
            for shard_id, count, start in zip(
                self.samples.shard_ids, self.samples.counts, self._start, strict=True
            )
        ]
        return np.concatenate(parts)

    def _ordered_items(self, partner: np.ndarray, cycle: int) -> np.ndarray:
        """Return (items, 2) int64 pairs in the cycle's order, unpaired ones with ``NO_PARTNER``.

        Items are sorted by (block of shards, random number): shards are shuffled globally, samples
        within blocks of ``shuffle_shards`` shards, so that a batch reads few tars.
        """
        own = np.arange(len(partner))
        first = np.flatnonzero(own <= partner)  # each pair once, by its lower number
        second = np.where(partner[first] == first, NO_PARTNER, partner[first])
        bits = BitStream(derive_seed("order", self.seed, cycle))
        position = np.argsort(np.argsort(bits.raw(len(self.samples.counts)), kind="stable"))
        block = (position // self.shuffle_shards)[self._shard[first]].astype(np.uint64)
        within = bits.raw(len(first)) >> np.uint64(24)
        order = np.argsort(block << np.uint64(40) | within, kind="stable")
        return np.stack([first, second], axis=1)[order]

    def _shown(self, members: np.ndarray, views: list[int], partner: np.ndarray) -> np.ndarray:
        """Return the (items, R, 2) bool mask of rows to show; ``partner``: in the first view."""
        shown = np.repeat((members != NO_PARTNER)[:, None], self.repeats, axis=1)
        if self.allowed is None:
            return shown
        allowed = np.concatenate(list(self.allowed))
        group = views[0] // self.policy.repeats
        for j, view in enumerate(views):
            if view // self.policy.repeats != group:
                group, partner = view // self.policy.repeats, self._partners(view)
            shown[:, j] &= (allowed & allowed[partner])[members]
        return shown
