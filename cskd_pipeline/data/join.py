"""A cache's samples found in the user's tars, by key: never by position, never silently short."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cskd_pipeline.cache.omitted import LeftOut
from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.data.batches import Renderer
from cskd_pipeline.data.images import NOWHERE, SHOWN, ImageSource, TarRows
from cskd_pipeline.data.index import Dataset, load_dataset, read_headers
from cskd_pipeline.data.left_out import Offsets
from cskd_pipeline.data.plan import SampleSet
from cskd_pipeline.errors import JoinError, UsageError
from cskd_pipeline.runtime.classes import Classes, ClassGuard
from cskd_pipeline.runtime.progress import progress


@dataclass(frozen=True)
class Join:
    """Every sample of a cache, found in the user's tars.

    Args:
        samples: the cache's layout, over which training is planned.
        images: reads samples by shard and offset in that layout.
        allowed: per shard (count,) bool, samples the user has; None: all.
        same_shards: shards whose tar holds the same keys in the same order.
        missing: samples that the user's tars lack.
        unused: the user's samples that the cache does not know.
        compared: samples whose labels were compared with the cache's.
        relabelled: (n, 3) shard, offset and the cache's label of those that have another here.
        reasons: reason -> shard -> offsets of samples that the user has and that are left out.
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
        """Return what renders the cache's views from the user's images."""
        return Renderer.of_cache(self.images)

    def there(self) -> np.ndarray:
        """Return (n, 2) int64 shard and offset of the samples that the user has."""
        every = self.samples.every()
        return every[self.images.locate(every)[0] != NOWHERE]

    def usable(self) -> np.ndarray:
        """Return (n, 2) int64 shard and offset of the samples that are allowed."""
        every = self.samples.every()
        return every if self.allowed is None else every[np.concatenate(self.allowed)]

    def without(self, offsets: Offsets, reason: str) -> Join:
        """Return the join without these samples, which the user has; refuse to leave none."""
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
                where=self.images.where(*self.there()[0].tolist()),
                action="use the original files: from copies that were resized or compressed again "
                "come other views than the teacher saw",
            )
        reasons = {**self.reasons, reason: offsets}
        return replace(self, allowed=tuple(allowed), reasons=reasons)

    def count(self, reason: str) -> int:
        """Count the samples left out for a reason of :attr:`reasons`."""
        return sum(map(len, self.reasons.get(reason, {}).values()))

    def left_out(self) -> Iterator[LeftOut]:
        """Yield every sample of the cache that is not allowed, in the cache's order."""
        why = {
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
                    reason = why.get((shard, offset), "missing")
                    yield LeftOut(reason, shard, offset, keys[offset])


def join(
    dataset: Dataset,
    cache: Cache,
    guard: ClassGuard | None = None,
    *,
    missing: str = "error",
    drift: str = "error",
) -> Join:
    """Find the cache's samples among the user's, and compare their labels.

    Tars that hold the same keys in the same order are taken as a whole, by their manifest where
    there is one; only what is left is looked up key by key.

    Args:
        guard: accepts labels that are not the cache's, or does not; without, they are refused.
        missing: ``error``, or ``skip``: train without the samples that are missing, and their
            partners.
        drift: ``error``; ``warn``: images that are not byte for byte the cache's are not refused;
            ``skip``: as ``error``, for a caller that looks for them (:func:`find_differing`) and
            leaves them out (:meth:`Join.without`).

    Raises:
        JoinError: samples missing, keys that fit twice, or other labels. Images are compared when
            they are read; :mod:`cskd_pipeline.data.replay` does so for a sample in advance.
        UsageError: another word for ``missing`` or ``drift``.
    """
    require_word("missing", missing, ("error", "skip"))
    require_word("drift", drift, ("error", "warn", "skip"))
    tar_rows = _tar_rows(dataset, cache)
    absent = {s: r.tar == NOWHERE for s, r in enumerate(tar_rows) if isinstance(r, TarRows)}
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
        guard.record(f"{len(relabelled)} of {compared} samples have other labels than in the cache")
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
        same_shards=sum(isinstance(place, int) for place in tar_rows),
        missing=count,
        unused=dataset.samples - (total - count),
        compared=compared,
        relabelled=relabelled,
    )


def require_word(name: str, value: str, words: Sequence[str]) -> None:
    """Refuse an option's value that is none of ``words``, with a UsageError."""
    if value not in words:
        raise UsageError(f"{name} has no such value", found=value, expected=" or ".join(words))


