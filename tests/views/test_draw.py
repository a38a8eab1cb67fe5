"""Draws stay within the image and the view and depend on the seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms import RandomResizedCropAndInterpolation

from cskd_pipeline.views.draw import ARGUMENT_UNITS, OPS, Box, argument, draw
from cskd_pipeline.views.policy import ViewPolicy

POLICY = ViewPolicy()
TIMM_NAMES = {
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}
LEVELS = [level / 64 for level in range(641)]
SEEDS = st.integers(0, 2**64 - 1)
SIDES = st.integers(1, 3000)


@pytest.fixture(autouse=True)
def _timms_random_state() -> Iterator[None]:
    state = random.getstate()
    random.seed(1)
    yield
    random.setstate(state)


def within(box: Box, width: int, height: int) -> bool:
    return (
        box.top >= 0
        and box.left >= 0
        and box.height > 0
        and box.width > 0
        and box.top + box.height <= height
        and box.left + box.width <= width
    )


@settings(max_examples=300, deadline=None)
@given(seed=SEEDS, width=SIDES, height=SIDES, size=st.integers(8, 512))
def test_every_draw_fits_the_image_and_the_view(
    seed: int, width: int, height: int, size: int
) -> None:
    policy = ViewPolicy(size=size, erase=1.0, randaugment_prob=1.0)
    params = draw(seed, policy, width, height)
    assert within(params.crop, width, height)
    assert all(within(box, size, size) for box in params.erase)
    assert len(params.erase) <= 1
    assert 0 <= params.noise_seed < 2**64
    assert len(params.ops) == 2
    assert {name for name, _ in params.ops} <= set(OPS)
    assert params == draw(seed, policy, width, height)


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS)
def test_only_the_crop_depends_on_the_images_size(seed: int) -> None:
    """If the crop's first attempt succeeds, as for small areas of a square."""
    policy = ViewPolicy(crop_area=(0.08, 0.5))
    small, large = draw(seed, policy, 50, 50), draw(seed, policy, 1000, 1000)
    assert replace(small, crop=large.crop) == large


def test_probabilities_0_and_1_are_never_and_always() -> None:
    never = ViewPolicy(flip=0.0, randaugment_prob=0.0, erase=0.0)
    always = ViewPolicy(flip=1.0, randaugment_prob=1.0, erase=1.0, randaugment_ops=3)
    for seed in range(200):
        params = draw(seed, never, 90, 80)
        assert (params.flip, params.ops, params.erase) == (False, (), ())
        params = draw(seed, always, 90, 80)
        assert (params.flip, len(params.ops), len(params.erase)) == (True, 3, 1)
    assert draw(1, ViewPolicy(randaugment_ops=0), 90, 80).ops == ()


def test_the_crop_can_be_the_full_image() -> None:
    policy = ViewPolicy(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    assert draw(3, policy, 70, 70).crop == Box(0, 0, 70, 70)


@pytest.mark.parametrize(
    "size", [(2000, 20), (20, 2000), (1000, 7), (7, 1000), (3, 300), (640, 48), (1, 90)]
)
def test_strips_get_timms_central_crop(size: tuple[int, int]) -> None:
    """No crop of the drawn area and ratio fits, so both use the same fallback."""
    policy = ViewPolicy(crop_area=(0.9, 1.0))
    top, left, height, width = RandomResizedCropAndInterpolation.get_params(
        Image.new("L", size), policy.crop_area, policy.crop_ratio
    )
    crop = draw(1, policy, *size).crop
    assert crop == Box(top, left, height, width) if min(size) > 1 else within(crop, *size)


def test_the_operations_are_timms_increasing_set() -> None:
    transform = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {})
    assert [TIMM_NAMES[name] for name in OPS] == [op.name for op in transform.ops]
    assert transform.num_layers == POLICY.randaugment_ops
    assert {op.prob for op in transform.ops} == {POLICY.randaugment_prob}
    assert {op.magnitude for op in transform.ops} == {POLICY.randaugment_magnitude}
    assert {op.magnitude_std for op in transform.ops} == {POLICY.randaugment_std}


@pytest.mark.parametrize("op", OPS)
def test_arguments_are_timms_at_every_level_rounded_to_the_grid(op: str) -> None:
    """Integers equal; others within half of 1/4096, in both directions."""
    level_to_argument = auto_augment.LEVEL_TO_ARG[TIMM_NAMES[op]]
    for level in LEVELS:
        ours = {argument(op, level, sign) for sign in (-1.0, 1.0)}
        if level_to_argument is None:
            assert ours == {0.0}
            continue
        theirs = {level_to_argument(level, {})[0] for _ in range(20)}  # random sign
        if all(isinstance(value, int) for value in theirs):
            assert ours == theirs
        else:
            for value in theirs:
                assert min(abs(value - x) for x in ours) <= 0.5 / ARGUMENT_UNITS + 1e-12
            assert len(ours) in (len(theirs), 1)


@pytest.mark.parametrize("op", OPS)
def test_arguments_are_on_the_grid_on_which_pillow_is_exact(op: str) -> None:
    for level in LEVELS:
        for sign in (-1.0, 1.0):
            value = argument(op, level, sign)
            assert (value * ARGUMENT_UNITS).is_integer()
            assert str(value) != "-0.0"  # differs from 0.0 in JSON
