"""Write the files that a cache is published with; uploading is left to the Hub's own tool."""

from __future__ import annotations

import logging
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.folders import require_local
from cskd_pipeline.cache.info import describe
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.cache.store import FINISH
from cskd_pipeline.cache.units import count_files
from cskd_pipeline.data.join import lenient_join
from cskd_pipeline.errors import CacheError, OutputError, UsageError, require_packages
from cskd_pipeline.runtime import atomic
from cskd_pipeline.runtime.classes import ClassGuard
from cskd_pipeline.tools.publish import cache_card, croissant, preview
from cskd_pipeline.tools.report.labels import draw_rows

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

SAMPLES = 300
_REPOSITORY = re.compile(r"hf://datasets/(?P<id>[\w.-]+/[\w.-]+)/?", re.ASCII)


@dataclass(frozen=True)
class PublishOptions:
    """Options for publishing a cache.

    Args:
        location: folder or URL that users will read it from; None: the folder's name.
        license: license of the cache; None: the manifest's.
        samples: number of views in the preview, drawn by ``seed``.
        thumbnails: whether to show the views, replayed from ``split`` of ``shards``.
    """

    location: str | None = None
    license: str | None = None
    samples: int = SAMPLES
    seed: int = 0
    thumbnails: bool = False
    shards: str | None = None
    split: str | None = None


def publish(path: Path, options: PublishOptions) -> dict[str, Any]:
    """Write ``README.md``, ``croissant.json``, ``preview.parquet`` and ``SHA256SUMS`` in a cache.

    Files of an earlier call are replaced, each atomically. The README is written first: its mark
    shows later calls that the files are the command's own.

    Returns:
        The files, the number of views in the preview, the cache's digest, and the upload command if
        ``location`` is on the Hub.

    Raises:
        CacheError: no unit is finished; OutputError: a file that this command did not write.
    """
    problem = "the preview needs an optional package"
    require_packages("pyarrow", extra="hub", problem=problem)
    repository = _repository(options.location)
    cache = open_cache(require_local(path, "only a local cache is published", "copy it here first"))
    if not cache.done().any():
        raise CacheError("the cache has no finished unit", where=cache.path, action=FINISH)
    _require_own(path)
    info = _describe(cache, options.license)
    table = _preview(cache, options)
    columns = preview.columns_of(table)
    location = options.location or path.resolve().name
    own = {cache_card.SUMS: sums(cache).encode(), preview.NAME: preview.parquet(table)}
    listed = {layout.GROUP: (path / layout.GROUP).read_bytes(), **own}
    written = {
        cache_card.NAME: cache_card.card(info, location, columns, table.num_rows).encode(),
        **own,
        croissant.NAME: croissant.croissant(info, repository, listed, columns).encode(),
    }
    for name, data in written.items():
        atomic.write_bytes(path / name, data)
    report = {
        "files": [str(path / name) for name in written],
        "views": table.num_rows,
        "license": info["license"] or "none stated",
        "digest": info["digest"],
    }
    if repository is not None:
        advice = count_files(cache.manifest).advice
        if advice is not None:
            log.warning(advice)
        target = f"{repository} {shlex.quote(str(path))}"
        report["upload"] = f"hf upload {target} --repo-type dataset"
    return report


def _repository(location: str | None) -> str | None:
    """Return OWNER/NAME of a location on the Hub, None for any other."""
    if location is None or not location.startswith("hf:"):
        return None
    match = _REPOSITORY.fullmatch(location)
    if match is None:
        raise UsageError(
            "not the location of a data set on the Hub",
            found=location,
            expected="hf://datasets/LAB/NAME, whose README is the data set's card",
        )
    return match["id"]


def _preview(cache: Cache, options: PublishOptions) -> pa.Table:
    rows, found = draw_rows(cache, options.samples, options.seed), None
    if options.thumbnails:
        assert options.shards is not None
        found = lenient_join(cache, options.shards, ClassGuard(), split=options.split)
    return preview.make_table(cache, rows, found)


def _require_own(path: Path) -> None:
    names = (cache_card.NAME, croissant.NAME, preview.NAME, cache_card.SUMS)
    existing = [name for name in names if (path / name).exists()]
    if existing and not cache_card.is_card(path / cache_card.NAME):
        raise OutputError(
            "the file exists, and was not written by this command",
            where=path / existing[0],
            expected="no such file, or the files of an earlier call",
            action="move or rename it",
        )


def _describe(cache: Cache, license_: str | None) -> dict[str, Any]:
    info = describe(cache)
    if license_ is not None and info["license"] not in ("", license_):
        raise UsageError(
            "the cache has another license",
            where=cache.path,
            found=f"--license {license_}",
            expected=info["license"],
            action="leave out --license: the manifest states it",
        )
    return info if license_ is None else {**info, "license": license_}


def sums(cache: Cache) -> str:
    """Return the SHA-256 of every file, in the format of ``sha256sum --check``.

    The digests of units' files come from their records: only the records are read.
    """

    def of_unit(unit: list[int]) -> dict[str, bytes]:
        keys = [key for _, key in store.recorded_files(*unit)]
        own = store.record_key(*unit)
        files = dict(zip(keys, store.record(*unit).files, strict=True))
        return files | {own: store.folder.sha256(own)}

    store, units = cache.store, np.argwhere(cache.done()).tolist()
    documents = (layout.GROUP, *layout.array_documents(cache.manifest))
    found = {key: store.folder.sha256(key) for key in documents}
    for files in store.each(of_unit, units, "reading records"):
        found |= files
    return "".join(f"{found[key].hex()}  {key}\n" for key in sorted(found))
