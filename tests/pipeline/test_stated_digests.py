"""Every command that reads a cache checks ``CACHE@sha256:DIGEST``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.models.checkpoint import read_header
from tests.pipeline import world
from tests.pipeline.conftest import World

OTHER = "0" * 64
COMMANDS: dict[str, Callable[[World, str, Path], list[object]]] = {
    "info": lambda w, cache, out: ["cache", "info", cache],
    "verify": lambda w, cache, out: ["cache", "verify", cache, "--shards", w.shards],
    "convert": lambda w, cache, out: ["cache", "convert", cache, out, "--encoding", "envelope"],
    "merge": lambda w, cache, out: ["cache", "merge", cache, "--out", out],
    "show": lambda w, cache, out: ["show", cache, "--shards", w.shards, "--out", out],
    "train": lambda w, cache, out: [
        *("train", "--shards", w.shards, "--cache", cache, "--student", world.STUDENT),
        *("--method", "cskd", "--epochs", 2, "--batch-size", 16, "--out", out),
        *world.as_flags(world.train_sets()),
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_right_digest_is_accepted_and_another_refused(
    command: str, small: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = open_cache(small.cache).digest()
    words = COMMANDS[command](small, f"{small.cache}@sha256:{OTHER}", tmp_path / "refused")
    assert world.cli(*words, "--quiet") == 1
    output = capsys.readouterr().err
    assert "the cache does not have the requested digest" in output
    assert f"sha256:{digest}" in output
    assert not (tmp_path / "refused").exists()
    words = COMMANDS[command](small, f"{small.cache}@sha256:{digest}", tmp_path / "out")
    assert world.cli(*words, "--quiet") == 0


def test_a_run_and_its_student_record_the_caches_digest(
    small: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = open_cache(small.cache).digest()
    words = COMMANDS["train"](small, str(small.cache), tmp_path / "run")
    assert world.cli(*words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["cache_digest"] == digest
    assert read_header(tmp_path / "run/last.safetensors").cache_sha256 == digest
