"""SIGKILL at random moments of every command that writes; repeating the command completes it.

``CSKD_KILLS`` is the number of kills per command, 4 by default.
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
from tests.faults.commands import Reference, Stages, output_of

KILLS = int(os.environ.get("CSKD_KILLS", "4"))
DIFFERENT = min(8, KILLS // 2)  # minimum number of distinct states at the kills


def progress(kind: str, out: Path) -> int:
    """Return how far a command got: files of a cache, updates of a run."""
    if kind != "train":
        return sum(path.is_file() for path in out.rglob("*"))
    state = out / "state.pt"
    return int(load_state(state)["update"]) if state.exists() else 0


@pytest.mark.parametrize("kind", ["dump", "convert", "merge", "train"])
def test_a_command_killed_at_random_moments_gives_the_output_of_an_uninterrupted_one(
    kind: str, stages: Stages, reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    command = getattr(stages, kind)
    expected, _, seconds = reference(kind)
    if kind in ("dump", "merge"):
        assert expected == output_of(kind, stages.cache)
    out, moments = tmp_path / "killed", random.Random(kind)
    reached: list[int] = []
    while len(reached) < KILLS or (len(set(reached)) < DIFFERENT and len(reached) < 10 * KILLS):
        process = stages.server.start(*command(out), log=stages.log)
        time.sleep(moments.uniform(0, seconds))
        result = process.kill()
        if result.code == 0:  # it ended before the kill
            assert output_of(kind, out) == expected
            shutil.rmtree(out)
            seconds *= 0.9
        else:
            assert result.code == -9, result.output
            reached.append(progress(kind, out))
            if reached[-1:] == reached[-2:-1]:  # killed before it made progress
                seconds *= 1.1
    result = stages.server.run(*command(out), log=stages.log)
    assert result.code == 0, result.output
    assert output_of(kind, out) == expected
    assert len(set(reached)) >= DIFFERENT, f"kills at too few different moments: {reached}"


def test_partial_files_of_a_killed_run_are_removed(stages: Stages, tmp_path: Path) -> None:
    """A random kill hardly ever falls between the write of a file and its rename."""
    out = tmp_path / "run"
    out.mkdir()
    (out / ".recipe.toml.0123456789abcdef.partial").write_text("half a rec")
    assert stages.server.run(*stages.train(out), log=stages.log).code == 0
    (out / ".state.pt.0123456789abcdef.partial").write_bytes(bytes(1000))
    assert stages.server.run(*stages.train(out), log=stages.log).code == 0
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("kind", ["dump", "convert", "merge"])
def test_two_processes_of_one_command_write_one_cache(
    kind: str, stages: Stages, reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    command, out = getattr(stages, kind), tmp_path / "both"
    both = [
        stages.server.start(*command(out), log=tmp_path / f"log {number}") for number in range(2)
    ]
    for process in both:
        result = process.wait()
        assert result.code == 0, result.output
    assert output_of(kind, out) == reference(kind).files
