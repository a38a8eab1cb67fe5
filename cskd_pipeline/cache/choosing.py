"""Choice of the encoding to read targets from: the smallest exact one that supports the losses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from cskd_pipeline.distill.encodings import Encoding, ResponseShape, Sampled, temperature_near
from cskd_pipeline.errors import CacheError

if TYPE_CHECKING:
    from cskd_pipeline.cache.reader import Cache


def serving(
    encodings: Mapping[str, Encoding],
    shape: ResponseShape,
    kinds: Collection[str],
    temperature: float | None,
) -> list[str]:
    """List the encodings that support these losses, best first; see ``Cache.serving``."""
    sizes = {
        name: sum(spec.row_bytes for spec in encoding.arrays(shape))
        for name, encoding in encodings.items()
        for lowest, highest in [encoding.temperatures]
        if set(kinds) <= set(encoding.serves)
        and ("soft" not in kinds or temperature is None or lowest <= temperature <= highest)
    }

    def rank(name: str) -> tuple[bool, bool, int]:
        exact, drawn = encodings[name].exact, isinstance(encodings[name], Sampled)
        return not exact, drawn, sizes[name] if exact else -sizes[name]

    return sorted(sizes, key=rank)


def refusal(cache: Cache, kinds: Collection[str], temperature: float, name: str) -> CacheError:
    """Return the error for a cache without the encoding ``name``, or without one for the losses."""
    known = name == "auto" or name in cache.encodings
    words = {"hard": "hard targets", "soft": f"soft targets at temperature {temperature}"}
    targets = " and ".join(words.get(kind, kind) for kind in sorted(kinds))
    nearest = [
        f"--set distill.temperature={temperature_near(encoding, temperature)} for {other}"
        for other, encoding in cache.encodings.items()
        if set(kinds) <= set(encoding.serves) and name in ("auto", other)
    ]
    hard = "--set distill.global_kind=hard --set distill.spatial_kind=hard"
    return CacheError(
        f"the cache does not support {targets}" if known else f"the cache has no encoding {name}",
        where=cache.path,
        found=f"encodings {', '.join(cache.encodings)}",
        expected=f"one that supports {targets}" if known else name,
        action=f"use {' or '.join(nearest) or hard}, or a cache dumped with --encoding dense"
        if "soft" in kinds
        else "use --set distill.encoding=auto, or a cache dumped with --encoding envelope",
    )
