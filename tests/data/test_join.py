"""A cache joined to tars with other shards, missing samples, or other images."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.data import shards as shards_module
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.data.cached_loader import CachedLoader
from cskd_pipeline.data.describe import index_shards
from cskd_pipeline.data.index import Dataset, load_dataset
from cskd_pipeline.data.join import Join, find_differing, join
from cskd_pipeline.data.left_out import by_shard
from cskd_pipeline.data.replay import replay, spread_views
from cskd_pipeline.data.training_views import TrainingViews
from cskd_pipeline.errors import JoinError, ViewDriftError
from cskd_pipeline.runtime.classes import COMMAND_SWITCH, ClassGuard
from cskd_pipeline.views import apply
from tests.conftest import COUNTS
from tests.data.factories import make_cache, same
from tests.images import Sample, samples, write_shard

EVERY = samples(0, sum(COUNTS))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Cache:
    return make_cache(tmp_path_factory.mktemp("cache") / "cache", load_dataset(shards))


def recut(folder: Path, *parts: list[Sample]) -> Dataset:
    """Return a data set with one tar per part."""
    folder.mkdir(exist_ok=True)
    paths = [write_shard(folder / f"other-{i:02d}.tar", part) for i, part in enumerate(parts)]
    return load_dataset(paths, num_classes=5)


class Source:
    """Batches of a join, indexed by (epoch, step, micro-batch)."""

    def __init__(self, loader: CachedLoader) -> None:
        self.views, self.plan, self._loader = loader.views, loader.plan, loader

    def __getitem__(self, position: tuple[int, int, int]) -> Batch:
        epoch, step, _ = position
        return self.views[self._loader.rows(epoch * self.plan.steps + step)]


def source(joined: Join, batch_size: int = 10) -> Source:
    views = TrainingViews.of_join(joined, "dense")
    return Source(CachedLoader(views, batch_size, repeats=2))


def test_the_cache_s_own_shards_are_matched_as_a_whole(
    dataset: Dataset, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cache, "keys", None)
    joined = join(dataset, cache)
    assert (joined.same_shards, joined.missing, joined.unused) == (4, 0, 0)
    assert joined.allowed is None
    assert joined.samples.counts == COUNTS


def test_shards_with_the_same_keys_are_matched_under_any_name(
    tmp_path: Path, cache: Cache, dataset: Dataset
) -> None:
    ends = np.cumsum(COUNTS)
    parts = [EVERY[end - n : end] for n, end in zip(COUNTS, ends, strict=True)]
    other = recut(tmp_path, *parts[::-1])
    joined = join(other, cache)
    assert joined.same_shards == 4
    one, two = source(joined), source(join(dataset, cache))
    assert same(one[(0, 1, 0)], two[(0, 1, 0)])


@pytest.mark.parametrize("seed", range(3))
def test_other_tars_in_another_order_give_the_same_batches(
    tmp_path: Path, dataset: Dataset, cache: Cache, seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(EVERY))
    cuts = sorted(np.random.default_rng(seed).choice(np.arange(1, len(EVERY)), 4, replace=False))
    parts = [[EVERY[i] for i in part] for part in np.split(order, cuts)]
    joined = join(recut(tmp_path, *parts, samples(500, 3)), cache)
    assert (joined.same_shards, joined.missing, joined.unused) == (0, 0, 3)
    one, two = source(joined), source(join(dataset, cache))
    for position in ((0, 0, 0), (1, 3, 0), (2, 2, 0)):
        assert same(one[position], two[position])


def test_a_batch_opens_every_tar_once(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = join(recut(tmp_path, EVERY[0::3], EVERY[1::3], EVERY[2::3]), cache)
    opened: list[Path] = []
    open_shard = shards_module.open_shard
    monkeypatch.setattr(
        shards_module, "open_shard", lambda path: (opened.append(path), open_shard(path))[1]
    )
    _ = source(joined, 40)[(0, 0, 0)]
    assert len(opened) == len(set(opened)) == 3


def test_missing_samples_are_counted_and_named(tmp_path: Path, cache: Cache) -> None:
    other = recut(tmp_path, [s for i, s in enumerate(EVERY) if i not in (3, 17, 40)])
    with pytest.raises(JoinError, match="3 of the cache's 43 samples are not in the shards") as e:
        join(other, cache)
    assert e.value.problems == [f"missing: {EVERY[i][0]}" for i in (3, 17, 40)]
    assert "data.missing=skip" in str(e.value.action)


def test_training_without_missing_samples_reads_none_of_them(
    tmp_path: Path, dataset: Dataset, cache: Cache
) -> None:
    gone = {3, 17, 40}
    other = recut(tmp_path, [s for i, s in enumerate(EVERY) if i not in gone], samples(99, 1))
    joined = join(other, cache, missing="skip")
    assert (joined.missing, joined.unused) == (3, 1)
    assert joined.allowed is not None
    starts = np.cumsum((0, *COUNTS))
    absent = {int(starts[s] + i) for s, m in enumerate(joined.allowed) for i in np.flatnonzero(~m)}
    assert absent == gone
    skipping = source(joined)
    every = join(dataset, cache)
    renderer = source(every).views
    for step in range(skipping.plan.steps):
        batch = skipping[(0, step, 0)]
        numbers = starts[batch.index[:, 1]] + batch.index[:, 2].numpy()
        assert not gone & set(numbers.tolist())
        assert same(batch, renderer[batch.index.numpy()])


def test_shards_of_another_data_set_are_refused_rather_than_skipped(
    tmp_path: Path, cache: Cache
) -> None:
    other = recut(tmp_path, samples(500, 20))
    for missing in ("error", "skip"):
        with pytest.raises(JoinError, match="43 of the cache's 43") as caught:
            join(other, cache, missing=missing)
    assert caught.value.found == "20 samples, for example bird_0500"
    assert "skip" not in str(caught.value.action)


def test_a_duplicate_key_is_refused(tmp_path: Path, cache: Cache) -> None:
    with pytest.raises(JoinError, match="more than once") as caught:
        join(recut(tmp_path, EVERY, EVERY[30:33]), cache)
    assert caught.value.found == EVERY[30][0]
    assert "other-00.tar and" in str(caught.value.where)
    first = EVERY[: COUNTS[0]]
    with pytest.raises(JoinError, match="more than once"):
        join(recut(tmp_path, first, EVERY[COUNTS[0] :], first), cache)


def test_duplicate_keys_that_are_not_in_the_cache_are_ignored(tmp_path: Path, cache: Cache) -> None:
    other = recut(tmp_path, EVERY, samples(500, 2), samples(500, 2))
    assert join(other, cache).unused == 4


def relabelled(sample: Sample, label: int) -> Sample:
    key, fields = sample
    return key, {**fields, "cls": b"%d" % label}


def test_labels_that_differ_are_refused_by_key(tmp_path: Path, cache: Cache) -> None:
    """All labels are compared before any image is read; renumbered classes are reported."""
    turned = [relabelled(s, 4 - i % 5) for i, s in enumerate(EVERY)]
    with pytest.raises(JoinError, match="34 of 43 samples have labels that differ") as caught:
        join(recut(tmp_path, turned[::-1]), cache)
    assert caught.value.problems[0] == "bird_0000: label 4, in the cache 0"
    assert caught.value.found == (
        "classes in another order, cache to shards: 0 to 4, 1 to 3, 3 to 1, 4 to 0"
    )
    ends = np.cumsum(COUNTS)
    last = [relabelled(s, 0) if i == 41 else s for i, s in enumerate(EVERY)]
    parts = [last[end - n : end] for n, end in zip(COUNTS, ends, strict=True)]
    with pytest.raises(JoinError, match="1 of 43 samples have labels that differ") as caught:
        join(recut(tmp_path, *parts), cache)
    assert caught.value.problems == [f"{EVERY[41][0]}: label 0, in the cache 1"]


def test_labels_of_missing_samples_are_not_compared(tmp_path: Path, cache: Cache) -> None:
    joined = join(recut(tmp_path, EVERY[1:30]), cache, missing="skip")
    assert (joined.compared, len(joined.relabelled)) == (29, 0)


def test_accepted_labels_are_counted_and_read_unchanged(tmp_path: Path, cache: Cache) -> None:
    guard = ClassGuard(COMMAND_SWITCH, accept=True)
    turned = [relabelled(s, 4 - i % 5) for i, s in enumerate(EVERY)]
    joined = join(recut(tmp_path, turned), cache, guard)
    assert guard.accepted == ["34 of 43 samples have labels that differ from the cache's"]
    assert joined.relabelled[:2].tolist() == [[0, 0, 0], [0, 1, 1]]
    assert joined.images.labels(np.array([[0, 0], [0, 1]])).tolist() == [4, 3]
    assert replay(joined, spread_views(joined, 3)).exact.all()


def test_labels_are_compared_if_the_manifest_has_another_sha256(tmp_path: Path) -> None:
    """The keys match, so the shard does; but the SHA-256 differs, so the labels may too."""
    (tmp_path / "theirs").mkdir()
    own = make_cache(tmp_path / "cache", recut(tmp_path / "theirs", EVERY))
    (tmp_path / "ours").mkdir()
    recut(tmp_path / "ours", [relabelled(s, 4 - i % 5) for i, s in enumerate(EVERY)])
    index_shards(tmp_path / "ours", num_classes=5).save(tmp_path / "ours/manifest.json")
    with pytest.raises(JoinError, match="34 of 43 samples have labels that differ"):
        join(load_dataset(tmp_path / "ours/manifest.json"), own)


def test_labels_altered_after_indexing_are_found_on_first_use(tmp_path: Path, cache: Cache) -> None:
    """The manifest still has the SHA-256 of the cache's tar, so the join reads no headers."""
    first = [relabelled(s, i % 5) for i, s in enumerate(EVERY)]
    own = make_cache(tmp_path / "cache", recut(tmp_path, first))
    index_shards(tmp_path, num_classes=5).save(tmp_path / "manifest.json")
    recut(tmp_path, [relabelled(s, 4 - i % 5) for i, s in enumerate(EVERY)])
    joined = join(load_dataset(tmp_path / "manifest.json"), own)
    assert joined.compared == 0
    with pytest.raises(JoinError, match="34 of 43 samples have labels that differ"):
        joined.images.labels(np.array([[0, 0]]))


