"""One zarr v3 array of the cache: its geometry, its ``zarr.json``, and the names of its files."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class StoredArray:
    """An array as it lies in the cache; every chunk is zstd with a checksum.

    Args:
        axes: a name for each axis; per-view arrays begin with ``view, shard, offset``.
        file_shape: the part of the array that one file holds, so that no two writers share a file.
        fill: stands where nothing was written.
        chunk_shape: chunks inside a file (the ``sharding_indexed`` codec, its index at the end with
            crc32c); None: the file is one chunk.
        order: the axes in the order in which a chunk's values are laid out; None: as they are.
        level: of zstd.
    """

    name: str
    dtype: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    fill: int | float
    chunk_shape: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    level: int = 3

    def key(self, *at: int) -> str:
        """Return the file of the element ``at`` (missing trailing indices are 0)."""
        full = at + (0,) * (len(self.shape) - len(at))
        places = [str(i // n) for i, n in zip(full, self.file_shape, strict=True)]
        return f"{self.name}/c/{'/'.join(places)}"

    @cached_property
    def little(self) -> np.dtype:
        """Return the data type as it is stored: little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def files(self) -> tuple[int, ...]:
        """Count the files of the whole array along each axis."""
        return tuple(-(-n // f) for n, f in zip(self.shape, self.file_shape, strict=True))

    @property
    def chunks_per_file(self) -> tuple[int, ...]:
        """Count the chunks of a file along each axis."""
        assert self.chunk_shape is not None
        return tuple(n // c for n, c in zip(self.file_shape, self.chunk_shape, strict=True))

    @property
    def most_bytes(self) -> int:
        """Return the bytes that reading one chunk takes: it, decoded, or its file's shard index."""
        chunk = math.prod(self.chunk_shape or self.file_shape) * self.little.itemsize
        index = 0 if self.chunk_shape is None else 16 * math.prod(self.chunks_per_file)
        return max(chunk, index)

    @property
    def least_bytes(self) -> int:
        """Return the least bytes of a file: a shard index, or a zstd frame of one empty block."""
        return 13 if self.chunk_shape is None else 16 * math.prod(self.chunks_per_file) + 4

    def most_encoded(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a chunk of ``shape`` in which nothing compresses."""
        size = math.prod(shape) * self.little.itemsize
        return size + size // 128 + 1024

    @property
    def most_file_bytes(self) -> int:
        """Return the most bytes of a file: no chunk compresses, and a shard index."""
        if self.chunk_shape is None:
            return self.most_encoded(self.file_shape)
        chunks = math.prod(self.chunks_per_file)
        return chunks * (self.most_encoded(self.chunk_shape) + 16) + 4

    def document(self) -> dict[str, Any]:
        """Return its ``zarr.json``: core zarr v3 metadata."""
        bytes_codec: dict[str, Any] = {"name": "bytes"}
        if np.dtype(self.dtype).itemsize > 1:
            bytes_codec["configuration"] = {"endian": "little"}
        zstd = {"name": "zstd", "configuration": {"level": self.level, "checksum": True}}
        codecs: list[dict[str, Any]] = [bytes_codec, zstd]
        if self.order is not None:
            transpose = {"name": "transpose", "configuration": {"order": list(self.order)}}
            codecs.insert(0, transpose)
        if self.chunk_shape is not None:
            little = {"name": "bytes", "configuration": {"endian": "little"}}
            sharding = {
                "chunk_shape": list(self.chunk_shape),
                "codecs": codecs,
                "index_codecs": [little, {"name": "crc32c"}],
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": sharding}]
        grid = {"name": "regular", "configuration": {"chunk_shape": list(self.file_shape)}}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": grid,
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN" if math.isnan(self.fill) else self.fill,
            "codecs": codecs,
            "attributes": {},
            "dimension_names": list(self.axes),
            "storage_transformers": [],
        }

    def problems(self, document: Any) -> list[str]:
        """Return where a ``zarr.json`` differs from :meth:`document`, a line for each field."""
        if not isinstance(document, dict):
            return ["found no JSON object"]
        expected = self.document()
        return [
            f"{name}: found {_shown(document.get(name))}, expected {_shown(expected.get(name))}"
            for name in dict.fromkeys((*expected, *document))
            if document.get(name) != expected.get(name)
        ]


def _shown(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))[:200]
