"""One depth of a verification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cskd_pipeline.cache.check import Problem


class Check(NamedTuple):
    """What was looked at, as numbers by name, and what is wrong."""

    depth: str
    counts: dict[str, Any]
    problems: Sequence[Problem]
