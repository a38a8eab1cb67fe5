"""A cache's samples matched to the user's tars by key, never by position or silently incomplete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cskd_pipeline.cache.omitted import LeftOut
from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.data.batches import Renderer
from cskd_pipeline.data.images import ABSENT, SHOWN, ImageSource, TarRows
from cskd_pipeline.data.index import Dataset, load_dataset, read_headers
from cskd_pipeline.data.left_out import Offsets
from cskd_pipeline.data.plan import SampleSet
from cskd_pipeline.errors import JoinError, UsageError
from cskd_pipeline.runtime.classes import Classes, ClassGuard
from cskd_pipeline.runtime.progress import progress


@dataclass(frozen=True)
class Join:
    """A cache's samples in the user's tars.

    Args:
        samples: the cache's layout, which training is planned on.
        images: source of the images, by shard and offset in that layout.
        allowed: per shard (count,) bool, samples to train on; None: all.
        same_shards: number of shards that have a tar with the same keys in the same order.
        missing: number of samples that the user's tars lack.
        unused: number of the user's samples that are not in the cache.
        compared: number of samples whose labels were compared with the cache's.
        relabelled: (n, 3) shard, offset and the cache's label of samples whose label differs.
        reasons: reason -> shard -> offsets of samples that are in the tars but left out.
    """

    samples: SampleSet
    images: ImageSource
    allowed: tuple[np.ndarray, ...] | None
    same_shards: int
    missing: int
    unused: int
    compared: int
    relabelled: np.ndarray
    reasons: Mapping[str, Offsets] = field(default_factory=dict)

    @property
    def cache(self) -> Cache:
        """Return the cache that was joined."""
        assert self.images.cache is not None
        return self.images.cache

    @property
    def renderer(self) -> Renderer:
        """Return a renderer of the cache's views from the user's images."""
        return Renderer.of_cache(self.images)

    def present(self) -> np.ndarray:
        """Return (n, 2) int64 shard and offset of the samples in the user's tars."""
        samples = self.samples.all_samples()
        return samples[self.images.locate(samples)[0] != ABSENT]

    def usable(self) -> np.ndarray:
        """Return (n, 2) int64 shard and offset of the allowed samples."""
        samples = self.samples.all_samples()
        return samples if self.allowed is None else samples[np.concatenate(self.allowed)]

    def without(self, offsets: Offsets, reason: str) -> Join:
        """Return the join without these samples of the user's tars; refuse to leave none."""
        if not offsets:
            return self
        allowed = [np.ones(count, bool) for count in self.samples.counts]
        if self.allowed is not None:
            allowed = [mask.copy() for mask in self.allowed]
        for shard, rows in offsets.items():
            allowed[shard][rows] = False
        if not any(mask.any() for mask in allowed):
            raise JoinError(
                "none of the images is the one the cache was made from",
                where=self.images.where(*self.present()[0].tolist()),
                action="use the original files: resized or recompressed copies give other views "
                "than the teacher saw",
            )
        reasons = {**self.reasons, reason: offsets}
        return replace(self, allowed=tuple(allowed), reasons=reasons)

    def count(self, reason: str) -> int:
        """Count the samples left out for a reason of :attr:`reasons`."""
        return sum(map(len, self.reasons.get(reason, {}).values()))

    def left_out(self) -> Iterator[LeftOut]:
        """Yield every disallowed sample of the cache, in the cache's order."""
        reasons = {
            (shard, offset): reason
            for reason, offsets in self.reasons.items()
            for shard, rows in offsets.items()
            for offset in rows
        }
        for shard, mask in enumerate(self.allowed or ()):
            offsets = np.flatnonzero(~mask)
            if len(offsets):
                keys = self.cache.keys(shard)
                for offset in offsets.tolist():
                    reason = reasons.get((shard, offset), "missing")
                    yield LeftOut(reason, shard, offset, keys[offset])


