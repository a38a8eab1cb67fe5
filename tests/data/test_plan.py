"""The training order: properties for any layout, and one golden order."""

from __future__ import annotations

import json
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from cskd_pipeline.data.plan import EpochPlan, SampleSet
from cskd_pipeline.errors import CacheError, DataError
from cskd_pipeline.views.mixing import matching
from cskd_pipeline.views.policy import ViewPolicy

GOLDEN = Path(__file__).parents[1] / "golden/loading.json"
Rows = set[tuple[int, int, int]]


def layout(counts: list[int]) -> SampleSet:
    return SampleSet(tuple(counts), tuple(f"{number:064x}" for number in range(len(counts))))


def as_set(rows: np.ndarray) -> Rows:
    return set(map(tuple, rows.tolist()))


@st.composite
def plans(draw: st.DrawFn, *, holes: bool = False) -> EpochPlan:
    counts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    repeats = draw(st.integers(1, 4))
    allowed = None
    if holes:
        bits = [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in counts]
        # Few samples are missing: those for which both draws are False.
        allowed = [
            np.array(row) | np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
            for row, n in zip(bits, counts, strict=True)
        ]
    policy = ViewPolicy(
        window=draw(st.integers(2, 12)),
        repeats=draw(st.integers(1, 4)),
        mix=draw(st.sampled_from([0.0, 1.0])),
    )
    try:
        return EpochPlan(
            layout(counts),
            policy,
            draw(st.integers(0, 5)),
            views=draw(st.one_of(st.none(), st.integers(repeats, 9))),
            repeats=repeats,
            batch_size=draw(st.integers(1, sum(counts))),
            seed=draw(st.integers(0, 5)),
            shuffle_shards=draw(st.integers(1, 5)),
            allowed=allowed,
        )
    except DataError:  # too many holes for one batch
        reject()


def partners(plan: EpochPlan, view: int, shard: int) -> np.ndarray:
    count, name = plan.samples.counts[shard], plan.samples.shard_ids[shard]
    return matching(plan.root_seed, name, count, view, plan.policy)


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(0, 9))
def test_an_epoch_has_full_batches_without_duplicates(plan: EpochPlan, number: int) -> None:
    rows = plan.epoch(number)
    assert plan.steps == plan.samples.total // plan.batch_size
    assert rows.shape == (plan.steps * plan.batch_size, 3)
    assert rows.dtype == np.int32
    assert len(as_set(rows)) == len(rows)
    views, shards, offsets = rows.T
    assert set(views) <= set(plan.cycle_views(number // plan.repeats))
    assert (offsets < np.array(plan.samples.counts)[shards]).all()
    assert (np.minimum(views, offsets) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(0, 3))
def test_a_cycle_shows_every_image_in_every_view_once_except_for_dropped_tails(
    plan: EpochPlan, cycle: int
) -> None:
    views = plan.cycle_views(cycle)
    assert len(set(views)) == plan.repeats
    shown: Rows = set()
    for phase in range(plan.repeats):
        rows = as_set(plan.epoch(cycle * plan.repeats + phase))
        assert not shown & rows
        shown |= rows
    everything = {
        (view, shard, offset)
        for view in views
        for shard, count in enumerate(plan.samples.counts)
        for offset in range(count)
    }
    assert shown <= everything
    dropped = plan.repeats * (plan.samples.total % plan.batch_size)
    assert len(everything - shown) == dropped


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 9))
def test_ranks_and_micro_batches_only_cut_the_global_batch(
    parts: int, size: int, number: int
) -> None:
    plan = make([30, 31], batch_size=parts * size)
    for step in (0, plan.steps - 1):
        cut = [plan.batch(number, step, part=part, parts=parts) for part in range(parts)]
        assert {len(part) for part in cut} == {size}
        assert np.array_equal(np.concatenate(cut), plan.batch(number, step))
        at = step * plan.batch_size
        full = plan.epoch(number)[at : at + plan.batch_size]
        assert np.array_equal(full, plan.batch(number, step))


@settings(max_examples=50, deadline=None)
@given(plans(), st.integers(0, 3))
def test_pairs_and_the_views_of_an_image_are_neighbours(plan: EpochPlan, cycle: int) -> None:
    """A pair's rows are within 2 R rows, even if a cut or the dropped tail has removed some."""
    rows = np.concatenate([plan.epoch(cycle * plan.repeats + p) for p in range(plan.repeats)])
    if (
        plan.samples.total % plan.batch_size
    ):  # tails are dropped between the epochs: check only the first
        rows = plan.epoch(cycle * plan.repeats)
    first_view = plan.cycle_views(cycle)[0]
    positions: dict[tuple[int, int], list[int]] = {}
    for row, (_, shard, offset) in enumerate(rows.tolist()):
        pair = min(offset, int(partners(plan, first_view, shard)[offset]))
        positions.setdefault((shard, pair), []).append(row)
    for found in positions.values():
        assert found[-1] - found[0] < 2 * plan.repeats
        assert len(found) == found[-1] - found[0] + 1


