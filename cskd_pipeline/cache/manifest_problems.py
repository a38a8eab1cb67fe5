"""Problems of manifests that a JSON Schema cannot express."""

from collections.abc import Iterator
from typing import Any

from cskd_pipeline.distill.encodings import Sampled
from cskd_pipeline.errors import CskdError
from cskd_pipeline.views.policy import ViewPolicy

MAX_UNITS = 10_000_000  # blocks of views times tar shards; ImageNet's paper recipe has 30,720


def dataset_problems(document: Any, at: str = "$") -> Iterator[str]:
    """Yield the problems of a data set's document."""
    names, classes = document["class_names"], document["num_classes"]
    if names is not None and len(names) != classes:
        yield f"{at}.class_names: found {len(names)} names, expected num_classes = {classes}"
    seen: dict[tuple[str, str], int] = {}
    for number, shard in enumerate(document["shards"]):
        here = f"{at}.shards[{number}]"
        name = shard["name"]
        parts = name.split("/")
        if "\\" in name or ":" in name or "|" in name or {"", ".", ".."} & set(parts):
            yield f"{here}.name: found {name!r}, expected a file name or a path inside the folder"
        elif not name.isprintable():
            yield f"{here}.name: found {name!r}, expected printable characters"
        for identity in ("name", "keys_sha256"):
            first = seen.setdefault((identity, shard[identity]), number)
            if first != number:
                yield f"{here}.{identity}: found that of shards[{first}], expected each once"


def cache_problems(document: Any) -> Iterator[str]:
    """Yield the problems of a cache's document, its data set's among them."""
    yield from dataset_problems(document["dataset"], "$.dataset")
    data = document["dataset"]
    if "location" in data:
        yield "$.dataset: found a location, expected none in a cache"
    views, block, teacher = document["views"], document["view_block"], document["teacher"]
    if views % block:
        yield f"$.views: found {views}, expected a multiple of view_block = {block}"
    units = -(-views // block) * len(data["shards"])
    if units > MAX_UNITS:
        yield f"$.views: found {units:,} units, expected at most {MAX_UNITS:,}"
    if teacher["num_classes"] != data["num_classes"]:
        yield (
            f"$.teacher.num_classes: found {teacher['num_classes']}, "
            f"expected the data set's num_classes = {data['num_classes']}"
        )
    drawn = Sampled.name in document["encodings"]
    if drawn != ("sampled" in document):
        found, expected = ("nothing", "draws and temperature") if drawn else ("draws", "none")
        yield f"$.sampled: found {found}, expected {expected}, by $.encodings"
    try:
        policy = ViewPolicy.from_json(document["policy"])
    except (CskdError, TypeError, ValueError) as error:
        reason = getattr(error, "found", None) or error
        yield f"$.policy: found {reason}, expected a view policy that is built in or registered"
    else:
        if policy.size != teacher["size"]:
            yield f"$.teacher.size: found {teacher['size']}, expected policy.size = {policy.size}"
