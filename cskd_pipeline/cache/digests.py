"""SHA-256 digests of a cache's files, units and complete contents.

A checksum detects noise, but not a file of another unit, view or teacher, whose checksum is valid
too. So a unit's record, written last, contains the digest of each of its files, and

    unit = SHA-256 of {"cache": lineage, "files": {key: digest, ...}} as canonical JSON
    root = SHA-256 of lineage, views (8 bytes, little-endian) and all unit digests, block by block

where the lineage (:meth:`CacheManifest.lineage`) covers data set, teacher, policy, seed and
encodings. The root identifies a finished cache's contents, whichever process wrote which unit.
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
    """The digests recorded when a unit was committed, 32 bytes each.

    Args:
        unit: the digest of the unit.
        lineage: the lineage of its cache.
        files: the digest of each of its files, in the order of :meth:`CacheStore.recorded_files`.
    """

    unit: bytes
    lineage: bytes
    files: tuple[bytes, ...]

    @classmethod
    def of(cls, lineage: str, keys: Sequence[str], files: Sequence[bytes]) -> Record:
        """Return the record of a unit whose files ``keys`` have the digests ``files``."""
        named = {key: digest.hex() for key, digest in zip(keys, files, strict=True)}
        unit = schemas.sha256({"cache": lineage, "files": named})
        return cls(bytes.fromhex(unit), bytes.fromhex(lineage), tuple(files))

    @classmethod
    def from_row(cls, row: np.ndarray) -> Record:
        """Return the inverse of :meth:`row`."""
        unit, lineage, *files = (bytes(digest) for digest in row.reshape(-1, SIZE))
        return cls(unit, lineage, tuple(files))

    def row(self) -> np.ndarray:
        """Return the record as stored in the array ``digest``: (32 * (2 + files),) uint8."""
        return np.frombuffer(b"".join((self.unit, self.lineage, *self.files)), np.uint8)


def root_digest(lineage: str, views: int, units: np.ndarray) -> str:
    """Return the root digest, SHA-256 (hex), of a finished cache.

    Args:
        units: (blocks, shards, 32) uint8, the unit digests.
    """
    head = bytes.fromhex(lineage) + views.to_bytes(8, "little")
    return hashlib.sha256(head + np.ascontiguousarray(units).tobytes()).hexdigest()


def split_pin(location: object) -> tuple[str, str | None]:
    """Split ``CACHE@sha256:DIGEST`` into location and digest (None if absent).

    Raises:
        UsageError: ``@sha256:`` is not followed by 64 hexadecimal digits.
    """
    match = _PIN.fullmatch(str(location))
    if match is None:
        return str(location), None
    digest = match["digest"].lower()
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise UsageError(
            "malformed cache digest",
            where=location,
            found=f"@sha256:{match['digest']}",
            expected="@sha256: and 64 hexadecimal digits, as printed by cskd-pipeline cache info",
        )
    return match["location"], digest