@settings(max_examples=50, deadline=None)
@given(plans(holes=True), st.integers(0, 9))
def test_no_row_needs_a_sample_that_is_missing(plan: EpochPlan, number: int) -> None:
    assert plan.allowed is not None
    rows = plan.epoch(number)
    assert len(rows) == plan.steps * plan.batch_size
    assert len(as_set(rows)) == len(rows)
    for view, shard, offset in rows.tolist():
        assert plan.allowed[shard][offset]
        assert plan.allowed[shard][partners(plan, view, shard)[offset]]


@settings(max_examples=20, deadline=None)
@given(plans(), st.permutations(range(6)))
def test_an_epoch_does_not_depend_on_earlier_calls(plan: EpochPlan, order: list[int]) -> None:
    in_turn = {number: plan.epoch(number) for number in range(6)}
    for number in order:
        assert np.array_equal(plan.epoch(number), in_turn[number])


def make(counts: list[int], **changes: object) -> EpochPlan:
    options: dict[str, object] = {"views": 6, "repeats": 3, "batch_size": 8, "seed": 0}
    policy = ViewPolicy(window=8)
    return EpochPlan(layout(counts), policy, 3, **{**options, **changes})  # type: ignore[arg-type]


def test_seeds_cycles_and_phases_change_the_order() -> None:
    plan = make([30, 31, 32])
    rows = [plan.epoch(0), plan.epoch(1), plan.epoch(3)]
    rows += [make([30, 31, 32], seed=1).epoch(0)]
    for i, one in enumerate(rows):
        for other in rows[i + 1 :]:
            assert not np.array_equal(one, other)
    assert not as_set(rows[0]) & as_set(rows[1])


def test_an_epoch_of_repeated_augmentation_shows_a_third_of_the_images_three_times() -> None:
    plan = make([40, 50, 54], batch_size=24)
    images = plan.epoch(4)[:, 1:]
    shown, times = np.unique(images, axis=0, return_counts=True)
    assert 144 / 3 <= len(shown) <= 144 / 3 + 2  # cuts may fall inside a pair
    assert (times == 3).sum() >= len(shown) - 4


def test_samples_are_shuffled_within_blocks_of_shards() -> None:
    plan = make([10] * 12, repeats=1, batch_size=30, shuffle_shards=3)
    for number in range(3):
        blocks = plan.epoch(number)[:, 1].reshape(4, 30)
        assert all(len(set(block)) == 3 for block in blocks.tolist())
        assert any(sorted(block) != block for block in blocks.tolist())
    assert len(set(make([10] * 12, repeats=1, batch_size=30).epoch(0)[:30, 1])) > 6


def test_views_are_reused_in_turn() -> None:
    plan = make([64], views=7)
    assert [plan.cycle_views(c) for c in range(4)] == [[0, 1, 2], [3, 4, 5], [6, 0, 1], [2, 3, 4]]


def test_too_few_views_or_samples_are_refused() -> None:
    with pytest.raises(CacheError, match="fewer views"):
        make([64], views=2)
    with pytest.raises(DataError, match="fewer samples than one batch"):
        make([3, 4])
    mask = np.ones(20, bool)
    mask[::2] = False
    with pytest.raises(DataError, match="fewer samples than one batch"):
        make([20], allowed=[mask])


def test_without_mixing_a_missing_sample_drops_no_other() -> None:
    mask = np.ones(40, bool)
    mask[::4] = False
    options = {"views": 6, "repeats": 3, "batch_size": 10, "seed": 0, "allowed": [mask]}
    alone = EpochPlan(layout([40]), ViewPolicy(window=8, mix=0.0), 3, **options)  # type: ignore[arg-type]
    assert alone.steps == 3  # all 30 remaining samples
    mixed = EpochPlan(layout([40]), ViewPolicy(window=8), 3, **options)  # type: ignore[arg-type]
    assert mixed.steps < 3


def test_the_order_is_pinned() -> None:
    """A resumed run continues in the same order, whatever version resumes it."""
    plan = make([30, 31, 32, 1], shuffle_shards=2)
    found = {str(n): zlib.crc32(plan.epoch(n).astype("<i4").tobytes()) for n in (0, 1, 2, 7)}
    assert found == json.loads(GOLDEN.read_text())["epochs"]


def test_an_epoch_of_imagenet_is_planned_quickly() -> None:
    plan = make([1251] * 512 + [1252] * 512, views=300, batch_size=1024)
    seconds = []
    for number in (0, 4):
        started = time.process_time()
        plan.epoch(number)
        seconds.append(time.process_time() - started)
    assert plan.steps == 1251
    assert min(seconds) < 2  # 0.4 s on an idle machine
