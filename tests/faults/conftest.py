"""The small world of the whole-pipeline tests, and processes to spoil it from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.commands import Stages
from tests.pipeline.conftest import small
from tests.processes import server

__all__ = ["small"]


@pytest.fixture
def stages(small: Any, tmp_path: Path) -> Stages:
    """The three commands that write, on the small world."""
    return Stages(server(), small.shards, small.cache, tmp_path / "log")
