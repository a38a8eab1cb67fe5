"""Shards of handwritten digits and a cache of them, shared by all examples."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from cskd_pipeline.config.reading import load_recipe
from cskd_pipeline.config.sections import DumpRecipe
from cskd_pipeline.pipeline.dump import dump_teacher
from cskd_pipeline.tools.demo_images import write_digit_folders
from cskd_pipeline.tools.make_shards import make_shards

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
STUDENT: dict[str, Any] = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
"""A student with 6 x 6 tokens at the demo's 48 pixels."""


class Digits(NamedTuple):
    """96 images in 2 tars, and a cache of the demo's teacher, untrained."""

    shards: str
    cache: str


def make_digits(root: Path, *sets: str) -> Digits:
    """Write shards and cache below ``root``; ``sets`` are ``--set`` values on the demo recipe."""
    write_digit_folders(root / "images", train=96, validation=1, seed=0)
    make_shards(root / "images/train", root / "shards", shard_size=60)
    flags = {
        "data.shards": str(root / "shards"),
        "cache.path": str(root / "cache"),
        "dump.workers": 0,
        "dump.device": "cpu",
    }
    dump_teacher(load_recipe(DumpRecipe, "demo", sets, flags))
    return Digits(str(root / "shards"), str(root / "cache"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """Return shards and a cache with 4 views of each image."""
    return make_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def example() -> Callable[[str], ModuleType]:
    """Return a function that loads an example as a module, by file name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
