"""Jobs that torchrun itself starts: on two nodes, and with a process that is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cskd_pipeline.cache.reader import open_cache
from tests.pipeline import test_distributed as test_ranks
from tests.pipeline import world
from tests.pipeline.conftest import World

SECONDS = 240  # far more than any of it takes, on a machine that does other things


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def torchrun(words: list[object], log: Path, *flags: object) -> Iterator[subprocess.Popen[bytes]]:
    """An agent and its processes, which are gone when the block ends."""
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


def workers(agent: int) -> list[int]:
    """The processes that an agent has started."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [
        int(pid)
        for pid in children
        if b"cskd_pipeline" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    ]


def test_two_nodes_give_the_loss_curve_of_one_process(small: World, tmp_path: Path) -> None:
    test_ranks.run_in(1, test_ranks.arguments(small, tmp_path / "alone"))
    words = test_ranks.arguments(small, tmp_path / "run")
    flags = ["--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "127.0.0.1"]
    flags += ["--master-port", free_port(), "--node-rank"]
    logs = [tmp_path / "node 0", tmp_path / "node 1"]
    with torchrun(words, logs[0], *flags, 0) as one, torchrun(words, logs[1], *flags, 1) as other:
        codes = [agent.wait(SECONDS) for agent in (one, other)]
    assert codes == [0, 0], [log.read_text() for log in logs]
    test_ranks.same_curve(
        test_ranks.summary(tmp_path / "run"), test_ranks.summary(tmp_path / "alone")
    )


def test_a_killed_process_takes_its_dump_down_and_nothing_is_lost(
    small: World, tmp_path: Path
) -> None:
    """The job ends with an error; the same command then makes what is left."""
    words = test_ranks.dump_words(small, tmp_path / "c", views=16)
    log = tmp_path / "log"
    with torchrun(words, log, "--standalone", "--nproc-per-node", 2) as agent:
        until = time.monotonic() + SECONDS
        while not list((tmp_path / "c").glob("digest/c/*/*")):
            assert agent.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.01)
        os.kill(workers(agent.pid)[-1], signal.SIGKILL)
        assert agent.wait(SECONDS) != 0
    assert "SIGKILL" in log.read_text()
    done = open_cache(tmp_path / "c").done()
    assert done.any()
    assert not done.all(), "killed too late to prove anything"
    assert world.cli(*words, "--quiet") == 0
    open_cache(tmp_path / "c").require_done()
