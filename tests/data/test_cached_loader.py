"""The loader of cached views: the contents of a batch, and resuming at any position."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.data.assemble import assemble, normalise
from cskd_pipeline.data.cached_loader import CachedBatch, CachedLoader
from cskd_pipeline.data.index import Dataset, load_dataset, sample
from cskd_pipeline.data.join import join
from cskd_pipeline.data.training_views import TrainingViews, open_views
from cskd_pipeline.distill.losses import DistillationLoss, mixed_targets
from cskd_pipeline.distill.targets import LogitTargets
from cskd_pipeline.errors import CacheError, DataError, JoinError, UsageError
from cskd_pipeline.views.policy import ViewPolicy
from tests.data.factories import POLICY, make_cache
from tests.images import samples, write_shard

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Cache:
    return make_cache(tmp_path_factory.mktemp("cache") / "cache", load_dataset(shards))


@pytest.fixture(scope="module")
def views(shards: Path, cache: Cache) -> TrainingViews:
    return open_views(shards, cache)


def loader_of(views: TrainingViews, **changes: Any) -> CachedLoader:
    options: dict[str, Any] = {"mean": MEAN, "std": STD, "repeats": 2, "seed": 1}
    return CachedLoader(views, 12, **{**options, **changes})


def same(one: CachedBatch, other: CachedBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def tensors(batch: CachedBatch) -> list[torch.Tensor]:
    assert isinstance(batch.targets, LogitTargets)
    return [*batch[:3], batch.targets.spatial, batch.targets.global_]


def test_a_batch_has_normalised_images_mixed_labels_and_the_teachers_response(
    views: TrainingViews, cache: Cache
) -> None:
    loader = loader_of(views, smoothing=0.2)
    batch = next(iter(loader))
    raw = views[loader.rows(0)]
    assert batch.images.shape == (12, 3, POLICY.size, POLICY.size)
    assert torch.equal(batch.images, normalise(assemble(raw, POLICY), MEAN, STD))
    own = next(iter(loader_of(views, mean=None, std=None))).images
    assert torch.equal(own, normalise(assemble(raw, POLICY), POLICY.mean, POLICY.std))
    expected = mixed_targets(raw.label, raw.partner_label, raw.lam, 5, 0.2)
    assert torch.equal(batch.labels, expected)
    assert (batch.labels.max(dim=1).values < 1).all()
    assert torch.equal(batch.hard_labels, raw.label)
    assert isinstance(batch.targets, LogitTargets)
    rows = cache.gather("dense", loader.rows(0))
    assert torch.equal(batch.targets.spatial, torch.from_numpy(rows["dense/spatial"]))
    assert torch.equal(batch.targets.global_, torch.from_numpy(rows["dense/global"]))


def test_an_epoch_has_the_stated_length_and_the_next_iteration_is_the_next_epoch(
    views: TrainingViews,
) -> None:
    loader, other = loader_of(views), loader_of(views)
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == len(loader) == loader.plan.steps
    assert not any(same(a, b) for a, b in itertools.product(first, second))
    other.set_epoch(1)
    assert all(same(a, b) for a, b in zip(second, other, strict=True))
    other.set_epoch(0)
    assert all(same(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_in_the_middle_of_an_epoch(views: TrainingViews, workers: int) -> None:
    full = loader_of(views, workers=workers)
    batches = [*full, *full]
    for done in (1, len(full) - 1, len(full), len(full) + 1):
        stopped, resumed = loader_of(views, workers=workers), loader_of(views)
        epochs = itertools.chain.from_iterable(itertools.repeat(stopped))
        assert all(same(a, b) for a, b in zip(batches[:done], epochs, strict=False))
        state = stopped.state_dict()
        assert state["epoch"] * len(full) + state["batch"] == done
        resumed.load_state_dict(state)
        resumed.set_epoch(state["epoch"])  # as loops do at the start of each epoch
        left = [*resumed, *(resumed if done < len(full) else ())]
        assert len(left) == len(batches) - done
        assert all(same(a, b) for a, b in zip(left, batches[done:], strict=True))


def test_after_an_error_the_next_iteration_starts_with_the_failed_batch(
    views: TrainingViews, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, batches = loader_of(views), list(loader_of(views))
    read = TrainingViews.__getitem__

    def failing(self: TrainingViews, rows: Any) -> Any:
        if (rows == loader.rows(1)).all():
            raise DataError("gone")
        return read(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingViews, "__getitem__", failing)
        for _ in range(2):
            with pytest.raises(DataError, match="gone"):
                list(loader)
    assert all(same(a, b) for a, b in zip(loader, batches[1:], strict=True))


def test_a_loader_continues_after_an_interrupted_iteration(
    views: TrainingViews, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, batches = loader_of(views), list(loader_of(views))

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingViews, "__getitem__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(loader)
    assert all(same(a, b) for a, b in zip(loader, batches, strict=True))


def test_a_jump_ends_the_iteration_and_the_next_starts_there(views: TrainingViews) -> None:
    loader, batches = loader_of(views), list(loader_of(views))
    state = loader.state_dict()
    jumps: list[Callable[[], object]] = [
        partial(loader.load_state_dict, state),
        partial(loader.set_epoch, 0),
        partial(loader.start_at, 0),
    ]
    for jump, epoch in zip(jumps, (0, 1, 2), strict=True):
        loader.set_epoch(epoch)
        seen = 0
        for _ in loader:
            seen += 1
            jump()
        assert seen == 1
        assert loader.epoch == 0
        assert all(same(a, b) for a, b in zip(loader, batches, strict=True))
    loader.start_at(0)
    for _ in loader:
        assert len(list(loader.batches(1))) == 1
    assert [same(batch, batches[2]) for batch in itertools.islice(loader, 1)] == [True]
    loader.start_at(0)
    for _ in loader.batches(3):
        loader.start_at(0, 2)
    assert loader.state_dict()["batch"] == 2


def test_a_state_is_resumed_with_another_number_of_ranks(views: TrainingViews) -> None:
    loader, batches = loader_of(views), list(loader_of(views))
    next(iter(loader))
    ranks = [loader_of(views, rank=rank, world=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(loader.state_dict())
    parts = zip(*map(tensors, (next(iter(rank)) for rank in ranks)), strict=True)
    for pair, full in zip(parts, tensors(batches[1]), strict=True):
        assert torch.equal(torch.cat(pair), full)


def test_without_a_cache_there_are_no_targets(views: TrainingViews) -> None:
    assert next(iter(loader_of(views.without_cache()))).targets is None


@pytest.mark.parametrize(
    "options",
    [
        *({name: 0} for name in ("accumulation", "repeats", "shuffle_shards", "world")),
        *({"workers": -1}, {"rank": 2, "world": 2}, {"rank": -1}),
    ],
)
def test_options_out_of_range_are_refused(views: TrainingViews, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(options))} = "):
        loader_of(views, **options)


def test_an_empty_batch_is_refused(views: TrainingViews) -> None:
    with pytest.raises(UsageError, match="batch_size = 0"):
        CachedLoader(views, 0)


@pytest.mark.parametrize("option", ["missing", "drift"])
def test_an_invalid_choice_is_refused(shards: Path, cache: Cache, option: str) -> None:
    with pytest.raises(UsageError, match=f"invalid value of {option}"):
        open_views(shards, cache, **{option: "ignore"})  # type: ignore[arg-type]  # any str
    with pytest.raises(UsageError, match=f"invalid value of {option}"):
        join(load_dataset(shards), cache, **{option: "ignore"})  # type: ignore[arg-type]  # any str


def test_a_state_with_another_order_is_refused(views: TrainingViews) -> None:
    state = loader_of(views).state_dict()
    with pytest.raises(UsageError, match="different batch order") as caught:
        loader_of(views, seed=2, accumulation=3).load_state_dict(state)
    assert caught.value.problems == [
        "accumulation: 1 in the state, 3 in this loader",
        "seed: 1 in the state, 2 in this loader",
    ]


def test_ranks_and_micro_batches_have_equal_parts_of_a_batch(views: TrainingViews) -> None:
    full = next(iter(loader_of(views)))
    parts = [
        batch
        for rank in range(2)
        for batch in itertools.islice(loader_of(views, rank=rank, world=2, accumulation=3), 3)
    ]
    assert [len(part.images) for part in parts] == [2] * 6
    assert torch.equal(torch.cat([part.images for part in parts]), full.images)


@pytest.mark.parametrize(("world", "accumulation"), [(5, 1), (1, 5), (4, 4), (24, 1)])
def test_a_batch_that_cannot_be_cut_into_equal_parts_is_refused(
    views: TrainingViews, world: int, accumulation: int
) -> None:
    with pytest.raises(UsageError, match="equal parts"):
        loader_of(views, world=world, accumulation=accumulation)


def test_a_mismatch_is_refused_on_opening(
    tmp_path: Path, shards: Path, cache: Cache, dataset: Dataset
) -> None:
    with pytest.raises(CacheError, match="no encoding topk"):
        open_views(shards, cache, encoding="topk")
    soft = DistillationLoss(global_kind="soft", spatial_kind="soft")
    assert open_views(shards, str(cache.path), soft).encoding == "dense"
    some = tmp_path / "some"
    some.mkdir()
    write_shard(some / "0.tar", samples(0, dataset.samples)[1:])
    with pytest.raises(JoinError, match="1 of the cache's"):
        open_views(some, cache)
    found = open_views(some, cache, missing="skip")
    assert found.allowed is not None
    assert sum(int((~mask).sum()) for mask in found.allowed) == 1


def test_shards_may_be_a_sequence_of_tars(shards: Path, cache: Cache) -> None:
    tars = sorted(shards.glob("*.tar"))
    assert len(tars) > 1
    assert open_views(tars, cache).samples.counts == open_views(shards, cache).samples.counts


def test_an_unknown_number_of_classes_is_refused(
    tmp_path: Path,
) -> None:
    write_shard(tmp_path / "0.tar", samples(0, 5))
    dataset = load_dataset(tmp_path)
    for use in (
        lambda: TrainingViews.of_dataset(dataset, ViewPolicy(size=32), 0),
        lambda: sample(dataset, 4),
    ):
        with pytest.raises(DataError, match="the number of classes is unknown"):
            use()
    views = TrainingViews.of_dataset(dataset.with_classes(10), ViewPolicy(size=32), 0)
    assert views.num_classes == 10


def test_dropping_a_loader_in_an_epoch_ends_its_processes(shards: Path) -> None:
    """A reference cycle would keep them alive until the garbage collector runs."""
    views = TrainingViews.of_dataset(load_dataset(shards), ViewPolicy(size=32), 0)
    loader = CachedLoader(views, 8, repeats=1, workers=1)
    gc.disable()
    try:
        before = set(multiprocessing.active_children())
        for _ in loader:
            break
        assert set(multiprocessing.active_children()) - before
        del loader
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()


def test_a_program_that_exits_in_the_middle_of_an_epoch_exits_silently(shards: Path) -> None:
    """Python tears down the modules before the loader, a later global than the package."""
    program = f"""
import cskd_pipeline
from cskd_pipeline.data.cached_loader import CachedLoader
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.data.training_views import TrainingViews
from cskd_pipeline.views.policy import ViewPolicy

views = TrainingViews.of_dataset(load_dataset({str(shards)!r}), ViewPolicy(size=32), 0)
one, other = (CachedLoader(views, 8, repeats=1, workers=workers) for workers in (0, 1))
for loader in (one, other):
    for batch in loader:
        break
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
