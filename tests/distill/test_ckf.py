"""CKF labels and the envelope, against exact rational arithmetic."""

from __future__ import annotations

import json
import math
import zlib
from fractions import Fraction
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cskd_pipeline.config.sections import TrainRecipe, key_types
from cskd_pipeline.distill import ckf
from cskd_pipeline.errors import RecipeError, TeacherError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "distill.json").read_text())
N = 65535
TINY = 2.0**-24  # the smallest float16
SPECIAL = [
    0.0,
    -0.0,
    TINY,
    -TINY,
    2 * TINY,
    2.0**-14,
    1.0,
    -1.0,
    1.0009765625,
    65504.0,
    -65504.0,
    65472.0,
]


def exact_label(d: np.ndarray, g: np.ndarray, r: Fraction) -> int:
    """The label at one location by the definition, in rationals."""

    def rank(k: int) -> tuple[Fraction, float, float, int]:
        dk, gk = Fraction(float(d[k])), Fraction(float(g[k]))
        return r * dk + (1 - r) * gk, float(g[k]), float(d[k]), -k

    return max(range(len(d)), key=rank)


def crossing(d: np.ndarray, g: np.ndarray, one: int, other: int) -> Fraction:
    """The r at which two lines meet."""
    fall = Fraction(float(g[one])) - Fraction(float(g[other]))
    rise = Fraction(float(d[other])) - Fraction(float(d[one]))
    return fall / (fall + rise)


def nearest(r: float) -> Fraction:
    """The multiple of 1/N nearest to r, the lower of two."""
    below = Fraction(math.floor(Fraction(r) * N), N)
    return below if Fraction(r) - below <= Fraction(1, 2 * N) else below + Fraction(1, N)


