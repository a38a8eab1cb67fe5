"""The cache as a zarr v3 group: its arrays, its files, and the documents that describe them.

Everything follows from the manifest: two writers, or a reader years later, derive the same layout.
A unit of work is (block of views, tar shard); every per-view array has separate files for each
unit. ``manifests/cache-format.md`` is the specification.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cskd_pipeline.cache.chunks import StoredArray
from cskd_pipeline.cache.digests import SIZE
from cskd_pipeline.cache.manifest import CacheManifest
from cskd_pipeline.distill.encodings import ENCODINGS, ArraySpec, Encoding, ResponseShape, Sampled
from cskd_pipeline.errors import CacheError
from cskd_pipeline.runtime import schemas

GROUP = "zarr.json"
ATTRIBUTE = "cskd"
PER_SHARD = ("key", "label", "image_crc32")
RECORD = "digest"
"""The array whose files, one per unit, are written last: a unit without one is not finished."""
EXTENDING = ".extending"
"""A file with the new number of views, while arrays are extended beyond the manifest's number."""
MAX_CHUNK_BYTES = 2**28
"""Limit on a decoded chunk and on a shard index: far above real ones; no manifest fills memory."""


def encodings_of(manifest: CacheManifest) -> dict[str, Encoding]:
    """Return the encodings of the cache by name, ``sampled`` with its draws and temperature.

    Raises:
        CacheError: an encoding is neither built in nor registered.
    """
    names = manifest.encodings
    unknown = [name for name in names if name not in ENCODINGS]
    if unknown:
        raise CacheError(
            "unknown encoding",
            found=", ".join(unknown),
            expected=", ".join(ENCODINGS),
            action="install a newer cskd-pipeline, or register your own encoding with "
            "cskd_pipeline.register_encoding before opening the cache",
        )
    configured: dict[str, Encoding] = {Sampled.name: manifest.sampled}
    return {name: configured.get(name, ENCODINGS[name]) for name in names}


def response_shape(manifest: CacheManifest) -> ResponseShape:
    """Return the shape of one view's spatial logits."""
    return ResponseShape(manifest.teacher.num_classes, *manifest.teacher.grid)


def specs(manifest: CacheManifest) -> dict[str, ArraySpec]:
    """Return the arrays of all encodings by name.

    Raises:
        CacheError: a registered encoding has no arrays, or some that cannot be stored or read.
    """
    shape = response_shape(manifest)
    found: dict[str, ArraySpec] = {}
    for name, encoding in encodings_of(manifest).items():
        arrays = encoding.arrays(shape)
        problems = list(_encoding_problems(name, arrays))
        if problems:
            raise CacheError(
                f"the arrays of the encoding {name} are invalid",
                problems=problems,
                action="correct the registered encoding",
            )
        found |= {spec.name: spec for spec in arrays}
    return found


def _encoding_problems(name: str, arrays: Sequence[ArraySpec]) -> Iterator[str]:
    """Yield why ``slabs`` could not read the arrays; ``ArraySpec`` documents the rules."""
    if not arrays:
        yield "no arrays"
    if len({spec.name for spec in arrays}) < len(arrays):
        yield "two arrays have the same name"
    if len({spec.rows is None for spec in arrays}) > 1:
        yield "some arrays have rows and some do not: an encoding's arrays are read in one way"
    for spec in arrays:
        if not re.fullmatch(f"{name}/[a-z0-9_-]+", spec.name):
            yield (
                f"{spec.name}: invalid name, expected {name}/ and lower-case letters, digits, "
                "hyphens, underscores"
            )
        if len(spec.axes) != len(spec.tail) or (spec.ragged and not spec.tail):
            yield f"{spec.name}: axes {spec.axes} with lengths {spec.tail}, ragged: {spec.ragged}"
        elif spec.tail_chunk not in (None, spec.tail) and not _split_along_first(spec):
            yield (
                f"{spec.name}: chunks {spec.tail_chunk} of {spec.tail}: only ragged arrays without "
                "rows are split, along the first of these axes"
            )


def _split_along_first(spec: ArraySpec) -> bool:
    chunk = spec.tail_chunk or ()
    same = len(chunk) == len(spec.tail) and chunk[1:] == spec.tail[1:]
    return same and spec.ragged and spec.rows is None and 0 < chunk[0] < spec.tail[0]


