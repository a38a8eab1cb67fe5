"""Which process something belongs to, among all of all machines, and whether it is still there."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path


def identify(pid: int) -> dict[str, object]:
    """Return what tells a process from all others, numbers that were used before included.

    Without /proc that is machine and number alone.
    """
    found: dict[str, object] = {"host": socket.gethostname(), "pid": pid}
    with suppress(OSError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found["namespace"] = os.readlink("/proc/self/ns/pid")
        # The 22nd field; the second is a name in parentheses, which may hold anything.
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        found["started"] = "" if stat[0] == "Z" else stat[19]
    return found


def has_ended(process: str) -> bool:
    """Return whether a process was one of this machine, and is no more.

    Args:
        process: :func:`identify`'s object as JSON, from whoever wrote it: False for anything else.
    """
    try:
        before = json.loads(process)
        now = identify(int(before["pid"]))
        here = all(before[name] == now[name] for name in ("host", "boot", "namespace"))
        return here and before["started"] != now.get("started")
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return False
