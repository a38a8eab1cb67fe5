"""A loader of cached views: images, labels and the teacher's targets, ready for a training loop."""

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
    """End what a program left in the middle, before Python takes its modules apart."""
    for stream in list(_open_streams):
        stream.close()


class CachedBatch(NamedTuple):
    """Hold B views on the loader's device, as :class:`CachedLoader` yields them."""

    images: Tensor
    labels: Tensor
    hard_labels: Tensor
    targets: Targets | None


@dataclass(frozen=True)
class _Order:
    """The rows of a rank's micro-batches, by their number since the first epoch."""

    plan: EpochPlan
    rank: int
    world: int
    accumulation: int

    def __call__(self, number: int) -> np.ndarray:
        epoch, within = divmod(number, self.plan.steps * self.accumulation)
        step, micro = divmod(within, self.accumulation)
        part = self.rank * self.accumulation + micro  # a rank's micro-batches are neighbours
        return self.plan.batch(epoch, step, part=part, parts=self.world * self.accumulation)

    def uses(self, images: ImageSource, start: int) -> Iterator[Use]:
        """Yield the tars that micro-batches from ``start`` on read, all ranks', without end."""
        steps = self.plan.steps * self.accumulation
        for epoch in count(start // steps):
            numbers, _ = images.locate(self.plan.epoch(epoch)[:, 1:])
            update = np.arange(len(numbers)) // self.plan.batch_size
            yield from uses_of(images.tars, numbers, epoch * steps + update * self.accumulation)


@dataclass(eq=False)
class CachedLoader:
    """Iterate over an epoch of views, batch by batch, as a ``DataLoader`` does.

    A batch is a named tuple: ``images`` (B, 3, S, S) float32, augmented, mixed and normalised;
    ``labels`` (B, K) float32, mixed and smoothed; ``hard_labels`` (B,) int64, of each view's own
    image; ``targets``, the teacher's response to these views, for :class:`DistillationLoss`.

    Which views a batch has depends on ``seed``, epoch and number of the batch alone, regardless of
    the number of ranks or workers and of where iteration started. Each new iteration is the next
    epoch; workers persist. :meth:`state_dict` is exact in the middle of an epoch too. Going
    elsewhere (:meth:`start_at`, :meth:`set_epoch`, :meth:`load_state_dict`, :meth:`batches`) ends
    an iteration that is going on; the next one begins there.

    Args:
        views: see :func:`open_views`.
        batch_size: images in an optimizer update, over all ranks and micro-batches.
        accumulation: micro-batches, which are what the loader yields, in an update.
        mean, std: the student's, in [0, 1] units; None: those of the views' policy.
        smoothing: label smoothing.
        repeats: R, views of an image in an epoch (repeated augmentation): an epoch shows 1/R of the
            images, and over R epochs every image comes R times.
        seed: seeds the order of the samples.
        shuffle_shards: samples are shuffled within blocks of so many shards, shards over all.
        rank, world: this process and their number; every rank gets the same number of batches.
        workers: loader processes; 0: none.
        device: where the batches are put.
        memory_format: memory format of the images.

    Raises:
        UsageError: an option out of range, a batch that cannot be cut into equal parts, or one
            whose tars, at a URL, exceed the room for copies.
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
        self._next = 0  # batches before the next one, since the first epoch
        self._stream: Iterator[Batch] | None = None

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.plan.steps * self.accumulation

    def __iter__(self) -> Iterator[CachedBatch]:
        """Yield what is left of the current epoch; the next iteration is the next epoch.

        Raises:
            CskdError: an image or the cache cannot be read, or is not what it was.
        """
        end = (self.epoch + 1) * len(self)
        if self._stream is None:
            self._stream = self._load(None)
        stream = self._stream
        while self._next < end and self._stream is stream:
            try:
                batch = next(stream).to(self.device)
            except BaseException:
                self._stream = None  # the next iteration starts at the batch that failed
                raise
            self._next += 1
            targets = self.views.targets(batch)
            yield CachedBatch(*self.inputs(batch), batch.label, targets)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the images (B, 3, S, S) float32, normalised, and the labels (B, K) float32, mixed
        and smoothed, of a batch from :meth:`batches`, on its device; the host does not wait.
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
        """Return the epoch, from 0, that the next batch belongs to."""
        return self._next // len(self)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; within that epoch already, stay (as after a resume)."""
        if epoch != self.epoch:
            self.start_at(epoch)

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Go to a batch of an epoch, both counted from 0."""
        if self._next != epoch * len(self) + batch:
            self._stream = None
            self._next = epoch * len(self) + batch

    def state_dict(self) -> dict[str, int]:
        """Return where the loader is: the batches that it has yielded are done."""
        order = {name: getattr(self, name) for name in _ORDER}
        return {"epoch": self.epoch, "batch": self._next % len(self), **order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, with any number of ranks and workers.

        Raises:
            UsageError: the state's loader has a different order of batches.
        """
        problems = [
            f"{name}: the state's {state.get(name)}, here {getattr(self, name)}"
            for name in _ORDER
            if state.get(name) != getattr(self, name)
        ]
        if problems:
            raise UsageError(
                "the loader's state has a different order of batches",
                problems=problems,
                action="make the loader with the same values",
            )
        self.start_at(state["epoch"], state["batch"])

    def batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield the next ``limit`` batches as they are loaded, on the host, over as many epochs as
        it takes; None: without end. Going elsewhere meanwhile ends them.
        """
        self._stream, number = None, self._next
        for batch in self._load(limit):
            self._next = number = number + 1
            yield batch
            if self._next != number:
                return

    def rows(self, number: int) -> np.ndarray:
        """Return view, shard, offset, (n, 3), of a batch, counted since the first epoch."""
        return self._order(number)

    def _load(self, limit: int | None) -> Iterator[Batch]:
        """The next batches. Nothing here refers to this loader: dropping it ends the processes at
        once, where a circle would leave that to the garbage collector, and them blocked.
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
        least = {name: 1 for name in (*_ORDER, "world") if name != "seed"}
        problems = [
            f"{name} = {getattr(self, name)}, expected at least {low}"
            for name, low in {**least, "workers": 0}.items()
            if getattr(self, name) < low
        ]
        if not 0 <= self.rank < max(self.world, 1):
            problems.append(f"rank = {self.rank}, expected one of {self.world} ranks, from 0")
        if problems:
            raise UsageError("the loader's options are out of range", problems=problems)

    def _require_equal_parts(self) -> None:
        """Of unequal ones a mean of means would not be the mean of the whole."""
        if self.batch_size % (self.world * self.accumulation):
            raise UsageError(
                "the batch cannot be cut into equal parts",
                found=f"batch_size {self.batch_size}, {self.world} ranks, "
                f"accumulation {self.accumulation}",
                expected="batch_size to be a multiple of ranks times accumulation",
                action="change batch.batch_size or batch.accumulation",
            )
