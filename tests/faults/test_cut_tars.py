"""A truncated tar is refused before or during training; samples are never dropped silently."""

from __future__ import annotations

import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import pytest

from cskd_pipeline.data.describe import index_shards
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.errors import ShardError
from cskd_pipeline.pipeline.from_recipe import make_loader
from cskd_pipeline.pipeline.training_data import open_training_data
from tests.faults.commands import Stages
from tests.pipeline import world
from tests.pipeline.conftest import World


@pytest.fixture(scope="module")
def one_tar(tmp_path_factory: pytest.TempPathFactory, small: World) -> Path:
    """A folder with one tar, its ``_info.json`` and its manifest."""
    folder = tmp_path_factory.mktemp("cut")
    shutil.copy(min(small.shards.glob("*.tar")), folder / "train.tar")
    count = len(load_dataset(folder / "train.tar", num_classes=4).shards[0])
    split = {"filenames": ["train.tar"], "shard_lengths": [count]}
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    index_shards(folder / "train.tar", num_classes=4).save(folder / "manifest.json")
    return folder


@pytest.mark.parametrize("spec", ["train.tar", "_info.json", "manifest.json"])
def test_a_tar_truncated_anywhere_is_refused(one_tar: Path, spec: str) -> None:
    """At both ends of every header, and at random offsets."""
    tar = one_tar / "train.tar"
    content = tar.read_bytes()
    with tarfile.open(tar) as opened:
        members = opened.getmembers()
    last = members[-1].offset_data + members[-1].size
    boundaries = [offset for m in members for offset in (m.offset, m.offset_data)]
    rng = random.Random(23)
    cuts = sorted({*boundaries, *(rng.randrange(last) for _ in range(100)), last})
    assert len(cuts) > 200
    try:
        for cut in cuts:
            tar.write_bytes(content[:cut])
            with pytest.raises(ShardError) as caught:
                load_dataset(one_tar / spec, num_classes=4)
            assert "train.tar" in str(caught.value)
    finally:
        tar.write_bytes(content)
    assert load_dataset(one_tar / spec, num_classes=4).samples == len(members) // 3


def test_a_tar_truncated_while_it_is_read_stops_the_run(stages: Stages, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(stages.shards, shards)
    recipe = world.train_recipe(shards, stages.cache, tmp_path / "run")
    tar = sorted(shards.glob("*.tar"))[1]
    content, rng = tar.read_bytes(), random.Random(24)
    for _ in range(5):
        loader = make_loader(recipe, open_training_data(recipe).views)
        os.truncate(tar, rng.randrange(len(content) // 2))
        with pytest.raises(ShardError, match="truncated while in use") as caught:
            list(loader)
        assert tar.name in str(caught.value)
        tar.write_bytes(content)
