"""A tar at a URL: headers are read by range requests, images from a local copy.

A copy is a complete tar, kept in a :class:`~cskd_pipeline.cache.mirror.Mirror` under a name derived
from the URL and what the server reports about the file: length and ETag (or date), or the SHA-256
if a manifest or the store states it. So a replaced tar is never mistaken for the one whose headers
were read. A copy is verified against all of these before it gets its name.

Indices of tars are stored next to the copies and outlive them: headers are requested once on a
machine.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from cskd_pipeline.cache import transfers
from cskd_pipeline.cache.chunks import DamageError
from cskd_pipeline.cache.mirror import FOLDER, GIGABYTES, INDEX_SUFFIX, Mirror
from cskd_pipeline.cache.remote_files import RemoteFiles
from cskd_pipeline.cache.transfers import ByteRange, Pace
from cskd_pipeline.errors import RemoteError, ShardError, UsageError
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.atomic import write_bytes

log = logging.getLogger(__name__)

FETCHING = 8  # tars fetched at a time
_SHA256 = re.compile("[0-9a-f]{64}")
_SMALL, _LARGE = 2**12, 2**20  # bytes of the shortest and the longest range
_BLOCKS = 4  # recent ranges kept: a label is read after the header that follows it


@dataclass(frozen=True)
class RemoteTar:
    """A tar at ``url``, and what is known about it; sent to loader processes.

    Args:
        size: length in bytes.
        version: ETag, date or empty.
        ranges: whether the server supports range requests.
        sha256: SHA-256 from its store or a manifest; None if unknown.
    """

    url: str
    size: int
    version: str
    ranges: bool
    sha256: str | None = None

    def __str__(self) -> str:
        return self.url

    @property
    def parent(self) -> str:
        """Return the URL of the tar's folder."""
        return self.url.rpartition("/")[0]

    @property
    def key(self) -> str:
        """Return the tar's name in its folder."""
        return self.url.rpartition("/")[2]

    @property
    def copy_name(self) -> str:
        """Return the name of the local copy."""
        known = self.sha256 or f"{self.size} {self.version}"
        return hashlib.sha256(f"{self.url} {known}".encode()).hexdigest()[:32] + ".tar"

    def with_sha256(self, sha256: str | None) -> RemoteTar:
        """Return the tar with the SHA-256 of a manifest, if any; refuse a contradiction."""
        if sha256 is None:
            return self
        if self.sha256 not in (None, sha256):
            raise _wrong_sha256(self, self.sha256, sha256)
        return replace(self, sha256=sha256)

    def fetch(self) -> None:
        """Fetch a local copy unless there is one.

        Raises:
            ShardError: the tar is gone or has changed.
            RemoteError: the server denies access, cannot be reached, or is too slow.
            UsageError: the limit on copies is smaller than the tar.
        """
        self.open().close()

    def open(self) -> BufferedReader:
        """Open the local copy, fetching it if absent; raise as :meth:`fetch`."""
        return tars_in(self.parent).open(self)

    def open_headers(self) -> BufferedReader | RangeFile:
        """Open the local copy if there is one, else the remote tar, read by ranges on demand."""
        tars = tars_in(self.parent)
        if tars.mirror.find(self.copy_name) is not None:
            return self.open()
        if self.ranges:
            return RangeFile(self.size, lambda part: tars.read(self, part))
        log.info(f"{self.url}: fetching the complete tar: the server does not support ranges")
        return self.open()

    def cached_index(self, read: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the tar's index as stored on this machine; without one, ``read`` and store it.

        Headers are read before the SHA-256 is checked, so the server's version is in the name too.
        """
        version = hashlib.sha256(self.version.encode()).hexdigest()[:32]
        path = tars_in(self.parent).root / f"{self.copy_name}.{version}{INDEX_SUFFIX}"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except FileNotFoundError:
            pass
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            log.warning(f"{path}: the index is damaged, writing it again: {error}")
        index = read()
        data = io.BytesIO()
        np.savez(data, **index)  # type: ignore[arg-type]  # no array is its allow_pickle
        write_bytes(path, data.getvalue())
        return index


Tar = Path | RemoteTar
"""A tar's location."""


class RemoteTars(RemoteFiles):
    """The tars in one folder at a URL."""

    def __init__(self, url: str) -> None:
        self.mirror = Mirror.of(f"shards {url}")
        super().__init__(url, self.mirror, of="shards")
        self._addresses: dict[str, str] = {}  # final URL of a redirected tar, by key

    def find(self, key: str) -> RemoteTar:
        """Request what the server reports about a tar; raise DamageError if absent."""

        def request(pace: Pace) -> RemoteTar:
            with self._response(key, 0, pace, 1) as response:
                if response.total is None:
                    raise OSError("the server does not report the file's length")
                return RemoteTar(self.where(key), response.total, response.version, response.part)

        return self._retry(key, request)

    def list_tars(self) -> dict[str, RemoteTar]:
        """Return the large files of a folder on the hub, from one listing; none of other stores.

        The hub lists their SHA-256, and limits the rate of requests.
        """
        if self.scheme != "hf":
            return {}

        def request() -> dict[str, RemoteTar]:
            found = {}
            for info in self._fs().ls(self.url, detail=True):
                large: Any = info.get("lfs") or {}
                sha256 = large.get("sha256") if isinstance(large, dict) else large.sha256
                if isinstance(sha256, str) and _SHA256.fullmatch(sha256):
                    name = str(info["name"]).rsplit("/", 1)[-1]
                    size = int(info["size"])
                    found[name] = RemoteTar(self.where(name), size, "", True, sha256)
            return found

        try:
            return self._retry("", lambda pace: transfers.within(pace, request))
        except DamageError:  # no such folder: its tars are reported missing one by one
            return {}

    def open(self, tar: RemoteTar) -> BufferedReader:
        """Open the local copy of a tar, fetching it if absent."""
        _require_room(tar.size, self.mirror, tar, "one tar")

        def open_copy(path: Path) -> BufferedReader | None:
            try:
                file = path.open("rb")
            except FileNotFoundError:
                return None
            if os.fstat(file.fileno()).st_size == tar.size:
                return file
            file.close()
            self.mirror.remove(tar.copy_name)
            return None

        with _shard_errors(tar):
            return self.mirror.open(
                tar.copy_name, lambda file: self._fetch_verified(tar, file), open_copy
            )

    def read(self, tar: RemoteTar, part: ByteRange) -> bytes:
        """Request a range of a tar; refuse a changed tar."""
        assert part.stop is not None
        key, length = tar.key, part.stop - part.start

        def request(pace: Pace) -> bytes:
            address, data = self._addresses.pop(key, None), bytearray()
            try:
                with (
                    self._response(key, part.start, pace, part.stop)
                    if address is None
                    else transfers.from_web(address, part, tar.url, pace, {})
                ) as response:
                    if not response.part:
                        raise OSError("the server sent the complete file instead of a range")
                    _require_same(tar, response.total, response.version)
                    for piece in response.pieces(pace):
                        data += piece
                        if len(data) > length:
                            raise OSError(f"more than the {length} bytes requested")
            except transfers.StatusError as error:
                if address is None:
                    raise
                raise OSError(f"{error}, at the URL of an earlier redirect") from error
            if len(data) != length:
                raise OSError(f"{len(data)} of {length} bytes arrived")
            address = response.address or address
            if address is not None:  # saves the next request the redirects
                self._addresses[key] = address
            return bytes(data)

        with _shard_errors(tar):
            return self._retry(key, request)

    def find_document(self, key: str) -> Any:
        """Read a JSON document; return None if it is absent or access is denied."""
        try:
            return schemas.parse(self.document(key, schemas.MAX_BYTES), self.where(key))
        except DamageError as error:
            if str(error) == "the file is missing":
                return None
            raise ShardError(
                "a document next to the shards cannot be read",
                where=self.where(key),
                found=str(error),
            ) from error
        except RemoteError as error:
            if not self.is_refusal(error):
                raise
            log.info(f"{self.where(key)}: treated as absent: {error.found}")
            return None

    def _fetch_verified(self, tar: RemoteTar, file: BufferedRandom) -> None:
        """Fetch a tar and compare it with ``tar``; fetch one of the wrong SHA-256 once more."""
        for retry in (True, False):
            file.seek(0)
            file.truncate()
            version = self._fetch(tar.key, file, tar.size)
            if tar.sha256 is not None:  # decides: some servers report several versions of one file
                version = tar.version
            _require_same(tar, file.tell(), version)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave zeros under a trusted name
            if tar.sha256 is None:
                return
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found == tar.sha256:
                return
            if not retry:
                raise _wrong_sha256(tar, found, tar.sha256)


def _require_same(tar: RemoteTar, size: int | None, version: str) -> None:
    listed = tar.sha256 is not None and not tar.version  # its listing has no ETag
    if size == tar.size and (listed or version == tar.version):
        return
    raise ShardError(
        "the tar changed while in use",
        where=tar,
        found=f"{size} bytes, version {version or 'unknown'}",
        expected=f"{tar.size} bytes, version {tar.version or 'unknown'}",
        action="run the same command again once the shards no longer change",
    )


@contextmanager
def _shard_errors(tar: RemoteTar) -> Iterator[None]:
    """Raise a DamageError as a ShardError."""
    try:
        yield
    except DamageError as error:
        raise ShardError(
            "the shard cannot be fetched",
            where=tar,
            found=str(error),
            expected="the tar as it was at the start",
            action="publish the shards again, or write a new manifest: cskd-pipeline index",
        ) from error


def _wrong_sha256(tar: RemoteTar, found: str | None, expected: str | None) -> ShardError:
    return ShardError(
        "the tar has the wrong SHA-256",
        where=tar,
        found=found,
        expected=expected,
        action="publish the original shards, or write a new manifest: cskd-pipeline index",
    )


def tars_in(folder: str) -> RemoteTars:
    """Return the tars in a folder at a URL; the same object for the same mirror."""
    return _tars_in(folder, os.environ.get(FOLDER), os.environ.get(GIGABYTES))


@lru_cache(maxsize=64)
def _tars_in(folder: str, *environment: str | None) -> RemoteTars:
    return RemoteTars(folder)


def room_of(tars: Iterable[Tar]) -> int | None:
    """Return the bytes of copies that remain after an eviction; None if all tars are local."""
    remote = next((tar for tar in tars if isinstance(tar, RemoteTar)), None)
    return None if remote is None else tars_in(remote.parent).mirror.capacity


def require_room(tars: Iterable[Tar], at_once: int, what: str) -> None:
    """Refuse a limit on copies below the size of the ``at_once`` largest of ``tars``."""
    remote = [tar for tar in tars if isinstance(tar, RemoteTar)]
    if remote:
        largest = sorted((tar.size for tar in remote), reverse=True)[:at_once]
        mirror = tars_in(remote[0].parent).mirror
        _require_room(sum(largest), mirror, mirror.folder, f"{what} ({len(largest)} tars)")


def _require_room(size: int, mirror: Mirror, where: object, what: str) -> None:
    if size > mirror.capacity:
        raise UsageError(
            f"the limit on copies of shards is too small for {what}",
            where=where,
            found=f"{GIGABYTES}={mirror.limit / 1e9:g}, of which an eviction leaves "
            f"{mirror.capacity / 1e9:g} GB",
            expected=f"at least {size / 7 * 8 / 1e9:.3g}",
            action=f"increase {GIGABYTES}, or copy the shards to this machine"
            + ("" if what == "one tar" else ", or reduce batch.shuffle_shards"),
        )


class RangeFile(io.RawIOBase):
    """A remote file read in ranges, which grow while reads are close together.

    Args:
        size: length of the file in bytes.
        fetch: function that returns the bytes of a range.
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
