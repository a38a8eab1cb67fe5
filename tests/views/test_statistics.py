"""Our distributions against those of timm's own transforms.

Every quantity is compared by a two-sample Kolmogorov-Smirnov test (frequencies by their binomial
deviation) at a level of 1e-4, with fixed seeds, so the result is deterministic. The power is tested
too: a small change to each parameter of the policy is detected.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import RandomHorizontalFlip

from cskd_pipeline.views.bits import derive_seed
from cskd_pipeline.views.draw import OPS, ViewParams, draw
from cskd_pipeline.views.mixing import draw_mix
from cskd_pipeline.views.policy import ViewPolicy
from tests.views.test_draw import TIMM_NAMES

POLICY = ViewPolicy()
VIEWS, MIXES = 24_000, 16_000
SIZES = ((500, 375), (375, 500), (160, 600))
KS = math.sqrt(-math.log(1e-4 / 2) / 2)  # times sqrt((n + m) / nm): the level 1e-4
SIGMAS = 3.9  # two-sided, the same level


@dataclass(frozen=True)
class Samples:
    """Values to compare by distribution, and events (count, trials) to compare by frequency."""

    values: dict[str, np.ndarray]
    events: dict[str, tuple[int, int]]


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest gap between two empirical distribution functions."""
    points = np.concatenate([one, other])
    shares = (np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (one, other))
    return float(np.abs(np.subtract(*shares)).max())


def differences(ours: Samples, theirs: Samples) -> list[str]:
    """List the quantities with different distributions."""
    found = []
    for name, mine in ours.values.items():
        other = theirs.values[name]
        assert min(len(mine), len(other)) > 300, name
        gap = distance(mine, other)
        # Crops and erase boxes are integer pixels on both sides. Only our arguments are rounded, to
        # 1/4096, which is negligible next to the width of a distribution.
        if gap > KS * math.sqrt((len(mine) + len(other)) / (len(mine) * len(other))):
            found.append(f"{name}: gap {gap:.3f} of {len(mine)} and {len(other)}")
    for name, (mine, n) in ours.events.items():
        other, m = theirs.events[name]
        share = (mine + other) / (n + m)
        spread = math.sqrt(share * (1 - share) * (1 / n + 1 / m))
        if abs(mine / n - other / m) > SIGMAS * spread:
            found.append(f"{name}: {mine / n:.4f} and {other / m:.4f}")
    return found


@contextmanager
def timms_random_state() -> Iterator[None]:
    """Seed the global random states, which timm reads, and restore them."""
    python, numbers, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(11)
    np.random.seed(12)
    torch.manual_seed(13)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(torchs)


def box_values(kind: str, boxes: np.ndarray, sides: np.ndarray) -> dict[str, np.ndarray]:
    """Return areas, ratios and positions of boxes (n, 4) in images of ``sides`` (n, 2)."""
    top, left, height, width = boxes.T.astype(float)
    room = np.maximum(sides - boxes[:, 2:], 1)
    return {
        f"{kind} area": height * width / sides.prod(axis=1),
        f"{kind} ratio": np.log(width / height),
        f"{kind} top": top / room[:, 0],
        f"{kind} left": left / room[:, 1],
    }


# -- crop and flip ------------------------------------------------------------------------------


@cache
def our_views(policy: ViewPolicy) -> list[tuple[tuple[int, int], ViewParams]]:
    sizes = [SIZES[i % len(SIZES)] for i in range(VIEWS)]
    return [(size, draw(derive_seed("v", i), policy, *size)) for i, size in enumerate(sizes)]


def our_crops(policy: ViewPolicy) -> Samples:
    drawn = our_views(policy)
    boxes = np.array([params.crop for _, params in drawn])
    sides = np.array([size[::-1] for size, _ in drawn])
    values = {}
    for i in range(len(SIZES)):
        values |= box_values(f"crop {SIZES[i]}", boxes[i :: len(SIZES)], sides[i :: len(SIZES)])
    flips = sum(params.flip for _, params in drawn)
    return Samples(values, {"flip": (flips, VIEWS)})


