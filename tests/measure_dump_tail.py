"""Measure how long a dump's ranks wait for a slow one, with units from a counter or equal shares.

``python -m tests.measure_dump_tail`` prints a line for each of three cases and both assignments:
the seconds of the dump, and of its tail, from the last unit of the other ranks to the end. Three
ranks write 48 units of 0.25 s each; rank 1 is as fast as the others, stopped (SIGSTOP) for 4 s, or
four times as slow.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cskd_pipeline.cache.units import Unit
from cskd_pipeline.pipeline.unit_writer import UndoneUnits, UnitWriter
from tests.pipeline import test_distributed as ranks
from tests.pipeline import world
from tests.pipeline.test_elastic import Dump

UNIT, STOPPED = 0.25, 4.0  # seconds


def equal_shares(self: UndoneUnits) -> Iterator[Iterator[Unit]]:
    """Yield the rank's units, assigned before the dump starts."""
    yield filter(self._claim, self.units[self.ranks.rank :: self.ranks.world])


def logged_write(log: Path, slow: bool) -> Any:
    """Return a ``UnitWriter._write`` that takes ``UNIT`` seconds and logs its end."""
    original = UnitWriter._write

    def write(self: UnitWriter, *arguments: Any) -> None:
        rank = os.environ["RANK"]
        time.sleep(UNIT * (4 if slow and rank == "1" else 1))
        original(self, *arguments)
        with open(log, "a") as file:
            file.write(json.dumps([rank, time.time()]) + "\n")

    return write


def measure(dump: Dump, folder: Path, case: str) -> tuple[float, float, list[int]]:
    """Return the seconds of the dump, of its tail, and the number of units of each rank."""
    log, original = folder / "log", UnitWriter._write
    UnitWriter._write = logged_write(log, case == "slow")  # type: ignore[method-assign]
    started = ranks.start(3, dump.words(folder / "c"))
    UnitWriter._write = original  # type: ignore[method-assign]
    while not log.exists() or '"1"' not in log.read_text():
        time.sleep(0.01)
    if case == "stopped":
        os.kill(started[1].pid, signal.SIGSTOP)
        threading.Timer(STOPPED, os.kill, (started[1].pid, signal.SIGCONT)).start()
    assert ranks.finish(started, 600) == [0, 0, 0]
    assert world.cache_files(folder / "c") == dump.bytes
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    first, last = min(at for _, at in rows), max(at for _, at in rows)
    others = max(at for rank, at in rows if rank != "1")
    return last - first, last - others, [sum(r == str(n) for r, _ in rows) for n in range(3)]


def main() -> None:
    table = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discards the dumps' own output
    with tempfile.TemporaryDirectory() as root:
        dump, counter = Dump(Path(root)), UndoneUnits.rounds
        print("rank 1     units        seconds   tail   units of each rank", file=table)
        for case in ("equal", "stopped", "slow"):
            for name, rounds in (("counter", counter), ("equal", equal_shares)):
                UndoneUnits.rounds = rounds  # type: ignore[method-assign]
                folder = Path(root) / f"{case} {name}"
                folder.mkdir()
                seconds, tail, units = measure(dump, folder, case)
                line = f"{case:10} {name:10} {seconds:9.1f} {tail:6.1f}   {units}"
                print(line, file=table)


if __name__ == "__main__":
    main()
