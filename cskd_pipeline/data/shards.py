"""A tar of samples, read in place: an index of its headers, then each image by its offset."""

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
    """One tar, read lazily without keeping the file open.

    It is pickled for loader processes, including the index if it has been read.

    Args:
        path: an uncompressed tar, local or remote.
        info: the tar's entry in a manifest, which gives count and keys without reading, and which
            the tar's keys are compared with.
        num_classes: exclusive upper bound of the labels.
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
            ShardError: not a tar, truncated, a sample without image or label, a label out of range,
                or not the tar in the manifest.
        """
        if self._index is None:
            index = read_index(self.path)
            self._check(index)
            self._index = index
        return self._index

    @property
    def is_indexed(self) -> bool:
        """Return whether the headers have been read."""
        return self._index is not None

    @property
    def size(self) -> int:
        """Return the length of the tar in bytes."""
        return self.path.size if isinstance(self.path, RemoteTar) else self.path.stat().st_size

    def __len__(self) -> int:
        return self.info.count if self.info else len(self.index)

    @cached_property
    def keys_sha256(self) -> str:
        """Return the SHA-256 of the keys, which identifies the samples and their order."""
        return self.info.keys_sha256 if self.info else keys_sha256(self.keys)

    def part(self, rows: range) -> TarShard:
        """Return a shard with only the samples ``rows``."""
        kept = self.index.at(slice(rows.start, rows.stop, rows.step))
        return replace(self, info=None, _index=kept)

    def without(self, rows: Sequence[int]) -> TarShard:
        """Return a shard without the samples ``rows``, and with its manifest entry adapted."""
        kept = self.index.at(np.delete(np.arange(len(self)), rows))
        shard = replace(self, info=None, _index=kept)
        if self.info:
            shard.info = ShardInfo.of(self.info.name, shard.keys, self.info.bytes, self.info.sha256)
        return shard

    @property
    def keys(self) -> list[str]:
        """Return all keys in the tar's order."""
        return [key.decode() for key in self.index.keys.tolist()]

    def key(self, i: int) -> str:
        """Return the key of sample ``i``."""
        return str(self.index.keys[i].decode())

    def label(self, i: int) -> int:
        """Return the class number of sample ``i``."""
        return int(self.index.label[i])

    def where(self, i: int) -> str:
        """Return the location of sample ``i`` for an error message."""
        return f"{self.path}: {self.key(i)}"

    def read_images(self, rows: Iterable[int]) -> Iterator[bytes]:
        """Yield the image bytes of samples ``rows``, in that order, opening the file once.

        Raises:
            ShardError: the file cannot be read, or was truncated since its headers were read.
        """
        with open_shard(self.path) as file:
            index = self.index  # after opening: a remote tar is read from its local copy
            for i in rows:
                size = int(index.size[i])
                try:
                    data = os.pread(file.fileno(), size, int(index.offset[i]))
                except OSError as error:  # a failing disk, or a lost network file system
                    raise ShardError(
                        "the shard cannot be read", where=self.path, found=error.strerror
                    ) from error
                if len(data) != size:
                    raise ShardError(
                        "the shard was truncated while in use",
                        where=self.where(i),
                        found=f"{len(data)} bytes of the image",
                        expected=size,
                    )
                yield data

    def _check(self, index: ShardIndex) -> None:
        if self.info and self.info.keys_sha256 != keys_sha256(k.decode() for k in index.keys):
            raise ShardError(
                "the shard's keys do not match its manifest",
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
                f"{len(outside)} labels are out of range",
                where=f"{self.path}: {index.keys[first].decode()}",
                found=int(index.label[first]),
                expected=f"0 to {self.num_classes - 1}",
                action="check the number of classes, and that labels start at 0",
            )