@cache
def timms_crops() -> Samples:
    with timms_random_state():
        transform = RandomResizedCropAndInterpolation(224, interpolation="bicubic")
        values = {}
        for size in SIZES:
            image = Image.new("L", size)
            boxes = np.array(
                [
                    transform.get_params(image, transform.scale, transform.ratio)
                    for _ in range(VIEWS // len(SIZES))
                ]
            )
            values |= box_values(f"crop {size}", boxes, np.tile(size[::-1], (len(boxes), 1)))
        marked = Image.fromarray(np.array([[0, 255]], np.uint8))
        flip = RandomHorizontalFlip(0.5)
        flips = sum(flip(marked).getpixel((0, 0)) == 255 for _ in range(VIEWS))
    return Samples(values, {"flip": (flips, VIEWS)})


# -- RandAugment --------------------------------------------------------------------------------


ENHANCED = ("color", "contrast", "brightness", "sharpness")  # 1 changes nothing
PER_LEVEL = {"rotate": 3.0, "shear_x": 0.03, "shear_y": 0.03, "translate_x": 0.045,
             "translate_y": 0.045} | dict.fromkeys(ENHANCED, 0.09)  # fmt: skip


def operation_samples(applied: list[list[tuple[str, float]]]) -> Samples:
    """Return the samples of every view's operations, in order."""
    values: dict[str, np.ndarray] = {}
    events: dict[str, tuple[int, int]] = {}
    levels = []
    for op in OPS:
        arguments = [value for ops in applied for name, value in ops if name == op]
        values[op] = np.array(arguments)
        if op in PER_LEVEL:
            strength = np.abs(values[op] - (op in ENHANCED)) / PER_LEVEL[op]
            levels.append(strength)
        events[f"{op} occurs"] = (len(arguments), 2 * len(applied))
        firsts = sum(bool(ops) and ops[0][0] == op for ops in applied)
        events[f"{op} is first"] = (firsts, len(applied))
        below = sum(x < (op in ENHANCED) for x in arguments)
        events[f"{op} has a negative sign"] = (below, len(arguments))
    values["level"] = np.concatenate(levels)
    for count in (0, 1, 2):
        events[f"{count} operations"] = (sum(len(ops) == count for ops in applied), len(applied))
    twice = sum(len(ops) == 2 and ops[0][0] == ops[1][0] for ops in applied)
    return Samples(values, events | {"the same twice": (twice, len(applied))})


def our_operations(policy: ViewPolicy) -> Samples:
    return operation_samples([list(params.ops) for _, params in our_views(policy)])


@cache
def timms_operations() -> Samples:
    """Replace timm's operations by ones that record their argument."""
    transform = rand_augment_transform("rand-m9-mstd0.5-inc1", {})
    applied: list[list[tuple[str, float]]] = []

    def recording(name: str) -> Callable[..., object]:
        def record(image: object, argument: float = 0.0, **_: object) -> object:
            applied[-1].append((name, float(argument)))
            return image

        return record

    for op in transform.ops:
        op.aug_fn = recording(next(ours for ours, timms in TIMM_NAMES.items() if timms == op.name))
    with timms_random_state():
        for _ in range(VIEWS):
            applied.append([])
            transform("image")
    return operation_samples(applied)


# -- erasing ------------------------------------------------------------------------------------


def erase_samples(boxes: list[tuple[int, int, int, int]], of: int) -> Samples:
    drawn = np.array(boxes)
    sides = np.full((len(drawn), 2), POLICY.size)
    return Samples(box_values("erase", drawn, sides), {"erase": (len(drawn), of)})


def our_erasing(policy: ViewPolicy) -> Samples:
    return erase_samples([box for _, p in our_views(policy) for box in p.erase], VIEWS)


class _BoxRecorder:
    """A stand-in for a tensor of three channels that records the boxes assigned to."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.boxes: list[tuple[int, int, int, int]] = []

    def size(self) -> tuple[int, int, int]:
        return (3, POLICY.size, POLICY.size)

    def __setitem__(self, index: tuple[slice, slice, slice], _: object) -> None:
        _, rows, columns = index
        height, width = rows.stop - rows.start, columns.stop - columns.start
        self.boxes.append((rows.start, columns.start, height, width))


@cache
def timms_erasing() -> Samples:
    recorder = _BoxRecorder()
    erase = RandomErasing(probability=0.25, mode="const", max_count=1, device="cpu")
    with timms_random_state():
        for _ in range(VIEWS):
            erase(recorder)
    return erase_samples(recorder.boxes, VIEWS)


# -- mixing -------------------------------------------------------------------------------------


def mix_samples(rows: list[tuple[bool, float, tuple[int, int, int, int]]]) -> Samples:
    """Return the samples of (is CutMix, lam, box of CutMix) rows."""
    lam = np.array([lam for cutmix, lam, _ in rows if not cutmix and lam < 1])
    boxes = np.array([box for cutmix, _, box in rows if cutmix])
    drawn = {
        "mixup lam": lam,
        "cutmix lam": np.array([lam for cutmix, lam, _ in rows if cutmix]),
        "cutmix height": boxes[:, 2],
        "cutmix top": boxes[:, 0],
        "cutmix left": boxes[:, 1],
    }
    cut = len(boxes)
    events = {
        "cutmix": (cut, len(rows)),
        "unmixed": (sum(lam == 1.0 and not cutmix for cutmix, lam, _ in rows), len(rows)),
    }
    return Samples(drawn, events)


def our_mixes(policy: ViewPolicy) -> Samples:
    mixes = [draw_mix(derive_seed("m", i), derive_seed("n", i), policy) for i in range(MIXES)]
    return mix_samples([(mix.cutmix, mix.lam, tuple(mix.box)) for mix in mixes])


@cache
def timms_mixes() -> Samples:
    """Draw in timm's mode "pair": one draw per pair, like ours."""
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="pair")
    rows = []
    with timms_random_state():
        for lam, cutmix in zip(*mixup._params_per_elem(MIXES), strict=True):
            box = (0, 0, 0, 0)
            if cutmix:
                (top, bottom, left, right), lam = cutmix_bbox_and_lam((3, 224, 224), lam)
                box = (int(top), int(left), int(bottom - top), int(right - left))
            rows.append((bool(cutmix), float(lam), box))
    return mix_samples(rows)


