"""Signs of life of a job's ranks, beside their collectives.

A collective that one rank does not come to fails after a time limit, or when that rank's sockets
close, and says neither who it was nor why. So each rank has a thread that counts its own life up in
the job's store, reads the others', and passes on the first error. A process that is stopped or
killed counts no further. Waiting is bounded by silence, not by work: a rank that has an hour more
to do is waited for.
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

BEAT = 0.5  # seconds between two signs of life
_SILENT = 3.0  # seconds without one, by which a failed collective is explained
_RESPONDING = 10.0  # seconds that the store is waited for where there is a way without
_LEAVING = 10.0  # seconds that a failed rank stays for the others to learn why
_FASTEST, _SLOWEST = 0.01, 0.5  # seconds between looks while a rank waits
_SHARED_STORE = (
    "; where torchrun's nodes come and go, export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all"
)
_FIELDS = ("problem", "found", "expected", "action", "problems")


class Watch:
    """This rank's thread, and what it has learned.

    Args:
        patience: seconds of silence after which a rank is given up.

    ``error`` is the one that ended another rank, ``interrupted`` that it was a signal.
    """

    def __init__(self, rank: int, world: int, patience: float) -> None:
        self.rank, self.world, self.patience = rank, world, patience
        self.error: CskdError | None = None
        self.interrupted = False
        now = time.monotonic()
        self._lives = dict.fromkeys(range(world), (0, now))  # count, and when it was new
        self._met = dict.fromkeys(range(world), 0)
        self._left: set[int] = set()
        self._looked = now
        self._lost = ""  # why the store cannot be reached
        self._arrived = 0
        self._leaving = False
        self._mine = queue.SimpleQueue[str]()  # why this rank ends
        self._counting = queue.SimpleQueue[str]()  # what is to be counted up
        self._counted = queue.SimpleQueue[int]()
        self._look, self._seen, self._closed = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._thread.start()

    # -- the rank's side -----------------------------------------------------------------------

    def meet(self) -> None:
        """Wait until all ranks have come to this meeting, for as long as all live.

        Raises:
            RankError: one of them is silent, was stopped, or failed; its error, in the last case.
        """
        self._arrived += 1
        pause, waited = _FASTEST, 0.0
        while True:
            self._refresh(pause)
            if all(met >= self._arrived for met in self._met.values()):
                return
            waited += pause  # not by the clock: this process may have been stopped itself
            if self.error is not None:
                raise self.error
            silent = self.silent(self.patience)
            if silent or self._lost or (waited > self.patience and self._deaf(self.patience)):
                raise self.lost(f"nothing was heard for {self.patience:g} s", silent)
            pause = min(1.5 * pause, _SLOWEST)

    def check(self) -> None:
        """Raise the error that ended another rank; signals are not passed on by this."""
        if self.error is not None and not self.interrupted:
            raise self.error

    def count(self, name: str) -> int | None:
        """Count ``name`` up by one, for all ranks, and return the count; None without the store."""
        self._counting.put(name)
        self._look.set()
        # Not by the clock: this process may have been stopped itself.
        for _ in range(math.ceil(min(self.patience, _RESPONDING) / BEAT)):
            with suppress(queue.Empty):
                return self._counted.get(timeout=BEAT)
            if self._lost:
                break
        return None

    def verdict(self, found: str) -> CskdError:
        """Say why a collective has failed."""
        until = time.monotonic() + 2 * _SILENT
        while time.monotonic() < until and not self._lost:
            self._refresh(_FASTEST)
            if self.error is not None:
                return self.error
            if self.silent(_SILENT):
                break
            time.sleep(_SLOWEST / 5)
        self._deaf(_SILENT)
        return self.lost(found, self.silent(_SILENT))

    def silent(self, seconds: float) -> list[int]:
        """List the ranks without a sign of life for so long, though the store could be read."""
        return [
            rank
            for rank, (_, at) in self._lives.items()
            if rank != self.rank and rank not in self._left and self._looked - at > seconds
        ]

    def lost(self, found: str, silent: list[int]) -> RankError:
        """Make an error that names the ranks."""
        if self._lost and not _agent_has_store():
            silent, found = [0], self._lost  # which holds the store
        names = " and ".join(", ".join(map(str, silent)).rsplit(", ", 1))
        who = f"rank{'s' * (len(silent) > 1)} {names}" if silent else "the other ranks"
        return RankError(
            f"{who} of this job cannot be reached",
            found=found,
            expected=f"{self.world} ranks at work",
            action="see whether a process was stopped or killed, and the messages of all ranks; "
            "then run the same command again (train continues with --resume)"
            + (_SHARED_STORE if self._arrived == 1 and _agent_has_store() else ""),
        )

    def fail(self, error: BaseException) -> None:
        """Let the others know why this rank ends; the first error of a job is the one they get."""
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
        self._mine.put(json.dumps({**fields, "where": where, "signal": signalled}, default=str))
        self._refresh(_SILENT)

    def leave(self, *, stay: bool) -> None:
        """End the thread; where ``stay``, once all others know why, or are gone.

        The rank that holds the job's store stays for them as well.
        """
        self._leaving = stay  # others that stay need not wait for this one
        stay = stay or (self.rank == 0 and not _agent_has_store())
        until = time.monotonic() + (_LEAVING if stay else 0.0)
        while time.monotonic() < until and not self._lost:
            self._refresh(_FASTEST)
            others = set(range(self.world)) - {self.rank}
            if others <= self._left | set(self.silent(_SILENT)):
                break
            time.sleep(_SLOWEST / 10)
        self._closed.set()
        self._look.set()
        self._thread.join(_SILENT)

    def _refresh(self, seconds: float) -> None:
        """Have the thread look now, and wait for that, but not longer than ``seconds``."""
        self._seen.clear()
        self._look.set()
        if self._seen.wait(seconds):
            self._seen.clear()
            self._look.set()  # the first look may have begun before this rank's news
            self._seen.wait(seconds)

    def _deaf(self, seconds: float) -> bool:
        """Return whether the store has been silent for so long, which is then the reason."""
        if time.monotonic() - self._looked <= seconds:
            return False
        self._lost = "the job's store does not respond"
        return True

    # -- the thread's side ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            store = _own_connection(self.patience)
            for kind in ("life", "met", "left"):
                for rank in range(self.world):
                    store.add(f"{kind}/{rank}", 0)  # makes it
            store.add("failed", 0)
            published = {"met": 0, "left": 0}
            while not self._closed.is_set():
                self._publish(store, published)
                self._read(store)
                self._seen.set()
                self._look.wait(BEAT)
                self._look.clear()
            if not self._leaving:
                store.add(f"left/{self.rank}", 1)  # the last that this rank wants of the store
        except (RuntimeError, ValueError) as error:  # DistError is a RuntimeError
            self._lost = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._seen.set()

    def _publish(self, store: dist.Store, published: dict[str, int]) -> None:
        store.add(f"life/{self.rank}", 1)
        with suppress(queue.Empty):
            self._counted.put(store.add(f"count/{self._counting.get_nowait()}", 1))
        with suppress(queue.Empty):
            mine = self._mine.get_nowait()
            if store.add("claims", 1) == 1:
                store.set("error", mine)
                store.add("failed", 1)
        for name, value in (("met", self._arrived), ("left", int(self._leaving))):
            if value > published[name]:
                store.add(f"{name}/{self.rank}", value - published[name])
                published[name] = value

    def _read(self, store: dist.Store) -> None:
        names = [f"{kind}/{rank}" for kind in ("life", "met", "left") for rank in self._met]
        values = list(map(int, store.multi_get([*names, "failed"])))
        lives, met, left = (values[i * self.world : (i + 1) * self.world] for i in range(3))
        now = time.monotonic()
        for rank, life in enumerate(lives):
            if life != self._lives[rank][0]:
                self._lives[rank] = (life, now)
        if values[-1] and self.error is None:
            fields = json.loads(store.get("error"))
            self.interrupted = fields.pop("signal")
            self.error = RankError(**fields)
        self._met = dict(enumerate(met))
        self._left = {rank for rank, gone in enumerate(left) if gone}
        self._looked = now


def _agent_has_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _own_connection(patience: float) -> dist.Store:
    """The job's store by a connection of the thread's own: a collective may wait on the other."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=patience),
    )
    return dist.PrefixStore("cskd-pipeline", of_this_attempt(store))


def of_this_attempt(store: dist.Store) -> dist.Store:
    """Return a part of the store without what ranks wrote before torchrun started them again.

    Where ranks have the store, it is new. Where agents have it, it stays, and they count restarts.
    """
    if not _agent_has_store():
        return store
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
