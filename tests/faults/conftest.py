"""The small data set of the pipeline tests, and commands that write from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from cskd_pipeline.cache.convert import Conversion, convert
from tests.faults.commands import Reference, Stages, disk_usage, output_of
from tests.pipeline.conftest import World, small
from tests.processes import server

__all__ = ["small"]


@pytest.fixture(scope="session")
def parts(small: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two caches that together equal the small one and share one of its three tar shards."""
    folder = tmp_path_factory.mktemp("parts")
    for number in range(2):
        convert(small.cache, folder / f"{number}", Conversion(shards=(number, number + 2)))
    return folder / "0", folder / "1"


@pytest.fixture
def stages(small: World, parts: tuple[Path, Path], tmp_path: Path) -> Stages:
    """Commands that write, on the small data set."""
    return Stages(server(), small.shards, small.cache, tmp_path / "log", parts)


@pytest.fixture(scope="session")
def reference(
    small: World, parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Reference]:
    """Return a function that runs a kind of command undisturbed, once."""
    root = tmp_path_factory.mktemp("reference")
    stages = Stages(server(), small.shards, small.cache, root / "log", parts)

    @cache
    def run(kind: str) -> Reference:
        started = time.monotonic()
        result = stages.server.run(*getattr(stages, kind)(root / kind), log=stages.log)
        assert result.code == 0, result.output
        seconds = time.monotonic() - started
        return Reference(output_of(kind, root / kind), disk_usage(root / kind), seconds)

    return run
