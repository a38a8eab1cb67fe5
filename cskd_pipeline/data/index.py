"""A data set: its tars in order, its classes, and the manifest it was opened with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cskd_pipeline.cache.manifest import DatasetManifest, ShardInfo
from cskd_pipeline.cache.remote_files import CONNECTIONS
from cskd_pipeline.data.listing import INFO, Spec, list_shards
from cskd_pipeline.data.remote_tar import RemoteTar, Tar, tars_in
from cskd_pipeline.data.shards import TarShard
from cskd_pipeline.errors import DataError, ImageError, ShardError
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.classes import Classes, ClassGuard
from cskd_pipeline.runtime.progress import progress

CLASSES = "classes.json"


@dataclass(frozen=True)
class Dataset:
    """Labelled tars, numbered in order.

    ``num_classes`` and ``class_names`` are None if unknown. ``manifest`` is the one the data set
    was opened with, or None.
    """

    name: str
    shards: tuple[TarShard, ...]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    manifest: DatasetManifest | None = None

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Return the number of samples of each tar."""
        return tuple(map(len, self.shards))

    @cached_property
    def shard_ids(self) -> tuple[str, ...]:
        """Return the SHA-256 of each tar's keys, which identifies its samples and their order."""
        return tuple(shard.keys_sha256 for shard in self.shards)

    @property
    def samples(self) -> int:
        """Return the total number of samples."""
        return sum(self.counts)

    def classes(self, of: str) -> Classes:
        """Return the classes for :class:`ClassGuard`, named after ``of`` in messages."""
        return Classes(of, str(self.shards[0].path.parent), self.num_classes, self.class_names)

    def with_classes_of(self, other: Classes, of: str, guard: ClassGuard) -> Dataset:
        """Return the data set with ``other``'s number of classes, if ``guard`` accepts the names.

        ``of``: name of this data set in messages.
        """
        guard.compare(self.classes(of), other)
        return self if other.count is None else self.with_classes(other.count)

    def with_classes(self, num_classes: int) -> Dataset:
        """Return the data set with a known number of classes; check the labels against it."""
        if self.num_classes == num_classes:
            return self
        classes = _agreed_classes(num_classes, self.num_classes, self.name)
        shards = tuple(replace(shard, num_classes=num_classes) for shard in self.shards)
        return replace(self, shards=shards, num_classes=classes)

    def with_infos_of(self, manifest: DatasetManifest) -> Dataset:
        """Return the data set with each tar required to match its entry in ``manifest``."""
        pairs = zip(self.shards, manifest.shards, strict=True)
        return replace(self, shards=tuple(replace(shard, info=info) for shard, info in pairs))

    def without(self, offsets: Mapping[int, Sequence[int]]) -> Dataset:
        """Return the data set without these samples, shard -> offsets, as if the tars lacked them.

        Raises:
            DataError: a tar would have no samples left.
        """
        empty = [s for s, left_out in offsets.items() if len(left_out) == self.counts[s]]
        if empty:
            raise DataError(
                f"{len(empty)} shards would have no samples left",
                where=self.name,
                problems=[f"every image is corrupt: {self.shards[s].path}" for s in empty],
                action="pass only the other shards",
            )
        shards, manifest = list(self.shards), self.manifest
        for number, rows in offsets.items():
            shards[number] = shards[number].without(rows)
        if manifest:
            manifest = replace(manifest, shards=tuple(shard.info for shard in shards if shard.info))
        return replace(self, shards=tuple(shards), manifest=manifest)


