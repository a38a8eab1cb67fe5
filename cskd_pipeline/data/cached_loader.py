"""A loader of cached views: images, labels and teacher targets, ready for a training loop."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from itertools import count, islice
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from cskd_pipeline.data.assemble import assemble, normalise
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.data.images import ImageSource
from cskd_pipeline.data.plan import EpochPlan
from cskd_pipeline.data.read_ahead import ReadAhead, Use, uses_of
from cskd_pipeline.data.remote_tar import require_room
from cskd_pipeline.data.training_views import TrainingViews
from cskd_pipeline.data.workers import Loader
from cskd_pipeline.distill.losses import mixed_targets
from cskd_pipeline.distill.targets import Targets
from cskd_pipeline.errors import UsageError

_ORDER = ("batch_size", "accumulation", "repeats", "seed", "shuffle_shards")

_open_streams: WeakSet[Any] = WeakSet()


@atexit.register
def _close_streams() -> None:
    """End unfinished iterations before Python tears down its modules at exit."""
    for stream in list(_open_streams):
        stream.close()


class CachedBatch(NamedTuple):
    """A batch of B views on the loader's device; :class:`CachedLoader` describes the fields."""

    images: Tensor
    labels: Tensor
    hard_labels: Tensor
    targets: Targets | None


@dataclass(frozen=True)
class _Order:
    """The rows of a rank's micro-batches, numbered from the start of the first epoch."""

    plan: EpochPlan
    rank: int
    world: int
    accumulation: int

    def __call__(self, number: int) -> np.ndarray:
        epoch, within = divmod(number, self.plan.steps * self.accumulation)
        step, micro = divmod(within, self.accumulation)
        part = self.rank * self.accumulation + micro  # a rank's micro-batches are adjacent
        return self.plan.batch(epoch, step, part=part, parts=self.world * self.accumulation)

    def uses(self, images: ImageSource, start: int) -> Iterator[Use]:
        """Yield the tars that all ranks' micro-batches read from number ``start``, endlessly."""
        steps = self.plan.steps * self.accumulation
        for epoch in count(start // steps):
            numbers, _ = images.locate(self.plan.epoch(epoch)[:, 1:])
            update = np.arange(len(numbers)) // self.plan.batch_size
            yield from uses_of(images.tars, numbers, epoch * steps + update * self.accumulation)


@dataclass(eq=False)
class CachedLoader:
    """A loader that iterates over an epoch of views, batch by batch, like a ``DataLoader``.

    A batch is a named tuple: ``images`` (B, 3, S, S) float32, augmented, mixed and normalised;
    ``labels`` (B, K) float32, mixed and smoothed; ``hard_labels`` (B,) int64, labels of the views'
    own images; ``targets``, the teacher's response to these views, for :class:`DistillationLoss`.

    The views in a batch depend only on ``seed``, the epoch and the batch number, not on the number
    of ranks or workers or on where iteration started. Each new iteration is the next epoch; workers
    persist. :meth:`state_dict` is exact in mid-epoch too. Changing the position (:meth:`start_at`,
    :meth:`set_epoch`, :meth:`load_state_dict`, :meth:`batches`) ends a running iteration; the next
    one starts at the new position.

    Args:
        views: views to load, see :func:`open_views`.
        batch_size: images per optimizer update, over all ranks and micro-batches.
        accumulation: micro-batches per optimizer update; the loader yields micro-batches.
        mean, std: normalisation of the student, in [0, 1] units; None: that of the views' policy.
        smoothing: label smoothing.
        repeats: R, views per image in an epoch (repeated augmentation): an epoch shows 1/R of the
            images, and R epochs show every image R times.
        seed: order seed.
        shuffle_shards: shards are shuffled globally, samples within blocks of this many shards.
        rank, world: rank of this process and number of ranks; all ranks get equally many batches.
        workers: number of loader processes; 0: load in this process.
        device: device of the batches.
        memory_format: memory format of the images.

    Raises:
        UsageError: an option out of range, a batch that cannot be cut into equal parts, or one
            whose remote tars exceed the space for copies.
        CacheError: fewer views than ``repeats``.
        DataError: fewer samples than one batch.
    """

    views: TrainingViews
    batch_size: int
    _: KW_ONLY
    accumulation: int = 1
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    smoothing: float = 0.1
    repeats: int = 3
    seed: int = 0
    shuffle_shards: int = 16
    rank: int = 0
    world: int = 1
    workers: int = 0
    device: torch.device | str = "cpu"
    memory_format: torch.memory_format = torch.contiguous_format

    def __post_init__(self) -> None:
        self._require_options()
        self._require_equal_parts()
        views = self.views
        at_once = min(self.shuffle_shards, self.batch_size)
        require_room(views.images.tars, at_once, "one batch")
        self.plan = EpochPlan(
            views.samples,
            views.policy,
            views.root_seed,
            views=views.views,
            repeats=self.repeats,
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle_shards=self.shuffle_shards,
            allowed=views.allowed,
        )
        self.device = torch.device(self.device)
        self._order = _Order(self.plan, self.rank, self.world, self.accumulation)
        self._next = 0  # number of the next batch, from the start of the first epoch
        self._stream: Iterator[Batch] | None = None

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.plan.steps * self.accumulation

    def __iter__(self) -> Iterator[CachedBatch]:
        """Yield the remaining batches of the current epoch; the next iteration is the next epoch.

        Raises:
            CskdError: an image or the cache cannot be read, or has changed.
        """
        end = (self.epoch + 1) * len(self)
        if self._stream is None:
            self._stream = self._load(None)
        stream = self._stream
        while self._next < end and self._stream is stream:
            try:
                batch = next(stream).to(self.device)
            except BaseException:
                self._stream = None  # the next iteration starts with the failed batch
                raise
            self._next += 1
            targets = self.views.targets(batch)
            yield CachedBatch(*self.inputs(batch), batch.label, targets)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, S, S) float32, normalised, and labels (B, K) float32, mixed and
        smoothed, of a batch from :meth:`batches`, on its device and without synchronising.
        """
        views, policy = self.views, self.views.policy
        labels = mixed_targets(
            batch.label, batch.partner_label, batch.lam, views.num_classes, self.smoothing
        )
        mean = policy.mean if self.mean is None else self.mean
        std = policy.std if self.std is None else self.std
        images = normalise(assemble(batch, policy), mean, std)
        return images.contiguous(memory_format=self.memory_format), labels

    @property
    def epoch(self) -> int:
        """Return the epoch of the next batch, counted from 0."""
        return self._next // len(self)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, or keep the position in it, for example after a resume."""
        if epoch != self.epoch:
            self.start_at(epoch)

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Go to a batch of an epoch, both counted from 0."""
        if self._next != epoch * len(self) + batch:
            self._stream = None
            self._next = epoch * len(self) + batch

    def state_dict(self) -> dict[str, int]:
        """Return the loader's position, after the batches yielded so far, and its order options."""
        order = {name: getattr(self, name) for name in _ORDER}
        return {"epoch": self.epoch, "batch": self._next % len(self), **order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, with any number of ranks and workers.

        Raises:
            UsageError: the state is from a loader with a different batch order.
        """
        problems = [
            f"{name}: {state.get(name)} in the state, {getattr(self, name)} in this loader"
            for name in _ORDER
            if state.get(name) != getattr(self, name)
        ]
        if problems:
            raise UsageError(
                "the state is from a loader with a different batch order",
                problems=problems,
                action="create the loader with the values in the state",
            )
        self.start_at(state["epoch"], state["batch"])

    def batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield the next ``limit`` batches (None: endlessly) as loaded, on the host, across epochs,
        until the loader's position is changed.
        """
        self._stream, number = None, self._next
        for batch in self._load(limit):
            self._next = number = number + 1
            yield batch
            if self._next != number:
                return

    def rows(self, number: int) -> np.ndarray:
        """Return (n, 3) view, shard, offset of batch ``number``, counted from the first epoch."""
        return self._order(number)

    def _load(self, limit: int | None) -> Iterator[Batch]:
        """Return an iterator of the next batches, without reference to this loader: a cycle would
        keep the processes alive until the garbage collector runs.
        """
        start, images = self._next, self.views.images
        loader = Loader(
            self.views,
            map(self._order, islice(count(start), limit)),
            workers=self.workers,
            pin_memory=torch.device(self.device).type == "cuda",
        )
        ahead = ReadAhead(images.tars, self._order.uses(images, start), len(self), start)
        stream = ahead.over(loader)
        _open_streams.add(stream)
        return stream

    def _require_options(self) -> None:
        minimum = {name: 1 for name in (*_ORDER, "world") if name != "seed"}
        problems = [
            f"{name} = {getattr(self, name)}, expected at least {low}"
            for name, low in {**minimum, "workers": 0}.items()
            if getattr(self, name) < low
        ]
        if self.rank not in range(ranks := max(self.world, 1)):
            problems.append(f"rank = {self.rank}, expected 0 to {ranks - 1}")
        if problems:
            raise UsageError("the loader's options are out of range", problems=problems)

    def _require_equal_parts(self) -> None:
        """Refuse a batch with unequal parts, which would bias the mean of their means."""
        if self.batch_size % (self.world * self.accumulation):
            raise UsageError(
                "the batch cannot be cut into equal parts",
                found=f"batch_size {self.batch_size}, {self.world} ranks, "
                f"accumulation {self.accumulation}",
                expected="batch_size a multiple of ranks times accumulation",
                action="change batch.batch_size or batch.accumulation",
            )
