"""Untrusted JSON documents: read within limits, checked against a schema, hashed."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cskd_pipeline.errors import ManifestError
from cskd_pipeline.runtime import resources

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import ValidationError

MAX_BYTES = 64 * 2**20  # the manifest of ImageNet's 1,024 shards takes 0.4 MB
MAX_VALUES = 4_000_000  # "[]" is 2 bytes of a file and 64 of memory
MAX_PROBLEMS = 1000


def sha256(document: object) -> str:
    """Return the SHA-256 (hex) of ``document`` as canonical JSON: sorted keys, no spaces, ASCII."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def read(path: Path) -> Any:
    """Read the JSON document in a file of at most 64 MiB.

    Raises:
        ManifestError: too large, not JSON, too deeply nested, or with a duplicate name.
        FileNotFoundError: no such file.
    """
    with open(path, "rb") as file:
        return parse(file.read(MAX_BYTES + 1), path)


def parse(data: bytes, where: object) -> Any:
    """Parse ``data`` as JSON, with the limits and errors of :func:`read`."""
    if len(data) > MAX_BYTES:
        raise ManifestError(
            where, [f"$: found a larger document, expected at most {MAX_BYTES >> 20} MiB"]
        )
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ManifestError(where, [f"$: found too many values, expected at most {MAX_VALUES:,}"])
    try:
        return json.loads(
            data, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_object
        )
    except (ValueError, RecursionError) as error:
        raise ManifestError(where, [f"$: found {error}, expected a JSON document"]) from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text}, which is not a finite number")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse duplicate names: some readers take the first, others the last."""
    document = dict(pairs)
    if len(document) < len(pairs):
        name = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        raise ValueError(f"the duplicate name {name!r} in an object")
    return document


def schema_problems(document: object, schema: str) -> list[str]:
    """List the violations of ``manifests/{schema}.schema.json`` in ``document``.

    One line per problem: path, found, expected.
    """
    lines = chain.from_iterable(map(_describe, _validator(schema).iter_errors(document)))
    return list(islice(lines, MAX_PROBLEMS))


@lru_cache
def _validator(schema: str) -> Draft202012Validator:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend
    from referencing import Registry, Resource

    documents = {
        name: json.loads((resources.manifests() / f"{name}.schema.json").read_bytes())
        for name in ("dataset", "cache")
    }
    registry: Registry[Any] = Registry().with_resources(
        (document["$id"], Resource.from_contents(document)) for document in documents.values()
    )
    kind = extend(Draft202012Validator, {"uniqueItems": _unique_items})
    return kind(documents[schema], registry=registry)


def _unique_items(
    validator: object, required: bool, items: object, schema: object
) -> Iterator[ValidationError]:
    """Replace the library's check, which takes quadratic time."""
    from jsonschema.exceptions import ValidationError

    if required and isinstance(items, list):
        texts = {json.dumps(item, sort_keys=True) for item in items}
        if len(texts) < len(items):
            yield ValidationError("items that are not unique")


def _describe(error: ValidationError) -> Iterator[str]:
    path, rule = error.json_path, str(error.validator)
    value: Any = error.validator_value
    instance: Any = error.instance
    assert isinstance(error.schema, Mapping)
    if rule == "required":
        missing = next(name for name in value if error.message.startswith(repr(name)))
        yield f"{path}.{missing}: found nothing, expected a value"
    elif rule == "additionalProperties" and value is False:
        known: Any = error.schema["properties"]
        for name in sorted(set(instance) - set(known)):
            yield f"{path}.{name}: found an unknown field, expected one of {', '.join(known)}"
    else:
        expected = {
            "type": lambda: " or ".join([value] if isinstance(value, str) else value),
            "const": lambda: json.dumps(value),
            "enum": lambda: "one of " + ", ".join(map(json.dumps, value)),
            "minimum": lambda: f"at least {value}",
            "maximum": lambda: f"at most {value}",
            "pattern": lambda: f"text like {value}",
            "minLength": lambda: f"at least {value} characters",
            "maxLength": lambda: f"at most {value} characters",
            "minItems": lambda: f"at least {value} entries",
            "maxItems": lambda: f"at most {value} entries",
            "maxProperties": lambda: f"at most {value} fields",
            "uniqueItems": lambda: "unique entries",
        }.get(rule, lambda: f"a value allowed by {rule}")()
        yield f"{path}: found {_shown(instance)}, expected {expected}"


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
