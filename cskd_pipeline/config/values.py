"""Documents to dataclasses, strictly, with every problem collected instead of the first."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from cskd_pipeline.errors import RecipeError, printable

T = TypeVar("T")
MAX_DEPTH = 20
"""Of tables and arrays in one another: what walks through them calls itself."""
_WRONG = object()  # a value that cannot be taken; its problem is already noted

_NAMES = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    dict: "a table",
}


class Problems:
    """What is wrong with a recipe, a line each: where, found, expected.

    Args:
        kind: the whole recipe's dataclass, which suggestions come from.
        overrides: the dotted names that the command line gave.
    """

    def __init__(self, kind: type, overrides: Iterable[str] = ()) -> None:
        self.lines: list[str] = []
        self._names = dotted_names(kind)
        self._overrides = set(overrides)

    def add(self, path: str, text: str) -> None:
        origin = " (from the command line)" if path.split("[")[0] in self._overrides else ""
        self.lines.append(f"{path}{origin}: {text}")

    def add_unknown(self, path: str) -> None:
        """Note that nothing is called ``path``, with the nearest name that something has."""
        section, _, key = path.rpartition(".")
        split = {name: name.rpartition(".") for name in self._names}
        inside = [last for first, _, last in split.values() if first == section]
        near = [
            f"{section}.{last}".lstrip(".") for last in difflib.get_close_matches(key, inside, 1)
        ]
        near = near or [f"{section}.{last}" for last in inside if key in last.split("_")]
        near = near or [name for name, (_, _, last) in split.items() if last == key]
        near = near or difflib.get_close_matches(path, self._names, 1)
        hint = f", did you mean {' or '.join(near)}?" if near else ""
        self.add(path, f"found an unknown {'key' if section else 'section'}{hint}")


def field_types(kind: type) -> dict[str, Any]:
    """Field name to type of a dataclass; of ``X | None`` only X, since TOML has no null."""
    hints = get_type_hints(kind)
    for name, hint in hints.items():
        if get_origin(hint) in (Union, types.UnionType):
            hints[name] = next(option for option in get_args(hint) if option is not type(None))
    return hints


def dotted_names(kind: type) -> list[str]:
    """Every ``section`` and ``section.key`` of a recipe."""
    names = []
    for section, wanted in field_types(kind).items():
        names += [section, *(f"{section}.{key}" for key in field_types(wanted))]
    return names


def build(kind: type[T], document: Mapping[str, Any], problems: Problems, prefix: str = "") -> T:
    """``document`` as a ``kind``; what is unknown or of a wrong type is noted and left out."""
    types_ = field_types(kind)
    for name in document:
        if name not in types_:
            problems.add_unknown(prefix + name)
    values = {
        name: convert(document[name], wanted, prefix + name, problems)
        for name, wanted in types_.items()
        if name in document
    }
    try:
        return kind(**{name: value for name, value in values.items() if value is not _WRONG})
    except RecipeError as error:  # the view policy checks itself
        problems.add(prefix.rstrip("."), str(error.found))
        return kind()


def convert(value: Any, wanted: Any, path: str, problems: Problems) -> Any:
    """``value`` as ``wanted``: integers serve as floats, booleans as nothing but booleans."""
    if is_dataclass(wanted):
        if isinstance(value, dict):
            assert isinstance(wanted, type)
            return build(wanted, value, problems, f"{path}.")
        return _refuse(value, "a table", path, problems)
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin is tuple:
        return _convert_array(value, arguments, path, problems)
    if origin is dict:
        return _convert_table(value, path, problems)
    if wanted is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) is not wanted:
        return _refuse(value, _NAMES[wanted], path, problems)
    flaw = _flaw(value)
    return _refuse(value, flaw, path, problems) if flaw else value


def _convert_array(value: Any, arguments: tuple[Any, ...], path: str, problems: Problems) -> Any:
    item, repeated = arguments[0], arguments[-1] is Ellipsis
    plural = _NAMES[item].split()[-1] + "s"
    wanted = f"an array of {plural}" if repeated else f"an array of {len(arguments)} {plural}"
    if not isinstance(value, list | tuple) or (not repeated and len(value) != len(arguments)):
        return _refuse(value, wanted, path, problems)
    items = [convert(v, item, f"{path}[{i}]", problems) for i, v in enumerate(value)]
    return _WRONG if any(v is _WRONG for v in items) else tuple(items)


def _convert_table(value: Any, path: str, problems: Problems) -> Any:
    """A table whose keys are somebody else's: a model's constructor arguments."""
    if not isinstance(value, dict):
        return _refuse(value, "a table", path, problems)
    before = len(problems.lines)
    _note_flaws(value, path, problems)
    return value if len(problems.lines) == before else _WRONG


def _note_flaws(value: Any, path: str, problems: Problems, depth: int = 0) -> None:
    if isinstance(value, dict | list) and depth == MAX_DEPTH:
        _refuse(value, f"at most {MAX_DEPTH} tables in one another", path, problems)
    elif isinstance(value, dict):
        for name, item in value.items():
            _note_flaws(item, f"{path}.{name}", problems, depth + 1)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            _note_flaws(item, f"{path}[{place}]", problems, depth + 1)
    elif flaw := _flaw(value):
        _refuse(value, flaw, path, problems)


def _flaw(value: Any) -> str:
    """What a plain value should have been where it cannot be passed on or written back."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return "text that is valid Unicode"
        return "text without a NUL character" if "\0" in value else ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else "a finite number"
    return "" if isinstance(value, int) else "a string, number or boolean"


def _refuse(value: Any, expected: str, path: str, problems: Problems) -> Any:
    problems.add(path, f"found {shown(value)}, expected {expected}")
    return _WRONG


def shown(value: Any) -> str:
    """``value`` about as TOML writes it, short."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    return printable(repr(list(value) if isinstance(value, tuple) else value), 60)
