"""Images, labels and keys of a layout's samples, read from the user's tars."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np

from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.data.read_ahead import ReadAhead, uses_of
from cskd_pipeline.data.remote_tar import Tar
from cskd_pipeline.data.shards import TarShard
from cskd_pipeline.errors import JoinError
from cskd_pipeline.runtime.classes import renumbering

ABSENT = -1  # tar, row and label of a sample that is in no tar
SHOWN = 20  # examples in a message


@dataclass(frozen=True)
class TarRows:
    """Tar number, row in that tar and label of each sample of one layout shard.

    All are (count,) int32, and ``ABSENT`` for samples that are in no tar.
    """

    tar: np.ndarray
    row: np.ndarray
    label: np.ndarray


@dataclass(eq=False)
class ImageSource:
    """Source of a layout's images, labels and keys.

    Samples are (n, 2) arrays of shard and offset in the layout.

    Args:
        shards: the user's tars.
        tar_rows: location of each layout shard's samples: the number of a tar with the same keys in
            the same order, or tar and row of each sample. None: the tars are the layout.
        cache: cache that the tars' labels and every image's CRC-32 are compared with.
        strict: refuse images and views that differ from the cache's; otherwise accept images and
            count views.
        same_labels: refuse labels that differ from the cache's.
    """

    shards: Sequence[TarShard]
    _: KW_ONLY
    tar_rows: Sequence[TarRows | int] | None = None
    cache: Cache | None = None
    strict: bool = True
    same_labels: bool = True
    _crcs: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def lenient(self) -> ImageSource:
        """Return the same source, but accepting images and views that differ from the cache's."""
        return replace(self, strict=False)

    def without_cache(self) -> ImageSource:
        """Return the same source without a cache."""
        return replace(self, cache=None)

    @property
    def tars(self) -> list[Tar]:
        """Return the paths or URLs of the tars."""
        return [shard.path for shard in self.shards]

    def _tar_rows_of(self, shard: int) -> TarRows | int:
        return shard if self.tar_rows is None else self.tar_rows[shard]

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tar numbers and rows in the tars, (n,) int64 each; ``ABSENT`` if in no tar."""
        tars, rows = samples[:, 0].astype(np.int64), samples[:, 1].astype(np.int64)
        for shard in np.unique(samples[:, 0]).tolist():
            mask = samples[:, 0] == shard
            tar_rows = self._tar_rows_of(shard)
            if isinstance(tar_rows, int):
                tars[mask] = tar_rows
            else:
                tars[mask], rows[mask] = tar_rows.tar[rows[mask]], tar_rows.row[rows[mask]]
        return tars, rows

    def labels(self, samples: np.ndarray) -> np.ndarray:
        """Return the tars' class numbers, (n,) int64, compared with the cache's."""
        labels = np.empty(len(samples), np.int64)
        for shard in np.unique(samples[:, 0]).tolist():
            if self.cache is not None:
                self._checked_crc32(shard)
            mask = samples[:, 0] == shard
            labels[mask] = self.shard_labels(shard)[samples[mask, 1]]
        return labels

    def keys(self, samples: np.ndarray) -> list[str]:
        """Return the samples' keys."""
        tars, rows = self.locate(samples)
        pairs = zip(tars.tolist(), rows.tolist(), strict=True)
        return [self.shards[tar].key(row) for tar, row in pairs]

    def where(self, shard: int, offset: int) -> str:
        """Return a sample's location for an error message."""
        tars, rows = self.locate(np.array([[shard, offset]]))
        return self.shards[int(tars[0])].where(int(rows[0]))

    def read(self, samples: np.ndarray) -> Iterator[tuple[int, bytes, int]]:
        """Yield index into ``samples``, image bytes and their CRC-32, in the tars' order.

        Raises:
            ShardError: a tar cannot be read.
            JoinError: an image is not the one the cache was made from.
        """
        tars, rows = self.locate(samples)
        assert (tars != ABSENT).all()
        order = np.lexsort((rows, tars))
        parts = np.split(order, np.flatnonzero(np.diff(tars[order])) + 1)
        for part in parts if len(order) else ():  # split returns one part even if there are none
            images = self.shards[int(tars[part[0]])].read_images(rows[part].tolist())
            for i, data in zip(part.tolist(), images, strict=True):
                crc = zlib.crc32(data)
                if self.cache is not None and self.strict:
                    self._compare(crc, *samples[i].tolist())
                yield i, data, crc

    def crc32(self, samples: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield index into ``samples`` and the image's CRC-32, in the order of :meth:`read`.

        Nothing is compared. Remote tars are fetched ahead.
        """
        tars, order = self.tars, np.sort(self.locate(samples)[0])
        ahead = ReadAhead(tars, uses_of(tars, order, np.arange(len(order))))
        ahead.start()
        try:
            for position, (i, _, crc) in enumerate(self.lenient().read(samples)):
                ahead.advance(position)
                yield i, crc
        finally:
            ahead.close()

    def shard_labels(self, shard: int) -> np.ndarray:
        """Return the labels of a layout shard, (count,); ``ABSENT`` for samples in no tar."""
        tar_rows = self._tar_rows_of(shard)
        return self.shards[tar_rows].index.label if isinstance(tar_rows, int) else tar_rows.label

    def relabelled(self, shard: int, recorded: np.ndarray) -> np.ndarray:
        """Find the samples of a layout shard whose label in the tars differs from the cache's.

        ``recorded``: (count,) the cache's labels. Samples in no tar are skipped.

        Returns:
            (n, 3) int64 shard, offset, and the cache's label.
        """
        found = self.shard_labels(shard)
        wrong = np.flatnonzero((found != recorded) & (found != ABSENT))
        rows = np.broadcast_arrays(shard, wrong, recorded[wrong])
        return np.stack(rows, axis=1).astype(np.int64)

    def label_error(self, relabelled: np.ndarray, total: int, switch: str | None) -> JoinError:
        """Return the error for the samples that :meth:`relabelled` found among ``total``.

        ``switch``: the option that accepts them, if there is one.
        """
        found, recorded = self.without_cache().labels(relabelled), relabelled[:, 2]
        pairs = np.unique(np.stack([recorded, found], axis=1), axis=0).tolist()
        changed = renumbering([(a, b) for a, b in pairs])
        order = ", ".join(f"{a} to {b}" for a, b in [*changed.items()][:SHOWN])
        few = slice(SHOWN)
        shown = zip(self.keys(relabelled[few]), found[few], recorded[few], strict=True)
        return JoinError(
            f"{len(found)} of {total} samples have labels that differ from the cache's",
            where=self.where(*relabelled[0, :2].tolist()),
            found=f"classes in another order, cache to shards: {order}" if order else None,
            expected="classes numbered as in the cache's data set",
            action="pack the images again from class folders with the same names as the cache's"
            + (f", or train on these labels anyway: {switch}" if switch else ""),
            problems=[f"{key}: label {a}, in the cache {b}" for key, a, b in shown],
        )

    def _checked_crc32(self, shard: int) -> np.ndarray:
        """Return the cache's image CRC-32 of a layout shard, (count,), after comparing labels."""
        if shard not in self._crcs:
            assert self.cache is not None
            if self.same_labels:
                recorded = self.cache.labels(shard)
                wrong = self.relabelled(shard, recorded)
                if len(wrong):
                    raise self.label_error(wrong, len(recorded), None)
            self._crcs[shard] = self.cache.image_crc32(shard)
        return self._crcs[shard]

    def _compare(self, crc: int, shard: int, offset: int) -> None:
        recorded = int(self._checked_crc32(shard)[offset])
        if crc != recorded:
            raise image_error(self.where(shard, offset), crc, recorded)


def image_error(where: object, crc: int, recorded: int) -> JoinError:
    """Return the error for an image whose CRC-32 differs from the cache's record."""
    return JoinError(
        "an image is not the one the cache was made from",
        where=where,
        found=f"CRC-32 {crc:08x}",
        expected=f"{recorded:08x}",
        action="use the original files (resized or recompressed copies give other views than the "
        "teacher saw), or train without these images: --set data.drift=skip",
    )
