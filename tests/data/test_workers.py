"""Loader processes: errors arrive as raised, interrupts are silent, deaths are reported."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from torch.utils.data import Dataset, get_worker_info

from cskd_pipeline.data.workers import Loader
from cskd_pipeline.errors import DataError, ImageError
from cskd_pipeline.runtime import signals
from tests.processes import PATIENCE, until

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

ERROR = ImageError("bad", where="a.tar: k", found=3, expected="4", action="act", problems=["p"])


class Squares(Dataset[int]):
    def __init__(self, kind: str = "") -> None:
        self.kind = kind

    def __getitem__(self, number: int) -> int:
        if number == 3 and self.kind == "ours":
            raise ERROR
        if number == 3 and self.kind == "bug":
            raise ZeroDivisionError
        if number == 3 and self.kind == "runtime":
            raise RuntimeError("of the data set")
        if number == 3 and self.kind == "local":

            class OnTheFlyError(Exception):
                pass

            raise OnTheFlyError("unknown type")
        if number == 3 and self.kind == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if number == 3 and self.kind == "killed":
            assert get_worker_info() is not None
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_items_come_in_order(workers: int) -> None:
    order = [4, 0, 2, 9, 1, 1]
    assert list(Loader(Squares(), order, workers=workers)) == [n * n for n in order]


@pytest.mark.parametrize("workers", [0, 2])
def test_our_errors_arrive_as_raised_and_in_order(workers: int) -> None:
    with pytest.raises(ImageError) as caught:
        list(Loader(Squares("ours"), range(6), workers=workers))
    assert type(caught.value) is ImageError
    assert vars(caught.value) == vars(ERROR)
    assert str(caught.value) == str(ERROR)


@pytest.mark.parametrize("workers", [0, 2])
def test_indices_are_taken_when_a_process_can_start_on_them(workers: int) -> None:
    taken = []
    order = (taken.append(number) or number for number in range(100))
    loader = iter(Loader(Squares(), order, workers=workers))
    assert [next(loader) for _ in range(3)] == [0, 1, 4]
    assert len(taken) == 3 + 2 * workers


def test_items_before_an_error_are_delivered() -> None:
    loader = iter(Loader(Squares("ours"), range(6), workers=2))
    assert [next(loader) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(ImageError):
        next(loader)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="raise ZeroDivisionError"):
        list(Loader(Squares("bug"), range(6), workers=1))


def test_a_bug_is_not_reported_as_a_dead_process() -> None:
    with pytest.raises(RuntimeError, match="of the data set"):
        list(Loader(Squares("runtime"), range(6), workers=1))


def test_an_error_of_a_local_type_is_not_lost() -> None:
    """torch's queue drops items that cannot be pickled, and the parent would wait for them."""
    with pytest.raises(RuntimeError, match="OnTheFlyError: unknown type"):
        list(Loader(Squares("local"), range(6), workers=1))


def test_a_dead_process_is_reported_with_the_usual_cause() -> None:
    with pytest.raises(DataError, match="a loader process died") as caught:
        list(Loader(Squares("killed"), range(6), workers=1))
    assert "DataLoader worker (pid" in str(caught.value.found)
    assert "the usual cause is too little memory" in str(caught.value.action)


def test_a_stopped_process_times_out_and_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cskd_pipeline.data.workers.PATIENCE", 1)
    before = set(multiprocessing.active_children())
    with pytest.raises(DataError, match="the loader processes timed out") as caught:
        list(Loader(Squares("stopped"), range(6), workers=1))
    assert "1 seconds" in str(caught.value.found)
    assert not set(multiprocessing.active_children()) - before


SLOW = """
import os, signal, sys, time
from torch.utils.data import Dataset
from cskd_pipeline.data.workers import Loader

if __name__ == "__main__":  # a background job starts without it
    signal.signal(signal.SIGINT, signal.default_int_handler)

class Slow(Dataset):
    def __getitem__(self, number):
        time.sleep(0.05)
        return number
"""
STOPPING = f"""{SLOW}
try:
    for number in Loader(Slow(), range(10_000), workers=2):
        print(number, flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""
STARTING = f"""{SLOW}
if __name__ == "__main__":
    try:
        print("0\\n1\\n2", flush=True)
        list(Loader(Slow(), range(10_000), workers=1, start_method="spawn"))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)
"""
FINISHING = f"""{SLOW}
def say(stop, _):
    os.write(1, f"stopped by {{int(stop)}}\\n".encode())

for number in Loader(Slow(), range(60), workers=2):
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(stop, say)
    print(number, flush=True)
"""


@contextmanager
def started(program: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a program in its own process group; yield after three items, and end it afterwards."""
    (folder / "program.py").write_text(program)
    process = subprocess.Popen(
        [sys.executable, str(folder / "program.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for number in range(3):
            assert process.stdout.readline() == f"{number}\n"
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def any_alive(session: int) -> bool:
    """Return whether any process of the session is alive and not a zombie."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return True
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("program", [STOPPING, STARTING])
def test_ctrl_c_ends_all_processes_silently(tmp_path: Path, program: str) -> None:
    with started(program, tmp_path) as process:
        time.sleep(0.5 * (program is STARTING))  # its process is importing now
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output, errors = process.communicate(timeout=PATIENCE)
        until(lambda: not any_alive(process.pid))
    assert process.returncode == 130
    assert output.endswith("interrupted\n")
    assert errors == ""


def test_a_parent_that_continues_after_a_signal_keeps_its_processes(tmp_path: Path) -> None:
    """Stage two finishes its update and saves before it stops, and needs its loader meanwhile.

    Terminals send SIGINT and SIGHUP to every process of a group, Slurm and timeout SIGTERM, and
    Slurm SIGUSR1 on request.
    """
    lines: list[str] = []
    with started(FINISHING, tmp_path) as process:
        assert process.stdout is not None
        for number in signals.STOPPING:
            os.killpg(process.pid, number)
            while f"stopped by {int(number)}" not in lines:
                lines.append(process.stdout.readline().removesuffix("\n"))
        output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, "")
    lines += output.splitlines()
    assert [line for line in lines if line.isdigit()] == list(map(str, range(3, 60)))
    assert len(lines) == 57 + len(signals.STOPPING)
