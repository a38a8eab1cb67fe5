"""A file elsewhere, of which only what is read is requested."""

from __future__ import annotations

import io
import os
from collections.abc import Callable

from cskd_pipeline.cache.transfers import ByteRange

_SMALL, _LARGE = 2**12, 2**20  # bytes of the shortest and the longest range
_BLOCKS = 4  # ranges that are kept: a label is read after the header that follows it


class RangeFile(io.RawIOBase):
    """Read a file elsewhere in ranges, which grow while what is read lies close together.

    Args:
        size: its length in bytes.
        fetch: returns the bytes of a part.
    """

    def __init__(self, size: int, fetch: Callable[[ByteRange], bytes]) -> None:
        self.size, self._fetch = size, fetch
        self._position, self._length = 0, _SMALL
        self._blocks: list[tuple[int, bytes]] = []

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position, from the beginning only."""
        assert whence == os.SEEK_SET
        self._position = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        """Read up to ``size`` bytes from the position on."""
        data = self.read_at(self.size if size < 0 else size, self._position)
        self._position += len(data)
        return data

    def read_at(self, size: int, offset: int) -> bytes:
        """Read up to ``size`` bytes from ``offset`` on."""
        size = max(0, min(size, self.size - offset))
        for start, block in self._blocks:
            if start <= offset and offset + size <= start + len(block):
                return block[offset - start : offset - start + size]
        if not size:
            return b""
        end = max((start + len(block) for start, block in self._blocks[-1:]), default=0)
        close = abs(offset - end) <= self._length
        self._length = min(2 * self._length, _LARGE) if close else _SMALL
        stop = min(offset + max(size, self._length), self.size)
        block = self._fetch(ByteRange(offset, stop))
        self._blocks = [*self._blocks[1 - _BLOCKS :], (offset, block)]
        return block[:size]
