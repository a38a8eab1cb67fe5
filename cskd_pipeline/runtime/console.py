"""What a person or a script sees: progress and warnings on stderr, results on stdout.

On a terminal rich draws bars; elsewhere plain lines stay greppable. With ``json`` stdout gets one
JSON object and nothing else. Text from files, models and recipes is foreign: control characters are
spelled out and rich markup is never interpreted.
"""

from __future__ import annotations

import errno
import io
import json as json_module
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

from rich.console import Console
from rich.text import Text

from cskd_pipeline.errors import CskdError, printable

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal
DATA_LIMITS = 0.1
"""From this share of the time spent waiting for data on, data and not the device is the limit."""
_LONGEST = 2000  # characters of a line

T = TypeVar("T")


class TimedMeter:
    """How far a piece of work is. The rate leaves out what was done before it began.

    Args:
        total: units in all; None where nobody knows.
        done: units that an earlier run had finished.
        clock: seconds that never run backwards.
        moved: called after every step.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        done: int,
        clock: Callable[[], float],
        moved: Callable[[TimedMeter], None] | None = None,
    ) -> None:
        self.total, self.unit, self.count = total, unit, done
        self.waited = 0.0
        """Seconds spent waiting for what :meth:`timed` passed on."""
        self._first, self._clock, self._moved = done, clock, moved
        self._started = clock()
        self._fed = False

    def advance(self, count: int = 1) -> None:
        """``count`` more units are done."""
        self.count += count
        if self._moved is not None:
            self._moved(self)

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """``batches``, whose making counts as waiting for data, while all else is the device's."""
        self._fed = True
        source = iter(batches)
        while True:
            asked = self._clock()
            try:
                batch = next(source)
            except StopIteration:
                return
            finally:
                self.waited += self._clock() - asked
            yield batch

    @property
    def data_wait(self) -> float:
        """The share of the time that was spent waiting for data."""
        return self.waited / self.seconds if self.seconds > 0 else 0.0

    @property
    def limit(self) -> str:
        """Which side holds up the other: ``data`` or ``device``."""
        return limiting_side(self.data_wait)

    @property
    def seconds(self) -> float:
        return self._clock() - self._started

    @property
    def rate(self) -> float:
        """Units per second since the meter started; 0 before the first."""
        return (self.count - self._first) / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        """``30/120 views, 12.3 views/s, 0:07 left``, and ``data wait 2 %, limit: device``."""
        of = f"/{self.total}" if self.total is not None else ""
        parts = [f"{self.count}{of} {self.unit}"]
        if self.rate > 0:
            shown = f"{self.rate:.3g}" if self.rate < 1000 else f"{self.rate:.0f}"
            parts.append(f"{shown} {self.unit}/s")
            if self.total is not None and self.count < self.total:
                parts.append(f"{duration((self.total - self.count) / self.rate)} left")
        if self._fed and self.rate > 0:
            parts += [f"data wait {100 * self.data_wait:.0f} %", f"limit: {self.limit}"]
        return ", ".join(parts)


def limiting_side(data_wait: float) -> str:
    """Return ``data`` or ``device`` by the share of the time that was spent waiting for data."""
    return "data" if data_wait >= DATA_LIMITS else "device"