def recompressed(sample: Sample) -> Sample:
    key, fields = sample
    field = next(name for name in fields if name not in ("cls", "json"))
    file = io.BytesIO()
    Image.open(io.BytesIO(fields[field])).convert("RGB").save(file, "JPEG", quality=70)
    return key, {
        **{n: d for n, d in fields.items() if n in ("cls", "json")},
        "jpg": file.getvalue(),
    }


def test_recompressed_images_are_noticed_in_a_sample(tmp_path: Path, cache: Cache) -> None:
    other = recut(tmp_path, [recompressed(s) for s in EVERY])
    joined = join(other, cache)
    with pytest.raises(JoinError, match="not the one the cache was made from") as caught:
        joined.renderer.render(spread_views(joined, 3))
    assert "CRC-32" in str(caught.value.found)
    assert "other-00.tar: " in str(caught.value.where)


def test_one_image_that_differs_is_noticed_when_it_is_read(tmp_path: Path, cache: Cache) -> None:
    changed = 6
    other = recut(tmp_path, [recompressed(s) if i == changed else s for i, s in enumerate(EVERY)])
    strict = source(join(other, cache))
    with pytest.raises(JoinError, match="not the one the cache was made from") as caught:
        _ = [strict[(epoch, step, 0)] for epoch in (0, 1) for step in range(strict.plan.steps)]
    assert EVERY[changed][0] in str(caught.value.where)


