"""Views out, logits in: write the units of a cache, with all stages of the work overlapping.

Loader processes render the next views; on CUDA the network computes one batch while the previous
one is encoded on a separate stream; a thread writes one unit while the next is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cskd_pipeline.cache.claims import Claims
from cskd_pipeline.cache.layout import encodings_of, response_shape, specs
from cskd_pipeline.cache.units import Unit, UnitBuffer, UnitData, encode_batch
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.data.full_batches import TeacherViews, full_batches
from cskd_pipeline.data.index import Dataset
from cskd_pipeline.data.shards import TarShard
from cskd_pipeline.data.unit_views import Loading, UnitViews, unit_batches
from cskd_pipeline.distill.ckf import hard_global_labels
from cskd_pipeline.errors import UsageError
from cskd_pipeline.models.teacher import Logits, require_finite
from cskd_pipeline.runtime.distributed import ALONE, Ranks
from cskd_pipeline.runtime.progress import Meter, progress
from cskd_pipeline.runtime.signals import pause

_SHORTEST, _LONGEST = 0.05, 5.0  # seconds between checks of the units that others are computing


class UnitWriter:
    """Writer of a cache's undone units: yields every view and takes its logits::

        with writer:
            for batch in writer.views():
                writer.put(batch, *network(batch.images))

    Batches are full except the last, on the device of ``loading``, and yielded once. Units are
    claimed one by one, so several processes may fill one cache. When no unit is free, a process
    waits for the others to finish theirs, and takes over units whose claims have timed out.
    A unit is committed once it has all its logits; a batch may span two units. Committed units
    stay, however the block ends. A block that ends normally waits until all complete units are
    written; one that raises waits only for the unit being written.

    Attributes:
        cache: the cache being written.
        units: units that were undone at the start, in the order in which they are drawn.
        units_written, views_written: units and views that this process has completed.
        meter: progress in views, and the time spent waiting for them.
    """

    def __init__(
        self, cache: CacheWriter, dataset: Dataset, undone: UndoneUnits, loading: Loading
    ) -> None:
        self.cache, self.dataset, self.loading = cache, dataset, loading
        self.units, self._undone = undone.units, undone
        self.units_written = self.views_written = 0
        self.meter = Meter(undone.expected, "views")
        self._shape = response_shape(cache.manifest)
        self._views = self._iterate()
        self._yielded = deque[TeacherViews]()  # awaiting their logits
        self._computing = deque[tuple[TeacherViews, Logits, torch.cuda.Event | None]]()
        self._unfinished = deque[Unit]()
        self._buffer: UnitBuffer | None = None
        self._missing = 0  # views that the buffer's unit still lacks
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def __enter__(self) -> UnitWriter:
        self._thread = ThreadPoolExecutor(1)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._thread is not None
        self._views.close()
        try:
            with self._thread:  # waits for the unit being written
                if kind is None:
                    self._flush()
        finally:
            self._thread = None
            self._undone.claims.drop_all()

    @property
    def views_total(self) -> int:
        """Return the current estimate of the views that this process will write in total."""
        return self._undone.expected

    @property
    def finished(self) -> bool:
        """Return whether all ``units`` are done, by any process."""
        return not self._undone.left()

    def views(self) -> Iterator[TeacherViews]:
        """Yield the views of undone units in batches, each view once; see :class:`TeacherViews`.

        Raises:
            CskdError: an image or tar cannot be read, or another rank failed (its error).
            UsageError: outside the ``with`` block.
        """
        return self._views

    def _iterate(self) -> Generator[TeacherViews, None, None]:
        self._require_open()
        with progress(self.views_total, "views", "dumping") as self.meter:
            for units in self._undone.rounds():
                pieces = self._pieces(self._queue(units))
                batches = full_batches(pieces, self.loading.batch_size)
                for views in self._undone.ranks.checking(batches):
                    self._yielded.append(views)
                    yield views
                self._flush()
                if self._unfinished:  # a caller may take all batches before it puts any logits
                    return

    def _queue(self, units: Iterable[Unit]) -> Iterator[UnitViews]:
        for unit in units:
            self._unfinished.append(unit)
            self.meter.total = self.views_total
            yield unit.shard, unit.views

    def _pieces(self, units: Iterable[UnitViews]) -> Iterator[TeacherViews]:
        manifest, loading = self.cache.manifest, self.loading
        batches = unit_batches(self.dataset, units, manifest.policy, manifest.root_seed, loading)
        for batch in self.meter.timed(batches):
            yield TeacherViews.of(batch, manifest.policy, loading.device)

    def put(self, views: TeacherViews, spatial: Tensor, global_: Tensor) -> int:
        """Take the logits of ``views``; on CUDA the host does not wait for them.

        Args:
            views: a batch from :meth:`views`, each once and in order.
            spatial: (n, K, h, w), on any device; rounded once to float16.
            global_: (n, K), on the same device.

        Returns:
            The number of units that became complete.

        Raises:
            UsageError: the logits' shape differs from the manifest's, ``views`` is not the next
                batch, or the call is outside the ``with`` block.
            TeacherError: logits of this or an earlier batch are NaN, infinite, or too large for
                float16.
            CacheError, OutputError: an earlier unit could not be written.
        """
        self._require_next(views, spatial, global_)
        logits = Logits(spatial.detach().half(), global_.detach().half())
        ready = None
        if spatial.is_cuda:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(spatial.device))
        self._computing.append((views, logits, ready))
        self.meter.advance(len(views))
        self._undone.claims.renew()
        completed = 0
        while len(self._computing) > batches_ahead(spatial.device):
            completed += self._store(*self._computing.popleft())
        return completed

    def _require_next(self, views: TeacherViews, spatial: Tensor, global_: Tensor) -> None:
        self._require_open()
        if not self._yielded or self._yielded[0] is not views:
            raise UsageError(
                "these views are not the next batch",
                where=self.cache.path,
                expected="each batch once, in the order of iteration",
            )
        found = tuple(spatial.shape), tuple(global_.shape)
        expected = (len(views), *self._shape), (len(views), self._shape.classes)
        if found != expected:
            raise UsageError(
                "the shape of the logits does not match the cache's manifest",
                where=self.cache.path,
                found=f"spatial {found[0]}, global {found[1]}",
                expected=f"spatial {expected[0]}, global {expected[1]}",
                action="correct TeacherInfo's num_classes and grid, or the network's output",
            )
        self._yielded.popleft()

    def _require_open(self) -> None:
        if self._thread is None:
            raise UsageError(
                "the cache's writer is not open",
                where=self.cache.path,
                expected="views() and put() called inside the writer's with block",
            )

    def _flush(self) -> None:
        """Write all units that have all their logits."""
        while self._computing:
            self._store(*self._computing.popleft())
        self._wait()

    def _store(self, views: TeacherViews, logits: Logits, ready: torch.cuda.Event | None) -> int:
        """Encode, sort into units, pass complete units to the thread; return their number.

        Encoding copies counts back to the host. On its own stream, which waits for these logits
        only, it does not also wait for the next batch.
        """
        if ready is None:
            arrays = self._encode(views, logits)
        else:
            side = _side_stream(logits.spatial.device)
            side.wait_event(ready)
            with torch.cuda.stream(side):
                for tensor in (*logits, views.label):
                    if tensor.is_cuda:  # labels are on the caller's Loading.device
                        tensor.record_stream(side)  # no reuse of its memory before this stream ends
                arrays = self._encode(views, logits)
        start = complete = 0
        while start < len(views):
            unit, buffer = self._unfinished[0], self._buffer or self._new_buffer()
            rows = slice(start, start + self._missing)
            view, shard, offset = views.index[rows].T
            assert (shard == unit.shard).all(), (unit, shard)
            own = {name: values[rows] for name, values in arrays.items()}
            buffer.put(view - unit.views[0], offset, own)
            start += len(view)
            self._missing -= len(view)
            if not self._missing:
                self._commit(buffer)
                complete += 1
        return complete

    def _encode(self, views: TeacherViews, logits: Logits) -> dict[str, np.ndarray]:
        """Return every array's rows; ``correct``: the network's top class is the label."""
        require_finite(logits, self.cache.manifest.teacher.name)
        label = views.label.to(logits.global_.device)
        correct = hard_global_labels(logits.global_) == label
        arrays: dict[str, np.ndarray] = {}
        for encoding in encodings_of(self.cache.manifest).values():
            arrays |= encode_batch(encoding, *logits, views.seed)
        return {
            **arrays,
            "correct": correct.cpu().numpy(),
            "seed": views.seed,
            "view_digest": views.view_digest,
            "image_crc32": views.image_crc32,
        }

    def _new_buffer(self) -> UnitBuffer:
        """Allocate the next unit's buffer."""
        unit, manifest = self._unfinished[0], self.cache.manifest
        fill = {name: spec.fill for name, spec in specs(manifest).items()}
        self._buffer = UnitBuffer(len(unit.views), manifest.dataset.counts[unit.shard], fill)
        self._missing = self.cache.size_of(unit)
        return self._buffer

    def _commit(self, buffer: UnitBuffer) -> None:
        """Write the current unit in the background."""
        unit, self._buffer = self._unfinished.popleft(), None
        data = _unit_data(self.dataset.shards[unit.shard], unit, buffer.arrays)
        self._wait()  # one unit is written while one is computed; more would only use memory
        assert self._thread is not None
        self._writing = self._thread.submit(self._write, unit, data)
        self.units_written += 1
        self.views_written += self.cache.size_of(unit)

    def _write(self, unit: Unit, data: UnitData) -> None:
        self.cache.write_unit(unit, data)
        self._undone.claims.drop(unit)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()


