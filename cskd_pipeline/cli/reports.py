"""Printing a tool's report: as tables and lines, or with --json as one object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cskd_pipeline.cli.options import Outcome
from cskd_pipeline.runtime.console import Terminal

if TYPE_CHECKING:
    from cskd_pipeline.tools.tables import Printed


def print_report(terminal: Terminal, report: Mapping[str, Any], printed: Printed) -> Outcome:
    """Print tables and lines; with --json return the report, which is printed instead."""
    if terminal.json:
        return dict(report)
    for part in printed:
        if isinstance(part, str):
            terminal.line(part)
        else:
            terminal.table(part.title, part.columns, part.rows)
    return None
