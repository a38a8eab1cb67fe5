"""Identification of processes across machines, and whether they have ended."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path


def identify(pid: int) -> dict[str, object]:
    """Return values that identify a process, even among later ones with the same number.

    Without /proc these are only machine and number.
    """
    found: dict[str, object] = {"host": socket.gethostname(), "pid": pid}
    with suppress(OSError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found["namespace"] = os.readlink("/proc/self/ns/pid")
        # Field 22; field 2 is a name in parentheses, which may contain anything.
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        found["started"] = "" if stat[0] == "Z" else stat[19]
    return found


def has_ended(process: str) -> bool:
    """Return whether a process ran on this machine and has ended.

    Args:
        process: the object from :func:`identify` as untrusted JSON; anything else returns False.
    """
    try:
        before = json.loads(process)
        now = identify(int(before["pid"]))
        local = all(before[name] == now[name] for name in ("host", "boot", "namespace"))
        return local and before["started"] != now.get("started")
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return False