def test_images_that_differ_are_counted_if_accepted(tmp_path: Path, cache: Cache) -> None:
    other = recut(tmp_path, [recompressed(s) for s in EVERY])
    batch = source(join(other, cache, drift="warn"))[(0, 0, 0)]
    assert batch.drifted == len(batch.pixels)


def test_with_manifests_on_both_sides_no_tar_is_read(
    tmp_path: Path, dataset: Dataset, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dataset.shards[0].path.parent
    manifest = index_shards(folder)
    manifest.save(tmp_path / "manifest.json")
    for shard in dataset.shards:
        (tmp_path / shard.path.name).symlink_to(shard.path)
    read: list[Path] = []
    read_index = shards_module.read_index
    monkeypatch.setattr(
        shards_module, "read_index", lambda path: (read.append(path), read_index(path))[1]
    )
    joined = join(load_dataset(tmp_path / "manifest.json"), cache)
    assert joined.same_shards == 4
    assert read == []


def test_images_that_differ_are_found_by_reading_all_and_left_out(
    tmp_path: Path, dataset: Dataset, cache: Cache
) -> None:
    """The tars have another order and lack samples."""
    other_images, gone = {0, 6, 25, 42}, {3, 30}
    content = [recompressed(s) if i in other_images else s for i, s in enumerate(EVERY)]
    order = [i for i in np.random.default_rng(5).permutation(len(EVERY)).tolist() if i not in gone]
    parts = [[content[i] for i in part] for part in np.array_split(order, 3)]
    joined = join(recut(tmp_path, *parts), cache, missing="skip", drift="skip")
    starts = np.cumsum((0, *COUNTS)).tolist()
    found = find_differing(joined)
    assert {starts[s] + i for s, i in found} == other_images
    shares = [find_differing(joined, part=part, parts=2) for part in range(2)]
    assert sorted(pair for share in shares for pair in share) == found

    skipping = joined.without(by_shard(found), "other image")
    assert (skipping.missing, skipping.count("other image")) == (2, 4)
    left_out = [(x.reason, starts[x.shard] + x.offset, x.key) for x in skipping.left_out()]
    assert left_out == [
        ("missing" if i in gone else "other image", i, EVERY[i][0])
        for i in sorted(other_images | gone)
    ]
    assert joined.allowed is not None  # the original join is unchanged
    assert sum(int((~mask).sum()) for mask in joined.allowed) == 2
    batches, every = source(skipping, 4), source(join(dataset, cache)).views
    for step in range(batches.plan.steps):
        batch = batches[(0, step, 0)]
        numbers = np.array(starts)[batch.index[:, 1]] + batch.index[:, 2].numpy()
        assert not (other_images | gone) & set(numbers.tolist())
        assert same(batch, every[batch.index.numpy()])


def test_if_no_image_differs_nothing_is_left_out(dataset: Dataset, cache: Cache) -> None:
    joined = join(dataset, cache, drift="skip")
    assert find_differing(joined) == []
    assert joined.without({}, "other image") == joined
    assert list(joined.without({}, "other image").left_out()) == []


def test_a_join_without_any_identical_image_is_refused(tmp_path: Path, cache: Cache) -> None:
    other = join(recut(tmp_path, [recompressed(s) for s in EVERY]), cache, drift="skip")
    found = find_differing(other)
    assert len(found) == len(EVERY)
    with pytest.raises(JoinError, match="none of the images is the one"):
        other.without(by_shard(found), "other image")


def test_an_image_altered_after_the_search_is_still_refused(tmp_path: Path, cache: Cache) -> None:
    other = recut(tmp_path, [recompressed(s) if i == 6 else s for i, s in enumerate(EVERY)])
    overlooked = source(join(other, cache, drift="skip"))
    with pytest.raises(JoinError, match="not the one the cache was made from"):
        _ = [overlooked[(epoch, step, 0)] for epoch in (0, 1) for step in range(4)]


def test_drift_of_identical_images_is_refused_rather_than_skipped(
    dataset: Dataset, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = apply.digest
    monkeypatch.setattr(apply, "digest", lambda pixels: digest(pixels) ^ 1)
    with pytest.raises(ViewDriftError):
        _ = source(join(dataset, cache, drift="skip"))[(0, 0, 0)]


def test_a_join_has_the_documented_fields(dataset: Dataset, cache: Cache) -> None:
    fields = {field.name for field in dataclasses.fields(join(dataset, cache))}
    counts = {"same_shards", "missing", "unused", "compared", "relabelled", "reasons"}
    assert {"samples", "images", "allowed", *counts} == fields
