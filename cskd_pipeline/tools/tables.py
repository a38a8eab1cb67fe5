"""A tool's report as the command line prints it, and as Markdown has it."""

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


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown; what others wrote in a cell stays text, on one line."""
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