def sample(dataset: Dataset, samples: int, parts: int = 4) -> Dataset:
    """Return about ``samples`` samples of ``dataset`` as ``parts`` shards of neighbouring samples.

    For trials and forecasts; the manifest has no SHA-256.
    """
    count = len(dataset.shards)
    chosen = sorted({(2 * i + 1) * count // (2 * parts) for i in range(parts)})
    each = -(-samples // len(chosen))
    shards, infos = [], []
    for i, number in enumerate(chosen):
        shard = dataset.shards[number]
        start = max(0, (len(shard) - each) // 2)
        part = shard.part(range(start, min(start + each, len(shard))))
        info = ShardInfo.of(f"part-{i}.tar", part.keys, int(part.index.size.sum()), None)
        shards.append(replace(part, info=info))
        infos.append(info)
    classes = require_num_classes(dataset)
    manifest = DatasetManifest(dataset.name, classes, tuple(infos), dataset.class_names)
    return replace(dataset, shards=tuple(shards), manifest=manifest)


def load_dataset(
    spec: Spec,
    *,
    split: str | None = None,
    prefer: Sequence[str] = ("train",),
    num_classes: int | None = None,
    empty: str = "error",
) -> Dataset:
    """Open shards, or the ``manifest.json`` next to them.

    With a manifest, only the tars' sizes are checked, and headers are read on first use; without
    one, all headers are read now.

    Args:
        spec, split, prefer: see :func:`cskd_pipeline.data.listing.list_shards`.
        num_classes: number of classes; None or 0: the manifest's, or the number of class names.
        empty: ``error``: refuse images of 0 bytes, if headers are read; ``pass``: accept them, for
            callers that search for all images that cannot be decoded
            (:mod:`cskd_pipeline.data.corrupt`).

    Raises:
        DataError: shards that are missing, damaged or do not match the manifest; different numbers
            of classes; images of 0 bytes, all listed.
        ManifestError: a manifest that does not match its schema.
    """
    tars, listing = list_shards(spec, split=split, prefer=prefer)
    manifest = listing.manifest
    if manifest is not None:
        classes = _agreed_classes(num_classes, manifest.num_classes, "the manifest")
        pairs = zip(tars, manifest.shards, strict=True)
        shards = tuple(TarShard(tar, info, classes) for tar, info in pairs)
        _check_sizes(shards)
        return Dataset(manifest.name, shards, classes, manifest.class_names, manifest)
    names = _class_names_of(tars)
    classes = _agreed_classes(num_classes, len(names) if names else None, "the class names")
    shards = tuple(TarShard(tar, num_classes=classes) for tar in tars)
    read_headers(shards)
    _check_counts(shards, listing.counts)
    if empty == "error":
        _refuse_empty_images(shards)
    return Dataset(name_of(tars), shards, classes, names)


def read_headers(shards: Sequence[TarShard]) -> None:
    """Read the headers of all tars not indexed yet; remote tars are read in parallel."""
    missing = [shard for shard in shards if not shard.is_indexed]
    if not missing:
        return
    pool = ThreadPoolExecutor(CONNECTIONS)
    remote = any(isinstance(shard.path, RemoteTar) for shard in missing)
    apply = pool.map if remote else map
    try:
        with progress(len(missing), "shards", "reading tar headers") as meter:
            for _ in apply(lambda shard: shard.index, missing):
                meter.advance()
    finally:  # an interrupt does not wait for tars in progress
        pool.shutdown(wait=False, cancel_futures=True)


def require_num_classes(dataset: Dataset, action: str = "pass --num-classes N") -> int:
    """Return the number of classes, or raise a DataError if it is unknown."""
    if dataset.num_classes is None:
        raise DataError(
            "the number of classes is unknown",
            where=dataset.name,
            expected=f"a list of class names in {CLASSES} next to the shards, or a number",
            action=action,
        )
    return dataset.num_classes


def _class_names_of(paths: Sequence[Tar]) -> tuple[str, ...] | None:
    """Return the class names found in the folders of ``paths``; refuse names that differ."""
    guard = ClassGuard()
    known: Classes | None = None
    for folder in dict.fromkeys(path.parent for path in paths):
        names = find_class_names(folder)
        if names is not None:
            found = Classes(f"the shards in {folder}", folder, len(names), names)
            guard.compare(found, known or found)
            known = known or found
    return None if known is None else known.names


def find_class_names(folder: Path | str) -> tuple[str, ...] | None:
    """Read class names in label order from ``classes.json`` or ``_info.json`` in ``folder``."""
    for file, field in ((CLASSES, None), (INFO, "class_names")):
        names = _document(folder, file)
        if field is not None:
            names = names.get(field) if isinstance(names, dict) else None
        if names is None:
            continue
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise DataError(
                "the class names cannot be used",
                where=f"{folder}/{file}",
                expected="a list of names, in label order",
            )
        return tuple(names)
    return None


def _document(folder: Path | str, name: str) -> Any:
    """Return the JSON document of this name in a local or remote folder; None if absent."""
    if isinstance(folder, Path):
        path = folder / name
        return schemas.read(path) if path.is_file() else None
    return tars_in(folder).find_document(name)


def name_of(paths: Sequence[Tar]) -> str:
    """Return the common prefix of the tars' names, without numbers: ``imagenet1k-train``."""
    # Character by character is intended: these are names, not paths as the rule assumes.
    common = os.path.commonprefix([Path(str(path)).stem for path in paths])  # noqa: RUF071
    common = common.rstrip("0123456789").rstrip("-_. ")
    return common or Path(str(paths[0])).resolve().parent.name or "shards"


def _agreed_classes(given: int | None, found: int | None, source: str) -> int | None:
    if given and found and given != found:
        raise DataError(
            "conflicting numbers of classes",
            found=f"{found}, from {source}",
            expected=given,
        )
    return given or found or None


def _check_counts(shards: Sequence[TarShard], counts: Sequence[int] | None) -> None:
    wrong = [
        f"{shard.path}: {len(shard)} samples, expected {count}"
        for shard, count in zip(shards, counts or map(len, shards), strict=True)
        if len(shard) != count
    ]
    action = f"download them again, or correct {INFO}"
    _refuse(wrong, shards, f"do not have the number of samples in {INFO}", action)


def _check_sizes(shards: Sequence[TarShard]) -> None:
    wrong = [
        f"{shard.path}: {shard.size} bytes, expected {shard.info.bytes}"
        for shard in shards
        if shard.info is not None and shard.size != shard.info.bytes
    ]
    action = "copy or download them again, or describe the present files: cskd-pipeline index"
    _refuse(wrong, shards, "do not match the manifest", action)


def _refuse(wrong: list[str], shards: Sequence[TarShard], problem: str, action: str) -> None:
    if wrong:
        raise ShardError(
            f"{len(wrong)} of {len(shards)} shards {problem}", problems=wrong, action=action
        )


def _refuse_empty_images(shards: Sequence[TarShard]) -> None:
    empty = [
        shard.where(row)
        for shard in shards
        for row in np.flatnonzero(shard.index.size == 0).tolist()
    ]
    if empty:
        raise ImageError(
            "an image has 0 bytes" if len(empty) == 1 else f"{len(empty)} images have 0 bytes",
            expected="complete JPEG, PNG or WebP files",
            action="write the shards again with intact files, or dump and train without these: "
            "--set data.corrupt=skip",
            problems=empty,
        )


def refuse_duplicate_keys(dataset: Dataset) -> None:
    """Raise a DataError if two tars have the same key, after reading the headers of all tars."""
    read_headers(dataset.shards)
    counts = [len(shard.index) for shard in dataset.shards]
    hashes = np.concatenate(
        [np.fromiter(map(hash, s.index.keys.tolist()), np.int64, len(s)) for s in dataset.shards]
    )
    order = np.argsort(hashes, kind="stable")
    repeated = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
    suspects = np.flatnonzero(np.isin(hashes, hashes[repeated]))
    ends = np.cumsum(counts)
    seen: dict[bytes, Tar] = {}
    problems = []
    for number in suspects.tolist():
        shard = int(np.searchsorted(ends, number, side="right"))
        tar = dataset.shards[shard]
        key = tar.index.keys[number - int(ends[shard]) + counts[shard]]
        first = seen.setdefault(key, tar.path)
        if first is not tar.path:
            problems.append(f"{key.decode()}: in {first} and {tar.path}")
    if problems:
        raise DataError(
            "a key is not unique" if len(problems) == 1 else f"{len(problems)} keys are not unique",
            where=dataset.name,
            expected="keys that are unique in the data set, because caches are joined by key",
            action="remove one of the shards, or write them again with unique keys: "
            "cskd-pipeline make-shards",
            problems=problems,
        )
