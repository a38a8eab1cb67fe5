"""Images, labels and keys of a layout's samples, wherever the user's tars hold them."""

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

NOWHERE = -1
SHOWN = 20  # examples in a message


@dataclass(frozen=True)
class TarRows:
    """The samples of one layout shard in the tars: number of the ``tar``, ``row`` there, ``label``.

    All are (count,) int32, and ``NOWHERE`` for samples that are in no tar.
    """

    tar: np.ndarray
    row: np.ndarray
    label: np.ndarray


@dataclass(eq=False)
class ImageSource:
    """Reads samples by (shard, offset) in a layout.

    Samples are given as (n, 2) arrays of shard and offset.

    Args:
        shards: the user's tars.
        tar_rows: per layout shard, where its samples are: the number of a tar with the same keys in
            the same order, or tar and row of each. None: the tars are the layout.
        cache: what must agree with the tars: labels, and every image's CRC-32.
        strict: an image or view unlike the cache's is an error; otherwise images are read, and
            views are counted.
        same_labels: labels unlike the cache's are an error.
    """

    shards: Sequence[TarShard]
    _: KW_ONLY
    tar_rows: Sequence[TarRows | int] | None = None
    cache: Cache | None = None
    strict: bool = True
    same_labels: bool = True
    _crcs: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def lenient(self) -> ImageSource:
        """Return the same source, which refuses no image or view of those unlike the cache's."""
        return replace(self, strict=False)

    def alone(self) -> ImageSource:
        """Return the same source without a cache."""
        return replace(self, cache=None)

    @property
    def tars(self) -> list[Tar]:
        """Return where the tars are."""
        return [shard.path for shard in self.shards]

    def _tar_rows_of(self, shard: int) -> TarRows | int:
        return shard if self.tar_rows is None else self.tar_rows[shard]

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tar numbers and rows in them, (n,) int64 each; ``NOWHERE`` for what no tar has."""
        tars, rows = samples[:, 0].astype(np.int64), samples[:, 1].astype(np.int64)
        for shard in np.unique(samples[:, 0]).tolist():
            here = samples[:, 0] == shard
            tar_rows = self._tar_rows_of(shard)
            if isinstance(tar_rows, int):
                tars[here] = tar_rows
            else:
                tars[here], rows[here] = tar_rows.tar[rows[here]], tar_rows.row[rows[here]]
        return tars, rows

    def labels(self, samples: np.ndarray) -> np.ndarray:
        """Return the class numbers that the tars have, (n,) int64; refuse any but the cache's."""
        labels = np.empty(len(samples), np.int64)
        for shard in np.unique(samples[:, 0]).tolist():
            if self.cache is not None:
                self._checked(shard)
            here = samples[:, 0] == shard
            labels[here] = self.shard_labels(shard)[samples[here, 1]]
        return labels

    def keys(self, samples: np.ndarray) -> list[str]:
        """Return the samples' keys."""
        tars, rows = self.locate(samples)
        pairs = zip(tars.tolist(), rows.tolist(), strict=True)
        return [self.shards[tar].key(row) for tar, row in pairs]

    def where(self, shard: int, offset: int) -> str:
        """Name a sample in an error message."""
        tars, rows = self.locate(np.array([[shard, offset]]))
        return self.shards[int(tars[0])].where(int(rows[0]))

    def read(self, samples: np.ndarray) -> Iterator[tuple[int, bytes, int]]:
        """Yield index into ``samples``, image bytes and their CRC-32; tar by tar, front to back.

        Raises:
            ShardError: a tar cannot be read.
            JoinError: an image is not the one the cache was made from.
        """
        tars, rows = self.locate(samples)
        assert (tars != NOWHERE).all(), "no tar has the sample"
        order = np.lexsort((rows, tars))
        parts = np.split(order, np.flatnonzero(np.diff(tars[order])) + 1)
        for part in parts if len(order) else ():  # of nothing, split makes one part
            images = self.shards[int(tars[part[0]])].read_images(rows[part].tolist())
            for i, data in zip(part.tolist(), images, strict=True):
                crc = zlib.crc32(data)
                if self.cache is not None and self.strict:
                    self._compare(crc, *samples[i].tolist())
                yield i, data, crc

    def crc32(self, samples: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield index into ``samples`` and the image's CRC-32, in the order of :meth:`read`.

        Nothing is compared. Tars elsewhere are fetched ahead.
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
        """Return the labels of a layout shard, (count,); ``NOWHERE`` for what no tar has."""
        tar_rows = self._tar_rows_of(shard)
        return self.shards[tar_rows].index.label if isinstance(tar_rows, int) else tar_rows.label

    def relabelled(self, shard: int, recorded: np.ndarray) -> np.ndarray:
        """Find the samples of a layout shard whose label in the tars is not the cache's.

        ``recorded``: (count,) the cache's labels. What no tar has is left out.

        Returns:
            (n, 3) int64 shard, offset, and the cache's label.
        """
        found = self.shard_labels(shard)
        wrong = np.flatnonzero((found != recorded) & (found != NOWHERE))
        rows = np.broadcast_arrays(shard, wrong, recorded[wrong])
        return np.stack(rows, axis=1).astype(np.int64)

    def label_error(self, relabelled: np.ndarray, among: int, switch: str | None) -> JoinError:
        """Make the error about the samples that :meth:`relabelled` found ``among`` so many.

        ``switch``: what accepts it, if anything does.
        """
        found, recorded = self.alone().labels(relabelled), relabelled[:, 2]
        pairs = np.unique(np.stack([recorded, found], axis=1), axis=0).tolist()
        changed = renumbering([(a, b) for a, b in pairs])
        order = ", ".join(f"{a} is {b} here" for a, b in [*changed.items()][:SHOWN])
        few = slice(SHOWN)
        shown = zip(self.keys(relabelled[few]), found[few], recorded[few], strict=True)
        return JoinError(
            f"{len(found)} of {among} samples have other labels than in the cache",
            where=self.where(*relabelled[0, :2].tolist()),
            found=f"classes in another order: {order}" if order else None,
            expected="classes numbered as in the cache's data set",
            action="pack the images again from class folders with the same names as the cache's"
            + (f"; or train on these labels all the same: {switch}" if switch else ""),
            problems=[f"{key}: label {a}, in the cache {b}" for key, a, b in shown],
        )

    def _checked(self, shard: int) -> np.ndarray:
        """The cache's image CRCs of a layout shard, (count,) uint32, after comparing labels."""
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
        recorded = int(self._checked(shard)[offset])
        if crc != recorded:
            raise other_image(self.where(shard, offset), crc, recorded)


def other_image(where: object, crc: int, recorded: int) -> JoinError:
    """Return the error of an image whose CRC-32 is not the recorded one."""
    return JoinError(
        "an image is not the one the cache was made from",
        where=where,
        found=f"CRC-32 {crc:08x}",
        expected=f"{recorded:08x}",
        action="use the original files: from copies that were resized or compressed again "
        "come other views than the teacher saw; or train without these images: "
        "--set data.drift=skip",
    )
