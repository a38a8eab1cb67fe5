"""``cache convert`` of dense equals a dump in that encoding, and students train from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cskd_pipeline.pipeline.dump import dump_teacher
from tests.cache.factories import tree
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.pipeline.test_loss_curves import loss_curve


@pytest.fixture(scope="module")
def soft(small: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The small world with its cache in the approximate encodings."""
    path = tmp_path_factory.mktemp("soft") / "cache"
    words = ("--encoding", "dense-q8", "--encoding", "topk", "--quiet")
    assert world.cli("cache", "convert", small.cache, path, *words) == 0
    return replace(small, cache=path)


def test_a_converted_envelope_equals_a_dumped_one(small: World, tmp_path: Path) -> None:
    assert world.cli("cache", "convert", small.cache, tmp_path / "a", "--encoding", "dense") == 0
    words = (tmp_path / "a", tmp_path / "b", "--encoding", "envelope")
    assert world.cli("cache", "convert", *words) == 0
    dumped, converted = tree(small.cache), tree(tmp_path / "b")
    assert converted.keys() == {name for name in dumped if not name.startswith("dense/")}
    records = {name for name in converted if name.startswith("digest/")}
    changed = {name for name in converted if converted[name] != dumped[name]}
    assert changed == {"zarr.json", *records}


@pytest.mark.parametrize("encoding", ["dense-q8", "topk"])
def test_soft_training_from_an_approximation_is_close_to_the_logits(
    small: World, soft: World, tmp_path: Path, encoding: str
) -> None:
    sets = [*world.SOFT, "distill.scaling=mean", "distill.temperature=2.0"]
    exact = loss_curve(small, tmp_path, "cskd", sets)
    near = loss_curve(soft, tmp_path, "cskd", [*sets, f"distill.encoding={encoding}"])
    assert not torch.equal(exact, near)
    torch.testing.assert_close(near, exact, atol=2e-3, rtol=0)
    assert exact[0, 2:].min() > 10 * 2e-3  # the teacher's terms are much larger


def test_soft_training_from_dumped_and_converted_draws_is_the_same(
    small: World, tmp_path: Path
) -> None:
    """And close to training from logits: above their divergence by the targets' entropy."""
    path = tmp_path / "dumped"
    sets = ["cache.sampled_draws=4", "cache.sampled_temperature=2.0"]
    dump_teacher(world.dump_recipe(small.shards, path, sets, encodings='["sampled"]'))
    words = ("--encoding", "sampled", "--sampled-draws", 4, "--sampled-temperature", 2, "--quiet")
    assert world.cli("cache", "convert", small.cache, tmp_path / "converted", *words) == 0
    dumped, converted = tree(path), tree(tmp_path / "converted")
    assert converted.keys() == dumped.keys()
    records = {name for name in converted if name.startswith("digest/")}
    changed = {name for name in converted if converted[name] != dumped[name]}
    assert changed <= {"zarr.json", *records}
    sets = [*world.SOFT, "distill.scaling=mean", "distill.temperature=2.0"]
    curve = loss_curve(replace(small, cache=path), tmp_path, "cskd", sets)
    exact = loss_curve(small, tmp_path, "cskd", sets)
    assert (curve[:, 2:] > exact[:, 2:]).all()
    torch.testing.assert_close(curve[:, 1], exact[:, 1], atol=0.02, rtol=0)  # the labels' term


def test_auto_picks_the_closest_approximation_and_logs_it(
    soft: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cskd_pipeline.pipeline.training_data import open_training_data
    from cskd_pipeline.runtime.console import Terminal

    recipe = world.train_recipe(soft.shards, soft.cache, tmp_path, "cskd", world.SOFT)
    Terminal().attach()
    data = open_training_data(recipe)
    assert data.views.cache is not None
    assert data.views.encoding == "dense-q8"
    assert "targets from dense-q8: an approximation" in capsys.readouterr().err


def test_hard_targets_are_never_read_from_an_approximation(
    soft: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--shards", soft.shards, "--cache", soft.cache, "--out", tmp_path / "run")
    sets = world.as_flags(world.train_sets())
    code = world.cli("train", *words, "--student", world.STUDENT, "--epochs", 1, *sets)
    assert code == 1
    message = capsys.readouterr().err
    assert "does not support hard targets" in message
    assert "dense-q8, topk" in message
    assert not (tmp_path / "run").exists()


def test_a_temperature_that_no_encoding_supports_is_refused_at_the_start(
    small: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (small.cache, tmp_path / "c", "--encoding", "topk", "--quiet")
    assert world.cli("cache", "convert", *words) == 0
    capsys.readouterr()
    sets = [*world.train_sets(), *world.SOFT, "distill.temperature=0.5"]
    words = ("--shards", small.shards, "--cache", tmp_path / "c", "--out", tmp_path / "run")
    code = world.cli(
        "train", *words, "--student", world.STUDENT, "--epochs", 1, *world.as_flags(sets)
    )
    assert code == 1
    assert "soft targets at temperature 0.5" in capsys.readouterr().err
