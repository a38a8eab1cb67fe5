"""Tables of a tool's report, for the command line and in Markdown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table of plain values, formatted and aligned by the command line."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


Printed = Iterator[Table | str]
"""Tables, which are results, and strings, each a status line."""


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown; each cell is escaped and on one line."""
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
