"""The small world of the whole-pipeline tests, and processes to spoil it from."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from cskd_pipeline.cache.convert import Conversion, convert
from tests.faults.commands import Stages, Whole, left_by, used
from tests.pipeline.conftest import World, small
from tests.processes import server

__all__ = ["small"]


@pytest.fixture(scope="session")
def parts(small: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The small world's cache in two that overlap in one of its three tar shards."""
    folder = tmp_path_factory.mktemp("parts")
    for number in range(2):
        convert(small.cache, folder / f"{number}", Conversion(shards=(number, number + 2)))
    return folder / "0", folder / "1"


@pytest.fixture
def stages(small: World, parts: tuple[Path, Path], tmp_path: Path) -> Stages:
    """The commands that write, on the small world."""
    return Stages(server(), small.shards, small.cache, tmp_path / "log", parts)


@pytest.fixture(scope="session")
def whole(
    small: World, parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Whole]:
    """What a kind of command leaves when nothing happens to it."""
    root = tmp_path_factory.mktemp("whole")
    stages = Stages(server(), small.shards, small.cache, root / "log", parts)

    @cache
    def of(kind: str) -> Whole:
        started = time.monotonic()
        ended = stages.server.run(*getattr(stages, kind)(root / kind), log=stages.log)
        assert ended.code == 0, ended.output
        seconds = time.monotonic() - started
        return Whole(left_by(kind, root / kind), used(root / kind), seconds)

    return of
