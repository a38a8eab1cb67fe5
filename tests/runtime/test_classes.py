"""Comparison of class names: kinds of difference, their wording, and the guard's decisions."""

from __future__ import annotations

import pytest

from cskd_pipeline.errors import ClassesError
from cskd_pipeline.runtime.classes import (
    COMMAND_SWITCH,
    Classes,
    ClassGuard,
    difference,
    renumbering,
)

NUMBERS = tuple(str(n) for n in range(12))
PADDED = tuple(f"n{n:08d}" for n in range(12))


def side(names: tuple[str, ...] | None, count: int | None = None, of: str = "here") -> Classes:
    return Classes(of, f"folder of {of}", count or (len(names) if names else None), names)


@pytest.mark.parametrize(
    ("mine", "theirs", "kind", "same"),
    [
        (("c", "b", "a"), ("a", "b", "c"), "the same 3 names in another order", True),
        # Duplicate names, like ImageNet's crane.
        (("a", "a", "b"), ("a", "b", "b"), "2 of 3 names in common", False),
        (("a", "b", "a"), ("a", "a", "b"), "the same 3 names in another order", True),
        (
            tuple(sorted(NUMBERS)),
            NUMBERS,
            "the same 12 names in another order, as one side sorts numbers as text: 0, 1, 10, 11, "
            "2, …",
            True,
        ),
        (
            tuple(sorted(NUMBERS)),
            PADDED,
            "other names with the same 12 numbers in another order, as one side sorts numbers as "
            "text: 0, 1, 10, 11, 2, …",
            False,
        ),
        (NUMBERS, PADDED, "other names with the same 12 numbers", False),
        (("Ant", "bee_1"), ("ant", "Bee 1"), "the same 2 names, spelled differently", True),
        (
            ("Bee", "Ant"),
            ("ant", "bee"),
            "the same 2 names, spelled differently and in another order",
            True,
        ),
        (("c", "c++"), ("C", "d"), "no names in common", False),
        (("ant", "bee", "cat"), ("ant", "bee", "cow"), "2 of 3 names in common", False),
        (("ant", "bee"), ("ant", "bee", "cow"), "2 names and 3, 2 of them in common", False),
        (("dog", "fox"), ("ant", "bee"), "no names in common", False),
    ],
)
def test_each_kind_of_difference_is_described(
    mine: tuple[str, ...], theirs: tuple[str, ...], kind: str, same: bool
) -> None:
    for one, other in ((mine, theirs), (theirs, mine)):
        found = difference(side(one), side(other, of="there"))
        assert found is not None
        assert found.kind == kind or len(mine) != len(theirs)
        assert found.same_classes is same


def test_equal_or_unknown_names_do_not_differ() -> None:
    for mine, theirs in ((NUMBERS, NUMBERS), (None, NUMBERS), (NUMBERS, None), (None, None)):
        assert difference(side(mine), side(theirs)) is None


def test_a_refusal_shows_both_sides_the_first_differing_classes_and_the_switch() -> None:
    one, other = side(tuple(sorted(NUMBERS)), of="the shards"), side(NUMBERS, of="the student")
    with pytest.raises(ClassesError) as caught:
        ClassGuard("--yes").compare(one, other)
    text = str(caught.value)
    assert "the shards and the student do not have the same classes: the same 12 names in" in text
    assert "where:    folder of the shards" in text
    assert "found:    0, 1, 10, 11, 2, …" in text
    assert "expected: 0, 1, 2, 3, 4, … as in folder of the student" in text
    assert '- class 2: "10" in the shards, "2" in the student' in text
    assert len(caught.value.problems) == 5
    assert "pass --yes" in text


def test_accepted_differences_are_recorded_without_paths_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guard = ClassGuard("--yes", accept=True)
    for _ in range(2):
        guard.compare(side(("b", "a")), side(("a", "b"), of="there"))
        guard.report_new()
    line = (
        "classes of here and there: the same 2 names in another order "
        '(class 0: "b" in here, "a" in there)'
    )
    assert guard.accepted == [line]
    assert caplog.messages == [f"accepted by --yes: {line}"]


def test_names_missing_on_one_side_are_logged_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for accept in (False, True):
        guard = ClassGuard(COMMAND_SWITCH, accept=accept)
        guard.compare(side(None, 12), side(NUMBERS, of="there"))
        guard.compare(side(None, 12), side(None, 12, of="there"))
        guard.compare(side(NUMBERS), side(NUMBERS, of="there"))
        guard.report_new()
        assert guard.accepted == []
    assert caplog.messages == ["no class names in here: class k is taken as class k of there"] * 2


def test_a_different_number_of_classes_is_never_accepted() -> None:
    guard = ClassGuard(COMMAND_SWITCH, accept=True)
    for mine, theirs in ((side(None, 11), side(NUMBERS)), (side(NUMBERS[1:]), side(NUMBERS))):
        with pytest.raises(ClassesError) as caught:
            guard.compare(mine, theirs)
        assert "accept" not in str(caught.value)
    assert guard.accepted == []


def test_untrusted_names_are_shortened_to_one_line() -> None:
    hostile = ("a\x1b[31m\nb" + "x" * 10_000, "c")
    with pytest.raises(ClassesError) as caught:
        ClassGuard(COMMAND_SWITCH).compare(side(hostile), side(("c", "d"), of="there"))
    assert "\x1b" not in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) < 400


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(0, 2), (2, 0)], {0: 2, 2: 0}),
        ([(0, 2), (0, 1)], {}),  # one label became two
        ([(0, 2), (1, 2)], {}),  # two became one
    ],
)
def test_a_renumbering_is_one_to_one(
    pairs: list[tuple[int, int]], expected: dict[int, int]
) -> None:
    assert renumbering(pairs) == expected