def _unit_data(shard: TarShard, unit: Unit, arrays: dict[str, np.ndarray]) -> UnitData:
    top1 = np.stack([arrays.pop("correct").sum(1), np.full(len(unit.views), len(shard))], axis=1)
    return UnitData(
        keys=shard.keys,
        labels=shard.index.label.astype(np.int32),
        image_crc32=arrays.pop("image_crc32")[0],
        seeds=arrays.pop("seed"),
        view_digests=arrays.pop("view_digest"),
        arrays=arrays,
        top1=top1.astype(np.uint32),
    )


def batches_ahead(device: torch.device) -> int:
    """Return how many batches the network computes while an earlier one is encoded and copied."""
    return 1 if device.type == "cuda" else 0


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class UndoneUnits:
    """The units of a cache that are neither done nor claimed, drawn one by one.

    Args:
        units: units that were undone at the start; the same list on every rank.
        patience: seconds without a heartbeat after which another process's unit is taken over.
        ranks: the ranks of this job.

    Attributes:
        expected: current estimate of the views that this process will draw in total.
    """

    def __init__(
        self, cache: CacheWriter, units: Sequence[Unit], patience: float, ranks: Ranks = ALONE
    ) -> None:
        self.cache, self.units, self.ranks = cache, tuple(units), ranks
        self.claims = Claims(cache.path, patience)
        self._left = np.cumsum([cache.size_of(unit) for unit in self.units][::-1])[::-1].tolist()
        self._mine = 0
        self.expected = self._expect(0)

    def rounds(self) -> Iterator[Iterator[Unit]]:
        """Yield rounds of units until all are done, by this process or others.

        The caller must commit a round's units before it requests the next round; otherwise two
        processes might wait for each other.

        Raises:
            CskdError: another rank failed; its error.
            KeyboardInterrupt: a signal came while waiting for other processes.
        """
        yield self._draw()
        seconds = _SHORTEST
        while left := self.left():
            if claimed := next((unit for unit in left if self._claim(unit)), None):
                yield iter([claimed])
                seconds = _SHORTEST
                continue
            self.ranks.check()
            pause(seconds)
            seconds = min(1.5 * seconds, _LONGEST)
        if self.cache.done().all():
            self.claims.sweep()

    def left(self) -> list[Unit]:
        """Return the units that are not done now, claimed or not."""
        done = self.cache.done()
        return [unit for unit in self.units if not done[unit.block, unit.shard]]

    def _draw(self) -> Iterator[Unit]:
        for number in self.ranks.numbers("units"):
            if number >= len(self.units):
                return
            unit = self.units[number]
            claimed = self._claim(unit)
            self._mine += claimed * self.cache.size_of(unit)
            self.expected = self._expect(number + 1)
            if claimed:
                yield unit

    def _claim(self, unit: Unit) -> bool:
        if self.cache.is_done(unit) or not self.claims.take(unit):
            return False
        if self.cache.is_done(unit):  # by a process that has just dropped its claim
            self.claims.drop(unit)
            return False
        return True

    def _expect(self, number: int) -> int:
        """Return the views drawn so far plus an equal share of those from unit ``number`` on."""
        left = self._left[number] if number < len(self.units) else 0
        return self._mine + left // self.ranks.world
