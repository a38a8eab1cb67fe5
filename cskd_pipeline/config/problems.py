"""Problems of a recipe, a line each: where, found, expected."""

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import ValidationError

from cskd_pipeline.config.sections import key_types
from cskd_pipeline.errors import printable

MAX_DEPTH = 20
"""Of tables and arrays in one another: what walks through them calls itself."""

# Where pydantic's own words are not those of someone who writes TOML.
_EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "a table",
    "dict_type": "a table",
    "float_type": "a number",
    "int_type": "an integer",
    "string_type": "a string",
    "too_short": "at least one value",
    "tuple_type": "an array",
}
_Location = tuple[str | int, ...]


class Problems:
    """Collect the problems of a recipe.

    Args:
        kind: the recipe's class, which suggestions come from.
        overrides: the dotted names that the command line gave.
    """

    def __init__(self, kind: type, overrides: Iterable[str] = ()) -> None:
        self.lines: list[str] = []
        self._names = list(key_types(kind))
        self._overrides = set(overrides)

    def add(self, path: str, text: str) -> None:
        """Add a line."""
        origin = " (from the command line)" if path.split("[")[0] in self._overrides else ""
        self.lines.append(f"{path}{origin}: {text}")

    def add_errors(self, error: ValidationError) -> None:
        """Add everything that pydantic found, unknown keys first."""
        unknown = "unexpected_keyword_argument"
        for one in sorted(error.errors(include_url=False), key=lambda one: one["type"] != unknown):
            path = _dotted(one["loc"])
            if one["type"] == unknown:
                self._add_unknown(path)
            elif one["type"] == "missing":  # of an array of fixed length
                self.add(path, "found nothing, expected a value")
            else:
                self.add(path, f"found {shown(one['input'])}, expected {_expected(one)}")

    def take_out_flaws(self, document: dict[str, Any]) -> None:
        """Take the keys out of ``document`` whose values no recipe can hold, and add them."""
        for location, text in list(_flaws(document)):
            self.add(_dotted(location), text)
            section = document.get(str(location[0]))
            if isinstance(section, dict) and len(location) > 1:
                section.pop(location[1], None)
            else:
                document.pop(str(location[0]), None)

    def _add_unknown(self, path: str) -> None:
        """Add that nothing is called ``path``, with the nearest name that something has."""
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


def _dotted(location: _Location) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")


def _expected(error: Any) -> str:
    """Return what was expected, of one of pydantic's errors."""
    text = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    text = re.sub("^(greater|less)", r"a value \1", _EXPECTED.get(error["type"], text))
    if error["type"] == "literal_error":
        near = difflib.get_close_matches(str(error["input"]), re.findall("'(.+?)'", text), 1)
        text += f", did you mean {near[0]!r}?" if near else ""
    return text


def _flaws(value: Any, location: _Location = ()) -> Iterator[tuple[_Location, str]]:
    """Yield the location and the text of what JSON, or TOML written later, could not hold."""
    if isinstance(value, dict | list | tuple) and len(location) <= MAX_DEPTH:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            inside = (*location, key)
            yield from _flaws(item, inside)
            if flaw := _flaw(key):
                yield inside, f"found {shown(key)}, expected {flaw}"
    elif flaw := _flaw(value):
        yield location, f"found {shown(value)}, expected {flaw}"


def _flaw(value: Any) -> str:
    """Return what a value should have been that cannot be passed on or written back."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return "text that is valid Unicode"
        return "text without a NUL character" if "\0" in value else ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else "a finite number"
    if isinstance(value, int):
        return "" if -(2**63) <= value < 2**63 else "an integer of 64 bits"
    if isinstance(value, dict | list | tuple):
        return f"at most {MAX_DEPTH} tables in one another"
    return "a string, number or boolean"


def shown(value: Any) -> str:
    """Return ``value`` about as TOML writes it, short."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    return printable(repr(list(value) if isinstance(value, tuple) else value), 60)
