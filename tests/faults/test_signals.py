"""A scheduler's signals at random moments: work is kept, and the exit code requests a requeue."""

from __future__ import annotations

import os
import pty
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cskd_pipeline.models.train_state import load_state
from tests.faults.commands import Reference, Stages, output_of


def has_handler(pid: int, number: signal.Signals) -> bool:
    """Return whether the process has installed a handler for the signal."""
    status = Path(f"/proc/{pid}/status").read_text().split()
    return bool(int(status[status.index("SigCgt:") + 1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("dump", signal.SIGTERM),
        ("convert", signal.SIGHUP),
        ("merge", signal.SIGUSR1),
        ("train", signal.SIGUSR1),
    ],
)
def test_a_command_stopped_by_a_scheduler_continues_when_requeued(
    kind: str,
    number: signal.Signals,
    stages: Stages,
    reference: Callable[[str], Reference],
    tmp_path: Path,
) -> None:
    command, out = getattr(stages, kind), tmp_path / "out"
    expected, _, seconds = reference(kind)
    moments = random.Random(f"{kind} {number}")
    for _ in range(2):
        process = stages.server.start(*command(out), log=stages.log)
        while not has_handler(process.pid, number):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, seconds / 3))
        process.send(number)
        result = process.wait()
        assert result.code in (0, 75), result.output
        if result.code == 75:
            assert f"error: stopped by {number.name}\n" in result.output
            assert "continue with" in result.output
        assert "Traceback" not in result.output
    result = stages.server.run(*command(out), log=stages.log)
    assert result.code == 0, result.output
    assert output_of(kind, out) == expected


def test_a_run_whose_terminal_is_closed_saves_its_state(stages: Stages, tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and writes to the terminal fail."""
    out = tmp_path / "run"
    words = [str(word) for word in stages.train(out) if word != "--quiet"]
    words[words.index("--epochs") + 1] = "5000"
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "cskd_pipeline", *words])
    while not (out / "state.pt").exists():
        os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    before = load_state(out / "state.pt")["update"]
    assert before > 0
    assert not list(out.glob(".*.partial"))
