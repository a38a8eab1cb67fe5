"""Console output: progress and warnings on stderr, results on stdout.

On a terminal rich draws bars; otherwise plain lines stay greppable. With ``json`` stdout gets one
JSON object and nothing else. Text from files, models and recipes is untrusted: control characters
are escaped and rich markup is never interpreted.
"""

from __future__ import annotations

import errno
import json as json_module
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console
from rich.text import Text

from cskd_pipeline.errors import CskdError, printable
from cskd_pipeline.runtime.progress import PACKAGE, Meter, duration, listen

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_INTERVAL = 10.0  # seconds between progress lines without a terminal
_LONGEST = 2000  # characters of a line


class Terminal:
    """The streams of a command.

    Args:
        quiet: print no progress and no information; only warnings, errors and results.
        json: print the result as one JSON object, and no tables.
        out, err: output streams; by default the current stdout and stderr.
        clock: source of time for the rates.
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
        self._err = Console(file=cast(TextIO, _HangupSafeStream(err or sys.stderr)))
        self._clock = clock
        self._bars: Progress | None = None

    def attach(self) -> Terminal:
        """Show this process's progress and log records from now on; return itself.

        It replaces the previous listener and log handlers; see ``progress.restore_reporting``.
        """
        listen(self)
        logger = logging.getLogger(PACKAGE)
        logger.handlers = [_LogHandler(self)]
        logger.setLevel(logging.INFO)
        logger.propagate = False
        return self

    def line(self, text: object) -> None:
        """Print one line of information."""
        if not self.quiet:
            _print(self._err, printable(text, _LONGEST))

    def warn(self, text: object) -> None:
        """Print one warning."""
        _print(self._err, f"warning: {printable(text, _LONGEST)}", "yellow")

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print a table with numbers right-aligned; nothing with ``json``."""
        if self.json:
            return
        columns = [printable(name) for name in columns]
        values = [list(row) for row in rows]
        right = [bool(values) and _is_numeric([v[n] for v in values]) for n in range(len(columns))]
        cells = [[printable(format_value(value), _LONGEST) for value in row] for row in values]
        _print(self._out, printable(title), "bold")
        if self._out.is_terminal:
            from rich.table import Table

            table = Table(box=None, pad_edge=False, header_style="bold")
            for name, numeric in zip(columns, right, strict=True):
                table.add_column(Text(name), justify="right" if numeric else "left")
            for row in cells:
                table.add_row(*map(Text, row))
            self._out.print(table)
            return
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for row in [columns, *cells]:
            padded = [
                cell.rjust(width) if numeric else cell.ljust(width)
                for cell, width, numeric in zip(row, widths, right, strict=True)
            ]
            _print(self._out, "  ".join(padded).rstrip())

    def result(self, document: Mapping[str, Any]) -> None:
        """Print a command's result: one JSON object, or ``name: value`` lines with dotted names."""
        if self.json:
            self._print_json(document)
            return
        for name, value in flatten(document):
            _print(self._out, f"{printable(name)}: {printable(format_value(value), _LONGEST)}")

    def error(self, error: CskdError) -> None:
        """Print an error on stderr; with ``json`` also ``{"error": {...}}`` and the partial result
        on stdout.
        """
        _print(self._err, f"error: {error}", "red")
        if self.json:
            names = ("problem", "where", "found", "expected", "action", "problems")
            kind = {"kind": type(error).__name__, "exit_code": error.exit_code}
            fields = kind | {name: getattr(error, name) for name in names}
            with suppress(OSError):  # stdout itself may have failed
                self._print_json({**(error.report or {}), "error": fields})

    @contextmanager
    def show(
        self, total: int | None, unit: str, description: str, done: int = 0
    ) -> Iterator[Meter]:
        """Yield a meter and show it with rate and time left while the block runs."""
        description, unit = printable(description), printable(unit)
        if self.quiet:
            yield Meter(total, unit, done, self._clock)
        elif self._err.is_terminal:
            with self._bar(total, unit, description, done) as meter:
                yield meter
        else:
            with self._plain_lines(total, unit, description, done) as meter:
                yield meter

    @contextmanager
    def _bar(self, total: int | None, unit: str, description: str, done: int) -> Iterator[Meter]:
        from rich.progress import BarColumn, Progress, TextColumn

        if self._bars is None:  # nested bars share one live display
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[meter]}", markup=False),
                console=self._err,
                transient=True,
            )
            self._bars.start()
        bars = self._bars
        meter = Meter(
            total,
            unit,
            done,
            self._clock,
            lambda m: bars.update(bar, completed=m.count, total=m.total),
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
    ) -> Iterator[Meter]:
        last = self._clock()
        printed = False

        def on_advance(meter: Meter) -> None:
            nonlocal last, printed
            if self._clock() - last >= PLAIN_INTERVAL:
                last, printed = self._clock(), True
                _print(self._err, f"{description}: {meter}")

        meter = Meter(total, unit, done, self._clock, on_advance)
        yield meter
        if printed:  # short work prints nothing, long work a final line
            _print(self._err, f"{description}: {meter}, {duration(meter.seconds)} in all")

    def _print_json(self, document: Mapping[str, Any]) -> None:
        text = json_module.dumps(to_plain(document), allow_nan=False) + "\n"
        try:
            self._out.file.write(text)
            self._out.file.flush()
        except BrokenPipeError:
            self._out.on_broken_pipe()  # like rich: the reader has closed the pipe, exit 1


class _LogHandler(logging.Handler):
    """Prints the package's log records: information as lines, warnings as warnings."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self._terminal.warn(text)
        else:
            self._terminal.line(text)


def to_plain(value: Any) -> Any:
    """Convert to JSON types: paths to text, numpy scalars to numbers, NaN and infinity to null."""
    if isinstance(value, Mapping):
        return {str(name): to_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return to_plain(value.item()) if hasattr(value, "item") else str(value)


def flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and value of every entry in nested mappings."""
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def format_value(value: Any) -> str:
    """Format a value: floats with four digits, lists with commas, a dash for an empty value."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"
    if isinstance(value, list | tuple):
        if any(isinstance(item, Mapping) for item in value):
            return f"{len(value)} entries (see --json)"
        return ", ".join(map(format_value, value)) or "-"
    return str(value)


def format_size(count: float) -> str:
    """Format a number of bytes: ``345 MB``, ``12.3 GB``; powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _is_numeric(values: Iterable[object]) -> bool:
    return all(value is None or isinstance(value, int | float) for value in values)


class _HangupSafeStream:
    """A text stream that discards its output once its terminal is closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._discard_if_closed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._discard_if_closed():
            self._stream.flush()

    @contextmanager
    def _discard_if_closed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # also discards buffered output
            os.close(null)


def _print(console: Console, text: str, style: str = "") -> None:
    # A Text, because rich interprets markup, emoji and links in a str.
    console.print(Text(text, style=style), soft_wrap=True)