def stored_arrays(manifest: CacheManifest) -> dict[str, StoredArray]:
    """Return every array of the cache by name.

    Raises:
        CacheError: an encoding is unknown or invalid, or chunks are larger than readers accept.
    """
    dataset, block = manifest.dataset, manifest.view_block
    shards, longest = len(dataset.shards), max(dataset.counts)
    key_bytes = max(shard.key_bytes for shard in dataset.shards)
    views = manifest.views
    per_shard, per_view = ("shard", "offset"), ("view", "shard", "offset")
    arrays = [
        StoredArray(
            "key", "uint8", (*per_shard, "byte"), (shards, longest, key_bytes),
            (1, longest, key_bytes), fill=0,
        ),
        StoredArray("label", "int32", per_shard, (shards, longest), (1, longest), fill=-1),
        StoredArray("image_crc32", "uint32", per_shard, (shards, longest), (1, longest), fill=0),
        StoredArray(
            "seed", "uint64", per_view, (views, shards, longest), (block, 1, longest), fill=0
        ),
        StoredArray(
            "view_digest", "uint32", per_view, (views, shards, longest), (block, 1, longest), fill=0
        ),
        StoredArray(
            "top1", "uint32", ("view", "shard", "correct_and_counted"), (views, shards, 2),
            (block, 1, 2), fill=0,
        ),
    ]  # fmt: skip
    arrays += [_stored(spec, manifest, longest) for spec in specs(manifest).values()]
    files = sum(1 if array.name in PER_SHARD else block // array.file_shape[0] for array in arrays)
    record = (2 + files) * SIZE
    arrays.append(
        StoredArray(
            RECORD, "uint8", ("block", "byte"), (views // block, shards * record), (1, record),
            fill=0,
        )
    )  # fmt: skip
    for array in arrays:
        if array.max_read_bytes > MAX_CHUNK_BYTES:
            raise CacheError(
                "the manifest implies chunks too large to read",
                found=f"{array.max_read_bytes} bytes in the array {array.name}",
                expected=f"at most {MAX_CHUNK_BYTES}",
                action="pack the data set into smaller tar shards, or use a smaller view block",
            )
    return {array.name: array for array in arrays}


def _stored(spec: ArraySpec, manifest: CacheManifest, longest: int) -> StoredArray:
    file_views = 1 if spec.file_per_view else manifest.view_block
    rows = min(spec.rows or longest, longest)
    tail_chunk = spec.tail_chunk or spec.tail
    chunk = None
    if spec.rows is not None or spec.tail_chunk is not None:
        chunk = (1, 1, rows, *tail_chunk)
    in_file = (round_up(longest, rows), *map(round_up, spec.tail, tail_chunk))
    return StoredArray(
        name=spec.name,
        dtype=spec.dtype,
        axes=("view", "shard", "offset", *spec.axes),
        shape=(manifest.views, len(manifest.dataset.shards), longest, *spec.tail),
        file_shape=(file_views, 1, *in_file),
        fill=spec.fill,
        chunk_shape=chunk,
        order=spec.order,
        level=spec.level,
    )


def round_up(length: int, step: int) -> int:
    """Return ``length`` rounded up to a multiple of ``step``."""
    return -(-length // step) * step


def array_documents(manifest: CacheManifest) -> dict[str, bytes]:
    """Return every ``zarr.json`` except the cache's own by key: arrays and their parent groups."""
    arrays = stored_arrays(manifest)
    groups = {name.rpartition("/")[0] for name in arrays} - {""}
    documents = {f"{name}/zarr.json": array.document() for name, array in arrays.items()}
    documents |= {f"{name}/zarr.json": group_document({}) for name in sorted(groups)}
    return {key: to_bytes(document) for key, document in documents.items()}


def manifest_document(manifest: CacheManifest) -> bytes:
    """Return the cache's own ``zarr.json``: manifest and SHA-256 in the attribute ``cskd``.

    Raises:
        CacheError: the document is larger than readers accept.
    """
    content = {"manifest": manifest.to_json(), "sha256": manifest.digest()}
    document = to_bytes(group_document({ATTRIBUTE: content}))
    if len(document) > schemas.MAX_BYTES:
        raise CacheError(
            "the manifest is too large",
            found=f"{len(document)} bytes for {len(manifest.dataset.shards)} tar shards",
            expected=f"at most {schemas.MAX_BYTES}",
            action="pack the data set into fewer tar shards",
        )
    return document


def group_document(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``zarr.json`` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def to_bytes(document: Mapping[str, Any]) -> bytes:
    """Encode a document as indented JSON."""
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def parse_manifest(data: bytes, where: object) -> CacheManifest:
    """Parse the manifest in a cache's ``zarr.json``.

    Raises:
        CacheError: the group is not a cache, or its manifest was altered.
        ManifestError: the manifest does not match its schema; lists every problem.
    """
    document = schemas.parse(data, where)
    attributes = document.get("attributes") if isinstance(document, dict) else None
    content = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
    _refuse_version_1(content, where)
    if not isinstance(content, dict) or "manifest" not in content:
        raise CacheError(
            "not a teacher cache",
            where=where,
            found="no manifest in the group's attributes",
            expected="a folder written by cskd-pipeline dump-teacher",
        )
    manifest = CacheManifest.from_json(content["manifest"], where)
    if content.get("sha256") != schemas.sha256(content["manifest"]):
        raise CacheError(
            "the manifest was altered",
            where=where,
            found=f"sha256 {schemas.sha256(content['manifest'])}",
            expected=f"sha256 {content.get('sha256')}",
            action="copy the file again from the original cache",
        )
    expected = manifest_document(manifest)
    if data != expected:
        raise CacheError(
            "the manifest was altered",
            where=where,
            found="; ".join(differences(data, expected, where)),
            action="copy the file again from the original cache",
        )
    return manifest


def differences(found: bytes, expected: bytes, where: object) -> list[str]:
    """List the differences of a ``zarr.json`` from the expected bytes, by field or else by byte."""
    document, original = schemas.parse(found, where), json.loads(expected)
    if not isinstance(document, dict):
        return ["found no JSON object"]
    lines = []
    for name in dict.fromkeys((*original, *document)):
        ours, theirs = _excerpts(document.get(name), original.get(name))
        if ours != theirs:
            lines.append(f"{name}: found {ours}, expected {theirs}")
    if lines:
        return lines
    at = _first_difference(found, expected)
    return [f"from byte {at}: found {found[at : at + 20]!r}, expected {expected[at : at + 20]!r}"]


def _excerpts(found: Any, expected: Any) -> list[str]:
    """Return 200 characters of each value as JSON, from shortly before the first difference."""
    texts = [json.dumps(value, separators=(",", ":")) for value in (found, expected)]
    start = max(0, _first_difference(*texts) - 100)
    return [f"{'…' if start else ''}{text[start : start + 200]}" for text in texts]


def _first_difference(one: str | bytes, other: str | bytes) -> int:
    """Return the index of the first difference, or the length of the shorter one."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _refuse_version_1(content: Any, where: object) -> None:
    """Raise a CacheError with the upgrade command for a cache of format version 1."""
    manifest = content.get("manifest") if isinstance(content, dict) else None
    if isinstance(manifest, dict) and manifest.get("format_version") == 1:
        folder = str(where).removesuffix(GROUP).rstrip("/")
        remote = "://" in folder
        raise CacheError(
            "the cache has format version 1, without digests of its files",
            where=where,
            found="format_version 1",
            expected="format_version 2",
            action=f"{'copy it to this machine, then ' if remote else ''}cskd-pipeline cache "
            f"upgrade {'FOLDER' if remote else shlex.quote(folder)}",
        )


def key_matrix(keys: Sequence[str], array: StoredArray) -> np.ndarray:
    """Return keys as stored in the array ``key``: (count, key_bytes) uint8, UTF-8, zero-padded."""
    width = array.shape[2]
    padded = b"".join(key.encode().ljust(width, b"\0") for key in keys)
    return np.frombuffer(padded, np.uint8).reshape(len(keys), width)


def keys_of(matrix: np.ndarray) -> list[str]:
    """Return the keys in a matrix from :func:`key_matrix`.

    Raises:
        ValueError: a key is not UTF-8.
    """
    return [bytes(row).rstrip(b"\0").decode() for row in matrix]
