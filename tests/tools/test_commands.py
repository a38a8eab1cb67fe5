"""Commands side by side: real processes, their summaries, failures and interruptions."""

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


def test_a_command_in_a_process_of_its_own_says_why_it_failed(tmp_path: Path) -> None:
    calls = {"look": ["cache", "info", tmp_path / "nothing"]}
    with pytest.raises(CskdError) as caught:
        list(side_by_side(calls, 2, tmp_path / "logs"))
    assert caught.value.problem.startswith("look: ")
    assert str(caught.value.where).startswith(str(tmp_path / "nothing"))
    assert "Traceback" not in (tmp_path / "logs/look.log").read_text()


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call's one word is Python to run instead of this program."""

    def start(words: Sequence[str], log: Path, own_group: bool) -> subprocess.Popen[bytes]:
        with open(f"{log}.json", "wb") as out, open(f"{log}.log", "wb") as err:
            return subprocess.Popen(
                [sys.executable, "-c", *words],
                stdout=out,
                stderr=err,
                start_new_session=own_group,
            )

    monkeypatch.setattr(commands, "_start", start)


def says(document: object, code: int = 0, after: float = 0.0) -> list[str]:
    text = json.dumps(document)
    return [f"import time, sys; time.sleep({after}); print({text!r}); sys.exit({code})"]


TOLD = {"problem": "p", "where": "w", "found": "f", "expected": None, "action": "a", "problems": []}
SLEEP = ["import time; time.sleep(60)"]


def patient(ready: Path, told: Path) -> list[str]:
    """Runs until SIGTERM, and then writes ``told``."""
    return [
        "import signal, sys, time, pathlib\n"
        f"def stop(*_): pathlib.Path({str(told)!r}).touch(); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)"
    ]


@pytest.mark.usefixtures("scripts")
def test_summaries_come_by_name_as_they_end(tmp_path: Path) -> None:
    calls = {"slow": says({"n": 1}, after=1.0), "quick": says({"n": 2}), "last": says({"n": 3})}
    found = list(side_by_side(calls, 2, tmp_path))
    assert found == [("quick", {"n": 2}), ("last", {"n": 3}), ("slow", {"n": 1})]


@pytest.mark.usefixtures("scripts")
def test_never_more_than_asked_run_at_once(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, time, json\n"
        f"mine = pathlib.Path({str(tmp_path)!r}, f'alive-{{os.getpid()}}'); mine.touch()\n"
        "time.sleep(0.2); print(json.dumps({'alive': len(list(mine.parent.glob('alive-*')))}))\n"
        "mine.unlink()"
    )
    calls = {str(n): [code] for n in range(5)}
    found = list(side_by_side(calls, 2, tmp_path / "logs"))
    assert len(found) == 5
    assert max(summary["alive"] for _, summary in found) <= 2


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize(
    ("failing", "told"),
    [
        (says({"error": TOLD}, 1), "bad: p\n  where:    w\n  found:    f\n  to do:    a"),
        (["import os; os.kill(os.getpid(), 9)"], "found:    signal 9"),
        (says([1]), "found:    exit code 0"),
        (["print('no JSON')"], "found:    exit code 0"),
        (says({"error": "text"}, 3), "found:    exit code 3"),
    ],
)  # fmt: skip
def test_one_that_fails_stops_the_others_kindly(
    failing: list[str], told: str, tmp_path: Path
) -> None:
    ready, asked = tmp_path / "ready", tmp_path / "asked"
    wait = f"import time, pathlib\nwhile not pathlib.Path({str(ready)!r}).exists(): time.sleep(.01)"
    failing = [f"{wait}\n{failing[0]}"]
    started = time.monotonic()
    calls = {"other": patient(ready, asked), "bad": failing, "never": SLEEP}
    with pytest.raises(CskdError) as caught:
        list(side_by_side(calls, 2, tmp_path / "logs"))
    assert told in str(caught.value)
    assert asked.exists()
    assert time.monotonic() - started < 50
    assert not (tmp_path / "logs/never.log").exists()


@pytest.mark.usefixtures("scripts")
def test_a_caller_that_stops_leaves_no_process(tmp_path: Path) -> None:
    ready, asked = tmp_path / "ready", tmp_path / "asked"
    quick = [f"import time, pathlib\nwhile not pathlib.Path({str(ready)!r}).exists(): "
             "time.sleep(.01)\nprint('{}')"]  # fmt: skip
    running = side_by_side({"a": patient(ready, asked), "b": quick}, 2, tmp_path / "l")
    assert next(running) == ("b", {})
    running.close()  # as an exception at the caller's would
    assert asked.exists()


@pytest.mark.usefixtures("scripts")
def test_one_that_does_not_stop_is_killed_with_what_it_started(tmp_path: Path) -> None:
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
    assert time.monotonic() - started < 10
    until(lambda: not alive(int(inner.read_text())), seconds=30)  # it sleeps for 60
