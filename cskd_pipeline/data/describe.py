"""The manifest of a data set: the one it was opened with, or computed from its tars."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cskd_pipeline.cache.manifest import DatasetManifest, ShardInfo
from cskd_pipeline.data.index import (
    Dataset,
    load_dataset,
    refuse_duplicate_keys,
    require_num_classes,
)
from cskd_pipeline.data.listing import Spec
from cskd_pipeline.data.remote_tar import RemoteTar, Tar
from cskd_pipeline.data.shards import TarShard
from cskd_pipeline.data.tar_index import open_shard
from cskd_pipeline.errors import DataError
from cskd_pipeline.runtime.progress import Meter, progress

log = logging.getLogger(__name__)


def index_shards(
    spec: Spec,
    *,
    name: str | None = None,
    num_classes: int | None = None,
    split: str | None = None,
    decoders: int | None = None,
) -> DatasetManifest:
    """Describe the shards by reading every byte once; remote shards, by their headers only.

    Args:
        decoders: number of loader processes that first decode every image; None: skip decoding.

    Raises:
        DataError: as :func:`load_dataset`; duplicate keys; the number of classes is unknown.
        ImageError: images that cannot be decoded, all listed in its report.
    """
    dataset = load_dataset(
        spec,
        split=split,
        num_classes=num_classes,
        empty="error" if decoders is None else "pass",
    )
    require_num_classes(dataset)
    refuse_duplicate_keys(dataset)
    if decoders is not None:
        from cskd_pipeline.data.corrupt import require_images  # imports torch

        require_images(dataset, workers=decoders)
    dataset = replace(dataset, name=name or dataset.name, manifest=None)
    location, _ = _relative_names([shard.path for shard in dataset.shards])
    return replace(describe(dataset), location=location)


def describe(dataset: Dataset) -> DatasetManifest:
    """Return the manifest of ``dataset``: its own, or one computed by reading every byte.

    Remote tars are not read: their SHA-256 is the one that their store states, or None.
    """
    manifest = dataset.manifest or _computed_manifest(dataset)
    unknown = sum(info.sha256 is None for info in manifest.shards)
    if unknown:
        log.info(
            f"{unknown} shards have no SHA-256, as their store does not state it: they are "
            "identified by length, keys and the images' CRC-32"
        )
    return replace(manifest, location=None)


def _computed_manifest(dataset: Dataset) -> DatasetManifest:
    classes = require_num_classes(dataset)
    _, names = _relative_names([shard.path for shard in dataset.shards])
    with progress(sum(shard.size for shard in dataset.shards), "bytes", "hashing shards") as meter:
        infos = [
            ShardInfo.of(name, shard.keys, shard.size, _sha256(shard, meter))
            for name, shard in zip(names, dataset.shards, strict=True)
        ]
    manifest = DatasetManifest(dataset.name, classes, tuple(infos), dataset.class_names)
    return DatasetManifest.from_json(manifest.to_json(), f"the manifest of {dataset.name}")


def _sha256(shard: TarShard, meter: Meter) -> str | None:
    if isinstance(shard.path, RemoteTar):
        meter.advance(shard.size)
        return shard.path.sha256
    digest = hashlib.sha256()
    with open_shard(shard.path) as file:
        while piece := file.read(2**20):
            digest.update(piece)
            meter.advance(len(piece))
    return digest.hexdigest()


def _relative_names(paths: Sequence[Tar]) -> tuple[str | None, list[str]]:
    """Return the URL of the innermost common folder (None if local), and the paths below it.

    Symbolic links keep their own names.
    """
    absolute = [Path(os.path.abspath(p) if isinstance(p, Path) else str(p)) for p in paths]
    first = paths[0]
    servers = {
        re.sub("(//[^/]*)/.*", r"\1", str(p)) if isinstance(p, RemoteTar) else "" for p in paths
    }
    if len(servers) > 1:
        raise DataError(
            "the shards of one data set are on several servers",
            found=", ".join(server or "this machine" for server in sorted(servers)),
            expected="all shards below one folder or one URL",
        )
    folder = os.path.commonpath([path.parent for path in absolute])
    names = [path.relative_to(folder).as_posix() for path in absolute]
    location = None if isinstance(first, Path) else first.url.removesuffix(f"/{names[0]}")
    return location, names
