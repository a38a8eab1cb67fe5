"""``data.corrupt``: both stages refuse images that cannot be decoded, or continue without them."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cskd_pipeline.cache.convert import convert
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.data import corrupt
from cskd_pipeline.data.describe import describe
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.errors import CskdError, DataError, ImageError
from cskd_pipeline.pipeline.dump import dump_teacher
from cskd_pipeline.pipeline.train import train
from cskd_pipeline.pipeline.training_data import open_training_data
from cskd_pipeline.tools.estimate_dump import plan_dump
from tests.images import Sample, write_shard
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.pipeline.test_distributed import finish, start
from tests.pipeline.test_layouts import recut, samples
from tests.pipeline.test_loss_curves import loss_curve

__all__ = ["samples"]  # a fixture

CORRUPT = (3, 40, 41, 95)
SKIP = ["data.corrupt=skip"]


def with_corrupt(content: Sequence[Sample]) -> list[Sample]:
    """Truncate the images of some samples, and empty the last one."""
    damaged = list(content)
    for row in CORRUPT:
        key, fields = damaged[row]
        size = 0 if row == CORRUPT[-1] else len(fields["jpg"]) // 2
        damaged[row] = key, {**fields, "jpg": fields["jpg"][:size]}
    return damaged


def without_corrupt(content: Sequence[Sample]) -> list[Sample]:
    return [sample for row, sample in enumerate(content) if row not in CORRUPT]


@pytest.fixture(scope="module")
def worlds(
    small: World, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory
) -> tuple[World, World]:
    """The small world with corrupt images, and without them."""
    root = tmp_path_factory.mktemp("worlds")
    ends = [len(without_corrupt(samples[: 32 * (number + 1)])) for number in range(3)]
    full = recut(small, root / "corrupt", with_corrupt(samples), 32)
    fewer = root / "fewer"
    fewer.mkdir()
    shutil.copy(small.shards / "classes.json", fewer)
    for number, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        write_shard(fewer / f"x-{number:02d}.tar", without_corrupt(samples)[first:last])
    return full, replace(small, shards=fewer)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_same_content(one: Path, other: Path) -> None:
    """Compare everything except the description of the tars."""
    first, second = open_cache(one), open_cache(other)
    assert first.counts == second.counts
    assert first.shard_ids == second.shard_ids
    for shard, count in enumerate(first.counts):
        assert first.keys(shard) == second.keys(shard)
        assert np.array_equal(first.image_crc32(shard), second.image_crc32(shard))
        for view in range(first.views):
            assert np.array_equal(first.seeds(view, shard), second.seeds(view, shard))
            digests = [cache.view_digests(view, shard) for cache in (first, second)]
            assert np.array_equal(*digests)
            locations = np.array([(view, shard, offset) for offset in range(count)])
            for name, values in first.gather("dense", locations).items():
                assert np.array_equal(values, second.gather("dense", locations)[name])


def test_a_dump_without_corrupt_images_equals_one_of_shards_without_them(
    worlds: tuple[World, World], samples: list[Sample], tmp_path: Path
) -> None:
    full, fewer = worlds
    dump_teacher(world.dump_recipe(fewer.shards, tmp_path / "fewer"))
    describe(load_dataset(full.shards, empty="pass")).save(full.shards / "manifest.json")
    for name, shards in (("cache", full.shards), ("listed", full.shards / "manifest.json")):
        recipe = world.dump_recipe(shards, tmp_path / name, SKIP)
        recipe = replace(recipe, dump=replace(recipe.dump, workers=2))
        assert dump_teacher(recipe)["left_out"] == len(CORRUPT)
        assert_same_content(tmp_path / name, tmp_path / "fewer")
        listed = rows(tmp_path / name / "left_out.csv")
        assert [(row["reason"], row["key"]) for row in listed] == [
            ("corrupt", samples[row][0]) for row in CORRUPT
        ]
        assert [(int(row["shard"]), int(row["offset"])) for row in listed] == [
            divmod(row, 32) for row in CORRUPT
        ]
    assert not (tmp_path / "fewer/left_out.csv").exists()


def test_a_resumed_dump_does_not_decode_every_image_again(
    worlds: tuple[World, World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, fewer = worlds
    recipe = world.dump_recipe(full.shards, tmp_path / "cache", SKIP, views=2)
    dump_teacher(recipe, shard_range=(0, 1))
    monkeypatch.setattr(corrupt, "find_corrupt", lambda *_, **__: pytest.fail("reads images"))
    strict = replace(recipe, data=replace(recipe.data, corrupt="error"))
    for shards in (full.shards, fewer.shards):
        other = replace(strict, data=replace(strict.data, shards=str(shards)))
        with pytest.raises(CskdError, match=r"0 bytes|was started with data") as caught:
            dump_teacher(other)
        assert "data.corrupt=skip" in str(caught.value)
    convert(tmp_path / "cache", tmp_path / "copy")
    for path in (tmp_path / "cache", tmp_path / "copy"):
        assert dump_teacher(world.dump_recipe(full.shards, path, SKIP, views=2))["complete"]


def test_ranks_share_the_search_for_corrupt_images(
    worlds: tuple[World, World], tmp_path: Path
) -> None:
    full, _ = worlds
    for ranks, name in ((1, "one"), (2, "two")):
        words = [
            *("dump-teacher", "--shards", full.shards, "--cache", tmp_path / name),
            *("--teacher", world.TEACHER, "--weights", "random", "--workers", 0),
            *("--device", "cpu", *world.as_flags([*world.dump_sets(views=2), *SKIP])),
        ]
        assert finish(start(ranks, words)) == [0] * ranks
    assert_same_content(tmp_path / "one", tmp_path / "two")
    for name in ("left_out.csv", "corrupt.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_by_default_both_stages_refuse_corrupt_images_with_an_action(
    worlds: tuple[World, World], small: World, samples: list[Sample], tmp_path: Path
) -> None:
    full, _ = worlds
    with pytest.raises(ImageError, match="an image has 0 bytes"):
        dump_teacher(world.dump_recipe(full.shards, tmp_path / "cache"))
    cut = recut(small, tmp_path / "cut", with_corrupt(samples)[:-1], 32)
    plain = world.train_recipe(cut.shards, None, tmp_path / "run", "none", world.VIEWS, epochs=2)
    stages: list[Callable[[], Any]] = [
        lambda: dump_teacher(world.dump_recipe(cut.shards, tmp_path / "cache")),
        lambda: train(plain),
    ]
    for stage in stages:
        with pytest.raises(ImageError, match="the image cannot be decoded") as caught:
            stage()
        message = str(caught.value)
        assert "x-0" in message
        assert any(samples[row][0] in message for row in CORRUPT)
        assert "index SHARDS --out FILE --check-images" in message
        assert "--set data.corrupt=skip" in message


def test_training_without_a_teacher_skips_corrupt_images(
    worlds: tuple[World, World], tmp_path: Path
) -> None:
    full, fewer = worlds
    expected = loss_curve(fewer, tmp_path, "none", world.VIEWS)
    assert torch.equal(loss_curve(full, tmp_path, "none", [*world.VIEWS, *SKIP]), expected)


@pytest.mark.parametrize("drift", ["error", "skip"])
def test_training_from_a_full_cache_leaves_out_corrupt_images_and_their_partners(
    worlds: tuple[World, World], samples: list[Sample], tmp_path: Path, drift: str
) -> None:
    full, fewer = worlds
    recipe = world.train_recipe(
        full.shards,
        full.cache,
        tmp_path / "run",
        sets=[*SKIP, f"data.drift={drift}"],
        epochs=1,
    )
    expected = loss_curve(fewer, tmp_path, "cskd", ["data.missing=skip"])
    curve = loss_curve(full, tmp_path, "cskd", [*SKIP, f"data.drift={drift}"])
    assert torch.equal(curve, expected)
    train(recipe)
    listed = [(row["reason"], row["key"]) for row in rows(tmp_path / "run/left_out.csv")]
    assert sorted(listed) == sorted(("corrupt", samples[row][0]) for row in CORRUPT)
    record = json.loads((tmp_path / "run/corrupt.json").read_text())
    assert sum(map(len, record["corrupt"].values())) == len(CORRUPT)


def test_corrupt_validation_images_are_left_out_and_listed_separately(
    worlds: tuple[World, World], small: World, tmp_path: Path
) -> None:
    full, _ = worlds
    sets = [*SKIP, f"data.val_shards={json.dumps(str(full.shards))}"]
    recipe = world.train_recipe(small.shards, small.cache, tmp_path / "run", sets=sets, epochs=1)
    validation = open_training_data(recipe).validation
    assert validation is not None
    assert validation.samples == 92
    train(recipe)
    assert len(rows(tmp_path / "run/left_out-validation.csv")) == len(CORRUPT)
    assert not (tmp_path / "run/left_out.csv").exists()


def test_a_tar_of_only_corrupt_images_is_refused(
    small: World, samples: list[Sample], tmp_path: Path
) -> None:
    bad = [(key, {**fields, "jpg": b"no image"}) for key, fields in samples[:4]]
    other = recut(small, tmp_path / "bad", [*bad, *samples[4:12]], 4)
    with pytest.raises(DataError, match="1 shards would have no samples left") as caught:
        dump_teacher(world.dump_recipe(other.shards, tmp_path / "cache", SKIP))
    assert "x-00.tar" in caught.value.problems[0]
    assert not (tmp_path / "cache").exists()


def test_a_forecast_leaves_out_corrupt_images(worlds: tuple[World, World], tmp_path: Path) -> None:
    full, _ = worlds
    report = plan_dump(world.dump_recipe(full.shards, tmp_path / "cache", SKIP))
    assert report["measured"]["samples"] == 96 - len(CORRUPT)


def test_a_key_in_two_shards_is_refused_before_the_dump(
    small: World, samples: list[Sample], tmp_path: Path
) -> None:
    other = recut(small, tmp_path / "duplicate", [*samples[:20], samples[3]], 10)
    with pytest.raises(DataError, match="a key is not unique") as caught:
        dump_teacher(world.dump_recipe(other.shards, tmp_path / "cache"))
    assert caught.value.problems == [
        f"{samples[3][0]}: in {other.shards / 'x-00.tar'} and {other.shards / 'x-02.tar'}"
    ]
    assert not (tmp_path / "cache").exists()
