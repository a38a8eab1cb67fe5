"""A registered encoding and a registered view policy, through both stages."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from cskd_pipeline import CskdError, ViewPolicy, open_cache, register_encoding, register_policy
from cskd_pipeline.distill.encodings import ENCODINGS
from cskd_pipeline.pipeline.dump import dump_teacher
from cskd_pipeline.pipeline.train import train
from cskd_pipeline.views import policy as policies
from cskd_pipeline.views.draw import Box, draw
from tests import own
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.processes import server


@pytest.fixture
def _registered() -> Iterator[None]:
    register_encoding(own.Negated())
    register_policy(own.VERSION, own.draw, own.render)
    yield
    ENCODINGS.pop(own.Negated.name, None)
    policies.REGISTERED.pop(own.VERSION, None)


@pytest.fixture
def cache(_registered: None, small: World, tmp_path: Path) -> Path:
    sets = [f'views.version="{own.VERSION}"']
    encodings = f'["dense", "{own.Negated.name}"]'
    path = tmp_path / "cache"
    dump_teacher(world.dump_recipe(small.shards, path, sets, views=2, encodings=encodings))
    return path


def test_training_from_a_registered_encoding_equals_training_from_dense(
    cache: Path, small: World, tmp_path: Path
) -> None:
    """In loader processes too; views' digests are compared, so the registered policy is used."""
    reader = open_cache(cache)
    assert reader.manifest.policy.version == own.VERSION
    dense, negated = (reader.rows(n, 1, 0, range(5)) for n in ("dense", own.Negated.name))
    np.testing.assert_array_equal(dense["dense/spatial"], -negated["own-negated/spatial"])
    weights = []
    for name, workers in (("dense", 0), (own.Negated.name, 2)):
        out = tmp_path / name
        sets = [f'distill.encoding="{name}"', *world.SOFT]
        recipe = world.train_recipe(small.shards, cache, out, sets=sets, epochs=2)
        train(replace(recipe, run=replace(recipe.run, workers=workers)))
        weights.append(load_file(out / "last.safetensors"))
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])


def test_loader_processes_get_the_registered_encoding_and_policy(
    cache: Path, tmp_path: Path
) -> None:
    """Like loader processes that are not forked, which unpickle the cache and the policy."""
    reader = open_cache(cache)
    expected = reader.rows(own.Negated.name, 0, 1, [3])["own-negated/global"]
    (tmp_path / "sent").write_bytes(pickle.dumps((reader.manifest.policy, reader, expected)))
    code = (
        "import pickle, sys; policy, cache, expected = pickle.load(open(sys.argv[1], 'rb')); "
        "from cskd_pipeline.views.draw import draw; assert not draw(1, policy, 40, 50).erase; "
        "assert (cache.rows('own-negated', 0, 1, [3])['own-negated/global'] == expected).all()"
    )
    ended = server().run(tmp_path / "sent", log=tmp_path / "log", code=code)
    assert ended.code == 0, ended.output


def test_a_cache_with_unregistered_names_is_refused_with_what_to_register(cache: Path) -> None:
    encoding = ENCODINGS.pop(own.Negated.name)
    with pytest.raises(CskdError, match=r"own-negated.*\n*[^$]*register_encoding"):
        open_cache(cache)
    register_encoding(encoding)
    del policies.REGISTERED[own.VERSION]
    with pytest.raises(CskdError, match=r"own-v1' is unknown[^$]*register_policy"):
        open_cache(cache)


def test_built_in_names_cannot_be_registered() -> None:
    with pytest.raises(CskdError, match="cannot be registered"):
        register_encoding(ENCODINGS["dense"])
    with pytest.raises(CskdError, match="cannot be registered"):
        register_policy("deit-v1", own.draw, own.render)


@pytest.mark.usefixtures("_registered")
def test_a_policy_that_does_not_render_a_view_is_refused() -> None:
    from cskd_pipeline.views.apply import render

    register_policy(own.VERSION, own.draw, lambda image, _params, _policy: image)
    policy, image = ViewPolicy(version=own.VERSION, size=16), np.zeros((20, 30, 3), np.uint8)
    with pytest.raises(CskdError, match="did not return a view"):
        render(image, own.draw(0, policy, 30, 20), policy)
    register_policy(own.VERSION, own.draw, lambda *_: None)  # type: ignore[arg-type]  # wrong
    with pytest.raises(CskdError, match=r"did not return a view[^$]*NoneType"):
        render(image, own.draw(0, policy, 30, 20), policy)


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("box", [(0, 0, 17, 2), (15, 0, 2, 2), (0, 15, 2, 2), (-1, 0, 2, 2)])
def test_a_policy_that_erases_outside_the_view_is_refused(box: tuple[int, int, int, int]) -> None:
    policy = ViewPolicy(version=own.VERSION, size=16)

    def draw_with(erase: Box) -> None:
        params = replace(own.draw(0, policy, 30, 20), erase=(erase,))
        register_policy(own.VERSION, lambda *_: params, own.render)
        draw(0, policy, 30, 20)

    draw_with(Box(14, 14, 2, 2))
    with pytest.raises(CskdError, match="did not return valid parameters"):
        draw_with(Box(*box))


@pytest.mark.usefixtures("_registered")
def test_an_encoding_with_unusable_array_names_is_refused(
    monkeypatch: pytest.MonkeyPatch, small: World, tmp_path: Path
) -> None:
    encoding = own.Negated()
    monkeypatch.setattr(encoding, "arrays", ENCODINGS["dense"].arrays)
    register_encoding(encoding)
    recipe = world.dump_recipe(small.shards, tmp_path / "c", views=2, encodings='["own-negated"]')
    with pytest.raises(CskdError, match="invalid name"):
        dump_teacher(recipe)
