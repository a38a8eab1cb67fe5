"""Console output for people and scripts."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cskd_pipeline.errors import CskdError, DataError, OutputError
from cskd_pipeline.runtime import progress
from cskd_pipeline.runtime.console import PLAIN_INTERVAL, Terminal, format_size, to_plain
from cskd_pipeline.runtime.progress import (
    PACKAGE,
    Meter,
    duration,
    listen,
    restore_reporting,
    silence,
)

HOSTILE = "[red]x[/red] \x1b[2J\x07\u202e :smile: https://a.b [link=x]y"
SPELLED = r"[red]x[/red] \x1b[2J\x07\u202e :smile: https://a.b [link=x]y"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


class Speech:
    """A terminal with its two streams and a manual clock."""

    def __init__(self, *, quiet: bool = False, json: bool = False, tty: bool = False) -> None:
        self.out, self.err = (Tty(), Tty()) if tty else (io.StringIO(), io.StringIO())
        self.clock = Clock()
        self.terminal = Terminal(
            quiet=quiet, json=json, out=self.out, err=self.err, clock=self.clock
        )

    @property
    def heard(self) -> tuple[str, str]:
        return self.out.getvalue(), self.err.getvalue()


def test_information_and_warnings_go_to_stderr_and_quiet_drops_information() -> None:
    speech = Speech()
    speech.terminal.line("one")
    speech.terminal.warn("two")
    assert speech.heard == ("", "one\nwarning: two\n")
    quiet = Speech(quiet=True)
    quiet.terminal.line("one")
    quiet.terminal.warn("two")
    quiet.terminal.result({"a": 1})
    assert quiet.heard == ("a: 1\n", "warning: two\n")


@pytest.mark.parametrize("tty", [False, True])
def test_untrusted_text_is_escaped_before_it_reaches_a_terminal(
    tty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    speech = Speech(tty=tty)
    terminal = speech.terminal
    terminal.line(HOSTILE)
    terminal.warn(HOSTILE)
    terminal.error(CskdError(HOSTILE, where=HOSTILE, found=HOSTILE, problems=[HOSTILE]))
    terminal.table(HOSTILE, [HOSTILE], [[HOSTILE]])
    terminal.result({HOSTILE: {"a": HOSTILE}})
    with terminal.show(3, HOSTILE, HOSTILE) as meter:
        speech.clock.now += PLAIN_INTERVAL
        meter.advance(2)
    text = "".join(speech.heard)
    assert "\x1b[2J" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert text.count("😄") == 0
    assert text.count(SPELLED) >= 9


def test_lines_are_not_wrapped_on_narrow_screens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    speech = Speech()
    long = "word " * 30 + "end"
    speech.terminal.line(long)
    speech.terminal.result({"a": long})
    speech.terminal.table("t", ["name"], [[long]])
    assert speech.heard == (f"a: {long}\nt\nname\n{long}\n", long + "\n")


def test_plain_progress_prints_occasional_lines_with_rate_and_time_left() -> None:
    speech = Speech()
    with speech.terminal.show(1000, "views", "dumping", done=400) as meter:
        speech.clock.now += PLAIN_INTERVAL / 2
        meter.advance(50)
        assert speech.heard == ("", "")
        speech.clock.now += PLAIN_INTERVAL / 2
        meter.advance(50)
        speech.clock.now += PLAIN_INTERVAL / 2
        meter.advance(50)
        speech.clock.now += 65
        meter.advance(450)
    assert speech.err.getvalue().splitlines() == [
        "dumping: 500/1000 views, 10 views/s, 0:50 left",
        "dumping: 1000/1000 views, 7.5 views/s",
        "dumping: 1000/1000 views, 7.5 views/s, 1:20 in all",
    ]


def test_progress_shows_which_side_limits_the_rate() -> None:
    """Data, if the device waits for it at least a tenth of the time."""
    speech = Speech()

    def batches(seconds: float) -> Iterator[int]:
        for number in range(100):
            speech.clock.now += seconds
            yield number

    shown = []
    for wait in (0.05, 0.25):
        with speech.terminal.show(100, "updates", f"waiting {wait}") as meter:
            for _ in meter.timed(batches(wait)):
                speech.clock.now += 1
                meter.advance()
        shown.append((meter.limit, round(meter.data_wait, 4), round(meter.waited, 6)))
    assert shown == [("device", 0.0476, 5), ("data", 0.2, 25)]
    lines = speech.err.getvalue().splitlines()
    assert "limit: device" in lines[0]
    assert lines[-1] == (
        "waiting 0.25: 100/100 updates, 0.8 updates/s, data wait 20 %, limit: data, 2:05 in all"
    )


def test_short_work_and_quiet_print_no_progress_lines() -> None:
    for speech in (Speech(), Speech(quiet=True)):
        with speech.terminal.show(None, "images", "reading") as meter:
            meter.advance()
        assert speech.heard == ("", "")
    quiet = Speech(quiet=True)
    with quiet.terminal.show(2, "images", "reading") as meter:
        quiet.clock.now += 100
        meter.advance()
        assert meter.count == 1
    assert quiet.heard == ("", "")


def test_bars_can_be_nested_and_lines_appear_above_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    speech = Speech(tty=True)
    with suppress(KeyError), speech.terminal.show(10, "updates", "epoch 1") as outer:
        speech.clock.now += 2
        outer.advance(4)
        with speech.terminal.show(5, "images", "evaluating") as inner:
            speech.clock.now += 2
            inner.advance(5)
        speech.terminal.line("in between")
        raise KeyError
    out, err = speech.heard
    assert out == ""
    assert "epoch 1" in err
    assert "evaluating" in err
    assert "in between" in err
    with speech.terminal.show(1, "updates", "again"):
        pass
    assert "again" in speech.err.getvalue()
    show_cursor = "\x1b[?25h"
    assert err.count(show_cursor) == 1  # the display ended with the outer block
    assert speech.err.getvalue().count(show_cursor) == 2


def test_meters_show_only_known_values() -> None:
    clock = Clock()
    meter = Meter(None, "images", 0, clock)
    assert str(meter) == "0 images"
    clock.now += 2
    meter.advance(5000)
    assert str(meter) == "5000 images, 2500 images/s"
    assert meter.rate == 2500
    assert [duration(s) for s in (0, 6.2, 750, 100_000)] == ["0:00", "0:07", "12:30", "27:46:40"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (73.4e9, "73.4 GB"), (37e12, "37 TB")],
)
def test_sizes_are_formatted(count: float, text: str) -> None:
    assert format_size(count) == text


def test_tables_align_numbers_to_the_right() -> None:
    speech = Speech()
    speech.terminal.table("top-1", ["method", "%"], [["cskd", 71.25], ["none", None], ["x", 8]])
    assert (
        speech.out.getvalue()
        == "top-1\nmethod      %\ncskd    71.25\nnone        -\nx           8\n"
    )
    empty = Speech()
    empty.terminal.table("none", ["a", "b"], [])
    assert empty.out.getvalue() == "none\na  b\n"


def test_results_are_dotted_lines_for_people_and_one_object_for_scripts() -> None:
    found = {
        "a": {"b": 0.123456, "c": [1, 2.5]},
        "d": None,
        "e": True,
        "f": 123456.7,
        "g": [{"x": 1}, {"x": 2}],
        "h": "",
        "i": [],
    }
    speech = Speech()
    speech.terminal.result(found)
    assert speech.out.getvalue().splitlines() == [
        "a.b: 0.1235",
        "a.c: 1, 2.5",
        "d: -",
        "e: yes",
        "f: 123457",
        "g: 2 entries (see --json)",
        "h: -",
        "i: -",
    ]
    machine = Speech(json=True)
    machine.terminal.table("t", ["a"], [[1]])
    machine.terminal.result(found)
    assert json.loads(machine.out.getvalue()) == found
    assert machine.out.getvalue().count("\n") == 1


def test_values_are_converted_to_json_types() -> None:
    found = {
        1: Path("a/b"),
        "nan": float("nan"),
        "inf": [float("inf")],
        "numpy": (np.float32(0.5), np.int64(3), np.float64("nan"), np.bool_(True)),
    }
    expected = {"1": "a/b", "nan": None, "inf": [None], "numpy": [0.5, 3, None, True]}
    assert to_plain(found) == expected
    assert json.dumps(to_plain(found), allow_nan=False)


def test_errors_are_printed_on_stderr_and_as_an_object() -> None:
    error = DataError("bad", where=Path("a"), found=3, expected="b", action="c", problems=["d"])
    speech = Speech()
    speech.terminal.error(error)
    message = "error: bad\n  where:    a\n  found:    3\n  expected: b\n  to do:    c\n  - d\n"
    assert speech.heard == ("", message)
    machine = Speech(json=True)
    machine.terminal.error(error)
    assert machine.err.getvalue() == message
    assert json.loads(machine.out.getvalue()) == {
        "error": {
            "kind": "DataError",
            "exit_code": 1,
            "problem": "bad",
            "where": "a",
            "found": 3,
            "expected": "b",
            "action": "c",
            "problems": ["d"],
        }
    }


def current_listener() -> Any:
    """Return the progress listener."""
    return progress._listener


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("within", [silence, restore_reporting])
def test_reporting_is_restored_after_a_silence_and_after_a_command(
    within: Callable[[], AbstractContextManager[None]], error: type[BaseException] | None
) -> None:
    own, handler, logger = Speech().terminal, logging.NullHandler(), logging.getLogger(PACKAGE)
    handlers: list[logging.Handler] = [handler]
    with restore_reporting():
        listen(own)
        logger.handlers, logger.propagate = handlers, True
        logger.setLevel(logging.ERROR)
        with suppress(KeyError, KeyboardInterrupt), within():
            if within is restore_reporting:
                Terminal().attach()
                assert not logger.propagate
            assert current_listener() is not own
            assert logger.level != logging.ERROR
            if error is not None:
                raise error
        assert current_listener() is own
        assert logger.handlers is handlers
        assert handlers == [handler]
        assert (logger.level, logger.propagate) == (logging.ERROR, True)


def test_an_error_about_a_full_stdout_is_still_printed() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    err = io.StringIO()
    Terminal(json=True, out=Full(), err=err).error(OutputError("no space left"))
    assert err.getvalue() == "error: no space left\n"
