"""SIGKILL at random moments of every command that writes; the same command again ends the same.

``CSKD_KILLS`` says how many kills each command gets: 4 unless given.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cskd_pipeline.models.train_state import load_state
from tests.faults.commands import Stages, Whole, left_by

KILLS = int(os.environ.get("CSKD_KILLS", "4"))
DIFFERENT = min(8, KILLS // 2)  # states that the kills must have left


def progress(kind: str, out: Path) -> int:
    """How far a command got: files of a cache, updates of a run."""
    if kind != "train":
        return sum(path.is_file() for path in out.rglob("*"))
    state = out / "state.pt"
    return int(load_state(state)["update"]) if state.exists() else 0


@pytest.mark.parametrize("kind", ["dump", "convert", "merge", "train"])
def test_a_command_killed_at_random_moments_ends_as_an_uninterrupted_one(
    kind: str, stages: Stages, whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    command = getattr(stages, kind)
    expected, _, seconds = whole(kind)
    if kind in ("dump", "merge"):
        assert expected == left_by(kind, stages.cache)
    out, moments = tmp_path / "killed", random.Random(kind)
    reached: list[int] = []
    while len(reached) < KILLS or (len(set(reached)) < DIFFERENT and len(reached) < 10 * KILLS):
        process = stages.server.start(*command(out), log=stages.log)
        time.sleep(moments.uniform(0, seconds))
        ended = process.kill()
        if ended.code == 0:  # it was faster
            assert left_by(kind, out) == expected
            shutil.rmtree(out)
            seconds *= 0.9
        else:
            assert ended.code == -9, ended.output
            reached.append(progress(kind, out))
            if reached[-1:] == reached[-2:-1]:  # too soon to have got anywhere
                seconds *= 1.1
    ended = stages.server.run(*command(out), log=stages.log)
    assert ended.code == 0, ended.output
    assert left_by(kind, out) == expected
    assert len(set(reached)) >= DIFFERENT, f"kills at too few different moments: {reached}"


def test_what_a_kill_left_half_written_stands_in_nobodys_way(
    stages: Stages, tmp_path: Path
) -> None:
    """The moment between a run's first file and its name is too short to be hit at random."""
    out = tmp_path / "run"
    out.mkdir()
    (out / ".recipe.toml.0123456789abcdef.partial").write_text("half a rec")
    assert stages.server.run(*stages.train(out), log=stages.log).code == 0
    (out / ".state.pt.0123456789abcdef.partial").write_bytes(bytes(1000))
    assert stages.server.run(*stages.train(out), log=stages.log).code == 0
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("kind", ["dump", "convert", "merge"])
def test_one_command_given_twice_at_once_makes_one_cache(
    kind: str, stages: Stages, whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    command, out = getattr(stages, kind), tmp_path / "both"
    both = [
        stages.server.start(*command(out), log=tmp_path / f"log {number}") for number in range(2)
    ]
    for process in both:
        ended = process.wait()
        assert ended.code == 0, ended.output
    assert left_by(kind, out) == whole(kind).left
