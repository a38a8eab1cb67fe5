"""The keys of a recipe by their dotted names, ``section.key``: types and metadata."""

import functools
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from pydantic.dataclasses import is_pydantic_dataclass
from pydantic.fields import FieldInfo


@functools.cache
def key_types(kind: type) -> Mapping[str, Any]:
    """Return dotted name -> type of every section and key; of ``X | None`` only X."""
    types: dict[str, Any] = {}
    for section, hint in get_type_hints(kind).items():
        types[section] = next((t for t in get_args(hint) if t is not type(None)), hint)
        types |= {f"{section}.{key}": t for key, t in get_type_hints(types[section]).items()}
    return types


def key_info(kind: type, name: str) -> FieldInfo:
    """Return default, limits, description and examples of the key called ``name``.

    Raises:
        KeyError: there is no such key.
    """
    section, _, key = name.partition(".")
    owner = key_types(kind)[section]
    if is_pydantic_dataclass(owner):
        return owner.__pydantic_fields__[key]
    return FieldInfo.from_annotation(get_type_hints(owner)[key])  # the view policy's


def keys_marked(kind: type, mark: str) -> set[str]:
    """Return the dotted names of the keys that are ``free`` or ``adjustable``."""
    names = (name for name in key_types(kind) if "." in name)
    return {name for name in names if key_info(kind, name).json_schema_extra == {"mark": mark}}
