"""Training from a cache on a web server or the Hub equals training from its folder."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from huggingface_hub.cli import hf
from PIL import Image

from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.tools.make_shards import make_shards
from tests.cache.factories import tree
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.pipeline.test_training import assert_equal, final_state
from tests.serving import REPOSITORY, keep_copies, redirect_hub, serving

Capture = pytest.CaptureFixture[str]


def train_args(cache: object, small: World, out: Path, *flags: object) -> list[object]:
    return [
        *("train", "--shards", small.shards, "--cache", cache, "--out", out),
        *("--student", world.STUDENT, "--method", "cskd", "--epochs", 2, "--batch-size", 16),
        *("--workers", 2, "--device", "cpu", *world.as_flags(world.train_sets()), *flags),
    ]


@pytest.fixture(scope="module")
def local(small: World, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The final state of a run from the folder."""
    out = tmp_path_factory.mktemp("local") / "run"
    assert world.cli(*train_args(small.cache, small, out)) == 0
    return final_state(out)


def test_training_from_a_url_equals_training_from_the_folder(
    small: World, local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With loader processes and an interrupted transfer."""
    keep_copies(tmp_path / "copies", monkeypatch)
    with serving(small.cache.parent) as served:
        served.faults = [("/c/1/0/0/0/0/0", "truncate"), ("/c/0/1/0", "reset")]
        url = f"{served.url}/{small.cache.name}"
        assert world.cli(*train_args(url, small, tmp_path / "remote")) == 0
        assert any("/c/" in path for _, path, _ in served.requests)
    assert_equal(local, final_state(tmp_path / "remote"))


def test_a_run_stopped_by_a_lost_server_can_be_resumed(
    small: World, local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    keep_copies(tmp_path / "copies", monkeypatch)
    out = tmp_path / "run"
    with serving(small.cache.parent) as served:
        url = f"{served.url}/{small.cache.name}"
        served.always["dense/spatial/c/1/2/0/0/0/0"] = 503
        assert world.cli(*train_args(url, small, out, "--set", "data.check=0")) == 1
        output = capsys.readouterr().err
        assert "the cache cannot be reached" in output
        assert "HTTP status 503" in output
        assert "Traceback" not in output
        served.always.clear()
        resume = train_args(url, small, out, "--set", "data.check=0", "--resume")
        assert world.cli(*resume) == 0
    assert_equal(local, final_state(out))


def test_a_cache_published_and_uploaded_to_the_hub_can_be_trained_from(
    small: World, local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The printed command runs unchanged."""
    shutil.copytree(small.cache, tmp_path / "my cache")
    location = f"hf://datasets/{REPOSITORY}"
    images = ("--thumbnails", "--shards", small.shards, "--samples", 40)
    words = ("cache", "publish", tmp_path / "my cache", "--location", location, *images, "--json")
    assert world.cli(*words) == 0
    report = json.loads(capsys.readouterr().out)
    for row in pq.read_table(tmp_path / "my cache/preview.parquet").to_pylist():
        assert max(Image.open(io.BytesIO(row["thumbnail"]["bytes"])).size) <= 112
    on_hub = tmp_path / "hub"
    on_hub.mkdir()
    with serving(on_hub, "hub") as served:
        redirect_hub(served.url, monkeypatch)
        monkeypatch.setattr(sys, "argv", shlex.split(report["upload"]))
        with pytest.raises(SystemExit) as exit_:
            hf.main()
        assert not exit_.value.code
        assert tree(on_hub) == tree(tmp_path / "my cache")
        keep_copies(tmp_path / "copies", monkeypatch)
        pinned = f"{location}@sha256:{report['digest']}"
        assert world.cli(*train_args(pinned, small, tmp_path / "run")) == 0
    assert_equal(local, final_state(tmp_path / "run"))


def test_thumbnails_show_only_views_whose_images_both_match(
    small: World, tmp_path: Path, capsys: Capture
) -> None:
    shutil.copytree(small.cache, tmp_path / "cache")
    tar = sorted(small.shards.glob("*.tar"))[0]
    words = (
        "cache",
        "publish",
        tmp_path / "cache",
        "--samples",
        60,
        "--thumbnails",
        "--shards",
        tar,
    )
    assert world.cli(*words) == 0
    rows = pq.read_table(tmp_path / "cache/preview.parquet").to_pylist()
    keys = {key.decode() for key in load_dataset(tar).shards[0].index.keys.tolist()}
    assert {row["key"] for row in rows} <= keys
    assert 0 < len(rows) < 60
    assert "the preview's thumbnails" in (tmp_path / "cache/README.md").read_text()
    before = tree(tmp_path / "cache")
    world.draw_images(tmp_path / "others", per_class=24, seed=1)
    make_shards(tmp_path / "others", tmp_path / "shards", shard_size=35)
    assert world.cli(*words[:-1], tmp_path / "shards") == 1
    assert "no view of the preview has its images" in capsys.readouterr().err
    assert tree(tmp_path / "cache") == before
