"""Rendering equals torchvision's and timm's own steps; erasing and mixing equal their formulas."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from timm.data.auto_augment import NAME_TO_OP
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from cskd_pipeline.views.apply import digest, erase_noise, mix_pixels, render, to_float
from cskd_pipeline.views.bits import BitStream
from cskd_pipeline.views.draw import Box, ViewParams, draw
from cskd_pipeline.views.mixing import NO_BOX, UNMIXED, Mix
from cskd_pipeline.views.policy import ViewPolicy
from tests.views.factories import noise, scene
from tests.views.test_draw import TIMM_NAMES

POLICY = ViewPolicy()
MEAN, STD = np.array(POLICY.mean, np.float32), np.array(POLICY.std, np.float32)


def by_timm(image, params: ViewParams, policy: ViewPolicy) -> np.ndarray:
    """Apply timm's training transform with given random choices, up to uint8."""
    view = tv.resized_crop(
        image, *params.crop, [policy.size, policy.size], InterpolationMode.BICUBIC
    )
    if params.flip:
        view = tv.hflip(view)
    for name, value in params.ops:
        argument = int(value) if name in ("posterize", "solarize", "solarize_add") else value
        given = () if name in ("auto_contrast", "equalize", "invert") else (argument,)
        fill = tuple(min(255, round(255 * x)) for x in policy.mean)
        view = NAME_TO_OP[TIMM_NAMES[name]](view, *given, fillcolor=fill, resample=3)
    return np.asarray(view)


@pytest.mark.parametrize("size", [(500, 375), (60, 333), (224, 224), (9, 7), (1, 1)])
@pytest.mark.parametrize("policy", [POLICY, ViewPolicy(size=65, mean=(0.1, 0.9, 0.5))])
def test_a_view_has_the_pixels_of_timms_transform(
    size: tuple[int, int], policy: ViewPolicy
) -> None:
    image = scene(*size)
    before = image.tobytes()
    for seed in range(8):
        params = draw(seed, policy, *size)
        found = render(np.asarray(image), params, policy)
        assert np.array_equal(found, by_timm(image, params, policy)), params
        assert found.dtype == np.uint8
        assert found.shape == (policy.size, policy.size, 3)
        assert found.flags.c_contiguous
        assert found.flags.writeable
    assert image.tobytes() == before


def test_operations_follow_the_flip_in_their_order() -> None:
    image, crop = noise(40, 40), Box(2, 3, 30, 31)
    policy = ViewPolicy(size=32)
    ops = (("translate_x", 0.25), ("solarize", 100.0), ("equalize", 0.0))
    views = [
        render(np.asarray(image), ViewParams(crop, flip, order, (), 0), policy).tobytes()
        for flip in (False, True)
        for order in (ops, ops[::-1], ops[:2])
    ]
    assert len(set(views)) == len(views)
    for flip in (False, True):
        params = ViewParams(crop, flip, ops, (), 0)
        found = render(np.asarray(image), params, policy)
        assert np.array_equal(found, by_timm(image, params, policy))


def test_the_digest_is_the_crc32_of_all_pixels() -> None:
    pixels = np.asarray(noise(8, 8)).copy()
    original = digest(pixels)
    assert original == zlib.crc32(pixels.tobytes())
    for index in np.ndindex(pixels.shape):
        changed = pixels.copy()
        changed[index] ^= 1
        assert digest(changed) != original
    assert digest(pixels.swapaxes(0, 1).copy()) != original


def params_with(*boxes: Box, noise_seed: int = 77) -> ViewParams:
    return ViewParams(Box(0, 0, 32, 32), False, (), boxes, noise_seed)


def test_noise_is_one_stream_box_after_box() -> None:
    boxes = (Box(1, 2, 3, 4), Box(20, 20, 5, 1))
    z = erase_noise(params_with(*boxes))
    assert z.dtype == np.int16
    assert np.array_equal(z, BitStream(77).normals(3 * (12 + 5)))
    assert np.array_equal(erase_noise(params_with(boxes[0])), z[:36])
    assert not np.array_equal(erase_noise(params_with(boxes[0], noise_seed=78)), z[:36])
    assert erase_noise(params_with()).shape == (0,)
    assert erase_noise(params_with()).dtype == np.int16


def test_an_erased_pixel_is_mean_plus_std_times_z_and_no_other_is_touched() -> None:
    policy = ViewPolicy(size=32)
    pixels = np.asarray(noise(32, 32))
    params = params_with(Box(1, 2, 3, 4), Box(20, 20, 5, 1))
    found = to_float(pixels, params, policy)
    assert found.dtype == np.float32
    expected = pixels / 255
    z = erase_noise(params) / 256
    expected[1:4, 2:6] = MEAN + STD * z[:36].reshape(3, 4, 3)
    expected[20:25, 20:21] = MEAN + STD * z[36:].reshape(5, 1, 3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    untouched = np.ones((32, 32), bool)
    untouched[1:4, 2:6] = untouched[20:25, 20:21] = False
    plain = to_float(pixels, params_with(), policy)
    assert np.array_equal(found[untouched], plain[untouched])
    assert np.array_equal(plain, pixels.astype(np.float32) / np.float32(255))


def test_cutmix_replaces_the_box_by_the_partners_pixels() -> None:
    own, partner = (np.asarray(noise(32, 32, i)).astype(np.float32) for i in (0, 1))
    kept = own.copy()
    mixed = mix_pixels(own, partner, Mix(True, 0.9, Box(4, 20, 10, 12)))
    inside = np.zeros((32, 32), bool)
    inside[4:14, 20:32] = True
    assert np.array_equal(mixed[inside], partner[inside])
    assert np.array_equal(mixed[~inside], own[~inside])
    assert np.array_equal(own, kept)
    assert np.array_equal(mix_pixels(own, partner, Mix(True, 1.0, NO_BOX)), own)


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.7, 1.0])
def test_mixup_is_a_mean_with_weight_lam_for_own_pixels(lam: float) -> None:
    own, partner = (np.asarray(noise(16, 16, i)).astype(np.float32) / 255 for i in (0, 1))
    mixed = mix_pixels(own, partner, Mix(False, lam, NO_BOX))
    assert mixed.dtype == np.float32
    np.testing.assert_allclose(mixed, own * lam + partner * (1 - lam), rtol=0, atol=1e-6)
    both = mixed + mix_pixels(partner, own, Mix(False, lam, NO_BOX))
    np.testing.assert_allclose(both, own + partner, rtol=0, atol=1e-6)


def test_an_unmixed_view_is_unchanged() -> None:
    own, partner = (np.asarray(noise(16, 16, i)).astype(np.float32) for i in (0, 1))
    assert np.array_equal(mix_pixels(own, partner, UNMIXED), own)
