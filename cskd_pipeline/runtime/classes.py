"""Classes are compared by name: a number means a class only beside the list that numbers it.

Wherever two sides meet (shards, validation shards, a cache, a student, weights to start from), a
:class:`ClassGuard` compares their lists. A difference is refused, or accepted and written down.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from cskd_pipeline.errors import ClassesError, printable

log = logging.getLogger(__name__)

SHOWN = 5  # names, and classes that differ, in a message
_NAME = 40  # characters of a name in a message

TRAIN_SWITCH = "--set data.classes=accept"
COMMAND_SWITCH = "--accept-classes"


@dataclass(frozen=True)
class Classes:
    """The classes of one side.

    Args:
        of: the side as a message calls it, without a path: ``the cache``.
        where: its path.
        count: how many; None where nothing says.
        names: in the order of their numbers; None where they are not known.
    """

    of: str
    where: object
    count: int | None
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class Difference:
    """The way in which one list of names is not the other.

    Args:
        kind: in words: ``the same 12 names in another order``.
        examples: the first classes that differ, one line each.
        same_classes: both lists name the same classes, in another order or spelling.
    """

    kind: str
    examples: tuple[str, ...]
    same_classes: bool


def difference(here: Classes, there: Classes) -> Difference | None:
    """Return how the names differ; None where they are equal, or not known on a side."""
    mine, theirs = here.names, there.names
    if mine is None or theirs is None or mine == theirs:
        return None
    pairs = [(k, a, b) for k, (a, b) in enumerate(zip_longest(mine, theirs)) if a != b]
    examples = [
        f"class {k}: {_quoted(a)} in {here.of}, {_quoted(b)} in {there.of}"
        for k, a, b in pairs[:SHOWN]
    ]
    kind, same_classes = _kind(mine, theirs)
    return Difference(kind, tuple(examples), same_classes)


class ClassGuard:
    """Refuses classes that differ, or accepts them; keeps what was accepted and what is unknown.

    Args:
        switch: what the user passes to accept a difference; None: nothing accepts it.
        accept: take class k of one side for class k of the other, whatever their names.

    Attributes:
        accepted: one line for each difference that was accepted, without paths.
        unknown: one line for each pair of which only one side names its classes.
    """

    def __init__(self, switch: str | None = None, *, accept: bool = False) -> None:
        self.switch = switch
        self.accept = accept
        self.accepted: list[str] = []
        self.unknown: list[str] = []
        self._pending: list[str] = []

    def compare(self, here: Classes, there: Classes) -> None:
        """Compare two sides.

        Raises:
            ClassesError: another number of classes, which nothing accepts; other names, or another
                order, where that is not accepted.
        """
        found = difference(here, there)
        counted = bool(here.count and there.count and here.count != there.count)
        if found is None and counted:
            raise ClassesError(
                f"{here.of} and {there.of} have different numbers of classes",
                where=here.where,
                found=f"{here.count} classes",
                expected=f"{there.count} classes, as in {there.where}",
                action="use data of the same classes on both sides",
            )
        if found is not None and (counted or not self.accept):
            raise self._error(here, there, found, final=counted)
        self._keep(here, there, found)

    def conflict(self, here: Classes, there: Classes) -> str | None:
        """Return one line about names that differ and are not accepted, for a list of conflicts."""
        found = difference(here, there)
        if found is not None and not self.accept:
            hint = "" if self.switch is None else f"; {self.switch} accepts it"
            return f"dataset.class_names: {found.kind} ({'; '.join(found.examples[:2])}){hint}"
        self._keep(here, there, found)
        return None

    def record(self, line: str) -> None:
        """Keep one line about something that was accepted."""
        if line not in self.accepted:
            self.accepted.append(line)
            self._pending.append(f"accepted by {self.switch}: {line}")

    def report_new(self) -> None:
        """Log what was accepted or is unknown and has not been logged yet, one warning each."""
        for line in self._pending:
            log.warning(line)
        self._pending.clear()

    def _keep(self, here: Classes, there: Classes, found: Difference | None) -> None:
        if found is not None:
            example = found.examples[0]
            self.record(f"classes of {here.of} and {there.of}: {found.kind} ({example})")
        elif (here.names is None) != (there.names is None):
            unnamed, named = (here, there) if here.names is None else (there, here)
            line = f"no class names in {unnamed.of}: class k is taken for class k of {named.of}"
            self.unknown.append(line)
            self._pending.append(line)

    def _error(
        self, here: Classes, there: Classes, found: Difference, *, final: bool
    ) -> ClassesError:
        assert here.names is not None
        assert there.names is not None
        action = (
            "pack the images again from class folders with the same names, or correct classes.json "
            "where only the names in it are wrong"
        )
        if self.switch is not None and not final:
            action += f"; if class k is the same on both sides all the same, pass {self.switch}"
        return ClassesError(
            f"{here.of} and {there.of} do not have the same classes: {found.kind}",
            where=here.where,
            found=_first(here.names),
            expected=f"{_first(there.names)} as in {there.where}",
            action=action,
            problems=found.examples,
        )


def renumbering(pairs: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Return what each label became; empty unless each became one other, and no two the same.

    Args:
        pairs: (label there, label here) of the samples with another label, each pair once.
    """
    found = dict(pairs)
    return found if len(found) == len(pairs) == len(set(found.values())) else {}


