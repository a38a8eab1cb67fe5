"""Heartbeats of a job's ranks, independent of their collectives.

A collective that one rank does not reach fails after a time limit, or when that rank's sockets
close, and names neither the rank nor the reason. So each rank has a thread that increments its own
heartbeat in the job's store, reads the others', and shares the first error. The heartbeat of a
stopped or killed process stands still. The time limit is for silence, not for work: the others wait
for a rank that has an hour more to do.
"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from cskd_pipeline.errors import CskdError, RankError

BEAT = 0.5  # seconds between two heartbeats
_SILENT = 3.0  # seconds without one that explain a failed collective
_RESPONDING = 10.0  # seconds to wait for the store if the work can continue without it
_LEAVING = 10.0  # seconds that a failed rank stays for the others to read its error
_FASTEST, _SLOWEST = 0.01, 0.5  # seconds between polls while a rank waits
_SHARED_STORE = (
    "; if torchrun's nodes come and go, export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all"
)
_FIELDS = ("problem", "found", "expected", "action", "problems")
_KINDS = ("beats", "barriers", "left")  # counters of each rank in the store


class Watch:
    """This rank's heartbeat thread, and the state of the other ranks.

    Args:
        patience: seconds without a heartbeat after which a rank times out.

    ``error`` is the error that ended another rank, ``interrupted`` whether it was a signal.
    """

    def __init__(self, rank: int, world: int, patience: float) -> None:
        self.rank, self.world, self.patience = rank, world, patience
        self.error: CskdError | None = None
        self.interrupted = False
        now = time.monotonic()
        self._beats = dict.fromkeys(range(world), (0, now))  # count, and when it last changed
        self._barriers = dict.fromkeys(range(world), 0)  # barriers that each rank has reached
        self._left: set[int] = set()
        self._polled_at = now
        self._outage = ""  # why the store cannot be reached
        self._reached = 0
        self._leaving = False
        self._failure = queue.SimpleQueue[str]()  # why this rank ends
        self._increments = queue.SimpleQueue[str]()  # names of counters
        self._counts = queue.SimpleQueue[int]()
        self._poll, self._polled, self._closed = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._thread.start()

    # -- the rank's side -----------------------------------------------------------------------

    def barrier(self) -> None:
        """Wait until all ranks reach this barrier, as long as all are alive.

        Raises:
            RankError: a rank is silent, was stopped, or failed (then its error).
        """
        self._reached += 1
        pause, waited = _FASTEST, 0.0
        while True:
            self._refresh(pause)
            if all(reached >= self._reached for reached in self._barriers.values()):
                return
            waited += pause  # not by the clock: this process may have been stopped itself
            if self.error is not None:
                raise self.error
            silent = self._silent(self.patience)
            if silent or self._outage or (waited > self.patience and self._stalled(self.patience)):
                raise self._unreachable(f"no heartbeat for {self.patience:g} s", silent)
            pause = min(1.5 * pause, _SLOWEST)

    def check(self) -> None:
        """Raise the error that ended another rank, unless that was a signal."""
        if self.error is not None and not self.interrupted:
            raise self.error

    def increment(self, name: str) -> int | None:
        """Increment the counter ``name`` of the job and return it; None without the store."""
        self._increments.put(name)
        self._poll.set()
        # Not by the clock: this process may have been stopped itself.
        for _ in range(math.ceil(min(self.patience, _RESPONDING) / BEAT)):
            with suppress(queue.Empty):
                return self._counts.get(timeout=BEAT)
            if self._outage:
                break
        return None

    def diagnose(self, found: str) -> CskdError:
        """Return the error that explains a failed collective."""
        until = time.monotonic() + 2 * _SILENT
        while time.monotonic() < until and not self._outage:
            self._refresh(_FASTEST)
            if self.error is not None:
                return self.error
            if self._silent(_SILENT):
                break
            time.sleep(_SLOWEST / 5)
        self._stalled(_SILENT)
        return self._unreachable(found, self._silent(_SILENT))

    def _silent(self, seconds: float) -> list[int]:
        """List the ranks without a heartbeat for so long, although the store could be read."""
        return [
            rank
            for rank, (_, at) in self._beats.items()
            if rank != self.rank and rank not in self._left and self._polled_at - at > seconds
        ]

    def _unreachable(self, found: str, silent: list[int]) -> RankError:
        """Return an error that names the ranks."""
        if self._outage and not _agent_has_store():
            silent, found = [0], self._outage  # rank 0 hosts the store
        names = " and ".join(", ".join(map(str, silent)).rsplit(", ", 1))
        ranks = f"rank{'s' * (len(silent) > 1)} {names}" if silent else "the other ranks"
        return RankError(
            f"{ranks} of this job cannot be reached",
            found=found,
            expected=f"{self.world} running ranks",
            action="check whether a process was stopped or killed, and read the messages of all "
            "ranks; then run the same command again (train continues with --resume)"
            + (_SHARED_STORE if self._reached == 1 and _agent_has_store() else ""),
        )

    def fail(self, error: BaseException) -> None:
        """Share why this rank ends; the other ranks get the first error of the job."""
        signalled = not isinstance(error, Exception)
        if not isinstance(error, CskdError):
            text = "was stopped by a signal" if signalled else f"ended with {error!r}"
            error = RankError(
                f"rank {self.rank} of this job {text}",
                action="run the same command again (train continues with --resume)"
                if signalled
                else f"see the traceback in the messages of rank {self.rank}",
            )
        where = f"rank {self.rank}" + ("" if error.where is None else f", {error.where}")
        if not signalled:
            error.where = where
        fields = {name: getattr(error, name) for name in _FIELDS}
        self._failure.put(json.dumps({**fields, "where": where, "signal": signalled}, default=str))
        self._refresh(_SILENT)

    def leave(self, *, stay: bool) -> None:
        """End the thread; if ``stay``, only when all other ranks have read the error or are gone.

        The rank that hosts the job's store always stays.
        """
        self._leaving = stay  # others that stay need not wait for this one
        stay = stay or (self.rank == 0 and not _agent_has_store())
        until = time.monotonic() + (_LEAVING if stay else 0.0)
        while time.monotonic() < until and not self._outage:
            self._refresh(_FASTEST)
            others = set(range(self.world)) - {self.rank}
            if others <= self._left | set(self._silent(_SILENT)):
                break
            time.sleep(_SLOWEST / 10)
        self._closed.set()
        self._poll.set()
        self._thread.join(_SILENT)

    def _refresh(self, seconds: float) -> None:
        """Make the thread poll now and wait for it, at most ``seconds`` per poll."""
        self._polled.clear()
        self._poll.set()
        if self._polled.wait(seconds):
            self._polled.clear()
            self._poll.set()  # the first poll may have started before this rank's change
            self._polled.wait(seconds)

    def _stalled(self, seconds: float) -> bool:
        """Return whether the store has been silent for so long; if so, record that as the error."""
        if time.monotonic() - self._polled_at <= seconds:
            return False
        self._outage = "the job's store does not respond"
        return True

    # -- the thread's side ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            store = _own_connection(self.patience)
            for kind in _KINDS:
                for rank in range(self.world):
                    store.add(f"{kind}/{rank}", 0)  # creates the key
            store.add("failed", 0)
            published = {"barriers": 0, "left": 0}
            while not self._closed.is_set():
                self._publish(store, published)
                self._read(store)
                self._polled.set()
                self._poll.wait(BEAT)
                self._poll.clear()
            if not self._leaving:
                store.add(f"left/{self.rank}", 1)  # this rank's last use of the store
        except (RuntimeError, ValueError) as error:  # DistError is a RuntimeError
            self._outage = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._polled.set()

    def _publish(self, store: dist.Store, published: dict[str, int]) -> None:
        store.add(f"beats/{self.rank}", 1)
        with suppress(queue.Empty):
            self._counts.put(store.add(f"count/{self._increments.get_nowait()}", 1))
        with suppress(queue.Empty):
            failure = self._failure.get_nowait()
            if store.add("claims", 1) == 1:
                store.set("error", failure)
                store.add("failed", 1)
        for name, value in (("barriers", self._reached), ("left", int(self._leaving))):
            if value > published[name]:
                store.add(f"{name}/{self.rank}", value - published[name])
                published[name] = value

    def _read(self, store: dist.Store) -> None:
        names = [f"{kind}/{rank}" for kind in _KINDS for rank in range(self.world)]
        values = list(map(int, store.multi_get([*names, "failed"])))
        beats, barriers, left = (values[i * self.world : (i + 1) * self.world] for i in range(3))
        now = time.monotonic()
        for rank, count in enumerate(beats):
            if count != self._beats[rank][0]:
                self._beats[rank] = (count, now)
        if values[-1] and self.error is None:
            fields = json.loads(store.get("error"))
            self.interrupted = fields.pop("signal")
            self.error = RankError(**fields)
        self._barriers = dict(enumerate(barriers))
        self._left = {rank for rank, gone in enumerate(left) if gone}
        self._polled_at = now


def _agent_has_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _own_connection(patience: float) -> dist.Store:
    """Connect to the job's store separately: a collective may block the other connection."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=patience),
    )
    return dist.PrefixStore("cskd-pipeline", attempt_store(store))


def attempt_store(store: dist.Store) -> dist.Store:
    """Return a part of the store without the entries from before torchrun restarted the ranks.

    A store hosted by rank 0 is new then; one hosted by the agent stays, and it counts restarts.
    """
    if not _agent_has_store():
        return store
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
