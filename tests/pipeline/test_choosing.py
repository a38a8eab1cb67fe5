"""The choice of the encoding that a run reads its targets from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cskd_pipeline import Cache
from cskd_pipeline.config.reading import load_recipe
from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.distill.encodings import ENCODINGS, Sampled
from cskd_pipeline.distill.encodings.base import ResponseShape
from cskd_pipeline.errors import CacheError
from cskd_pipeline.pipeline.from_recipe import make_loss

SHAPE = ResponseShape(1000, 7, 7)  # ImageNet's: with few classes all encodings have similar sizes


def make_cache(names: list[str]) -> Any:
    encodings = {name: ENCODINGS[name] for name in names}
    cache: Any = SimpleNamespace(path=Path("cache"), encodings=encodings, shape=SHAPE)
    cache.serving = partial(Cache.serving, cache)
    cache.choose = partial(Cache.choose, cache)
    return cache


def choose(names: list[str], sets: list[str]) -> str:
    recipe = load_recipe(TrainRecipe, None, [f"distill.{key}" for key in sets])
    loss, name = make_loss(recipe.distill), recipe.distill.encoding
    kinds, tau = set(loss.kinds.values()), loss.temperature
    results = {make_cache(n).choose(kinds, tau, name) for n in (names, names[::-1])}
    assert len(results) == 1, "the order in the manifest must not matter"
    return results.pop()


SOFT = ["global_kind=soft", "spatial_kind=soft"]
ALL = ["dense", "dense-q8", "topk", "envelope"]


@pytest.mark.parametrize(
    ("names", "sets", "expected"),
    [
        (ALL, [], "envelope"),
        (["dense", "dense-q8", "topk"], [], "dense"),
        (ALL, SOFT, "dense"),
        (["dense-q8", "topk", "envelope"], SOFT, "dense-q8"),
        (["dense-q8", "topk"], [*SOFT, "temperature=4.0"], "dense-q8"),
        (["topk", "envelope"], SOFT, "topk"),
        (ALL, ["spatial_kind=soft"], "dense"),
        (ALL, ["global_kind=soft"], "dense"),
        (ALL, ["method=deit"], "envelope"),
        (ALL, ["method=deit", "spatial_kind=soft"], "envelope"),  # deit has no spatial term
        (["dense-q8", "envelope"], ["method=deit", "global_kind=soft"], "dense-q8"),
        (["sampled", "envelope"], SOFT, "sampled"),
        (["sampled", "envelope"], [], "envelope"),
        (["sampled", "topk"], SOFT, "topk"),
        (["sampled", "topk"], [*SOFT, "encoding=sampled"], "sampled"),
        (["sampled", "topk"], [*SOFT, "temperature=2.0"], "topk"),
    ],
)
def test_auto_is_the_smallest_exact_encoding_else_the_closest_approximation(
    names: list[str], sets: list[str], expected: str
) -> None:
    assert choose(names, sets) == expected


@pytest.mark.parametrize(
    ("names", "sets", "message"),
    [
        (["dense-q8", "topk"], [], "does not support hard targets"),
        (["topk"], [*SOFT, "temperature=0.5"], "does not support soft targets at temperature 0.5"),
        (
            ["dense-q8", "topk", "envelope"],
            ["spatial_kind=soft"],
            "does not support hard targets and soft targets at temperature 1",
        ),
        (["dense", "envelope"], [*SOFT, "encoding=envelope"], "does not support soft targets"),
        (["dense"], ["encoding=envelope"], "has no encoding envelope"),
        (["sampled"], [*SOFT, "temperature=2.0"], "does not support soft targets at temperature 2"),
        (["sampled"], [*SOFT, "temperature=2.0"], "distill.temperature=1.0 for sampled"),
        (["sampled"], [], "does not support hard targets"),
        (["sampled", "envelope"], ["spatial_kind=soft"], "hard targets and soft targets"),
    ],
)
def test_losses_that_no_encoding_of_the_cache_supports_are_refused(
    names: list[str], sets: list[str], message: str
) -> None:
    with pytest.raises(CacheError, match=message):
        choose(names, sets)


def test_sampled_is_chosen_last_if_it_is_the_largest() -> None:
    cache = make_cache(["sampled", "dense-q8", "topk"])
    cache.shape = ResponseShape(10, 4, 4)
    assert cache.serving({"soft"}) == ["topk", "dense-q8", "sampled"]
    cache.encodings["sampled"] = Sampled(2, 0.5)
    assert cache.serving({"soft"}, 0.5) == ["dense-q8", "sampled"]
    assert cache.serving({"soft"}, None) == ["topk", "dense-q8", "sampled"]
