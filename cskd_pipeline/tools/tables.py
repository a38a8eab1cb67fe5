"""A tool's report as the command line prints it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Hold a table of plain values, which the command line formats and aligns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


Printed = Iterator[Table | str]
"""Tables, which are results, and strings, each a line of news."""
