"""SHA-256 from a file's bytes up to the whole cache: what was written, and that it belongs here.

A checksum finds noise; it does not find a file of another unit, view or teacher, whose checksum is
valid too. So a unit's record, written last, holds the digest of each of its files, and

    unit = SHA-256 of {"cache": lineage, "files": {key: digest, ...}} as canonical JSON
    root = SHA-256 of lineage, views (8 bytes, little-endian) and all unit digests, block by block

where the lineage (:meth:`CacheManifest.lineage`) stands for data set, teacher, policy, seed and
encodings. The root names a finished cache's contents: it does not depend on who wrote which unit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cskd_pipeline.errors import UsageError
from cskd_pipeline.runtime import schemas

SIZE = 32  # bytes of a SHA-256
_PIN = re.compile(r"(?P<location>.+)@sha256:(?P<digest>[^/@]*)")


class Record(NamedTuple):
    """The digests noted of a unit when it was committed, 32 bytes each.

    Args:
        unit: the digest of the unit.
        lineage: of the cache that it was written for.
        files: of each of its files, in the order of :meth:`CacheStore.recorded_files`.
    """

    unit: bytes
    lineage: bytes
    files: tuple[bytes, ...]

    @classmethod
    def of(cls, lineage: str, keys: Sequence[str], files: Sequence[bytes]) -> Record:
        """Return the record of a unit whose files are ``keys`` with the digests ``files``."""
        named = {key: digest.hex() for key, digest in zip(keys, files, strict=True)}
        unit = schemas.sha256({"cache": lineage, "files": named})
        return cls(bytes.fromhex(unit), bytes.fromhex(lineage), tuple(files))

    @classmethod
    def from_row(cls, row: np.ndarray) -> Record:
        """Return the inverse of :meth:`row`."""
        unit, lineage, *files = (bytes(digest) for digest in row.reshape(-1, SIZE))
        return cls(unit, lineage, tuple(files))

    def row(self) -> np.ndarray:
        """Return the record as the array ``digest`` stores it: (32 * (2 + files),) uint8."""
        return np.frombuffer(b"".join((self.unit, self.lineage, *self.files)), np.uint8)


def root_digest(lineage: str, views: int, units: np.ndarray) -> str:
    """Return the SHA-256 (hex) of a finished cache's contents.

    Args:
        units: (blocks, shards, 32) uint8, the unit digests.
    """
    head = bytes.fromhex(lineage) + views.to_bytes(8, "little")
    return hashlib.sha256(head + np.ascontiguousarray(units).tobytes()).hexdigest()


def split_pin(location: object) -> tuple[str, str | None]:
    """Split ``CACHE@sha256:DIGEST`` into location and digest; None where no digest is stated.

    Raises:
        UsageError: what follows ``@sha256:`` is not 64 hexadecimal digits.
    """
    match = _PIN.fullmatch(str(location))
    if match is None:
        return str(location), None
    digest = match["digest"].lower()
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise UsageError(
            "not the digest of a cache",
            where=location,
            found=f"@sha256:{match['digest']}",
            expected="@sha256: and 64 hexadecimal digits, as cskd-pipeline cache info shows them",
        )
    return match["location"], digest