def join_to_look(cache: Cache, shards: str, guard: ClassGuard, *, split: str | None = None) -> Join:
    """The cache's samples among the user's ``shards``, for those who compare or show them: samples
    that are missing and images that differ are no error.
    """
    dataset = load_dataset(shards, split=split)
    dataset = dataset.fitting(classes_of(cache), "the shards", guard)
    return join(dataset, cache, guard, missing="skip", drift="warn")


def classes_of(cache: Cache) -> Classes:
    """Return the classes of a cache, for a comparison."""
    return cache.manifest.dataset.classes("the cache", cache.path)


def find_differing(found: Join, part: int = 0, parts: int = 1) -> list[tuple[int, int]]:
    """Read every image that is not left out; return shard and offset of those unlike the cache's.

    Args:
        part, parts: of the user's tars, read every ``parts``-th, from number ``part`` on.
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
            raise _twice(dataset, dataset.shards[tar].key(0), tars[shard_id], tar)
        tars[shard_id] = tar
    same = [tars.get(shard_id) for shard_id in cache.shard_ids]
    looked_up = _look_up(dataset, cache, same)
    return [next(looked_up) if tar is None else tar for tar in same]


def _compare_labels(
    images: ImageSource, cache: Cache, tar_rows: Sequence[TarRows | int]
) -> tuple[int, np.ndarray]:
    """Return the count of labels compared, and :attr:`Join.relabelled`.

    Not compared here are tars whose SHA-256, by a manifest, is that of the one that the cache's
    labels were read from; nothing of such a tar is read before its first use, which compares them.
    """
    recorded = cache.manifest.dataset.shards
    infos = [images.shards[place].info if isinstance(place, int) else None for place in tar_rows]
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
    places = [tar_rows[shard] for shard in shards]
    read_headers([images.shards[place] for place in places if isinstance(place, int)])
    labels_of = cache.store.each(
        cache.labels, shards, "comparing labels with the cache's", "shards"
    )
    for shard, labels in zip(shards, labels_of, strict=True):
        compared += int((images.shard_labels(shard) != NOWHERE).sum())
        found.append(images.relabelled(shard, labels))
    return compared, np.concatenate(found)


def _look_up(dataset: Dataset, cache: Cache, same: Sequence[int | None]) -> Iterator[TarRows]:
    """Yield where samples of the shards that are None in ``same`` are, in tars not in it."""
    if None not in same:
        return
    tars = sorted(set(range(len(dataset.shards))) - set(same))
    read_headers([dataset.shards[tar] for tar in tars])
    keys = [dataset.shards[tar].index.keys for tar in tars] or [np.empty(0, "S1")]
    tar = np.repeat(tars, [len(part) for part in keys]).astype(np.int32)
    row = np.concatenate([np.arange(len(part), dtype=np.int32) for part in keys])
    every = np.concatenate(keys)
    label = np.concatenate([dataset.shards[tar].index.label for tar in tars] or [row])
    order = np.argsort(every, kind="stable")
    every, tar, row, label = every[order], tar[order], row[order], label[order]
    for shard in (number for number, known in enumerate(same) if known is None):
        sought = np.array([key.encode() for key in cache.keys(shard)])
        first = np.searchsorted(every, sought, side="left")
        count = np.searchsorted(every, sought, side="right") - first
        if (count > 1).any():
            i = int(np.argmax(count > 1))
            at = int(first[i])
            raise _twice(dataset, sought[i].decode(), int(tar[at]), int(tar[at + 1]))
        found = count == 1
        tar_rows = np.full((3, len(sought)), NOWHERE, np.int32)
        tar_rows[:, found] = tar[first[found]], row[first[found]], label[first[found]]
        yield TarRows(*tar_rows)


def _twice(dataset: Dataset, key: str, first: int, second: int) -> JoinError:
    return JoinError(
        "a key of the cache is there more than once",
        where=f"{dataset.shards[first].path} and {dataset.shards[second].path}",
        found=key,
        expected="keys that are unique in the data set",
        action="leave one of the two out",
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
    return JoinError(
        f"{count} of the cache's {total} samples are not in the shards",
        where=dataset.name,
        found=f"{dataset.samples} samples, for example {dataset.shards[0].key(0)}",
        expected=f"the keys of {cache.manifest.dataset.name}",
        action="give all shards of that data set"
        + (
            ""
            if count == total
            else ", or train without these, listed in the run's left_out.csv: "
            "--set data.missing=skip"
        )
        + f"; cskd-pipeline cache verify {cache.path} --shards SHARDS --json lists them all",
        problems=examples[:SHOWN],
    )