COMPARED: dict[str, tuple[Callable[[ViewPolicy], Samples], Callable[[], Samples]]] = {
    "crop and flip": (our_crops, timms_crops),
    "operations": (our_operations, timms_operations),
    "erasing": (our_erasing, timms_erasing),
    "mixing": (our_mixes, timms_mixes),
}


@pytest.mark.parametrize("part", COMPARED)
def test_our_draws_are_distributed_like_timms(part: str) -> None:
    ours, theirs = COMPARED[part]
    assert differences(ours(POLICY), theirs()) == []


# Small changes to every parameter, at both ends of each range. (Few of the largest crops fit an
# image of another shape, so the upper end needs a larger change.)
OFF = {
    "low": ViewPolicy(
        crop_area=(0.1, 1.0),
        crop_ratio=(0.77, 4 / 3),
        flip=0.47,
        randaugment_prob=0.48,
        randaugment_magnitude=8.9,
        erase=0.22,
        erase_area=(0.04, 1 / 3),
        erase_ratio=(0.35, 1 / 0.3),
        mixup_alpha=1.0,
        cutmix_switch=0.47,
    ),
    "high": ViewPolicy(
        crop_area=(0.08, 0.8),
        crop_ratio=(3 / 4, 1.29),
        randaugment_std=0.4,
        erase_area=(0.02, 0.3),
        erase_ratio=(0.3, 2.9),
        cutmix_alpha=0.7,
        mix=0.99,
    ),
}


@pytest.mark.parametrize(
    ("off", "part", "quantity"),
    [
        ("low", "crop and flip", "crop (375, 500) area"),
        ("low", "crop and flip", "crop (375, 500) ratio"),
        ("low", "crop and flip", "flip"),
        ("low", "operations", "2 operations"),
        ("low", "operations", "level"),
        ("low", "erasing", "erase"),
        ("low", "erasing", "erase area"),
        ("low", "erasing", "erase ratio"),
        ("low", "mixing", "mixup lam"),
        ("low", "mixing", "cutmix"),
        ("high", "crop and flip", "crop (375, 500) area"),
        ("high", "crop and flip", "crop (375, 500) ratio"),
        ("high", "operations", "level"),
        ("high", "erasing", "erase area"),
        ("high", "erasing", "erase ratio"),
        ("high", "mixing", "cutmix lam"),
        ("high", "mixing", "unmixed"),
    ],
)
def test_a_slightly_different_policy_is_detected(off: str, part: str, quantity: str) -> None:
    ours, theirs = COMPARED[part]
    found = differences(ours(OFF[off]), theirs())
    assert any(line.startswith(f"{quantity}: ") for line in found), found
