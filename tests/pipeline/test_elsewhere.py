"""Training from a cache that lies on a web server is training from its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from cskd_pipeline.cache import remote_files
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.pipeline.test_training import assert_equal, final_state
from tests.serving import serving

Capture = pytest.CaptureFixture[str]


def command(cache: object, small: World, out: Path, *flags: object) -> list[object]:
    return [
        *("train", "--shards", small.shards, "--cache", cache, "--out", out),
        *("--student", world.STUDENT, "--method", "cskd", "--epochs", 2, "--batch-size", 16),
        *("--workers", 2, "--device", "cpu", *world.as_flags(world.train_sets()), *flags),
    ]


def test_training_from_a_url_equals_training_from_the_folder(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With loader processes, and with a transfer that breaks on the way."""
    monkeypatch.setenv("CSKD_CACHE_DIR", str(tmp_path / "copies"))
    monkeypatch.setattr(remote_files, "WAIT", 0.01)
    assert world.cli(*command(small.cache, small, tmp_path / "local")) == 0
    with serving(small.cache.parent) as served:
        served.faults = [("/c/1/0/0/0/0/0", "truncate"), ("/c/0/1/0", "reset")]
        url = f"{served.url}/{small.cache.name}"
        assert world.cli(*command(url, small, tmp_path / "remote")) == 0
        assert any("/c/" in path for _, path, _ in served.asked)
    assert_equal(final_state(tmp_path / "local"), final_state(tmp_path / "remote"))


def test_a_server_that_goes_away_stops_a_run_that_can_go_on(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("CSKD_CACHE_DIR", str(tmp_path / "copies"))
    monkeypatch.setattr(remote_files, "WAIT", 0.001)
    out = tmp_path / "run"
    with serving(small.cache.parent) as served:
        url = f"{served.url}/{small.cache.name}"
        served.always["dense/spatial/c/1/2/0/0/0/0"] = 503
        assert world.cli(*command(url, small, out, "--set", "data.check=0")) == 1
        told = capsys.readouterr().err
        assert "the cache cannot be reached" in told
        assert "HTTP status 503" in told
        assert "Traceback" not in told
        served.always.clear()
        again = command(url, small, out, "--set", "data.check=0", "--resume")
        assert world.cli(*again) == 0
    local = tmp_path / "local"
    assert world.cli(*command(small.cache, small, local)) == 0
    assert_equal(final_state(local), final_state(out))