def tensors(d: np.ndarray, g: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample with one location."""
    return torch.from_numpy(d.copy()).view(1, -1, 1, 1), torch.from_numpy(g.copy()).view(1, -1)


def check(d: np.ndarray, g: np.ndarray, ratios: list[float]) -> list[int]:
    """Check all claims about one location; return its planes as a list."""
    spatial, global_ = tensors(d, g)
    planes = ckf.upper_envelope(spatial, global_)
    listed = planes.flatten().tolist()
    classes, crossings = listed[0::2], listed[1::2]
    assert crossings == sorted(set(crossings)), "crossings rise"
    assert all(0 <= c < len(d) for c in classes)
    assert all(0 <= q < N for q in crossings)
    # at, just before and just after every crossing
    edges = [q + step for q in crossings for step in (0.0, 0.5, 0.5 + 1e-9, 1.0, 1.5)]
    for r in [0.0, 1.0, *ratios, *(min(edge / N, 1.0) for edge in edges)]:
        label = ckf.envelope_labels(planes, r).item()
        assert label == ckf.hard_labels(spatial, global_, r).item()
        assert label == exact_label(d, g, nearest(r))
        at_r = exact_label(d, g, Fraction(r))
        if label != at_r:  # then these two lines cross between r and the multiple
            assert 0.0 < r < 1.0
            assert abs(crossing(d, g, label, at_r) - Fraction(r)) <= Fraction(1, 2 * N)
    return listed


def half(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float16)


finite_half = (
    st.integers(0, 0xFFFF).map(lambda bits: np.uint16(bits).view(np.float16)).filter(np.isfinite)
)
logit = st.one_of(
    st.sampled_from(SPECIAL),
    st.integers(-3, 3).map(float),
    finite_half.map(float),
    st.floats(-20, 20, width=16),
)
ratio = st.one_of(
    st.floats(0.0, 1.0),
    st.integers(0, N).map(lambda t: t / N),
    st.integers(0, N - 1).map(lambda q: (q + 0.5) / N),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(logit, logit), min_size=2, max_size=9), st.lists(ratio, max_size=4))
@example([(-65504.0, 65000.0), (0.0, TINY), (TINY, 0.0)], [0.49805, 0.499, 0.5])  # floats would tie
@example([(-65000.0, 65504.0), (0.0, TINY), (TINY, 0.0)], [0.5])
# one float32 rounding away from falling below the chord of the first and the last line
@example(
    [
        (-38304.0, 50976.0),
        (0.000957489013671875, -0.0036106109619140625),
        (0.00384521484375, -0.009185791015625),
    ],
    [0.6],
)
@example([(1.0, 0.0)] * 4, [])  # identical lines
@example([(1.0, 2.0), (2.0, 3.0), (3.0, 4.0)], [0.3])  # equal slopes
@example([(0.0, 1.0), (1.0, 0.0), (0.5, 0.5)], [0.5])  # three lines in one point
@example([(1.0, 1.0), (1.0, 0.0)], [0.999999])  # a tie at r = 1 only
@example([(0.0, 1.0), (1.0, 1.0)], [1e-9])  # a tie at r = 0 only
def test_envelope_labels_are_the_exact_fused_argmax_for_any_float16(
    lines: list[tuple[float, float]], ratios: list[float]
) -> None:
    check(half([line[0] for line in lines]), half([line[1] for line in lines]), ratios)


def draw_logits(kind: str, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    if kind == "bits":  # any finite float16
        d, g = rng.integers(0, 0x10000, (2, classes)).astype(np.uint16).view(np.float16)
        return np.where(np.isfinite(d), d, 0).astype(np.float16), np.where(
            np.isfinite(g), g, 0
        ).astype(np.float16)
    if kind == "levels":  # ties everywhere
        d, g = rng.integers(-4, 5, (2, classes)) / 4
    elif kind == "mirror":  # sums nearly constant: crossings crowd around one half
        d = rng.normal(size=classes)
        g = -d + rng.integers(-2, 3, classes) * 2.0**-9
    elif kind == "subnormal":
        d, g = rng.integers(-9, 10, (2, classes)) * TINY
    elif kind == "circle":  # many lines on the envelope
        angle = rng.uniform(0, math.pi / 2, classes)
        d, g = 30 * np.sin(angle), 30 * np.cos(angle)
    else:  # like a network's
        d, g = rng.normal(0, 2, (2, classes))
    return d.astype(np.float16), g.astype(np.float16)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["bits", "levels", "mirror", "subnormal", "circle", "normal"]),
    st.sampled_from([2, 3, 10, 100, 1000]),
    st.integers(0, 2**32 - 1),
    ratio,
)
def test_envelope_labels_are_exact_for_up_to_a_thousand_classes(
    kind: str, classes: int, seed: int, r: float
) -> None:
    d, g = draw_logits(kind, classes, seed)
    spatial, global_ = tensors(d, g)
    planes = ckf.upper_envelope(spatial, global_)
    crossings = planes[0, 1::2].flatten().tolist()[:3]
    units = [
        (int(Fraction(float(a)) * 2**24), int(Fraction(float(b)) * 2**24))
        for a, b in zip(d, g, strict=True)
    ]
    for t in {0, N, int(nearest(r) * N), *crossings, *(q + 1 for q in crossings)}:
        best = max(
            range(classes),
            key=lambda k, t=t: (t * units[k][0] + (N - t) * units[k][1], units[k][::-1], -k),
        )
        assert ckf.hard_labels(spatial, global_, t / N).item() == best
        assert ckf.envelope_labels(planes, t / N).item() == best


def convex_chain(largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (g, d) in convex position, exact in float16: every line is on the envelope."""
    edges = [
        (a, b)
        for a in range(1, largest)
        for b in range(1, largest)
        if math.gcd(a, b) == 1 and a + b <= largest
    ]
    edges.sort(key=lambda edge: Fraction(edge[0], edge[1]))
    g = 2048 - np.cumsum([0, *(a for a, _ in edges)])
    d = -2048 + np.cumsum([0, *(b for _, b in edges)])
    assert g.min() >= -2048
    assert d.max() <= 2048
    return d.astype(np.float16), g.astype(np.float16)


def test_every_class_is_listed_if_every_line_is_on_the_envelope() -> None:
    d, g = convex_chain(30)
    shuffle = np.random.default_rng(0).permutation(len(d))
    planes = ckf.upper_envelope(*tensors(d[shuffle], g[shuffle])).flatten().tolist()
    assert len(d) > 250
    assert [shuffle[c] for c in planes[0::2]] == list(range(len(d)))
    meetings = [crossing(d, g, k, k + 1) for k in range(len(d) - 1)]
    assert planes[1::2] == [math.floor(meeting * N) for meeting in meetings]


@pytest.mark.parametrize("classes", [2, 10, 46])
def test_tangents_to_a_parabola_all_appear_at_their_own_crossings(classes: int) -> None:
    # tangents of (45 r)^2 at 45 r = p: p (90 r - p); neighbours meet at 45 r = p + 1/2
    p = np.arange(classes)
    listed = check((90 * p - p * p).astype(np.float16), (-p * p).astype(np.float16), [])
    assert listed[0::2] == list(range(classes))
    assert listed[1::2] == [math.floor(Fraction(2 * q + 1, 90) * N) for q in range(classes - 1)]


def test_a_class_between_two_crossings_of_one_quantum_is_not_listed() -> None:
    # class 1 is on top for 2**-42 of r just below one half
    d, g = half([-65504.0, 0.0, TINY]), half([65504.0, TINY, 0.0])
    assert exact_label(d, g, Fraction(1, 2) - Fraction(1, 2**43)) == 1
    assert check(d, g, [0.5])[0::2] == [0, 2]


@pytest.mark.parametrize(
    ("spatial", "global_", "at_zero", "at_one"),
    [
        ([1, 1, 1], [0, 2, 2], 1, 1),  # at r = 1 all tie: larger g, then the lower index
        ([1, 3, 3], [2, 2, 2], 1, 1),  # at r = 0 all tie: larger d, then the lower index
        ([5, 5, 0], [1, 0, 9], 2, 0),  # moves to the line that also wins the tie at r = 1
        ([5, 5, 5], [1, 2, 3], 2, 2),  # never moves to a line that only ties at r = 1
        ([5, 5, 4.996], [1, 2, 60000], 2, 1),  # two take over in the last quantum and tie at r = 1
    ],
)
def test_ties_go_to_the_larger_global_then_spatial_logit_then_lower_index(
    spatial: list[float], global_: list[float], at_zero: int, at_one: int
) -> None:
    d, g = half(spatial), half(global_)
    check(d, g, [0.5])
    planes = ckf.upper_envelope(*tensors(d, g))
    assert ckf.envelope_labels(planes, 0.0).item() == at_zero
    assert ckf.envelope_labels(planes, 1.0).item() == at_one


def random_response(
    seed: int, shape: tuple[int, int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spatial = torch.randn(shape, generator=generator).half()
    return spatial, spatial.float().mean((2, 3)).half()


def test_batches_of_maps_equal_their_locations_one_by_one() -> None:
    spatial, global_ = random_response(0, (3, 20, 2, 5))
    planes = ckf.upper_envelope(spatial, global_)
    assert planes.dtype == torch.uint16
    assert planes.shape[0:1] + planes.shape[2:] == (3, 2, 5)
    for b, y, x in np.ndindex(3, 2, 5):
        alone = ckf.upper_envelope(spatial[b : b + 1, :, y : y + 1, x : x + 1], global_[b : b + 1])
        ours = planes[b, :, y, x].tolist()
        assert ours[: alone.shape[1]] == alone.flatten().tolist()
        assert set(ours[alone.shape[1] :]) <= {ckf.UNUSED}
        for r in (0.0, 0.2, 0.61, 1.0):
            at_r = exact_label(spatial[b, :, y, x].numpy(), global_[b].numpy(), nearest(r))
            assert ckf.hard_labels(spatial, global_, r)[b, y, x] == at_r


@pytest.mark.parametrize("chunk", [50 * 9 * 2, 1])  # two samples; less than one
def test_a_batch_in_pieces_has_the_planes_of_the_full_batch(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    spatial, global_ = random_response(1, (5, 50, 3, 3))
    spatial[:2] = global_[:2, :, None, None]  # one line each
    full, labels = ckf.upper_envelope(spatial, global_), ckf.hard_labels(spatial, global_, 0.6)
    assert full.shape[1] > 1
    monkeypatch.setattr(ckf, "_CHUNK", chunk)
    assert torch.equal(ckf.upper_envelope(spatial, global_).int(), full.int())
    assert torch.equal(ckf.hard_labels(spatial, global_, 0.6), labels)


def test_unused_planes_may_follow_or_be_cut_off() -> None:
    spatial, global_ = random_response(2, (4, 30, 3, 3))
    planes = ckf.upper_envelope(spatial, global_)
    padded = torch.full((4, 59, 3, 3), ckf.UNUSED, dtype=torch.int32)
    padded[:, : planes.shape[1]] = planes.int()
    for r in (0.0, 0.3, 0.99, 1.0):
        expected = ckf.hard_labels(spatial, global_, r)
        assert torch.equal(ckf.envelope_labels(padded.to(torch.uint16), r), expected)


def test_the_label_of_65535_classes_fits() -> None:
    spatial = torch.zeros(1, 65535, 1, 1, dtype=torch.float16)
    global_ = torch.zeros(1, 65535, dtype=torch.float16)
    global_[0, 0], spatial[0, 65534] = 1.0, 1.0
    planes = ckf.upper_envelope(spatial, global_)
    assert planes.flatten().tolist() == [0, 32767, 65534]
    assert ckf.envelope_labels(planes, 1.0).item() == 65534


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["spatial", "global"])
def test_nan_and_infinite_logits_are_refused(bad: float, where: str) -> None:
    spatial, global_ = random_response(3, (2, 6, 2, 2))
    (spatial if where == "spatial" else global_).view(-1)[7] = bad
    with pytest.raises(TeacherError, match="NaN or infinite"):
        ckf.upper_envelope(spatial, global_)


def test_large_opposite_infinities_do_not_pass_as_finite() -> None:
    assert not ckf.all_finite(torch.tensor([math.inf, -math.inf]).half())
    assert ckf.all_finite(torch.full((100_000,), 65504.0).half())


def test_labels_never_wait_for_the_device() -> None:
    # a meta tensor has no values, so reading one would raise
    spatial = torch.empty(2, 9, 3, 3, dtype=torch.float16, device="meta")
    global_ = torch.empty(2, 9, dtype=torch.float16, device="meta")
    planes = torch.empty(2, 15, 3, 3, dtype=torch.uint16, device="meta")
    assert ckf.hard_labels(spatial, global_, 0.5).shape == (2, 3, 3)
    assert ckf.envelope_labels(planes, 0.5).shape == (2, 3, 3)


def test_the_planes_of_a_fixed_response_never_change() -> None:
    # logits from a congruential sequence, independent of torch's generators and reductions
    values = torch.arange(2 * 100 * 10) * 7919 % 2003 - 1001
    spatial, global_ = (values / 128).half().split([1800, 200])
    planes = ckf.upper_envelope(spatial.view(2, 100, 3, 3), global_.view(2, 100)).numpy()
    assert list(planes.shape) == GOLDEN["envelope_shape"]
    assert zlib.crc32(planes.astype("<u2").tobytes()) == GOLDEN["envelope_crc32"]


def test_the_papers_schedules_fall_from_one_to_zero_as_published() -> None:
    for schedule, middle in (("linear", 0.5), ("x2", 0.25), ("cos", math.sqrt(0.5))):
        assert ckf.ckf_ratio(schedule, 0.0) == 1.0
        assert ckf.ckf_ratio(schedule, 0.5) == pytest.approx(middle, abs=1e-15)
        assert ckf.ckf_ratio(schedule, 1.0) == pytest.approx(0.0, abs=1e-15)
    assert ckf.ckf_ratio("cos", 1 / 3) == pytest.approx(math.sqrt(3) / 2)


def test_a_schedule_may_be_a_users_own_function_of_progress() -> None:
    assert ckf.ckf_ratio(lambda t: 1 - t**3, 0.5) == 0.875
    for ratio in (-0.01, 1.01, math.nan):
        with pytest.raises(RecipeError, match="CKF schedule is out of range") as caught:
            ckf.ckf_ratio(lambda t, ratio=ratio: ratio, 0.25)
        assert caught.value.where == "schedule(0.25)"
    with pytest.raises(RecipeError, match="progress is out of range"):
        ckf.ckf_ratio("linear", 1.01)


@pytest.mark.parametrize("r", [-0.01, 1.01, math.nan])
def test_a_ratio_outside_the_unit_interval_is_refused_wherever_it_is_used(r: float) -> None:
    spatial, global_ = random_response(4, (2, 5, 3, 2))
    planes = ckf.upper_envelope(spatial, global_)
    for use in (
        lambda: ckf.fuse(spatial, global_, r),
        lambda: ckf.hard_labels(spatial, global_, r),
        lambda: ckf.envelope_labels(planes, r),
    ):
        with pytest.raises(RecipeError, match="the CKF ratio is out of range") as caught:
            use()
        assert caught.value.found is r


def test_the_ends_of_the_fusion_are_schedules_too() -> None:
    """The ablations: ``spatial`` is r = 1 and ``global`` is r = 0 at any progress."""
    for progress in (0.0, 0.3, 1.0):
        assert ckf.ckf_ratio("spatial", progress) == 1.0
        assert ckf.ckf_ratio("global", progress) == 0.0
    spatial, global_ = random_response(5, (2, 7, 3, 3))
    alone = ckf.hard_labels(spatial, global_, ckf.ckf_ratio("spatial", 0.5))
    assert torch.equal(alone, spatial.float().argmax(dim=1))
    alike = ckf.hard_labels(spatial, global_, ckf.ckf_ratio("global", 0.5))
    assert torch.equal(alike, ckf.hard_global_labels(global_)[:, None, None].expand(2, 3, 3))


def test_recipes_know_every_schedule() -> None:
    assert get_args(key_types(TrainRecipe)["distill.schedule"]) == tuple(ckf.SCHEDULES)


def test_an_unknown_schedule_is_named_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="cubic") as caught:
        ckf.ckf_ratio("cubic", 0.5)
    assert "linear, x2, cos, spatial, global" in str(caught.value)


def test_fused_logits_are_the_weighted_mean_in_float32() -> None:
    spatial, global_ = random_response(4, (2, 5, 3, 2))
    d, g = spatial.numpy().astype(np.float64), global_.numpy().astype(np.float64)[:, :, None, None]
    fused = ckf.fuse(spatial, global_, 0.3)
    assert fused.dtype == torch.float32
    np.testing.assert_allclose(fused.numpy(), 0.3 * d + 0.7 * g, rtol=1e-6, atol=1e-6)


def test_the_global_label_is_the_first_of_the_largest() -> None:
    global_ = torch.tensor([[1, 3, 3, 2], [0, 0, 0, 0]], dtype=torch.float16)
    assert ckf.hard_global_labels(global_).tolist() == [1, 0]


def test_few_of_many_lines_are_candidates() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4, 1, 1000, generator=generator)  # shared by all locations
    d = (1.2 * image + torch.randn(4, 49, 1000, generator=generator)).half().float()
    g = d.mean(dim=1, keepdim=True).half().float().expand_as(d)
    assert ckf._candidates(d, g).shape[:2] == (3, 4 * 49)
    assert ckf._candidates(d, g).shape[2] < 60
    assert ckf._candidates(torch.ones(1, 2, 1000), torch.ones(1, 2, 1000)).shape[2] == 1