def join(
    dataset: Dataset,
    cache: Cache,
    guard: ClassGuard | None = None,
    *,
    missing: str = "error",
    drift: str = "error",
) -> Join:
    """Match the cache's samples to the user's by key, and compare their labels.

    A tar with the same keys in the same order as a shard is matched as a whole (by its manifest, if
    it has one); the remaining samples are looked up key by key.

    Args:
        guard: decides whether labels that differ from the cache's are accepted; None: refused.
        missing: ``error``, or ``skip``: leave missing samples and their partners out.
        drift: ``error``; ``warn``: accept images that differ from the cache's; ``skip``: as
            ``error``, for callers that find them (:func:`find_differing`) and leave them out
            (:meth:`Join.without`).

    Raises:
        JoinError: missing samples, duplicate keys, or labels that differ. Images are compared only
            when they are read; :mod:`cskd_pipeline.data.replay` compares some in advance.
        UsageError: an invalid value of ``missing`` or ``drift``.
    """
    require_choice("missing", missing, ("error", "skip"))
    require_choice("drift", drift, ("error", "warn", "skip"))
    tar_rows = _tar_rows(dataset, cache)
    absent = {s: r.tar == ABSENT for s, r in enumerate(tar_rows) if isinstance(r, TarRows)}
    count = int(sum(mask.sum() for mask in absent.values()))
    total = sum(cache.counts)
    if count and (missing == "error" or count == total):
        raise _missing_error(dataset, cache, absent, count)
    guard = guard or ClassGuard()
    images = ImageSource(
        dataset.shards,
        tar_rows=tar_rows,
        cache=cache,
        strict=drift != "warn",
        same_labels=not guard.accept,
    )
    compared, relabelled = _compare_labels(images, cache, tar_rows)
    if len(relabelled):
        if not guard.accept:
            raise images.label_error(relabelled, compared, guard.switch)
        guard.record(
            f"{len(relabelled)} of {compared} samples have labels that differ from the cache's"
        )
    allowed = None
    if count:
        allowed = tuple(
            ~absent[shard] if shard in absent else np.ones(n, bool)
            for shard, n in enumerate(cache.counts)
        )
    return Join(
        samples=SampleSet.of(cache),
        images=images,
        allowed=allowed,
        same_shards=sum(isinstance(tar, int) for tar in tar_rows),
        missing=count,
        unused=dataset.samples - (total - count),
        compared=compared,
        relabelled=relabelled,
    )


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a UsageError unless an option's value is one of ``choices``."""
    if value not in choices:
        raise UsageError(f"invalid value of {name}", found=value, expected=" or ".join(choices))


def lenient_join(cache: Cache, shards: str, guard: ClassGuard, *, split: str | None = None) -> Join:
    """Join ``shards`` for comparison or display: missing samples and other images are accepted."""
    dataset = load_dataset(shards, split=split)
    dataset = dataset.with_classes_of(classes_of(cache), "the shards", guard)
    return join(dataset, cache, guard, missing="skip", drift="warn")


def classes_of(cache: Cache) -> Classes:
    """Return the classes of a cache, for :class:`ClassGuard`."""
    return cache.manifest.dataset.classes("the cache", cache.path)


def find_differing(found: Join, part: int = 0, parts: int = 1) -> list[tuple[int, int]]:
    """Read every allowed image; return shard and offset of images that differ from the cache's.

    Args:
        part, parts: read every ``parts``-th of the user's tars, starting with number ``part``.
    """
    samples = found.usable()
    samples = samples[found.images.locate(samples)[0] % parts == part]
    differing: list[tuple[int, int]] = []
    if not len(samples):
        return differing
    with progress(len(samples), "images", "comparing images with the cache's") as meter:
        for i, crc in found.images.crc32(samples):
            shard, offset = samples[i].tolist()
            if crc != found.cache.image_crc32(shard)[offset]:
                differing.append((shard, offset))
            meter.advance()
    return sorted(differing)


def _tar_rows(dataset: Dataset, cache: Cache) -> list[TarRows | int]:
    tars: dict[str, int] = {}
    for tar, shard_id in enumerate(dataset.shard_ids):
        if shard_id in tars and shard_id in cache.shard_ids:
            raise _duplicate_error(dataset, dataset.shards[tar].key(0), tars[shard_id], tar)
        tars[shard_id] = tar
    same = [tars.get(shard_id) for shard_id in cache.shard_ids]
    looked_up = _look_up(dataset, cache, same)
    return [next(looked_up) if tar is None else tar for tar in same]


