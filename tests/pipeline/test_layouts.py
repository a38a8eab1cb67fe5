"""A cache and another copy of its data: other shards, missing, altered and duplicate samples."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.errors import ManifestError
from cskd_pipeline.pipeline import training_data
from cskd_pipeline.pipeline.train import train
from cskd_pipeline.pipeline.training_data import open_training_data
from cskd_pipeline.runtime.console import Terminal
from cskd_pipeline.tools.estimate_train import plan_train
from tests.images import Sample, write_shard
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.pipeline.test_distributed import finish, start
from tests.pipeline.test_loss_curves import loss_curve
from tests.pipeline.test_training import assert_equal, final_state

Capture = pytest.CaptureFixture[str]
REMOVED, ALTERED = (5, 40, 41), (0, 17, 64, 95)
SKIP = ["data.missing=skip", "data.drift=skip"]


@pytest.fixture(scope="module")
def samples(small: World) -> list[Sample]:
    """All samples of the small world, in order."""
    return [
        (key, {"jpg": next(shard.read_images([i])), "cls": b"%d" % shard.label(i)})
        for shard in load_dataset(small.shards).shards
        for i, key in enumerate(shard.keys)
    ]


def recut(small: World, folder: Path, content: Iterable[Sample], size: int = 17) -> World:
    """Return the small world with ``content`` in tars of ``size`` samples."""
    folder.mkdir()
    rows = list(content)
    for number in range(-(-len(rows) // size)):
        write_shard(folder / f"x-{number:02d}.tar", rows[number * size : (number + 1) * size])
    shutil.copy(small.shards / "classes.json", folder)
    return replace(small, shards=folder)


def recompress(sample: Sample) -> Sample:
    key, fields = sample
    file = io.BytesIO()
    Image.open(io.BytesIO(fields["jpg"])).convert("RGB").save(file, "JPEG", quality=60)
    return key, {**fields, "jpg": file.getvalue()}


def modified(samples: list[Sample]) -> list[Sample]:
    """Reverse the samples, remove three, recompress four, and add two unknown to the cache."""
    content = [
        recompress(s) if i in ALTERED else s for i, s in enumerate(samples) if i not in REMOVED
    ]
    return [("new/a", samples[0][1]), *content[::-1], ("new/b", samples[1][1])]


def test_other_shard_layouts_of_the_same_images_give_the_same_loss_curve(
    small: World, samples: list[Sample], tmp_path: Path
) -> None:
    curve = loss_curve(small, tmp_path, "cskd", [])
    for number, size in enumerate((17, 96, 1)):
        content = samples[::-1] if number else samples
        other = recut(small, tmp_path / f"cut {number}", content, size)
        assert torch.equal(loss_curve(other, tmp_path, "cskd", []), curve)


def test_samples_left_out_decide_the_loss_curve_and_the_layout_does_not(
    small: World, samples: list[Sample], tmp_path: Path
) -> None:
    """Recompressed images are left out like missing ones, together with their partners."""
    other = recut(small, tmp_path / "modified", modified(samples))
    kept = [s for i, s in enumerate(samples) if i not in (*REMOVED, *ALTERED)]
    fewer = recut(small, tmp_path / "fewer", kept, 50)
    curve = loss_curve(other, tmp_path, "cskd", SKIP)
    assert torch.equal(curve, loss_curve(fewer, tmp_path, "cskd", SKIP[:1]))
    assert not torch.equal(curve[:3], loss_curve(small, tmp_path, "cskd", [])[:3])


def train_args(other: World, out: Path, *sets: str) -> list[object]:
    return [
        *("train", "--shards", other.shards, "--cache", other.cache, "--out", out),
        *("--student", world.STUDENT, "--method", "cskd", "--epochs", 1, "--batch-size", 16),
        *("--workers", 0, "--device", "cpu", *world.as_flags([*world.train_sets(), *sets])),
    ]


def test_samples_left_out_are_counted_and_listed(
    small: World, samples: list[Sample], tmp_path: Path, capsys: Capture
) -> None:
    other = recut(small, tmp_path / "modified", modified(samples))
    assert world.cli(*train_args(other, tmp_path / "run", *SKIP)) == 0
    output = capsys.readouterr().err
    assert "training without 7 samples of the cache's 96: 3 are not in the shards, 4 have" in output
    assert f"{tmp_path / 'run/left_out.csv'} lists them" in output
    assert "2 samples of the shards are not in the cache" in output
    with open(tmp_path / "run/left_out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    reader = open_cache(small.cache)
    keys = [key for shard in range(3) for key in reader.keys(shard)]
    starts = [0, reader.counts[0], sum(reader.counts[:2])]
    assert [(row["reason"], row["key"]) for row in rows] == [
        ("missing" if i in REMOVED else "other image", keys[i])
        for i in sorted((*REMOVED, *ALTERED))
    ]
    numbers = [starts[int(row["shard"])] + int(row["offset"]) for row in rows]
    assert numbers == sorted((*REMOVED, *ALTERED))


def test_no_list_is_written_if_nothing_is_left_out(small: World, tmp_path: Path) -> None:
    assert world.cli(*train_args(small, tmp_path / "run"), "-q") == 0
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert not written & {"left_out.csv", "differing.json"}


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        ([], ["3 of the cache's 96 samples", "missing: ", "data.missing=skip", "left_out.csv"]),
        (SKIP[:1], ["not the one the cache was made from", "CRC-32", "data.drift=skip"]),
    ],
)
def test_samples_that_must_not_be_left_out_are_refused_and_nothing_is_written(
    small: World, samples: list[Sample], tmp_path: Path, capsys: Capture, sets: list[str], text: Any
) -> None:
    other = recut(small, tmp_path / "modified", modified(samples))
    assert world.cli(*train_args(other, tmp_path / "run", *sets)) == 1
    message = capsys.readouterr().err
    assert all(part in message for part in text), message
    assert not (tmp_path / "run").exists()


def test_duplicate_samples_are_refused(
    small: World, samples: list[Sample], tmp_path: Path, capsys: Capture
) -> None:
    other = recut(small, tmp_path / "duplicate", [*samples, samples[20]])
    assert world.cli(*train_args(other, tmp_path / "run", *SKIP)) == 1
    message = capsys.readouterr().err
    assert "a key of the cache is in the shards more than once" in message
    assert samples[20][0] in message
    assert "x-01.tar and " in message
    assert not (tmp_path / "run").exists()


@pytest.fixture
def stopped(
    small: World, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Kill a run with images left out in its first epoch; return its recipe by folder name."""

    class DiedError(Exception):
        pass

    def die(*arguments: object) -> None:
        raise DiedError

    other = recut(small, tmp_path / "modified", modified(samples))
    sets = [*SKIP, "run.checkpoint_every=1"]

    def recipe(out: str) -> Any:
        return world.train_recipe(other.shards, small.cache, tmp_path / out, sets=sets, epochs=2)

    with monkeypatch.context() as patch:
        patch.setattr("cskd_pipeline.pipeline.train._close_epoch", die)
        with pytest.raises(DiedError):
            train(recipe("run"))
    return recipe


