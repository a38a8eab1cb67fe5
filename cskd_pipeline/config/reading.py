"""Read recipes from files, names and the command line; report every problem, one per line."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin

from pydantic import TypeAdapter, ValidationError

from cskd_pipeline.config.sections import DumpRecipe, TrainRecipe, is_factory, key_types
from cskd_pipeline.errors import RecipeError, UsageError, printable
from cskd_pipeline.runtime import resources

R = TypeVar("R", DumpRecipe, TrainRecipe)

_FOLDERS: dict[type, str] = {DumpRecipe: "dump_teacher", TrainRecipe: "train"}
_MAX_BYTES = 2**20
_MAX_DOTS = 30
_DOT_NEXT_TO_QUOTE = re.compile(rb"""["'][ \t]*\.|\.[ \t]*["']""")
_NO_BARE_KEY = re.compile(rb"[^\w\-. \t]+")
MAX_DEPTH = 20
"""Maximum nesting of tables and arrays, which are walked recursively."""

# TOML's terms, instead of pydantic's.
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


def load_recipe(
    kind: type[R],
    source: str | Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> R:
    """Return a validated recipe: the defaults, overridden by the file, ``sets`` and ``flags``.

    Args:
        kind: ``DumpRecipe`` or ``TrainRecipe``.
        source: a file, or a name in ``stages/``; see :func:`find_recipe`. None: defaults only.
        sets: ``section.key=value`` with a TOML value; a bare word is a string.
        flags: dotted name -> value; None: the flag was not given.

    Raises:
        RecipeError: the file is missing or not TOML; or lists every unknown key, wrong type and
            invalid value at once, and a teacher's factory that only the file names.
        UsageError: ``sets`` are not ``section.key=value``, or contradict ``flags``.
    """
    path = None if source is None else find_recipe(kind, source)
    document = {} if path is None else _read(path)
    overrides = _parse_sets(kind, sets)
    for name, value in (flags or {}).items():
        if value is None:
            continue
        if overrides.get(name, value) != value:
            raise UsageError(
                "a flag and --set disagree",
                where=name,
                found=f"{_format(value)} and {_format(overrides[name])}",
                action="pass only one of the two",
            )
        overrides[name] = value
    problems = _Problems(kind, overrides)
    _refuse_code(document, overrides, problems)
    _put_all(document, overrides, problems)
    problems.remove_unstorable(document)
    recipe = _validate(kind, document, problems)
    if problems.lines or recipe is None:
        where = path or "the command line"
        raise RecipeError("the recipe is not valid", where=where, problems=problems.lines)
    return recipe


def _validate(kind: type[R], document: dict[str, Any], problems: _Problems) -> R | None:
    try:
        # As JSON, whose types are TOML's: strict validation then accepts arrays for tuples.
        return TypeAdapter(kind).validate_json(json.dumps(document))
    except ValidationError as error:
        problems.add_errors(error)
    except RecipeError as error:  # raised by the view policy
        problems.add("views", str(error.found))
        _validate(kind, {**document, "views": {}}, problems)
    return None


def find_recipe(kind: type, source: str | Path) -> Path:
    """Return the file of a ``--recipe``: a path, or a name in ``stages/``; refuse others.

    A name without a method, such as ``paper_tiny``, means method cskd.
    """
    given = str(source)
    if given.endswith(".toml") or os.sep in given:
        return Path(given)
    files = _recipe_files(kind)
    for name in (given, f"{given}_cskd"):
        if name in files:
            return files[name]
    if Path(given).is_file():
        return Path(given)
    known = sorted(files)
    near = difflib.get_close_matches(given, known, 1)
    raise RecipeError(
        "no recipe of that name",
        where=resources.stages() / _FOLDERS[kind],
        found=given,
        expected="a .toml file or one of " + ", ".join(known),
        action=f"--recipe {near[0]}" if near else None,
    )


def recipe_names(kind: type) -> list[str]:
    """Return the names of the recipes in ``stages/`` for this kind."""
    return sorted(_recipe_files(kind))


def _recipe_files(kind: type) -> dict[str, Path]:
    """Return name -> file; in ``study/``, names that end in ``_dump`` are dump recipes."""
    own = (resources.stages() / _FOLDERS[kind]).glob("*.toml")
    studies = (resources.stages() / "study").glob("*.toml")
    mine = (path for path in studies if path.stem.endswith("_dump") == (kind is DumpRecipe))
    return {path.stem: path for path in (*own, *mine)}


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise RecipeError("the recipe is too large", where=path, expected="at most 1 MiB")
        if _nests_deeply(data):
            raise RecipeError("the recipe's keys are nested too deeply", where=path)
        return tomllib.loads(data.decode())
    except OSError as error:
        raise RecipeError(
            "the recipe cannot be read", where=path, found=error.strerror, expected="a TOML file"
        ) from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError too
        raise RecipeError("the recipe is not TOML", where=path, found=error) from error


def _nests_deeply(data: bytes) -> bool:
    """Return whether a line may contain a dotted key of many parts, ``a.a.a``.

    tomllib's memory grows with the square of their number. A dot between parts is next to a quote,
    or in an uninterrupted run of bare words.
    """
    return any(
        len(_DOT_NEXT_TO_QUOTE.findall(line)) > _MAX_DOTS
        or any(words.count(b".") > _MAX_DOTS for words in _NO_BARE_KEY.split(line))
        for line in data.split(b"\n")
    )


def _refuse_code(
    document: Mapping[str, Any], overrides: Mapping[str, Any], problems: _Problems
) -> None:
    """Refuse a factory, which runs code, if only the file names it: the file may be untrusted."""
    section = document.get("teacher")
    name = section.get("name") if isinstance(section, dict) else None
    if isinstance(name, str) and is_factory(name) and "teacher.name" not in overrides:
        problems.add(
            "teacher.name",
            f"found {_format(name)}, which would run code of that module; a recipe file alone may "
            f"not do so: if you trust it, pass --teacher {_format(name)} as well",
        )


def _parse_sets(kind: type, sets: Sequence[str]) -> dict[str, Any]:
    values = {}
    for text in sets:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or "." not in name or not all(name.split(".")):
            action = "use --set as in --set optim.lr=5e-4"
            raise UsageError("--set takes section.key=value", found=text, action=action)
        values[name] = _parse_value(kind, name, value)
    return values


def _parse_value(kind: type, name: str, text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    if set(parsed) != {"value"}:  # a line break, then another key
        return text
    # A key of type string takes `--set run.device=0` and `--set data.split=true` as text.
    type_ = key_types(kind).get(name)
    textual = type_ is str or get_origin(type_) is Literal
    return text if textual and not isinstance(parsed["value"], str) else parsed["value"]


def _put_all(document: dict[str, Any], overrides: Mapping[str, Any], problems: _Problems) -> None:
    """Put the overrides into ``document``; report those inside another override or a non-table."""
    for name, value in overrides.items():
        outer = next((one for one in overrides if name.startswith(f"{one}.")), None)
        if outer is not None:
            problems.add(name, f"found {outer} on the command line too, expected one of the two")
            continue
        *parents, key = name.split(".")
        table = document
        for depth, part in enumerate(parents, 1):
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):
                parent = ".".join(parents[:depth])
                problems.add(name, f"found {parent} = {_format(inner)}, expected a table")
                break
            table = inner
        else:
            table[key] = value


# -- the problems of a recipe ------------------------------------------------------------------


class _Problems:
    """The problems found in a recipe; those of keys in ``overrides`` name the command line."""

    def __init__(self, kind: type, overrides: Iterable[str]) -> None:
        self.lines: list[str] = []
        self._names = list(key_types(kind))
        self._overrides = set(overrides)

    def add(self, path: str, text: str) -> None:
        origin = " (from the command line)" if path.split("[")[0] in self._overrides else ""
        self.lines.append(f"{path}{origin}: {text}")

    def add_errors(self, error: ValidationError) -> None:
        """Add pydantic's errors, unknown keys first."""
        unknown = "unexpected_keyword_argument"
        for one in sorted(error.errors(include_url=False), key=lambda one: one["type"] != unknown):
            path = _dotted(one["loc"])
            if one["type"] == unknown:
                self._add_unknown(path)
            elif one["type"] == "missing":  # an item of an array of fixed length
                self.add(path, "found nothing, expected a value")
            else:
                self.add(path, f"found {_format(one['input'])}, expected {_expected(one)}")

    def remove_unstorable(self, document: dict[str, Any]) -> None:
        """Add values that a recipe cannot store, and remove their keys from ``document``."""
        for location, text in list(_unstorable(document)):
            self.add(_dotted(location), text)
            section = document.get(str(location[0]))
            if isinstance(section, dict) and len(location) > 1:
                section.pop(location[1], None)
            else:
                document.pop(str(location[0]), None)

    def _add_unknown(self, path: str) -> None:
        """Add that ``path`` is unknown, with the most similar known names."""
        section, _, key = path.rpartition(".")
        last = {name: name.rpartition(".")[2] for name in self._names}
        inside = {last[name]: name for name in self._names if name.rpartition(".")[0] == section}
        near = (
            [inside[one] for one in difflib.get_close_matches(key, inside, 1)]
            or [name for one, name in inside.items() if key in one.split("_")]
            or [name for name in self._names if last[name] == key]
            or difflib.get_close_matches(path, self._names, 1)
        )
        hint = f", did you mean {' or '.join(near)}?" if near else ""
        self.add(path, f"found an unknown {'key' if section else 'section'}{hint}")


def _dotted(location: _Location) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")


def _expected(error: Any) -> str:
    """Return what one of pydantic's errors expected."""
    text = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    text = re.sub("^(greater|less)", r"a value \1", _EXPECTED.get(error["type"], text))
    if error["type"] == "literal_error":
        near = difflib.get_close_matches(str(error["input"]), re.findall("'(.+?)'", text), 1)
        text += f", did you mean {near[0]!r}?" if near else ""
    return text


def _unstorable(value: Any, location: _Location = ()) -> Iterator[tuple[_Location, str]]:
    """Yield the location and the problem of every value that JSON or TOML cannot store."""
    if isinstance(value, dict | list | tuple) and len(location) <= MAX_DEPTH:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            inside = (*location, key)
            yield from _unstorable(item, inside)
            if storable := _storable_type(key):
                yield inside, f"found {_format(key)}, expected {storable}"
    elif storable := _storable_type(value):
        yield location, f"found {_format(value)}, expected {storable}"


def _storable_type(value: Any) -> str:
    """Return the storable type expected instead of ``value``; "" if ``value`` can be stored."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return "text that is valid Unicode"
        return "text without a NUL character" if "\0" in value else ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else "a finite number"
    if isinstance(value, int):
        return "" if -(2**63) <= value < 2**63 else "a 64-bit integer"
    if isinstance(value, dict | list | tuple):
        return f"at most {MAX_DEPTH} nested tables"
    return "a string, number or boolean"


def _format(value: Any) -> str:
    """Return ``value`` roughly as TOML, shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    return printable(repr(list(value) if isinstance(value, tuple) else value), 60)
