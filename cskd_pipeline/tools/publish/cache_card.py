"""The README of a published cache, a dataset card for the Hugging Face Hub.

Everything in it follows from the manifest and the files. Names, notes and licenses come from the
cache's author and are escaped in Markdown.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cskd_pipeline.cache.summary import fidelity, summarise
from cskd_pipeline.errors import printable
from cskd_pipeline.runtime.console import format_size
from cskd_pipeline.tools import markdown
from cskd_pipeline.tools.publish import preview
from cskd_pipeline.tools.publish.preview import Column

MARK = "<!-- written by cskd-pipeline cache publish -->"
NAME = "README.md"
SUMS = "SHA256SUMS"
"""The file with the digests of all others."""
# The Hub's identifiers of common data licenses; any other license is "other", with its name.
_LICENSES = (
    *("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"),
    *("cc-by-nc-sa-4.0", "odbl", "pddl", "unknown"),
)
_SIZES = (
    *((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")),
    *((10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B")),
    *((10**11, "10B<n<100B"), (10**12, "100B<n<1T")),
)

Info = Mapping[str, Any]


def is_card(path: Path) -> bool:
    """Return whether the file exists and was written by this command."""
    if not path.exists():
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        return MARK in file.read(10_000)


def card(info: Info, location: str, columns: Sequence[Column], views: int) -> str:
    """Return the card's text.

    Args:
        info: description by :func:`cskd_pipeline.cache.info.describe`.
        location: folder or URL that users will read the cache from.
        columns, views: columns of the preview, and its number of views.
    """
    fields = hub_fields(info)
    soft = " --set distill.global_kind=soft --set distill.spatial_kind=soft"
    pin = "" if info["digest"] is None else f"@sha256:{info['digest']}"
    return markdown.render(
        "cache_card.md",
        front_matter=markdown.front_matter(fields),
        mark=MARK,
        title=fields["pretty_name"],
        location=markdown.escape_fence(shlex.quote(printable(location))) + pin,
        kinds="" if "hard" in info["losses"]["cskd"] else soft,
        info=info,
        about=summarise(info),
        size=format_size,
        fidelity=fidelity,
        bibtex=markdown.escape_fence(info["cite"]["bibtex"]),
        columns=columns,
        thumbnails=any(column.type == "image" for column in columns),
        views=views,
        files={"preview": preview.NAME, "sums": SUMS},
    )


def hub_fields(info: Info) -> dict[str, Any]:
    """Return the Hub's metadata: name, license, categories, and the file for its viewer."""
    license_ = info["license"].strip()
    title = f"Teacher cache: {info['teacher']['name']} on {info['dataset']['name']}"
    fields: dict[str, Any] = {"pretty_name": printable(title)}
    if license_.lower() in _LICENSES:
        fields["license"] = license_.lower()
    elif license_:
        fields |= {"license": "other", "license_name": printable(license_)}
    views = info["samples"] * info["views"]
    files = [{"split": "preview", "path": preview.NAME}]
    return fields | {
        "task_categories": ["image-classification"],
        "size_categories": [next((name for limit, name in _SIZES if views < limit), "n>1T")],
        "tags": ["knowledge-distillation", "teacher-cache", "cskd", "zarr"],
        "configs": [{"config_name": "preview", "data_files": files}],
    }
