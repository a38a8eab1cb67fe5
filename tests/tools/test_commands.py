"""Commands run in parallel processes: summaries, failures and interruptions."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from cskd_pipeline.errors import CskdError
from cskd_pipeline.tools import commands
from cskd_pipeline.tools.commands import side_by_side
from tests.processes import alive, until


def test_a_command_in_a_separate_process_reports_its_error(tmp_path: Path) -> None:
    calls = {"info": ["cache", "info", tmp_path / "absent"]}
    with pytest.raises(CskdError) as caught:
        list(side_by_side(calls, 2, tmp_path / "logs"))
    assert caught.value.problem.startswith("info: ")
    assert str(caught.value.where).startswith(str(tmp_path / "absent"))
    assert "Traceback" not in (tmp_path / "logs/info.log").read_text()


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a call's only argument as Python code instead of this program."""

    def start(words: Sequence[str], log: Path, own_group: bool) -> subprocess.Popen[bytes]:
        with open(f"{log}.json", "wb") as out, open(f"{log}.log", "wb") as err:
            return subprocess.Popen(
                [sys.executable, "-c", *words],
                stdout=out,
                stderr=err,
                start_new_session=own_group,
            )

    monkeypatch.setattr(commands, "_start", start)


def emit(document: object, code: int = 0, after: float = 0.0) -> list[str]:
    text = json.dumps(document)
    return [f"import time, sys; time.sleep({after}); print({text!r}); sys.exit({code})"]


FAIL = {"problem": "p", "where": "w", "found": "f", "expected": None, "action": "a", "problems": []}
SLEEP = ["import time; time.sleep(60)"]


def until_stopped(ready: Path, stopped: Path) -> list[str]:
    """Return a script that creates ``ready``, runs until SIGTERM, and creates ``stopped``."""
    return [
        "import signal, sys, time, pathlib\n"
        f"def stop(*_): pathlib.Path({str(stopped)!r}).touch(); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)"
    ]


@pytest.mark.usefixtures("scripts")
def test_summaries_are_yielded_as_commands_end(tmp_path: Path) -> None:
    calls = {"slow": emit({"n": 1}, after=1.0), "quick": emit({"n": 2}), "last": emit({"n": 3})}
    summaries = list(side_by_side(calls, 2, tmp_path))
    assert summaries == [("quick", {"n": 2}), ("last", {"n": 3}), ("slow", {"n": 1})]


@pytest.mark.usefixtures("scripts")
def test_no_more_processes_than_requested_run_at_once(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, time, json\n"
        f"mine = pathlib.Path({str(tmp_path)!r}, f'alive-{{os.getpid()}}'); mine.touch()\n"
        "time.sleep(0.2); print(json.dumps({'alive': len(list(mine.parent.glob('alive-*')))}))\n"
        "mine.unlink()"
    )
    calls = {str(n): [code] for n in range(5)}
    summaries = list(side_by_side(calls, 2, tmp_path / "logs"))
    assert len(summaries) == 5
    assert max(summary["alive"] for _, summary in summaries) <= 2


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize(
    ("failing", "text"),
    [
        (emit({"error": FAIL}, 1), "bad: p\n  where:    w\n  found:    f\n  to do:    a"),
        (["import os; os.kill(os.getpid(), 9)"], "found:    signal 9"),
        (emit([1]), "found:    exit code 0"),
        (["print('no JSON')"], "found:    exit code 0"),
        (emit({"error": "text"}, 3), "found:    exit code 3"),
    ],
)  # fmt: skip
def test_a_failure_terminates_the_other_commands(
    failing: list[str], text: str, tmp_path: Path
) -> None:
    ready, stopped = tmp_path / "ready", tmp_path / "stopped"
    wait = f"import time, pathlib\nwhile not pathlib.Path({str(ready)!r}).exists(): time.sleep(.01)"
    failing = [f"{wait}\n{failing[0]}"]
    started = time.monotonic()
    calls = {"other": until_stopped(ready, stopped), "bad": failing, "never": SLEEP}
    with pytest.raises(CskdError) as caught:
        list(side_by_side(calls, 2, tmp_path / "logs"))
    assert text in str(caught.value)
    assert stopped.exists()
    assert time.monotonic() - started < 50
    assert not (tmp_path / "logs/never.log").exists()


@pytest.mark.usefixtures("scripts")
def test_closing_the_generator_stops_its_processes(tmp_path: Path) -> None:
    ready, stopped = tmp_path / "ready", tmp_path / "stopped"
    quick = [f"import time, pathlib\nwhile not pathlib.Path({str(ready)!r}).exists(): "
             "time.sleep(.01)\nprint('{}')"]  # fmt: skip
    running = side_by_side({"a": until_stopped(ready, stopped), "b": quick}, 2, tmp_path / "l")
    assert next(running) == ("b", {})
    running.close()  # as if the caller had raised
    assert stopped.exists()


@pytest.mark.usefixtures("scripts")
def test_a_process_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    stubborn = [
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"if os.fork() == 0: pathlib.Path({str(inner)!r}).write_text(str(os.getpid()) + ' ')\n"
        "time.sleep(60)"
    ]
    quick = [
        f"import time, pathlib\np = pathlib.Path({str(inner)!r})\n"
        "while not p.exists() or not p.read_text().endswith(' '): time.sleep(.01)\nprint('{}')"
    ]
    running = side_by_side({"a": stubborn, "b": quick}, 2, tmp_path / "l", grace=0.1)
    assert next(running) == ("b", {})
    started = time.monotonic()
    running.close()
    assert time.monotonic() - started < 50
    until(lambda: not alive(int(inner.read_text())), seconds=30)  # it sleeps for 60
