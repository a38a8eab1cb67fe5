"""How long work says how far it is, without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Meter(Protocol):
    """Something that counts."""

    def advance(self, count: int = 1) -> None: ...


class Progress(Protocol):
    """Makes a meter that lasts as long as a ``with`` block; ``Terminal.progress`` is one."""

    def __call__(
        self, total: int | None, unit: str, description: str
    ) -> AbstractContextManager[Meter]: ...


class _Unheard:
    def advance(self, count: int = 1) -> None:
        pass


@contextmanager
def silent(total: int | None, unit: str, description: str) -> Iterator[Meter]:
    """A :class:`Progress` that nobody hears."""
    yield _Unheard()
