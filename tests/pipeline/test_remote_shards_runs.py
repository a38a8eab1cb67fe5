"""Commands on shards at a URL give what they give on shards on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cskd_pipeline import open_cache
from cskd_pipeline.cache import remote_files
from cskd_pipeline.pipeline.dump import dump_teacher
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.pipeline.test_training import assert_equal, final_state
from tests.serving import serving

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where copies are kept."""
    monkeypatch.setenv("CSKD_CACHE_DIR", str(tmp_path / "copies"))
    monkeypatch.setattr(remote_files, "WAIT", 0.01)
    return tmp_path / "copies"


def files(cache: Path) -> dict[str, bytes]:
    """The bytes of a cache but for the manifest, which states when it was made."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.name != "zarr.json"
    }


def test_a_dump_from_a_url_has_the_bytes_of_one_from_disk(small: World, tmp_path: Path) -> None:
    with serving(small.shards.parent) as served:
        served.faults = [("0001.tar", "truncate"), ("0002.tar", "reset")]
        recipe = world.dump_recipe(f"{served.url}/shards", tmp_path / "cache")
        dump_teacher(recipe)
    assert files(tmp_path / "cache") == files(small.cache)
    made, other = open_cache(tmp_path / "cache"), open_cache(small.cache)
    assert made.manifest.dataset == other.manifest.dataset  # with every tar's SHA-256
    assert made.digest() == other.digest()


def train(shards: object, small: World, out: Path, *flags: object) -> int:
    return world.cli(
        *("train", "--shards", shards, "--cache", small.cache, "--out", out),
        *("--student", world.STUDENT, "--method", "cskd", "--epochs", 2, "--batch-size", 16),
        *("--device", "cpu", *world.as_flags(world.train_sets()), *flags),
    )


def evaluate(run: Path, shards: object, capsys: Capture) -> dict[str, Any]:
    capsys.readouterr()
    assert world.cli("evaluate", run, "--shards", shards, "--workers", 2, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    del found["seconds"]
    return found


def test_training_and_evaluation_from_urls_equal_those_from_disk(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """With loader processes, transfers that break, and room for less than the set."""
    sizes = [path.stat().st_size for path in small.shards.glob("*.tar")]
    block = ("--set", "batch.shuffle_shards=1")
    assert train(small.shards, small, tmp_path / "local", *block, "--workers", 0) == 0
    with serving(small.shards.parent) as served:
        monkeypatch.setenv("CSKD_CACHE_GB", str(1.6 * max(sizes) / 1e9))
        served.faults = [("0001.tar", "truncate"), ("0000.tar", 503), ("0002.tar", "reset")]
        url = f"{served.url}/shards"
        assert train(url, small, tmp_path / "remote", *block, "--workers", 2) == 0
        assert len(served.gets("0000.tar")) > 2  # fetched again after it was evicted
        assert evaluate(tmp_path / "local", small.validation, capsys) | {"checkpoint": ""} == (
            evaluate(tmp_path / "local", f"{served.url}/validation", capsys) | {"checkpoint": ""}
        )
    assert_equal(final_state(tmp_path / "local"), final_state(tmp_path / "remote"))


def test_room_for_less_than_a_batch_refuses_the_run(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    size = max(path.stat().st_size for path in small.shards.glob("*.tar"))
    with serving(small.shards.parent) as served:
        monkeypatch.setenv("CSKD_CACHE_GB", str(1.6 * size / 1e9))
        assert train(f"{served.url}/shards", small, tmp_path / "run", "--workers", 0) == 2
    assert "smaller than what one batch (3 tars) takes" in capsys.readouterr().err
