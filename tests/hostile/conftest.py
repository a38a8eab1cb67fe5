"""Commands that must be refused within a memory limit, and a payload that shows if it ran."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cache.conftest import unsynced
from tests.faults.commands import Stages
from tests.pipeline import world
from tests.pipeline.conftest import World, small
from tests.processes import server

__all__ = ["small", "unsynced"]

MEMORY = 240 * 10**6
"""Bytes that a command may use beyond ``idle``, legitimate work included."""


@pytest.fixture
def stages(small: World, tmp_path: Path) -> Stages:
    return Stages(server(), small.shards, small.cache, tmp_path / "log")


@pytest.fixture(scope="session")
def idle(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Return the resident bytes of a command that does nothing."""
    log = tmp_path_factory.mktemp("idle") / "log"
    return server().run("--version", log=log).bytes


CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that move a terminal's cursor, set colours or reverse the text direction."""


def check_refusal(code: int, output: str) -> str:
    assert code in (1, 2), output
    assert "Traceback" not in output
    assert "error: " in output
    assert not CONTROL.search(output)
    return output


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command in this process and returns its refusal."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        code = world.cli(*arguments)
        return check_refusal(code, "".join(capsys.readouterr()))

    return run


@pytest.fixture
def bounded(tmp_path: Path, idle: int) -> Callable[..., str]:
    """Do the same in a separate process whose memory is measured."""

    def run(*arguments: object, memory: int = MEMORY) -> str:
        ended = server().run(*arguments, log=tmp_path / "log", limits={"AS": 4 * 10**9})
        assert ended.bytes - idle < memory, f"{(ended.bytes - idle) / 1e6:.0f} MB"
        return check_refusal(ended.code, ended.output)

    return run


class Payload:
    """Touches a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (subprocess.call, (["touch", str(self.marker)],))


@pytest.fixture
def payload(tmp_path: Path) -> Iterator[Payload]:
    """Yield a payload; fail if the test has run it."""
    payload = Payload(tmp_path / "it ran")
    yield payload
    assert not payload.marker.exists()
