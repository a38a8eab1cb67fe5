"""Write recipes as TOML, and compute the digest of the keys that decide a result."""

import json
import re
from dataclasses import asdict
from typing import Any

from cskd_pipeline.config.sections import DumpRecipe, TrainRecipe, keys_marked
from cskd_pipeline.runtime import schemas

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(recipe: DumpRecipe | TrainRecipe) -> str:
    """Return the complete recipe as TOML; :func:`load_recipe` reads it back as an equal recipe."""
    sections = []
    for section, values in asdict(recipe).items():
        if values is not None:
            lines = [f"{name} = {_value(value)}\n" for name, value in values.items()]
            sections.append(f"[{section}]\n" + "".join(lines))
    return "\n".join(sections)


def result_digest(recipe: DumpRecipe | TrainRecipe) -> str:
    """Return the SHA-256 (hex) of all keys that can change a result: no folders, workers, notes."""
    return schemas.sha256(_deciding_sections(recipe))


def deciding_keys(recipe: DumpRecipe | TrainRecipe) -> dict[str, Any]:
    """Return dotted name -> JSON value of the keys that can change a result."""
    sections = json.loads(json.dumps(_deciding_sections(recipe)))
    return {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in (values or {}).items()
    }


def adjustable_keys(kind: type[DumpRecipe | TrainRecipe]) -> set[str]:
    """Return the dotted names of the keys that may change when a run is resumed."""
    return keys_marked(kind, "adjustable")


def _deciding_sections(recipe: DumpRecipe | TrainRecipe) -> dict[str, Any]:
    free = keys_marked(type(recipe), "free")
    if isinstance(recipe, DumpRecipe) and "sampled" not in recipe.cache.encodings:
        free |= {"cache.sampled_draws", "cache.sampled_temperature"}  # nothing is drawn
    return {
        section: values
        and {name: v for name, v in values.items() if f"{section}.{name}" not in free}
        for section, values in asdict(recipe).items()
    }


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        items = (f"{_key(name)} = {_value(v)}" for name, v in value.items())
        return "{" + ", ".join(items) + "}"
    return repr(value)  # integers and floats, even inf and nan, are written as in Python


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _text(name)


def _text(text: str) -> str:
    # A JSON string is a TOML basic string, except that TOML requires DEL to be escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