def fail_on_read(*_: object, **__: object) -> None:
    pytest.fail("reads images")


def test_a_resumed_run_does_not_read_every_image_again(
    stopped: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(stopped("full"))
    before = (tmp_path / "run/left_out.csv").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(training_data, "find_differing", fail_on_read)
        train(stopped("run"), resume=True)
    assert_equal(final_state(tmp_path / "full"), final_state(tmp_path / "run"))
    for name in ("left_out.csv", "differing.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "full" / name).read_bytes()
    assert (tmp_path / "run/left_out.csv").read_bytes() == before


def test_a_record_of_other_shards_is_ignored(
    stopped: Callable[..., Any], tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "run/differing.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "shards": "0" * 64, "differing": {}}))
    Terminal().attach()
    train(stopped("run"), resume=True)
    assert "reading the images again" in capsys.readouterr().err
    assert json.loads(path.read_text()) == record


@pytest.mark.parametrize(
    "differing", [None, [1], {"3": [0]}, {"0": [32]}, {"0": [1, 1]}, {"0": [-1]}, {"0": ["1"]}]
)
def test_an_invalid_record_is_refused(
    stopped: Callable[..., Any], tmp_path: Path, differing: Any
) -> None:
    path = tmp_path / "run/differing.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"differing": differing}))
    with pytest.raises(ManifestError, match="1 problem") as caught:
        train(stopped("run"), resume=True)
    assert "delete the file" in str(caught.value.action)


def test_a_run_does_not_resume_with_other_samples_missing(
    small: World, samples: list[Sample], tmp_path: Path
) -> None:
    """As many samples as before, of the same tar shard."""

    def digest(name: str, removed: int) -> Any:
        other = recut(small, tmp_path / name, [s for i, s in enumerate(samples) if i != removed])
        recipe = world.train_recipe(other.shards, small.cache, tmp_path / "run", sets=SKIP[:1])
        return open_training_data(recipe).identity["left_out"]

    assert len({digest("a", 3), digest("b", 4), digest("c", 50)}) == 3
    assert digest("d", 3) == digest("e", 3)


def test_ranks_share_the_reading_and_leave_out_the_same_samples(
    small: World, samples: list[Sample], tmp_path: Path
) -> None:
    other = recut(small, tmp_path / "modified", modified(samples))
    for ranks, out in ((1, "one"), (2, "two")):
        words = train_args(other, tmp_path / out, *SKIP)
        assert finish(start(ranks, words)) == [0] * ranks
    for name in ("left_out.csv", "differing.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_forecast_reads_no_more_images_than_it_times(
    small: World, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = recut(small, tmp_path / "modified", modified(samples))
    recipe = world.train_recipe(other.shards, small.cache, tmp_path / "run", sets=SKIP)
    monkeypatch.setattr(training_data, "find_differing", fail_on_read)
    assert plan_train(recipe, updates=2)["samples"] == 96
