"""One dumped cache for all pipeline tests that only read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from cskd_pipeline.pipeline.dump import dump_teacher
from cskd_pipeline.tools.make_shards import make_shards
from tests.pipeline import world


@dataclass(frozen=True)
class World:
    """``shards``: 96 images in 3 tars; ``validation``: 16; ``cache``: dense and envelope."""

    shards: Path
    validation: Path
    cache: Path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    world.draw_images(root / "images", per_class=24, seed=0)
    world.draw_images(root / "more", per_class=4, seed=1)
    make_shards(root / "images", root / "shards", shard_size=35)
    make_shards(root / "more", root / "validation", split="validation")
    created = World(root / "shards", root / "validation", root / "cache")
    dump_teacher(world.dump_recipe(created.shards, created.cache))
    return created


@pytest.fixture(scope="session")
def alone(small: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The loss curve of one process, for comparison with jobs of several ranks."""
    from tests.pipeline import test_distributed as ranks

    out = tmp_path_factory.mktemp("alone") / "run"
    ranks.run_in(1, ranks.train_args(small, out))
    return ranks.summary(out)
