"""A tar of samples, read where it lies: an index of its headers, then each image by its offset."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from cskd_pipeline.cache.manifest import ShardInfo, keys_sha256
from cskd_pipeline.data.remote_tar import RemoteTar, Tar
from cskd_pipeline.data.tar_index import ShardIndex, open_shard, read_index
from cskd_pipeline.errors import ShardError


@dataclass(eq=False)
class TarShard:
    """One tar. Nothing is read before it is needed, and no file stays open.

    It travels to loader processes by pickle, with its index where that was read already.

    Args:
        path: an uncompressed tar, here or elsewhere.
        info: its entry in a manifest; then count and keys are known without reading, and what is
            read is compared.
        num_classes: labels must lie below it.
    """

    path: Tar
    info: ShardInfo | None = None
    num_classes: int | None = None
    _index: ShardIndex | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.info is not None and isinstance(self.path, RemoteTar):
            self.path = self.path.with_sha256(self.info.sha256)
        if self._index is not None:
            self._check(self._index)

    @property
    def index(self) -> ShardIndex:
        """Return the index of the headers, read once.

        Raises:
            ShardError: not a tar, cut short, a sample without image or label, a label outside the
                classes, or not what the manifest says.
        """
        if self._index is None:
            index = read_index(self.path)
            self._check(index)
            self._index = index
        return self._index

    @property
    def is_indexed(self) -> bool:
        """Return whether the headers were read."""
        return self._index is not None

    @property
    def size(self) -> int:
        """Return the length of the tar in bytes."""
        return self.path.size if isinstance(self.path, RemoteTar) else self.path.stat().st_size

    def __len__(self) -> int:
        return self.info.count if self.info else len(self.index)

    @cached_property
    def keys_sha256(self) -> str:
        """Return what identifies the samples and their order."""
        return self.info.keys_sha256 if self.info else keys_sha256(self.keys)

    def part(self, rows: range) -> TarShard:
        """Return these samples alone, as if the tar held no others."""
        kept = self.index.at(slice(rows.start, rows.stop, rows.step))
        return replace(self, info=None, _index=kept)

    def without(self, rows: Sequence[int]) -> TarShard:
        """Return the same as if the tar did not hold samples ``rows``, with a fitting entry."""
        kept = self.index.at(np.delete(np.arange(len(self)), rows))
        shard = replace(self, info=None, _index=kept)
        if self.info:
            shard.info = ShardInfo.of(self.info.name, shard.keys, self.info.bytes, self.info.sha256)
        return shard

    @property
    def keys(self) -> list[str]:
        """Return all keys, in the tar's order."""
        return [key.decode() for key in self.index.keys.tolist()]

    def key(self, i: int) -> str:
        """Return the key of sample ``i``."""
        return str(self.index.keys[i].decode())

    def label(self, i: int) -> int:
        """Return the class number of sample ``i``."""
        return int(self.index.label[i])

    def where(self, i: int) -> str:
        """Name sample ``i`` in an error message."""
        return f"{self.path}: {self.key(i)}"

    def read_images(self, rows: Iterable[int]) -> Iterator[bytes]:
        """Yield the images of samples ``rows``, in that order, from one opening of the file.

        Raises:
            ShardError: the file is gone or has become shorter since its headers were read.
        """
        with open_shard(self.path) as file:
            index = self.index  # of a tar elsewhere, from the copy that is now there
            for i in rows:
                size = int(index.size[i])
                try:
                    data = os.pread(file.fileno(), size, int(index.offset[i]))
                except OSError as error:  # a failing disk, a network file system that went away
                    raise ShardError(
                        "the shard cannot be read", where=self.path, found=error.strerror
                    ) from error
                if len(data) != size:
                    raise ShardError(
                        "the file has become shorter while it was in use",
                        where=self.where(i),
                        found=f"{len(data)} bytes of the image",
                        expected=size,
                    )
                yield data

    def _check(self, index: ShardIndex) -> None:
        if self.info and self.info.keys_sha256 != keys_sha256(k.decode() for k in index.keys):
            raise ShardError(
                "the shard is not the one its manifest describes: its samples' keys differ",
                where=self.path,
                found=f"{len(index)} samples",
                expected=f"{self.info.count} samples, keys {self.info.keys_sha256[:12]}…",
                action="use the shards that were indexed, or run: cskd-pipeline index",
            )
        if self.num_classes is None:
            return
        outside = np.flatnonzero(index.label >= self.num_classes)
        if len(outside):
            first = outside[0]
            raise ShardError(
                f"{len(outside)} labels lie outside the classes",
                where=f"{self.path}: {index.keys[first].decode()}",
                found=int(index.label[first]),
                expected=f"0 to {self.num_classes - 1}",
                action="check the number of classes, and that labels count from 0",
            )