def duration(seconds: float) -> str:
    """``0:07``, ``12:30``, ``27:46:40``."""
    minutes, second = divmod(math.ceil(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Terminal:
    """Where a command speaks.

    Args:
        quiet: no progress and no news; warnings, errors and results stay.
        json: results go to stdout as one JSON object, once, and tables nowhere.
        out, err: the streams; stdout and stderr as they are now.
        clock: for the rates.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        json: bool = False,
        out: TextIO | None = None,
        err: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quiet = quiet
        self.json = json
        self._out = Console(file=out or sys.stdout)
        self._err = Console(file=cast(TextIO, _Lasting(err or sys.stderr)))
        self._clock = clock
        self._bars: Progress | None = None

    @classmethod
    def silent(cls) -> Terminal:
        """One that says nothing at all, for processes that leave it to another to speak."""
        nowhere = io.StringIO()
        nowhere.write = len  # type: ignore[method-assign]  # forgets what it is told
        return cls(quiet=True, out=nowhere, err=nowhere)

    def line(self, text: object) -> None:
        """One line of news."""
        if not self.quiet:
            _print(self._err, printable(text, _LONGEST))

    def warn(self, text: object) -> None:
        """One line about something that is not as it should be, yet no reason to stop."""
        _print(self._err, f"warning: {printable(text, _LONGEST)}", "yellow")

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A result in rows, numbers to the right. With ``json`` nothing."""
        if self.json:
            return
        columns = [printable(name) for name in columns]
        values = [list(row) for row in rows]
        right = [_is_numeric(column) for column in zip(*values, strict=True)]
        cells = [[printable(format_value(value), _LONGEST) for value in row] for row in values]
        _print(self._out, printable(title), "bold")
        if self._out.is_terminal:
            from rich.table import Table

            table = Table(box=None, pad_edge=False, header_style="bold")
            for name, numeric in zip(columns, right or [False] * len(columns), strict=True):
                table.add_column(Text(name), justify="right" if numeric else "left")
            for row in cells:
                table.add_row(*map(Text, row))
            self._out.print(table)
            return
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for row in [columns, *cells]:
            padded = [
                cell.rjust(width) if numeric else cell.ljust(width)
                for cell, width, numeric in zip(
                    row, widths, right or [False] * len(row), strict=True
                )
            ]
            _print(self._out, "  ".join(padded).rstrip())

    def result(self, document: Mapping[str, Any]) -> None:
        """What a command found: one JSON object, or ``name: value`` lines with dotted names."""
        if self.json:
            self._print_json(document)
            return
        for name, value in flatten(document):
            _print(self._out, f"{printable(name)}: {printable(format_value(value), _LONGEST)}")

    def error(self, error: CskdError) -> None:
        """Why a command stopped, on stderr, and with ``json`` as ``{"error": {...}}`` on stdout,
        beside what it found nevertheless.
        """
        _print(self._err, f"error: {error}", "red")
        if self.json:
            names = ("problem", "where", "found", "expected", "action", "problems")
            kind = {"kind": type(error).__name__, "exit_code": error.exit_code}
            with suppress(OSError):  # where stdout itself is what failed, stderr has told it
                told = {"error": kind | {name: getattr(error, name) for name in names}}
                self._print_json({**(error.report or {}), **told})

    @contextmanager
    def progress(
        self, total: int | None, unit: str, description: str, *, done: int = 0
    ) -> Iterator[TimedMeter]:
        """A meter to ``advance`` while the block runs, shown with rate and time left.

        Args:
            total: how many there are, or None.
            unit: their name in the plural: ``views``.
            done: how many of them earlier runs have finished.
        """
        description, unit = printable(description), printable(unit)
        if self.quiet:
            yield TimedMeter(total, unit, done, self._clock)
        elif self._err.is_terminal:
            with self._bar(total, unit, description, done) as meter:
                yield meter
        else:
            with self._plain_lines(total, unit, description, done) as meter:
                yield meter

    @contextmanager
    def _bar(
        self, total: int | None, unit: str, description: str, done: int
    ) -> Iterator[TimedMeter]:
        from rich.progress import BarColumn, Progress, TextColumn

        if self._bars is None:  # one live display, however deep the bars are nested
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[meter]}", markup=False),
                console=self._err,
                transient=True,
            )
            self._bars.start()
        bars = self._bars
        meter = TimedMeter(
            total, unit, done, self._clock, lambda m: bars.update(bar, completed=m.count)
        )
        bar = bars.add_task(description, total=total, completed=done, meter=meter)
        try:
            yield meter
        finally:
            bars.remove_task(bar)
            if not bars.tasks:
                bars.stop()
                self._bars = None

    @contextmanager
    def _plain_lines(
        self, total: int | None, unit: str, description: str, done: int
    ) -> Iterator[TimedMeter]:
        last = self._clock()
        printed = False

        def moved(meter: TimedMeter) -> None:
            nonlocal last, printed
            if self._clock() - last >= PLAIN_INTERVAL:
                last, printed = self._clock(), True
                _print(self._err, f"{description}: {meter}")

        meter = TimedMeter(total, unit, done, self._clock, moved)
        yield meter
        if printed:  # short work leaves no lines, long work a last one
            _print(self._err, f"{description}: {meter}, {duration(meter.seconds)} in all")

    def _print_json(self, document: Mapping[str, Any]) -> None:
        text = json_module.dumps(plain(document), allow_nan=False) + "\n"
        try:
            self._out.file.write(text)
            self._out.file.flush()
        except BrokenPipeError:
            self._out.on_broken_pipe()  # as rich does: whoever read it has seen enough, exit 1


def plain(value: Any) -> Any:
    """``value`` as JSON has it: paths as text, numpy scalars as numbers, NaN, infinity as null."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)


def flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything in nested mappings."""
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def format_value(value: Any) -> str:
    """``value`` for a person: four significant digits, lists with commas, nothing as a dash."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"
    if isinstance(value, list | tuple):
        if any(isinstance(item, Mapping) for item in value):
            return f"{len(value)} entries, which --json lists"
        return ", ".join(map(format_value, value)) or "-"
    return str(value)


def _is_numeric(values: Iterable[object]) -> bool:
    return all(value is None or isinstance(value, int | float) for value in values)


class _Lasting:
    """A text stream that takes no harm when its terminal is closed: it then speaks to nobody."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._unless_closed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._unless_closed():
            self._stream.flush()

    @contextmanager
    def _unless_closed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what is buffered goes there too
            os.close(nowhere)


def _print(console: Console, text: str, style: str = "") -> None:
    # As a Text: rich reads markup, emoji and links only out of a str.
    console.print(Text(text, style=style), soft_wrap=True)
