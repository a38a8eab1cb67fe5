"""One process claims each unit, and the claims of ended processes expire."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cskd_pipeline.cache import claims as module
from cskd_pipeline.cache.claims import FOLDER, Claims
from cskd_pipeline.cache.units import Unit
from cskd_pipeline.errors import OutputError
from cskd_pipeline.runtime import processes
from cskd_pipeline.runtime.processes import has_ended, identify
from tests.clock import FakeClock

ONE, TWO = Unit(0, 1, range(2)), Unit(3, 0, range(6, 8))
PATIENCE = 60.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """Replace the clock of all claims."""
    clock = FakeClock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock))
    return clock


def claims(root: Path) -> Claims:
    return Claims(root, PATIENCE)


def foreign_claim(root: Path, unit: Unit, **changes: Any) -> Path:
    """Write the claim of a process that sends no heartbeat."""
    path = root / FOLDER / f"{unit.block}.{unit.shard}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**identify(os.getpid()), "claim": "another", **changes}))
    return path


def test_a_unit_has_one_owner_until_it_is_released(tmp_path: Path) -> None:
    one, other = claims(tmp_path), claims(tmp_path)
    assert one.take(ONE)
    assert not other.take(ONE)
    assert other.take(TWO)
    one.drop(ONE)
    assert other.take(ONE)
    other.drop_all()
    assert not list(tmp_path.iterdir())
    one.drop_all()  # harmless without claims


def test_concurrent_processes_never_claim_the_same_unit(tmp_path: Path) -> None:
    units = [Unit(block, 0, range(1)) for block in range(100)]
    context = multiprocessing.get_context("fork")
    results, finished = context.SimpleQueue(), context.Event()

    def work() -> None:
        own = claims(tmp_path)
        results.put([unit.block for unit in units if own.take(unit)])
        finished.wait()
        os._exit(0)

    started = [context.Process(target=work) for _ in range(4)]
    for process in started:
        process.start()
    taken = [block for _ in started for block in results.get()]
    assert sorted(taken) == list(range(100))
    finished.set()
    for process in started:
        process.join()
    after = claims(tmp_path)
    assert all(after.take(unit) for unit in units)  # their owners have ended


def test_a_claim_without_a_heartbeat_expires(tmp_path: Path, clock: FakeClock) -> None:
    """The owning process is alive or on another machine."""
    for unit, changes in ((ONE, {}), (TWO, {"boot": "another", "pid": 2**22, "started": "1"})):
        path = foreign_claim(tmp_path, unit, **changes)
        os.utime(path, (0, 0))  # clocks do not matter
        own = claims(tmp_path)
        assert not own.take(unit)
        clock.advance(PATIENCE)
        os.utime(path, (2**31, 2**31))  # a heartbeat
        assert not own.take(unit)
        clock.advance(PATIENCE)
        assert not own.take(unit)
        clock.advance(1)
        assert own.take(unit)
        assert '"another"' not in path.read_text()


def test_a_claim_whose_owner_was_killed_before_naming_itself_expires_sooner(
    tmp_path: Path, clock: FakeClock
) -> None:
    foreign_claim(tmp_path, ONE).write_text("")
    own = claims(tmp_path)
    assert not own.take(ONE)  # it may be about to name itself
    clock.advance(10)
    assert not own.take(ONE)
    clock.advance(1)
    assert own.take(ONE)


def test_heartbeats_keep_a_claim(tmp_path: Path, clock: FakeClock) -> None:
    one, other = claims(tmp_path), claims(tmp_path)
    assert one.take(ONE)
    for _ in range(60):
        assert not other.take(ONE)
        clock.advance(PATIENCE / 20)
        time.sleep(0.01)  # modification times are exact to a tick of the kernel
        one.renew()


def test_a_claim_taken_over_is_not_released_by_its_first_owner(
    tmp_path: Path, clock: FakeClock
) -> None:
    one, other, third = (claims(tmp_path) for _ in range(3))
    assert one.take(ONE)
    assert not other.take(ONE)
    clock.advance(PATIENCE + 1)
    assert other.take(ONE)
    one.drop_all()
    assert not third.take(ONE)


def test_an_ended_process_is_identified_by_more_than_its_pid(tmp_path: Path) -> None:
    own = identify(os.getpid())
    assert not has_ended(json.dumps(own))
    assert has_ended(json.dumps({**own, "started": "1"}))  # an earlier process with the same id
    for field in ("host", "boot", "namespace"):
        assert not has_ended(json.dumps({**own, "started": "1", field: "another"}))
    for text in ("", "{", "[1]", "[" * 100_000, json.dumps({**own, "pid": "x"}), '{"pid": 1e999}'):
        assert not has_ended(text)


def test_without_proc_only_missing_heartbeats_end_a_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.dumps({**identify(os.getpid()), "started": "1"})

    def no_such_file(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(processes.Path, "read_text", no_such_file)
    assert not has_ended(before)
    assert not has_ended(json.dumps(identify(os.getpid())))


def test_links_and_fifos_among_the_claims_are_harmless(tmp_path: Path, clock: FakeClock) -> None:
    outside, cache = tmp_path / "outside", tmp_path / "cache"
    (cache / FOLDER).mkdir(parents=True)
    outside.write_text("mine")
    (cache / FOLDER / "0.1").symlink_to(outside)
    os.mkfifo(cache / FOLDER / "3.0")
    own = claims(cache)
    for unit in (ONE, TWO):
        assert not own.take(unit)
        clock.advance(PATIENCE + 1)
        assert own.take(unit)
    own.sweep()
    assert outside.read_text() == "mine"
    (cache / FOLDER).symlink_to(tmp_path)
    with pytest.raises(OutputError, match="leads out of it"):
        own.take(ONE)
