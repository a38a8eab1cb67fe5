"""The encoding that targets are read from: one that serves the losses, the smallest exact first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from cskd_pipeline.distill.encodings import Encoding, ResponseShape
from cskd_pipeline.errors import CacheError

if TYPE_CHECKING:
    from cskd_pipeline.cache.reader import Cache


def serving(
    encodings: Mapping[str, Encoding],
    shape: ResponseShape,
    kinds: Collection[str],
    temperature: float,
) -> list[str]:
    """List the encodings that serve these losses, the best first; see ``Cache.serving``."""
    sizes = {
        name: sum(spec.row_bytes for spec in encoding.arrays(shape))
        for name, encoding in encodings.items()
        for lowest, highest in [encoding.temperatures]
        if set(kinds) <= set(encoding.serves)
        and ("soft" not in kinds or lowest <= temperature <= highest)
    }
    exact = {name: encodings[name].exact for name in sizes}
    return sorted(sizes, key=lambda n: (not exact[n], sizes[n] if exact[n] else -sizes[n]))


def refusal(cache: Cache, kinds: Collection[str], temperature: float, name: str) -> CacheError:
    """Make the error about a cache that lacks the encoding ``name``, or one for these losses."""
    known = name == "auto" or name in cache.encodings
    words = {"hard": "hard targets", "soft": f"soft targets at temperature {temperature:g}"}
    targets = " and ".join(words.get(kind, kind) for kind in sorted(kinds))
    return CacheError(
        f"the cache cannot serve {targets}" if known else f"the cache has no encoding {name}",
        where=cache.path,
        found=f"encodings {', '.join(cache.encodings)}",
        expected=f"one that serves {targets}" if known else name,
        action="use --set distill.global_kind=hard --set distill.spatial_kind=hard, or a cache "
        "dumped with --encoding dense"
        if "soft" in kinds
        else "use --set distill.encoding=auto, or a cache dumped with --encoding envelope",
    )
