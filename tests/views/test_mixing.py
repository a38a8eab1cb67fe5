"""Partners are an involution within windows; mixes are the same for both members of a pair."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cskd_pipeline.views.draw import Box
from cskd_pipeline.views.mixing import NO_BOX, UNMIXED, draw_mix, matching
from cskd_pipeline.views.policy import ViewPolicy

POLICY = ViewPolicy()
SEEDS = st.integers(0, 2**64 - 1)


@settings(max_examples=100, deadline=None)
@given(
    root_seed=SEEDS,
    shard=st.text(max_size=5),
    count=st.integers(0, 400),
    view=st.integers(0, 900),
    window=st.integers(2, 130),
    repeats=st.integers(1, 4),
)
def test_a_matching_is_an_involution_within_windows(
    root_seed: int, shard: str, count: int, view: int, window: int, repeats: int
) -> None:
    policy = ViewPolicy(window=window, repeats=repeats)
    partner = matching(root_seed, shard, count, view, policy)
    samples = np.arange(count)
    assert partner.dtype == np.int64
    assert partner.shape == (count,)
    assert np.array_equal(partner[partner], samples)
    assert np.array_equal(partner // window, samples // window)
    # One is left over where a window's length is odd, nobody elsewhere.
    sizes = np.bincount(samples // window)
    assert np.array_equal(np.bincount(samples // window, partner == samples), sizes % 2)


def test_repeated_views_share_a_matching_and_no_others_do() -> None:
    def of(view: int, root_seed: int = 0, shard: str = "a", repeats: int = 3) -> bytes:
        return matching(root_seed, shard, 300, view, ViewPolicy(repeats=repeats)).tobytes()

    assert of(0) == of(1) == of(2) != of(3) == of(5) != of(6)
    assert len({of(view, repeats=1) for view in range(20)}) == 20
    assert len({of(0), of(0, root_seed=1), of(0, shard="b")}) == 3


def test_all_matchings_of_a_window_are_equally_likely() -> None:
    """Of 4,500 matchings of six samples, each of the 15 ways occurs 300 times within 5 sigma."""
    policy = ViewPolicy(window=6, repeats=1)
    seen = Counter(tuple(matching(0, "s", 6, view, policy).tolist()) for view in range(4500))
    assert len(seen) == 15
    assert all(abs(count - 300) < 5 * np.sqrt(300 * 14 / 15) for count in seen.values())


def test_the_sample_left_over_changes_from_view_to_view() -> None:
    policy = ViewPolicy(repeats=1)
    alone = {
        int(np.flatnonzero(matching(0, "s", 67, view, policy) == np.arange(67))[0])
        for view in range(40)
    }
    assert alone == {64, 65, 66}


def test_without_mixing_every_sample_is_its_own_partner() -> None:
    policy = ViewPolicy(mix=0.0)
    assert np.array_equal(matching(0, "s", 99, 3, policy), np.arange(99))
    assert draw_mix(1, 2, policy) == UNMIXED


@settings(max_examples=300, deadline=None)
@given(one=SEEDS, other=SEEDS, size=st.integers(8, 400), alpha=st.floats(0.05, 5))
def test_a_mix_is_the_same_for_both_and_its_lam_is_the_unmixed_share(
    one: int, other: int, size: int, alpha: float
) -> None:
    policy = ViewPolicy(size=size, mixup_alpha=alpha, cutmix_alpha=alpha)
    mix = draw_mix(one, other, policy)
    assert mix == draw_mix(other, one, policy)
    assert 0.0 <= mix.lam <= 1.0
    top, left, height, width = mix.box
    if mix.cutmix:
        assert min(top, left, height, width) >= 0
        assert max(top + height, left + width) <= size
        assert mix.lam == 1.0 - height * width / size**2
    else:
        assert mix.box == NO_BOX
        assert (mix.lam * 65536).is_integer()
    if one == other:
        assert mix == UNMIXED


def test_a_mix_depends_on_both_seeds() -> None:
    mixes = {draw_mix(a, b, POLICY) for a in range(20) for b in range(a + 1, 20)}
    assert len(mixes) > 185  # of 190; lam has 65,537 values


def test_the_selection_of_mixed_pairs_is_pinned() -> None:
    """A quarter of the pairs, and exactly these, so that caches replay in every version."""
    policy = ViewPolicy(mix=0.25)
    mixed = [other for other in range(2, 34) if draw_mix(1, other, policy) != UNMIXED]
    assert mixed == [2, 11, 12, 16, 23, 27, 28, 33]
    for other in mixed:
        assert draw_mix(1, other, policy) == draw_mix(1, other, POLICY)


def test_an_own_partner_is_not_mixed() -> None:
    assert draw_mix(5, 5, POLICY) == UNMIXED
    assert Box(0, 0, 0, 0) == UNMIXED.box
    assert UNMIXED.lam == 1.0


@pytest.mark.parametrize(
    ("policy", "kinds"),
    [
        (ViewPolicy(cutmix_alpha=0.0), {False}),
        (ViewPolicy(mixup_alpha=0.0), {True}),
        (ViewPolicy(cutmix_switch=0.0), {False}),
        (ViewPolicy(cutmix_switch=1.0), {True}),
        (POLICY, {False, True}),
    ],
)
def test_only_the_policys_kinds_of_mixing_are_drawn(policy: ViewPolicy, kinds: set[bool]) -> None:
    mixes = [draw_mix(1, other, policy) for other in range(2, 60)]
    assert {mix.cutmix for mix in mixes} == kinds
    assert all(mix.lam < 1.0 for mix in mixes)


def test_an_unclipped_box_has_the_drawn_area() -> None:
    """Sides are floor(size * sqrt(1 - lam)), odd ones too."""
    boxes = [draw_mix(1, other, ViewPolicy(mixup_alpha=0.0)).box for other in range(2, 400)]
    unclipped = [
        box for box in boxes if 0 < box.top < 224 - box.height and 0 < box.left < 224 - box.width
    ]
    assert len(unclipped) > 20
    assert all(box.height == box.width for box in unclipped)
    assert {box.height % 2 for box in unclipped} == {0, 1}
