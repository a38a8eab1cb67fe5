"""Commands in separate processes that start within milliseconds, to be killed and measured.

One server process imports the large libraries once, and nothing from this package. It forks itself
for every command, so a real process with real signals costs only the work it does.
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

PATIENCE = 120  # seconds: ample even on a busy machine


def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait until ``condition`` is true, and fail if it is not within ``seconds``.

    If the condition would become true on its own later, pass fewer seconds than that takes.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition is not true after {seconds} s"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Return whether a process exists and is no zombie; one that is being killed is alive."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "XZ"


@dataclass(frozen=True)
class Result:
    """The result of a command: ``code`` as ``Popen.returncode``, ``bytes`` of peak memory."""

    code: int
    bytes: int
    output: str


class Process:
    """A running command."""

    def __init__(self, server: Server, pid: int, log: Path) -> None:
        self._server, self.pid, self._log = server, pid, log

    def kill(self) -> Result:
        """Send SIGKILL, and wait."""
        os.kill(self.pid, signal.SIGKILL)  # until wait(), no other process gets this pid
        return self.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal; it has no effect if the command has ended."""
        os.kill(self.pid, number)

    def wait(self) -> Result:
        usage = self._server.request(wait=self.pid)
        output = self._log.read_text(encoding="utf-8", errors="replace")
        self._log.unlink()
        return Result(usage["code"], usage["bytes"], output)


class Server:
    """The process that forks itself for each command; see the module's docstring."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.request(ready=True)

    def request(self, **request: Any) -> Any:
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
        """Start ``cskd-pipeline`` with these arguments.

        Args:
            log: file for stdout and stderr; removed by :meth:`Process.wait`.
            limits: soft limits by name, without ``RLIMIT_``; ``AS`` is added to the server's size.
            environment: environment variables to set.
            code: Python code, or the path of a program, to run instead of ``cskd-pipeline``.
            session: start a new session, as a terminal does.
        """
        log.touch()  # a process killed at once writes none
        words = [str(word) for word in arguments]
        if isinstance(code, Path):
            code = f"import runpy; runpy.run_path({str(code)!r}, run_name='__main__')"
        options = {"limits": limits or {}, "environment": environment or {}, "session": session}
        pid = self.request(run=words, log=str(log), code=code, **options)
        return Process(self, pid, log)

    def run(self, *arguments: object, log: Path, **options: Any) -> Result:
        """Start a command with the options of :meth:`start`, and wait."""
        return self.start(*arguments, log=log, **options).wait()

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


@lru_cache
def server() -> Server:
    """Return the test session's only server."""
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
    gc.freeze()  # garbage collection in forked processes skips the libraries' objects
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            response: Any = os.fork() or _run(request)
        elif "wait" in request:
            response = _wait(request["wait"])
        else:
            response = None
        print(json.dumps(response), flush=True)


def _wait(pid: int) -> dict[str, int]:
    _, status, usage = os.wait4(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "bytes": usage.ru_maxrss * 1024}


def _run(request: dict[str, Any]) -> None:
    """Run the command in the forked child, and exit."""
    if request["session"]:
        os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
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
