"""The manifest of a data set: made once from its tars, or the one that it was opened by."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cskd_pipeline.cache.manifest import DatasetManifest, ShardInfo
from cskd_pipeline.data.index import (
    Dataset,
    load_dataset,
    of_each,
    refuse_repeated_keys,
    require_num_classes,
)
from cskd_pipeline.data.listing import Spec
from cskd_pipeline.data.remote_tar import FETCHING, RemoteTar, Tar
from cskd_pipeline.data.shards import TarShard
from cskd_pipeline.data.tar_index import open_shard
from cskd_pipeline.errors import DataError
from cskd_pipeline.runtime.progress import progress

log = logging.getLogger(__name__)


def index_shards(
    spec: Spec,
    *,
    name: str | None = None,
    num_classes: int | None = None,
    split: str | None = None,
    check: Callable[[Dataset], None] | None = None,
) -> DatasetManifest:
    """Read every byte of the shards once, and describe them; of those at a URL, headers only.

    The SHA-256 of a tar at a URL is None, unless its store has it (``hf://``) or it was fetched
    whole before.

    Args:
        check: run on the data set, empty images included, before the shards are hashed.

    Raises:
        DataError: as :func:`load_dataset`, and what ``check`` raises; a key that is there twice;
            nothing states the number of classes.
    """
    dataset = load_dataset(
        spec,
        split=split,
        num_classes=num_classes,
        empty="pass" if check else "error",
    )
    require_num_classes(dataset)
    refuse_repeated_keys(dataset)
    if check:
        check(dataset)
    if name:
        dataset = replace(dataset, name=name)
    return _describe(dataset, whole=False)


def describe(dataset: Dataset) -> DatasetManifest:
    """Return the manifest of ``dataset``: its own, or one made by reading every byte.

    Tars without a SHA-256 in the manifest are hashed too: what is derived of them states it.

    Raises:
        DataError: nothing states the number of classes.
        ManifestError: a tar's name that no reader of manifests accepts.
    """
    manifest = dataset.manifest
    if manifest is None:
        return replace(_describe(dataset, whole=True), location=None)
    if not any(shard.sha256 is None for shard in manifest.shards):
        return replace(manifest, location=None)
    infos = [
        info if info.sha256 else replace(info, sha256=found)
        for info, found in zip(manifest.shards, _hashed(dataset.shards, whole=True), strict=True)
    ]
    return replace(manifest, location=None, shards=tuple(infos))


def _describe(dataset: Dataset, *, whole: bool) -> DatasetManifest:
    """The manifest of tars that have none; not ``whole``: nothing is fetched for its SHA-256."""
    classes = require_num_classes(dataset)
    location, names = _relative_names([shard.path for shard in dataset.shards])
    hashed = zip(dataset.shards, names, _hashed(dataset.shards, whole), strict=True)
    infos = [
        ShardInfo.of(relative, shard.keys, shard.size, found) for shard, relative, found in hashed
    ]
    made = DatasetManifest(dataset.name, classes, tuple(infos), dataset.class_names, location)
    unknown = sum(info.sha256 is None for info in infos)
    if unknown:
        log.info(
            f"{unknown} shards without SHA-256: the store states none, and they were not fetched; "
            "dump-teacher finds it, once it has them"
        )
    return DatasetManifest.from_json(made.to_json(), f"the manifest of {dataset.name}")


def _hashed(shards: Sequence[TarShard], whole: bool) -> Iterator[str | None]:
    """The SHA-256 of each tar; not ``whole``: nothing is fetched, and it may be None."""
    with progress(sum(shard.size for shard in shards), "bytes", "hashing shards") as meter:

        def sha256(shard: TarShard) -> str | None:
            if isinstance(shard.path, RemoteTar):
                return shard.path.sha256() if whole else shard.path.known_sha256()
            digest = hashlib.sha256()
            with open_shard(shard.path) as file:
                while piece := file.read(2**20):
                    digest.update(piece)
                    meter.advance(len(piece))
            return digest.hexdigest()

        for shard, found in zip(shards, of_each(shards, sha256, FETCHING), strict=True):
            if isinstance(shard.path, RemoteTar):
                meter.advance(shard.size)
            yield found


def _relative_names(paths: Sequence[Tar]) -> tuple[str | None, list[str]]:
    """The URL of the innermost folder that holds them all, if it has one, and paths below it.

    Links keep their own names.

    Raises:
        DataError: tars of several servers.
    """
    absolute = [Path(os.path.abspath(p) if isinstance(p, Path) else str(p)) for p in paths]
    first = paths[0]
    kinds = {
        re.sub("(//[^/]*)/.*", r"\1", str(p)) if isinstance(p, RemoteTar) else "" for p in paths
    }
    if len(kinds) > 1:
        raise DataError(
            "the shards of one data set lie on several servers",
            found=", ".join(kind or "this machine" for kind in sorted(kinds)),
            expected="one folder that holds them all, here or at a URL",
        )
    folder = os.path.commonpath([path.parent for path in absolute])
    names = [path.relative_to(folder).as_posix() for path in absolute]
    location = None if isinstance(first, Path) else first.url.removesuffix(f"/{names[0]}")
    return location, names
