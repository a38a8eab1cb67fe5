"""Comparison of classes by name: a class number means nothing without the list that numbers it.

Wherever two sides meet (shards, validation shards, a cache, a student, initial weights), a
:class:`ClassGuard` compares their lists. A difference is refused, or accepted and recorded.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from cskd_pipeline.errors import ClassesError, printable

log = logging.getLogger(__name__)

SHOWN = 5  # names, and differing classes, in a message
_NAME = 40  # characters of a name in a message

TRAIN_SWITCH = "--set data.classes=accept"
COMMAND_SWITCH = "--accept-classes"


@dataclass(frozen=True)
class Classes:
    """The classes of one side.

    Args:
        of: name of the side in messages, without a path: ``the cache``.
        where: its path.
        count: number of classes; None if unknown.
        names: class names in the order of their numbers; None if unknown.
    """

    of: str
    where: object
    count: int | None
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class Difference:
    """A difference between two lists of class names.

    Args:
        kind: description: ``the same 12 names in another order``.
        examples: the first differing classes, one line each.
        same_classes: True if both lists name the same classes, in another order or spelling.
    """

    kind: str
    examples: tuple[str, ...]
    same_classes: bool


def difference(one: Classes, other: Classes) -> Difference | None:
    """Return the difference between the names; None if they are equal, or unknown on a side."""
    names, others = one.names, other.names
    if names is None or others is None or names == others:
        return None
    pairs = [(k, a, b) for k, (a, b) in enumerate(zip_longest(names, others)) if a != b]
    examples = [
        f"class {k}: {_quoted(a)} in {one.of}, {_quoted(b)} in {other.of}"
        for k, a, b in pairs[:SHOWN]
    ]
    kind, same_classes = _kind(names, others)
    return Difference(kind, tuple(examples), same_classes)


class ClassGuard:
    """Refuses differing classes, or accepts them and records the differences.

    Args:
        switch: the flag that accepts a difference; None: none does.
        accept: assume that class k is the same on both sides, whatever its names.

    Attributes:
        accepted: one line per accepted difference, without paths.
        unknown: one line per pair in which only one side names its classes.
    """

    def __init__(self, switch: str | None = None, *, accept: bool = False) -> None:
        self.switch = switch
        self.accept = accept
        self.accepted: list[str] = []
        self.unknown: list[str] = []
        self._pending: list[str] = []

    def compare(self, one: Classes, other: Classes) -> None:
        """Compare two sides.

        Raises:
            ClassesError: the numbers of classes differ, which cannot be accepted; or the names or
                their order differ, unless accepted.
        """
        found = difference(one, other)
        counts_differ = bool(one.count and other.count and one.count != other.count)
        if found is None and counts_differ:
            raise ClassesError(
                f"{one.of} and {other.of} have different numbers of classes",
                where=one.where,
                found=f"{one.count} classes",
                expected=f"{other.count} classes, as in {other.where}",
                action="use data with the same classes on both sides",
            )
        if found is not None and (counts_differ or not self.accept):
            raise self._error(one, other, found, final=counts_differ)
        self._accept(one, other, found)

    def conflict(self, one: Classes, other: Classes) -> str | None:
        """Return one line about names that differ, for a list of conflicts; None if accepted."""
        found = difference(one, other)
        if found is not None and not self.accept:
            hint = "" if self.switch is None else f"; {self.switch} accepts it"
            return f"dataset.class_names: {found.kind} ({'; '.join(found.examples[:2])}){hint}"
        self._accept(one, other, found)
        return None

    def record(self, line: str) -> None:
        """Record one line about an accepted difference."""
        if line not in self.accepted:
            self.accepted.append(line)
            self._pending.append(f"accepted by {self.switch}: {line}")

    def report_new(self) -> None:
        """Log one warning for each new accepted difference or unknown side."""
        for line in self._pending:
            log.warning(line)
        self._pending.clear()

    def _accept(self, one: Classes, other: Classes, found: Difference | None) -> None:
        if found is not None:
            example = found.examples[0]
            self.record(f"classes of {one.of} and {other.of}: {found.kind} ({example})")
        elif (one.names is None) != (other.names is None):
            unnamed, named = (one, other) if one.names is None else (other, one)
            line = f"no class names in {unnamed.of}: class k is taken as class k of {named.of}"
            self.unknown.append(line)
            self._pending.append(line)

    def _error(
        self, one: Classes, other: Classes, found: Difference, *, final: bool
    ) -> ClassesError:
        assert one.names is not None
        assert other.names is not None
        action = (
            "pack the images again from class folders with the same names, or correct classes.json "
            "if only its names are wrong"
        )
        if self.switch is not None and not final:
            action += f"; if class k is the same on both sides anyway, pass {self.switch}"
        return ClassesError(
            f"{one.of} and {other.of} do not have the same classes: {found.kind}",
            where=one.where,
            found=_first(one.names),
            expected=f"{_first(other.names)} as in {other.where}",
            action=action,
            problems=found.examples,
        )


def renumbering(pairs: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Return the new label of each old one; empty unless the pairs map labels one to one.

    Args:
        pairs: distinct (old label, new label) of the samples whose label differs.
    """
    renumbered = dict(pairs)
    return renumbered if len(renumbered) == len(pairs) == len(set(renumbered.values())) else {}


def _kind(names: Sequence[str], others: Sequence[str]) -> tuple[str, bool]:
    """Describe how two lists differ, and return whether they name the same classes."""
    count = len(names)
    common = (Counter(names) & Counter(others)).total()
    if len(others) != count:
        return f"{count} names and {len(others)}, {common} of them in common", False
    if common == count:
        return f"the same {count} names in another order{_as_text(names, others)}", True
    plain, other_plain = _normalised(names), _normalised(others)
    if plain and other_plain and Counter(plain) == Counter(other_plain):
        moved = "" if plain == other_plain else " and in another order"
        return f"the same {count} names, spelled differently{moved}", True
    numbers, other_numbers = _numbers(names), _numbers(others)
    if numbers and other_numbers and set(numbers) == set(other_numbers):
        moved = "" if numbers == other_numbers else " in another order"
        return f"other names with the same {count} numbers{moved}{_as_text(names, others)}", False
    return f"{common} of {count} names in common" if common else "no names in common", False


def _normalised(names: Sequence[str]) -> tuple[str, ...] | None:
    """Return the letters and digits in lower case; None if different names would become equal."""
    plain = tuple("".join(filter(str.isalnum, name.casefold())) for name in names)
    return plain if all(plain) and len(set(plain)) == len(set(names)) else None


def _numbers(names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the number at the end of each name; None if one is missing or repeated."""
    found = [re.search(r"[0-9]{1,18}$", name) for name in names]
    numbers = tuple(int(match[0]) for match in found if match is not None)
    return numbers if len(numbers) == len(names) == len(set(numbers)) else None


def _as_text(names: Sequence[str], others: Sequence[str]) -> str:
    """Return the usual reason if it applies: one side sorted numbers as text."""
    for text, other in ((names, others), (others, names)):
        numbers, other_numbers = _numbers(text), _numbers(other)
        if not numbers or not other_numbers or list(text) != sorted(text):
            continue
        if list(numbers) != sorted(numbers) and list(other_numbers) == sorted(other_numbers):
            return f", as one side sorts numbers as text: {_first(text)}"
    return ""


def _first(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name, _NAME) for name in names[:SHOWN])
    return shown + (", …" if len(names) > SHOWN else "")


def _quoted(name: str | None) -> str:
    return "none" if name is None else f'"{printable(name, _NAME)}"'
