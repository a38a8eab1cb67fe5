"""The description of a cache in Croissant 1.0 (JSON-LD), for the Hub's and other data tools.

It lists only the preview, the cache's ``zarr.json`` and ``SHA256SUMS``, which has the digests of
all other files: a cache of ImageNet has tens of thousands, and mlcroissant 1.1 takes 5 ms for each.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from cskd_pipeline.errors import printable
from cskd_pipeline.tools.publish import preview
from cskd_pipeline.tools.publish.cache_card import SUMS, hub_fields
from cskd_pipeline.tools.publish.preview import Column

NAME = "croissant.json"
_TYPES = {
    "string": "sc:Text",
    "int32": "sc:Integer",
    "float32": "sc:Float",
    "image": "sc:ImageObject",
}
_FORMATS = {".json": "application/json", ".parquet": "application/x-parquet"}
# The specification's context, for the terms used: https://docs.mlcommons.org/croissant/docs/croissant-spec.html
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    **{
        term: f"cr:{term}"
        for term in (
            *("citeAs", "column", "extract", "field", "fileObject", "fileSet", "includes"),
            *("jsonPath", "recordSet", "source", "transform"),
        )
    },
}


def croissant(
    info: Mapping[str, Any],
    repository: str | None,
    files: Mapping[str, bytes],
    columns: Sequence[Column],
) -> str:
    """Return the document's text, safe to embed in HTML.

    Args:
        info: description by :func:`cskd_pipeline.cache.info.describe`.
        repository: OWNER/NAME on the Hub, if any.
        files: contents of the files to list, by name.
        columns: columns of the preview.
    """
    document = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        **_metadata(info, repository),
        "distribution": [
            *(_file(name, data) for name, data in files.items()),
            *(_array(name) for name in info["bytes_by_array"] if name != "metadata"),
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "preview",
                "name": "preview",
                "description": "Views drawn at random, with the teacher's labels.",
                "field": [_field(column) for column in columns],
            }
        ],
    }
    return json.dumps(document, indent=2).replace("<", "\\u003c") + "\n"


def _metadata(info: Mapping[str, Any], repository: str | None) -> dict[str, Any]:
    fields, digest = hub_fields(info), info["digest"]
    metadata: dict[str, Any] = {
        "name": fields["pretty_name"],
        "description": "A CNN's logits of augmented views of a data set, for distillation: "
        f"{info['views']} views of each of {info['samples']} samples, in a zarr v3 group"
        f"{'' if digest is None else f', contents sha256:{digest}'}. The record set is a sample.",
        "keywords": fields["tags"],
        "citeAs": info["cite"]["bibtex"],
        "dateCreated": info["created"],
        "datePublished": datetime.now(UTC).date().isoformat(),
    }
    if info["license"]:
        metadata["license"] = printable(info["license"])
    if repository is not None:
        metadata["url"] = f"https://huggingface.co/datasets/{repository}"
    return metadata


def _file(name: str, data: bytes) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{len(data)} B",
        "encodingFormat": _FORMATS.get(PurePosixPath(name).suffix, "text/plain"),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _array(name: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": f"array/{name}",
        "name": name,
        "description": f"Files of a zarr array; {SUMS} has their SHA-256.",
        "encodingFormat": "application/octet-stream",
        "includes": f"{name}/**",
    }


def _field(column: Column) -> dict[str, Any]:
    source: dict[str, Any] = {
        "fileObject": {"@id": preview.NAME},
        "extract": {"column": column.name},
    }
    if column.type == "image":
        source["transform"] = {"jsonPath": "bytes"}
    return {
        "@type": "cr:Field",
        "@id": f"preview/{column.name}",
        "name": column.name,
        "description": column.meaning,
        "dataType": _TYPES[column.type],
        "source": source,
    }
