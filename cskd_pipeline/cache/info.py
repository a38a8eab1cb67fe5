"""The description of a cache for ``cache info``, pages and READMEs, as a JSON-ready dictionary."""

from __future__ import annotations

import math
from typing import Any

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.manifest import CacheManifest
from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.cache.units import count_files

METHOD = (
    "Cumulative Spatial Knowledge Distillation for Vision Transformers. ICCV 2023. "
    "arXiv:2307.08500."
)

_MANIFEST_FIELDS = (
    *("format_version", "parent", "sampled", "teacher", "policy", "root_seed", "views"),
    *("view_block", "versions", "other_versions", "license", "notes", "created"),
)
SIZES = ("views", "samples", "complete", "bytes", "bytes_per_view")
"""The fields of a description that a command reports after writing a cache."""


def describe(cache: Cache) -> dict[str, Any]:
    """Return data, teacher, policy, completeness and sizes of a cache.

    - Sizes are file lengths in bytes, unfinished units included, or None if files cannot be listed.
    - ``bytes_per_view``: per view of one sample, over finished units.
    - ``teacher_top1``: percentage of views whose label is the teacher's top-1.
    - ``digest``: SHA-256 of a finished cache's contents, else None.
    - ``files``, ``largest_folder``: number of files, and of entries in the largest folder, once
      the cache is finished.
    - ``epochs``: number of epochs without a repeated view, equal to the views whatever the repeats.

    Raises:
        CacheError: a file that is read is damaged.
    """
    manifest, done = cache.manifest, cache.done()
    sizes = _bytes_by_array(cache)
    views_done = int(done.sum(axis=0) @ list(cache.counts)) * manifest.view_block
    digest, counts = cache.digest(), count_files(manifest)
    correct, counted = cache.top1()

    def per_view(names: list[str]) -> float | None:
        if sizes is None or not views_done:
            return None
        return round(sum(sizes[n] for n in names) / views_done, 2)

    encodings = {}
    for name, encoding in cache.encodings.items():
        arrays = [spec.name for spec in cache.specs(name)]
        lowest, highest = encoding.temperatures
        encodings[name] = {
            "serves": list(encoding.serves),
            "exact": encoding.exact,
            "min_temperature": lowest,
            "max_temperature": None if highest == math.inf else highest,
            "bytes": None if sizes is None else sum(sizes[array] for array in arrays),
            "bytes_per_view": per_view(arrays),
        }
    kinds = sorted({kind for encoding in cache.encodings.values() for kind in encoding.serves})
    document = manifest.to_json()
    return {
        "path": str(cache.path),
        "digest": digest,
        "manifest_sha256": manifest.digest(),
        **{name: document.get(name) for name in _MANIFEST_FIELDS},
        "dataset": {
            "name": manifest.dataset.name,
            "num_classes": manifest.dataset.num_classes,
            "shards": len(cache.counts),
        },
        "teacher_top1": 100 * correct / counted if counted else None,
        "samples": manifest.dataset.samples,
        "epochs": manifest.views,
        "units": {"done": int(done.sum()), "total": done.size},
        "complete": bool(done.all()),
        "shards": [
            {"name": shard.name, "samples": shard.count, "views_done": int(n) * manifest.view_block}
            for shard, n in zip(manifest.dataset.shards, done.sum(axis=0), strict=True)
        ],
        **counts._asdict(),
        "bytes": None if sizes is None else sum(sizes.values()),
        "bytes_by_array": sizes,
        "bytes_per_view": {
            "seeds_and_digests": per_view(["seed", "view_digest", "top1", layout.RECORD]),
            **{name: encoding["bytes_per_view"] for name, encoding in encodings.items()},
        },
        "encodings": encodings,
        "losses": {"deit": kinds, "cskd": kinds},
        "schedules": "any",
        "cite": cite(manifest, digest),
    }


def cite(manifest: CacheManifest, digest: str | None) -> dict[str, str]:
    """Return how to cite the cache (text and BibTeX) and the method.

    Args:
        digest: SHA-256 of the contents; None if unfinished, cited by the manifest's SHA-256.
    """
    data, teacher = manifest.dataset, manifest.teacher
    title = (
        f"Teacher cache of {teacher.name} on {data.name}: {manifest.views} views, policy "
        f"{manifest.policy.version}"
    )
    prefix = "manifest sha256 " if digest is None else "sha256:"
    digest = digest or manifest.digest()
    identity = f"{prefix}{digest}"
    year = manifest.created[:4]
    return {
        "cache": f"{title}. {year}. {identity}.",
        "bibtex": (
            f"@misc{{cskd-cache-{digest[:8]},\n"
            f"  title = {{{_escape_bibtex(title)}}},\n"
            f"  year = {{{year}}},\n"
            f"  note = {{{identity}; teacher weights sha256 {teacher.weights_sha256}}},\n"
            "}\n"
        ),
        "method": METHOD,
    }


def _escape_bibtex(text: str) -> str:
    """Return ``text`` for BibTeX braces, without characters that end them or start a command."""
    return "".join(c for c in text if c not in "{}\\" and c.isprintable())


def _bytes_by_array(cache: Cache) -> dict[str, int] | None:
    """Return file lengths by array, and those of all ``zarr.json`` together as ``metadata``."""
    found = cache.store.folder.sizes()
    if found is None:
        return None
    sizes = dict.fromkeys([*sorted(layout.stored_arrays(cache.manifest)), "metadata"], 0)
    for key, length in found.items():
        name = "metadata" if key.rpartition("/")[2] == layout.GROUP else key.partition("/c/")[0]
        if name in sizes:  # other files are not the cache's
            sizes[name] += length
    return sizes
