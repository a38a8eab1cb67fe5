"""A job started by torchrun on two nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.pipeline import test_distributed as test_ranks
from tests.pipeline import world
from tests.pipeline.conftest import World

SECONDS = 240  # far more than needed, even on a busy machine


@contextmanager
def torchrun(words: list[object], log: Path, *flags: object) -> Iterator[subprocess.Popen[bytes]]:
    """Start an agent; end it and its processes with the block."""
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, flags)]
    command += ["-m", "cskd_pipeline", *map(str, words)]
    with open(log, "wb") as file:
        agent = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        yield agent
    finally:
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()


def test_two_nodes_reproduce_the_loss_curve_of_one_process(
    small: World, tmp_path: Path, alone: list[dict[str, float]]
) -> None:
    words = test_ranks.train_args(small, tmp_path / "run")
    flags = ["--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "127.0.0.1"]
    flags += ["--master-port", world.free_port(), "--node-rank"]
    logs = [tmp_path / "node 0", tmp_path / "node 1"]
    with torchrun(words, logs[0], *flags, 0) as one, torchrun(words, logs[1], *flags, 1) as other:
        codes = [agent.wait(SECONDS) for agent in (one, other)]
    assert codes == [0, 0], [log.read_text() for log in logs]
    test_ranks.assert_same_curve(test_ranks.summary(tmp_path / "run"), alone)