def _compare_labels(
    images: ImageSource, cache: Cache, tar_rows: Sequence[TarRows | int]
) -> tuple[int, np.ndarray]:
    """Return the number of labels compared, and :attr:`Join.relabelled`.

    A tar is skipped if its manifest states the SHA-256 of the tar that the cache was dumped from:
    its headers are read, and its labels compared, when it is first used.
    """
    recorded = cache.manifest.dataset.shards
    infos = [images.shards[tar].info if isinstance(tar, int) else None for tar in tar_rows]
    shards = [
        shard
        for shard in np.flatnonzero(cache.done().any(axis=0)).tolist()
        if (info := infos[shard]) is None
        or info.sha256 is None
        or info.sha256 != recorded[shard].sha256
    ]
    compared, found = 0, [np.empty((0, 3), np.int64)]
    if not shards:
        return compared, found[0]
    tars = [tar for shard in shards if isinstance(tar := tar_rows[shard], int)]
    read_headers([images.shards[tar] for tar in tars])
    labels_of = cache.store.each(
        cache.labels, shards, "comparing labels with the cache's", "shards"
    )
    for shard, labels in zip(shards, labels_of, strict=True):
        compared += int((images.shard_labels(shard) != ABSENT).sum())
        found.append(images.relabelled(shard, labels))
    return compared, np.concatenate(found)


def _look_up(dataset: Dataset, cache: Cache, same: Sequence[int | None]) -> Iterator[TarRows]:
    """Yield the rows of each shard that is None in ``same``, looked up in the tars not in it."""
    if None not in same:
        return
    tars = sorted(set(range(len(dataset.shards))) - set(same))
    read_headers([dataset.shards[tar] for tar in tars])
    indices = {tar: dataset.shards[tar].index for tar in tars}
    columns = [
        np.stack(np.broadcast_arrays(tar, np.arange(len(index)), index.label))
        for tar, index in indices.items()
    ]
    keys = np.concatenate([np.empty(0, "S1"), *(index.keys for index in indices.values())])
    rows = np.concatenate([np.empty((3, 0), np.int32), *columns], axis=1).astype(np.int32)
    order = np.argsort(keys, kind="stable")
    keys, rows = keys[order], rows[:, order]
    for shard in (number for number, tar in enumerate(same) if tar is None):
        sought = np.array([key.encode() for key in cache.keys(shard)])
        first = np.searchsorted(keys, sought, side="left")
        count = np.searchsorted(keys, sought, side="right") - first
        if (count > 1).any():
            i = int(np.argmax(count > 1))
            one, other = rows[0, first[i] : first[i] + 2].tolist()
            raise _duplicate_error(dataset, sought[i].decode(), one, other)
        found = count == 1
        tar_rows = np.full((3, len(sought)), ABSENT, np.int32)
        tar_rows[:, found] = rows[:, first[found]]
        yield TarRows(*tar_rows)


def _duplicate_error(dataset: Dataset, key: str, first: int, second: int) -> JoinError:
    return JoinError(
        "a key of the cache is in the shards more than once",
        where=f"{dataset.shards[first].path} and {dataset.shards[second].path}",
        found=key,
        expected="keys that are unique in the data set",
        action="remove one of the two shards",
    )


def _missing_error(
    dataset: Dataset, cache: Cache, absent: Mapping[int, np.ndarray], count: int
) -> JoinError:
    examples: list[str] = []
    for shard, mask in absent.items():
        if mask.any() and len(examples) < SHOWN:
            keys = cache.keys(shard)
            examples += [f"missing: {keys[i]}" for i in np.flatnonzero(mask)[:SHOWN].tolist()]
    total = sum(cache.counts)
    skip = ", or train without them (left_out.csv lists them): --set data.missing=skip"
    return JoinError(
        f"{count} of the cache's {total} samples are not in the shards",
        where=dataset.name,
        found=f"{dataset.samples} samples, for example {dataset.shards[0].key(0)}",
        expected=f"the keys of {cache.manifest.dataset.name}",
        action=f"pass all shards of that data set{'' if count == total else skip}; all missing "
        f"keys: cskd-pipeline cache verify {cache.path} --shards SHARDS --json",
        problems=examples[:SHOWN],
    )
