"""The policy's fields: validated together, preserved in JSON, all included in the digest."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from cskd_pipeline.errors import RecipeError
from cskd_pipeline.views.policy import ViewPolicy

OTHER: dict[str, object] = {
    "size": 192,
    "crop_area": (0.2, 1.0),
    "crop_ratio": (0.5, 2.0),
    "flip": 0.4,
    "randaugment_ops": 1,
    "randaugment_prob": 0.6,
    "randaugment_magnitude": 7.0,
    "randaugment_std": 0.0,
    "erase": 0.0,
    "erase_area": (0.02, 0.2),
    "erase_ratio": (0.5, 2.0),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "mix": 0.5,
    "mixup_alpha": 0.2,
    "cutmix_alpha": 0.0,
    "cutmix_switch": 0.7,
    "window": 32,
    "repeats": 1,
}


def test_every_field_is_in_the_digest_and_in_the_difference() -> None:
    policy = ViewPolicy()
    assert set(OTHER) == {field.name for field in fields(ViewPolicy)} - {"version"}
    digests = {replace(policy, **{name: value}).digest() for name, value in OTHER.items()}
    assert len(digests | {policy.digest()}) == len(OTHER) + 1
    for name, value in OTHER.items():
        (line,) = policy.difference(replace(policy, **{name: value}))
        assert line.startswith(f"{name}: ")
    assert policy.difference(ViewPolicy()) == []


def test_a_policy_survives_json_with_its_digest() -> None:
    for policy in (ViewPolicy(), ViewPolicy(**OTHER)):
        again = ViewPolicy.from_json(json.loads(json.dumps(policy.to_json())))
        assert again == policy
        assert again.digest() == policy.digest()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", "deit-v0"),
        ("size", 7),
        ("flip", 1.01),
        ("randaugment_prob", -0.1),
        ("erase", 2.0),
        ("mix", -1.0),
        ("cutmix_switch", 1.5),
        ("crop_area", (0.0, 1.0)),
        ("crop_area", (0.5, 1.1)),
        ("erase_area", (0.4, 0.3)),
        ("crop_ratio", (2.0, 0.5)),
        ("erase_ratio", (-1.0, 1.0)),
        ("randaugment_ops", -1),
        ("randaugment_magnitude", 10.5),
        ("randaugment_std", -0.5),
        ("mixup_alpha", -0.1),
        ("window", 1),
        ("repeats", 0),
        ("std", (0.2, 0.0, 0.2)),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RecipeError) as caught:
        ViewPolicy(**{field: value})
    assert field in str(caught.value.found)


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(RecipeError) as caught:
        ViewPolicy(size=1, flip=3.0, mixup_alpha=0.0, cutmix_alpha=0.0)
    found = str(caught.value.found)
    assert all(name in found for name in ("size", "flip", "mixup_alpha or cutmix_alpha"))
    assert ViewPolicy(mix=0.0, mixup_alpha=0.0, cutmix_alpha=0.0).mixes is False


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown"):
        ViewPolicy.from_json({"size": 224, "colour_jitter": 0.3})