def _kind(mine: Sequence[str], theirs: Sequence[str]) -> tuple[str, bool]:
    """Say in words how two lists differ, and whether they name the same classes."""
    count = len(mine)
    if len(theirs) != count:
        common = (Counter(mine) & Counter(theirs)).total()
        return f"{count} names and {len(theirs)}, {common} of them in common", False
    if Counter(mine) == Counter(theirs):
        return f"the same {count} names in another order{_as_text(mine, theirs)}", True
    plain, other_plain = _plain(mine), _plain(theirs)
    if plain and other_plain and Counter(plain) == Counter(other_plain):
        moved = "" if plain == other_plain else " and in another order"
        return f"the same {count} names, spelled otherwise{moved}", True
    numbers, others = _numbers(mine), _numbers(theirs)
    if numbers and others and set(numbers) == set(others):
        moved = "" if numbers == others else " in another order"
        return f"other names with the same {count} numbers{moved}{_as_text(mine, theirs)}", False
    common = (Counter(mine) & Counter(theirs)).total()
    return f"{common} of {count} names in common" if common else "no name in common", False


def _plain(names: Sequence[str]) -> tuple[str, ...] | None:
    """Letters and digits alone, lower case; None where names would become equal."""
    plain = tuple("".join(filter(str.isalnum, name.casefold())) for name in names)
    return plain if all(plain) and len(set(plain)) == len(set(names)) else None


def _numbers(names: Sequence[str]) -> tuple[int, ...] | None:
    """The numbers at the names' ends; None where one has none, or two have the same."""
    found = [re.search(r"[0-9]{1,18}$", name) for name in names]
    numbers = tuple(int(match[0]) for match in found if match is not None)
    return numbers if len(numbers) == len(names) == len(set(numbers)) else None


def _as_text(mine: Sequence[str], theirs: Sequence[str]) -> str:
    """Name the usual reason: one side sorted numbers as text, the other as numbers."""
    for text, other in ((mine, theirs), (theirs, mine)):
        numbers, others = _numbers(text), _numbers(other)
        if not numbers or not others or list(text) != sorted(text):
            continue
        if list(numbers) != sorted(numbers) and list(others) == sorted(others):
            return f", as one side sorts numbers as text: {_first(text)}"
    return ""


def _first(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name, _NAME) for name in names[:SHOWN])
    return shown + (", …" if len(names) > SHOWN else "")


def _quoted(name: str | None) -> str:
    return "none" if name is None else f'"{printable(name, _NAME)}"'
