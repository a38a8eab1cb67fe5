"""Tars are fetched in the order of their use, within the limit on copies."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import Dataset

from cskd_pipeline.data import read_ahead
from cskd_pipeline.data.read_ahead import ReadAhead, Use, uses_of
from cskd_pipeline.data.remote_tar import RemoteTar
from cskd_pipeline.data.workers import Loader
from cskd_pipeline.errors import RemoteError
from tests.processes import until


def tar(number: int, size: int = 100) -> RemoteTar:
    return RemoteTar(f"https://host/{number}.tar", size, "", True)


class Fetched:
    """A stand-in for the network that records the tars fetched, in order."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.failing: set[int] = set()
        self.lock = threading.Lock()

    def fetch(self, tar: RemoteTar) -> None:
        number = int(tar.url.rpartition("/")[2].removesuffix(".tar"))
        with self.lock:
            self.numbers.append(number)
        if number in self.failing:
            raise RemoteError("the shards cannot be reached", where=tar)

    def until(self, numbers: list[int]) -> None:
        """Wait until these tars were fetched, and no others."""
        until(lambda: len(self.numbers) >= len(numbers))
        time.sleep(0.05)
        assert sorted(self.numbers) == sorted(numbers)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Fetched:
    found = Fetched()
    monkeypatch.setattr(RemoteTar, "fetch", lambda self: found.fetch(self))
    monkeypatch.setattr(read_ahead, "room_of", lambda tars: 500)
    return found


def test_uses_are_ordered_by_the_first() -> None:
    tars = [tar(0), Path("here.tar"), tar(2)]
    uses = uses_of(tars, np.array([2, 1, 2, 0, 0]), np.array([0, 0, 1, 1, 2]))
    assert uses == [Use(tars[2], 0, 1), Use(tars[0], 1, 2)]  # type: ignore[arg-type]


def test_tars_are_fetched_into_half_of_the_room(fetched: Fetched) -> None:
    tars = [tar(number) for number in range(5)]
    ahead = ReadAhead(tars, [Use(t, n, n) for n, t in enumerate(tars)], horizon=100)
    fetched.until([])  # nothing before the loader's processes exist
    ahead.start()
    fetched.until([0, 1])
    ahead.advance(1)  # tar 0 is not needed any more
    fetched.until([0, 1, 2])
    ahead.advance(4)  # the reader is beyond tar 3
    fetched.until([0, 1, 2, 4])
    ahead.close()


def test_fetching_starts_with_the_loaders_processes_at_the_readers_position(
    fetched: Fetched,
) -> None:
    """Before the first item, which may wait for a tar; earlier tars are skipped."""
    seen: list[list[int]] = []

    class Items(Dataset[int]):
        def __getitem__(self, number: int) -> int:
            fetched.until([2, 3])
            seen.append(sorted(fetched.numbers))
            return number

    tars = [tar(number) for number in range(4)]
    uses = [Use(t, n, n) for n, t in enumerate(tars)]
    ahead = ReadAhead(tars, uses, horizon=9, position=2)
    assert list(ahead.over(Loader(Items(), [2, 3]))) == [2, 3]
    assert seen == [[2, 3], [2, 3]]


def test_nothing_beyond_the_horizon_is_fetched(fetched: Fetched) -> None:
    tars = [tar(0, 1), tar(1, 1)]
    endless = (Use(tars[n % 2], n, n) for n in range(10**9))
    ahead = ReadAhead(tars, endless, horizon=3)
    ahead.start()
    fetched.until([0, 1, 0, 1])
    ahead.close()


def test_a_tar_that_fails_is_left_to_its_reader(fetched: Fetched) -> None:
    fetched.failing = {0}
    tars = [tar(0), tar(1)]
    ahead = ReadAhead(tars, [Use(t, n, n) for n, t in enumerate(tars)], horizon=9)
    ahead.start()
    fetched.until([0, 1])
    ahead.close()


def test_nothing_is_fetched_after_closing(fetched: Fetched) -> None:
    tars = [tar(number) for number in range(5)]
    ahead = ReadAhead(tars, [Use(t, n, n) for n, t in enumerate(tars)], horizon=9)
    ahead.start()
    fetched.until([0, 1])
    ahead.close()
    ahead.advance(4)
    fetched.until([0, 1])


def test_local_tars_start_no_threads() -> None:
    before = threading.active_count()
    ahead = ReadAhead([Path("a.tar")], [], horizon=9)
    ahead.start()
    assert threading.active_count() == before
