"""Commands as processes of their own that start in milliseconds, to be killed and measured.

One server process loads the large libraries once, and nothing of this package. It forks a copy of
itself for every command, so a real process with real signals costs no more than the work it does.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

PATIENCE = 120  # seconds: far more than any of it takes, on a machine that does other things


def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait until ``condition`` is true, and fail if it is not within ``seconds``.

    Where it would come true by itself some day, give fewer seconds than that takes.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what the test waits for does not happen"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Return whether a process is there and no zombie; one that is being killed still is."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "XZ"


@dataclass(frozen=True)
class Ended:
    """How a command ended: ``code`` as ``Popen.returncode``, and its most resident ``bytes``."""

    code: int
    bytes: int
    output: str


class Process:
    """A command that runs."""

    def __init__(self, server: Server, pid: int, log: Path) -> None:
        self._server, self.pid, self._log = server, pid, log

    def kill(self) -> Ended:
        """SIGKILL, unless it has ended by itself."""
        os.kill(self.pid, signal.SIGKILL)  # it waits for wait(), so the number is not another's
        return self.wait()

    def send(self, number: signal.Signals) -> None:
        """A signal, unless it has ended by itself."""
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        found = self._server.ask(wait=self.pid)
        output = self._log.read_text(encoding="utf-8", errors="replace")
        self._log.unlink()
        return Ended(found["code"], found["bytes"], output)


class Server:
    """Forks itself for each command; see the module's docstring."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.ask(ready=True)

    def ask(self, **request: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(
        self,
        *arguments: object,
        log: Path,
        limits: dict[str, int] | None = None,
        environment: dict[str, str] | None = None,
        code: str | Path | None = None,
        session: bool = False,
    ) -> Process:
        """``cskd-pipeline`` with these arguments, or a program with them.

        Args:
            log: a file for stdout and stderr, gone when the process was waited for.
            limits: soft limits by name, without ``RLIMIT_``; ``AS`` is beyond what torch takes.
            environment: variables that differ from this process's.
            code: of the program, instead of the command's; a path is that of its file.
            session: in a group of processes of its own, as a terminal starts it.
        """
        log.touch()  # a process killed at once writes none
        words = [str(word) for word in arguments]
        if isinstance(code, Path):
            code = f"import runpy; runpy.run_path({str(code)!r}, run_name='__main__')"
        how = {"limits": limits or {}, "environment": environment or {}}
        pid = self.ask(run=words, log=str(log), code=code, session=session, **how)
        return Process(self, pid, log)

    def run(self, *arguments: object, log: Path, **options: Any) -> Ended:
        """:meth:`start`, with its options, and wait."""
        return self.start(*arguments, log=log, **options).wait()

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


@lru_cache
def server() -> Server:
    """The one server of a test session."""
    started = Server()
    atexit.register(started.close)
    return started


def _serve() -> None:
    import numba  # noqa: F401
    import timm  # noqa: F401
    import torch
    import webdataset  # noqa: F401
    from torch.utils import tensorboard  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # no collection in a forked process looks through what was loaded here
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            answer: Any = os.fork() or _run(request)
        elif "wait" in request:
            answer = _wait(request["wait"])
        else:
            answer = None
        print(json.dumps(answer), flush=True)


def _wait(pid: int) -> dict[str, int]:
    _, status, usage = os.wait4(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "bytes": usage.ru_maxrss * 1024}


def _run(request: dict[str, Any]) -> None:
    """In the forked child: run the command and end."""
    if request["session"]:
        os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    for name, limit in request["limits"].items():
        kind = getattr(resource, f"RLIMIT_{name}")
        if name == "AS":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit += pages * resource.getpagesize()
        resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
    os.environ.update(request["environment"])
    code = 70
    try:
        code = _command(request["run"], request["code"])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _command(words: list[str], code: str | None) -> int:
    if code is None:
        from cskd_pipeline.cli import main

        return main(words)
    sys.argv = ["-c", *words]
    exec(code, {"__name__": "__main__"})
    return 0


if __name__ == "__main__":
    _serve()
