"""A cache in half a screen: what :func:`cskd_pipeline.cache.info.describe` found, for a person."""

from collections.abc import Mapping
from typing import Any

from cskd_pipeline.cache.units import FileCounts
from cskd_pipeline.distill.encodings import Sampled
from cskd_pipeline.runtime.console import format_size
from cskd_pipeline.views.policy import ViewPolicy

SHOWN = 5  # examples of what there may be thousands of

Info = Mapping[str, Any]


def summarise(info: Info) -> dict[str, Any]:
    """Return one line for each question about a cache, by its name."""
    teacher, data = info["teacher"], info["dataset"]
    height, width = teacher["grid"]
    kinds = " and ".join(info["losses"]["cskd"])
    counts = FileCounts(info["files"], info["largest_folder"])
    return {
        "cache": info["path"],
        "data": (
            f"{data['name']}: {info['samples']} samples of {data['num_classes']} classes in "
            f"{data['shards']} shards"
        ),
        "teacher": (
            f"{teacher['name']}, {teacher['precision']}, {teacher['size']} px, {height}x{width} "
            f"locations; mean {_value(teacher['mean'])}, std {_value(teacher['std'])}; "
            f"weights from {teacher['source']}, sha256 {teacher['weights_sha256'][:12]}…"
        ),
        "teacher_top1": "not known before a unit is done"
        if info["teacher_top1"] is None
        else f"{info['teacher_top1']:.2f} % of the views, with the label of what fills more of "
        "them",
        "policy": _policy(info["policy"]),
        "views": f"{info['views']} of each sample; {info['epochs']} epochs see none of them twice",
        "complete": _completeness(info),
        "encodings": {name: _encoding(name, info) for name in info["encodings"]},
        "serves": f"methods deit and cskd with {kinds} targets, under every CKF schedule",
        "files": counts.advice or str(counts),
        "bytes": "not listed there" if info["bytes"] is None else format_size(info["bytes"]),
        "largest": ", ".join(
            f"{name} {format_size(count)}"
            for name, count in sorted(
                (info["bytes_by_array"] or {}).items(), key=lambda item: -item[1]
            )
            if count
        ),
        "made": _making(info),
        "digest": "none before it is finished"
        if info["digest"] is None
        else f"sha256:{info['digest']}",
        "license": info["license"] or "none stated",
        "notes": info["notes"] or None,
        "cite": {"cache": info["cite"]["cache"], "method": info["cite"]["method"]},
    }


def _policy(policy: Info) -> str:
    usual = ViewPolicy(size=policy["size"]).to_json()
    own = [f"{k} {_value(v)}" for k, v in policy.items() if usual.get(k) != v and k != "size"]
    differing = f"; unlike its defaults: {', '.join(own)}" if own else ", its defaults"
    return f"{policy['version']}, {policy['size']} px{differing}"


def _completeness(info: Info) -> str:
    if info["complete"]:
        return f"yes, {info['units']['total']} units"
    unfinished = [shard for shard in info["shards"] if shard["views_done"] < info["views"]]
    examples = [
        f"{shard['name']} has {shard['views_done']} of {info['views']} views"
        for shard in unfinished[:SHOWN]
    ]
    more = f", and {len(unfinished) - SHOWN} more" if len(unfinished) > SHOWN else ""
    return (
        f"no, {info['units']['done']} of {info['units']['total']} units; unfinished: "
        f"{', '.join(examples)}{more}"
    )


def kept(name: str, info: Info) -> str:
    """Return how well an encoding of the cache serves: exactly, by draws, or approximately."""
    if name == Sampled.name:
        return f"by unbiased draws, {info['sampled']['draws']} of each location"
    return "exactly" if info["encodings"][name]["exact"] else "approximately"


def _encoding(name: str, info: Info) -> str:
    encoding = info["encodings"][name]
    kinds = " and ".join(encoding["serves"])
    lowest, highest = encoding["min_temperature"], encoding["max_temperature"]
    where = f" at temperatures of {lowest} and more" if lowest else ""
    where = f" at temperature {lowest}" if lowest == highest else where
    each = encoding["bytes_per_view"]
    unknown = "bytes not known" if encoding["bytes"] is None else "no view yet"
    costs = unknown if each is None else f"{each:.4g} bytes a view"
    return f"{costs}; {kinds} targets, {kept(name, info)}{where}"


def _making(info: Info) -> str:
    versions = info["versions"]
    names = ("torch", "timm", "pillow", "libjpeg_turbo")
    libraries = ", ".join(f"{n} {versions[n]}" for n in names if n in versions)
    parent = info["parent"]
    source = (
        f", converted from {_identity(parent)} ({', '.join(parent['encodings'])}, "
        f"{parent['views']} views, {parent['shards']} shards)"
        if parent
        else ""
    )
    others = f"; {len(info['other_versions'])} other sets too" if info["other_versions"] else ""
    return f"{info['created']}{source}, with {libraries}{others}"


def _identity(parent: Info) -> str:
    if parent["digest"] is None:
        return f"an unfinished cache, manifest {parent['manifest_sha256'][:12]}…"
    return f"sha256:{parent['digest']}"


def _value(value: Any) -> str:
    return "/".join(f"{v:g}" for v in value) if isinstance(value, list) else f"{value}"
