"""A tar at a URL: its headers by requests for ranges, its images from a copy on this machine.

A copy is a whole tar, kept as a cache's files are (:class:`~cskd_pipeline.cache.mirror.Mirror`),
under a name that follows from the URL and from what the server states of the file: length and ETag
(or date), or the SHA-256 where a manifest or the store has it. So a tar that is exchanged is never
taken for the one whose headers were read. Copies are compared with all of that before they get
their name.

Indices of tars are noted beside the copies and outlast them: headers are requested once on a
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
from cskd_pipeline.cache.mirror import FOLDER, GIGABYTES, Mirror
from cskd_pipeline.cache.remote_files import RemoteFiles
from cskd_pipeline.cache.transfers import ByteRange, Pace
from cskd_pipeline.errors import RemoteError, ShardError, UsageError
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.atomic import write_bytes

log = logging.getLogger(__name__)

FETCHING = 8  # whole tars at a time
_SHA256 = re.compile("[0-9a-f]{64}")
_SMALL, _LARGE = 2**12, 2**20  # bytes of the shortest and the longest range
_BLOCKS = 4  # ranges that are kept: a label is read after the header that follows it


@dataclass(frozen=True)
class RemoteTar:
    """Name a tar at ``url``, as messages do, and what is stated of it; loader processes get it.

    Args:
        size: in bytes.
        version: ETag, date or empty.
        ranges: the server sends parts of it.
        sha256: by its store or a manifest; None: not known.
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
        """Return the URL of its folder."""
        return self.url.rpartition("/")[0]

    @property
    def key(self) -> str:
        """Return its name in its folder."""
        return self.url.rpartition("/")[2]

    @property
    def copy_name(self) -> str:
        """Return the name of its copy."""
        known = self.sha256 or f"{self.size} {self.version}"
        return hashlib.sha256(f"{self.url} {known}".encode()).hexdigest()[:32] + ".tar"

    def with_sha256(self, sha256: str | None) -> RemoteTar:
        """Return the tar that must have this SHA-256, by a manifest; None: unknown to it."""
        if sha256 is None:
            return self
        if self.sha256 not in (None, sha256):
            raise _not_described(self, self.sha256, sha256)
        return replace(self, sha256=sha256)

    def fetch(self) -> None:
        """Have a copy on this machine.

        Raises:
            ShardError: the tar is gone, or not what was stated.
            RemoteError: the server refuses, or cannot be reached.
            UsageError: there is no room for one tar.
        """
        self.open().close()

    def open(self) -> BufferedReader:
        """Open the copy, fetched if need be; raise as :meth:`fetch`."""
        return tars_in(self.parent).open(self)

    def open_headers(self) -> BufferedReader | RangeFile:
        """Open the copy, or the tar where it lies, of which only what is read is requested."""
        tars = tars_in(self.parent)
        if tars.mirror.find(self.copy_name) is not None:
            return self.open()
        if self.ranges:
            return RangeFile(self.size, lambda part: tars.read(self, part))
        log.info(f"{self.url}: the server sends no parts of files: fetching the whole tar")
        return self.open()

    def noted(self, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return what was made of its headers before, on this machine, or make and note it.

        Headers are read before the SHA-256 is compared: what the server states is in the name too.
        """
        version = hashlib.sha256(self.version.encode()).hexdigest()[:32]
        path = tars_in(self.parent).root / f"{self.copy_name}.{version}.npz"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except FileNotFoundError:
            pass
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            log.warning(f"{path}: damaged, and written anew: {error}")
        made = make()
        arrays = io.BytesIO()
        np.savez(arrays, **made)  # type: ignore[arg-type]  # no array is its allow_pickle
        write_bytes(path, arrays.getvalue())
        return made


Tar = Path | RemoteTar
"""Where a tar is."""


class RemoteTars(RemoteFiles):
    """Read the tars in one folder at a URL."""

    def __init__(self, url: str) -> None:
        self.mirror = Mirror.of(f"shards {url}")
        super().__init__(url, self.mirror, of="shards")
        self._addresses: dict[str, str] = {}  # where redirects of a tar led to, by its key

    def state(self, key: str) -> RemoteTar:
        """Request what the server states of a tar; raise DamageError where there is none."""

        def request(pace: Pace) -> RemoteTar:
            with self._response(key, 0, pace, 1) as response:
                if response.total is None:
                    raise OSError("the server does not state the file's length")
                return RemoteTar(self.where(key), response.total, response.version, response.part)

        return self._insisting(key, request)

    def listed(self) -> dict[str, RemoteTar]:
        """Return what one listing states of all large files; nothing but of the hub's.

        The hub keeps their SHA-256, and limits how many requests it serves in a while.
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
            return self._insisting("", lambda pace: transfers.within(pace, request))
        except DamageError:  # no such folder: its tars are found missing one by one
            return {}

    def open(self, tar: RemoteTar) -> BufferedReader:
        """Open the copy of a tar; fetch it first if it is not there."""
        _require_room(tar.size, self.mirror, tar, "one tar")

        def opening(path: Path) -> BufferedReader | None:
            try:
                file = path.open("rb")
            except FileNotFoundError:
                return None
            if os.fstat(file.fileno()).st_size == tar.size:
                return file
            file.close()
            self.mirror.remove(tar.copy_name)
            return None

        with _explained(tar):
            return self.mirror.opened(
                tar.copy_name, lambda file: self._fetch_whole(tar, file), opening
            )

    def read(self, tar: RemoteTar, part: ByteRange) -> bytes:
        """Request a part of a tar, of the version that was stated."""
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
                        raise OSError("the whole file where a part of it was requested")
                    _require_same(tar, response.total, response.version)
                    for piece in response.pieces(pace):
                        data += piece
                        if len(data) > length:
                            raise OSError(f"more than the {length} bytes that were requested")
            except transfers.StatusError as error:
                if address is None:
                    raise
                raise OSError(f"{error}, where redirects led to before") from error
            if len(data) != length:
                raise OSError(f"{len(data)} bytes arrived where {length} should")
            address = response.address or address
            if address is not None:  # saves the redirects of the next part
                self._addresses[key] = address
            return bytes(data)

        with _explained(tar):
            return self._insisting(key, request)

    def document_if_there(self, key: str) -> Any:
        """Read a JSON document; None where there is none, or one that may not be read."""
        try:
            return schemas.parse(self.document(key, schemas.MAX_BYTES), self.where(key))
        except DamageError as error:
            if str(error) == "the file is missing":
                return None
            raise ShardError(
                "a document beside the shards cannot be read",
                where=self.where(key),
                found=str(error),
            ) from error
        except RemoteError as error:
            if not self.is_refusal(error):
                raise
            log.info(f"{self.where(key)}: taken for absent: {error.found}")
            return None

    def _fetch_whole(self, tar: RemoteTar, file: BufferedRandom) -> None:
        """Fetch a tar, and compare it with what is stated; a wrong one is fetched once more."""
        for again in (True, False):
            file.seek(0)
            file.truncate()
            version = self._fetch(tar.key, file, tar.size)
            if tar.sha256 is not None:  # decides; some servers state a version each of one file
                version = tar.version
            _require_same(tar, file.tell(), version)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave zeros under a name that is believed
            if tar.sha256 is None:
                return
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found == tar.sha256:
                return
            if not again:
                raise _not_described(tar, found, tar.sha256)


def _require_same(tar: RemoteTar, size: int | None, version: str) -> None:
    listed = tar.sha256 is not None and not tar.version  # its listing has no ETag
    if size == tar.size and (listed or version == tar.version):
        return
    raise ShardError(
        "the tar was exchanged while it was in use",
        where=tar,
        found=f"{size} bytes, version {version or 'not stated'}",
        expected=f"{tar.size} bytes, version {tar.version or 'not stated'}",
        action="run the same command again once the shards stay as they are",
    )


@contextmanager
def _explained(tar: RemoteTar) -> Iterator[None]:
    try:
        yield
    except DamageError as error:
        raise ShardError(
            "the shard cannot be fetched",
            where=tar,
            found=str(error),
            expected="the tar that was there at the start",
            action="publish the shards again, or describe what is there: cskd-pipeline index",
        ) from error


def _not_described(tar: RemoteTar, found: str | None, expected: str | None) -> ShardError:
    return ShardError(
        "the tar is not the one that was described: its bytes differ",
        where=tar,
        found=f"SHA-256 {found}",
        expected=expected,
        action="publish the shards again as they were, or describe them anew: cskd-pipeline index",
    )


def tars_in(folder: str) -> RemoteTars:
    """Return the tars in a folder at a URL, by this process's connections."""
    return _with_copies(folder, os.environ.get(FOLDER), os.environ.get(GIGABYTES))


@lru_cache(maxsize=64)
def _with_copies(folder: str, *environment: str | None) -> RemoteTars:
    """``environment``: where copies lie, and how many."""
    return RemoteTars(folder)


def room_of(tars: Iterable[Tar]) -> int | None:
    """Return how many bytes of copies stay; None where all tars are on this machine."""
    remote = next((tar for tar in tars if isinstance(tar, RemoteTar)), None)
    return None if remote is None else tars_in(remote.parent).mirror.lasting


def require_room(tars: Iterable[Tar], at_once: int, what: str) -> None:
    """Refuse room for copies that is less than the ``at_once`` largest of ``tars`` take."""
    remote = [tar for tar in tars if isinstance(tar, RemoteTar)]
    if remote:
        largest = sorted((tar.size for tar in remote), reverse=True)[:at_once]
        mirror = tars_in(remote[0].parent).mirror
        _require_room(sum(largest), mirror, mirror.folder, f"{what} ({len(largest)} tars)")


def _require_room(size: int, mirror: Mirror, where: object, what: str) -> None:
    if size > mirror.lasting:
        raise UsageError(
            f"the room for copies of shards is smaller than what {what} takes",
            where=where,
            found=f"{GIGABYTES}={mirror.limit / 1e9:g}, of which {mirror.lasting / 1e9:g} GB stay",
            expected=f"at least {size / 7 * 8 / 1e9:.3g}",
            action=f"set {GIGABYTES} to more, or copy the shards to this machine"
            + ("" if what == "one tar" else "; or set batch.shuffle_shards to less"),
        )


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
