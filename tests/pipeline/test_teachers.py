"""Stage one with a user's own teacher, as in docs/own-teacher.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.pipeline.dump import dump_teacher, open_stage_one
from cskd_pipeline.pipeline.trainer import Trainer
from cskd_pipeline.pipeline.training_data import open_training_data
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.pipeline.live import live_responses

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]

# A user's network: plain PyTorch, nothing from timm.
MY_RESNET = """
import torch.nn as nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(Block(3, 8, 2), Block(8, 16, 2), Block(16, 32, 2))
        self.linear = nn.Linear(32, 4)

    def forward(self, x):
        out = F.avg_pool2d(self.layers(x), 4)
        return self.linear(out.view(out.size(0), -1))
"""


def example() -> str:
    """Return the page's command."""
    page = (ROOT / "docs/own-teacher.md").read_text()
    return page.split("```")[1].strip()


def test_the_pages_example_runs_unchanged(small: World, tmp_path: Path) -> None:
    (tmp_path / "my_resnet.py").write_text(MY_RESNET)
    shutil.copytree(small.shards, tmp_path / "cifar10/train")
    module: dict[str, Any] = {}
    exec(MY_RESNET, module)
    torch.save(module["ResNet18"]().state_dict(), tmp_path / "cifar10.pth")
    program = tmp_path / "bin/cskd-pipeline"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{ROOT}" exec {sys.executable} -P -m cskd_pipeline "$@"'
    )
    program.chmod(0o755)
    environment = os.environ | {
        **{"PATH": f"{program.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
    }
    done = subprocess.run(
        ["sh", "-c", example()], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    teacher = open_cache(tmp_path / "cache").manifest.teacher
    assert (teacher.name, teacher.grid, teacher.source) == ("my_resnet:ResNet18", (4, 4), "file")
    assert (teacher.mean, teacher.std) == ((0.491, 0.482, 0.447), (0.247, 0.244, 0.262))


def test_the_help_states_the_contract_with_the_pages_example(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert world.cli("dump-teacher", "--help") == 0
    output = re.sub(r"\s+", " ", capsys.readouterr().out)
    for part in ("package.module:factory", "forward_features", "(B, C, h, w)", "forward_head"):
        assert part in output
    for words in re.findall(r"--(?:teacher|weights|mean|std|set) \S+", example()):
        assert words in output, words


@pytest.mark.parametrize("flag", ["--mean", "--std"])
def test_mean_and_std_are_three_numbers(flag: str, small: World, capsys: Capture) -> None:
    words = ("--shards", small.shards, "--teacher", "resnet10t", "--cache", "c")
    for wrong in ("0.5", "0.5,0.5", "a,b,c", "0.1,0.2,0.3,0.4"):
        assert world.cli("dump-teacher", *words, flag, wrong) == 2
        assert f"{flag} takes R,G,B" in capsys.readouterr().err
    assert world.cli("dump-teacher", *words, flag, "124,116,104") == 1
    assert f"teacher.{flag[2:]}" in capsys.readouterr().err
    assert world.cli("dump-teacher", *words, "--set", f"teacher.{flag[2:]}=[0.5]") == 1
    assert "three channels" in capsys.readouterr().err


def own(name: str) -> list[str]:
    return [f"teacher.name=tests.models.plain:{name}", "teacher.kwargs={}",
            "teacher.mean=[0.5, 0.4, 0.3]", "teacher.std=[0.3, 0.2, 0.1]"]  # fmt: skip


def test_the_cache_keeps_the_teachers_rows_and_columns(small: World, tmp_path: Path) -> None:
    recipe = world.dump_recipe(small.shards, tmp_path / "cache", views=2)
    sets = [*world.dump_sets(views=2), *own("oblong"), "teacher.weights=random"]
    flags = {"data.shards": str(small.shards), "cache.path": str(tmp_path / "cache"),
             "dump.workers": 0, "dump.device": "cpu"}  # fmt: skip
    recipe = world.load_recipe(type(recipe), None, sets, flags)
    dump_teacher(recipe)
    reader = open_cache(tmp_path / "cache")
    assert reader.manifest.teacher.grid == (1, 2)
    for live in live_responses(small.shards, tmp_path / "cache"):
        rows = np.arange(len(live.global_))
        stored = reader.rows("dense", live.view, live.shard, rows)
        assert stored["dense/spatial"].shape[2:] == (1, 2)
        assert np.array_equal(stored["dense/spatial"], live.spatial)


def test_a_grid_for_smaller_images_causes_a_warning(
    small: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A network for at most 32 px, given 224."""
    for factory, rows, warned in (("every_pixel", 17, True), ("every_pixel", 16, False)):
        sets = [*own(factory), f"views.size={rows}", "teacher.weights=random"]
        flags = {"data.shards": str(small.shards), "dump.device": "cpu"}
        recipe = world.load_recipe(world.DumpRecipe, None, sets, flags)
        caplog.clear()
        open_stage_one(recipe)
        assert ("a grid of 17x17 locations, 2.32 kB per view" in caplog.text) == warned
        assert ("set views.size to their size" in caplog.text) == warned


def test_a_student_with_five_dimensional_weights_is_built(small: World, tmp_path: Path) -> None:
    sets = [*world.VIEWS, "run.channels_last=true"]
    recipe = world.train_recipe(
        small.shards, None, tmp_path, "none", sets, student="lambda_resnet26t", kwargs="{}"
    )
    trainer = Trainer(recipe, open_training_data(recipe).views, torch.device("cpu"))
    shapes = {parameter.ndim for parameter in trainer.student.parameters()}
    assert 5 in shapes
