"""A half-screen summary of the description by :func:`cskd_pipeline.cache.info.describe`."""

from collections.abc import Mapping
from typing import Any

from cskd_pipeline.cache.units import FileCounts
from cskd_pipeline.distill.encodings import Sampled
from cskd_pipeline.runtime.console import format_size
from cskd_pipeline.views.policy import ViewPolicy

SHOWN = 5  # unfinished tar shards in the summary

Info = Mapping[str, Any]


def summarise(info: Info) -> dict[str, Any]:
    """Return one line of text per property of a cache, by name."""
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
        "teacher_top1": "unknown until a unit is finished"
        if info["teacher_top1"] is None
        else f"{info['teacher_top1']:.2f} % of the views (label of the image that fills more)",
        "policy": _policy(info["policy"]),
        "views": f"{info['views']} of each sample, enough for {info['epochs']} epochs without "
        "repeating one",
        "complete": _completeness(info),
        "encodings": {name: _encoding(name, info) for name in info["encodings"]},
        "serves": f"methods deit and cskd with {kinds} targets, under every CKF schedule",
        "files": counts.advice or str(counts),
        "bytes": "unknown (the server lists no files)"
        if info["bytes"] is None
        else format_size(info["bytes"]),
        "largest": ", ".join(
            f"{name} {format_size(count)}"
            for name, count in sorted(
                (info["bytes_by_array"] or {}).items(), key=lambda item: -item[1]
            )
            if count
        ),
        "made": _provenance(info),
        "digest": "none until the cache is finished"
        if info["digest"] is None
        else f"sha256:{info['digest']}",
        "license": info["license"] or "none stated",
        "notes": info["notes"] or None,
        "cite": {"cache": info["cite"]["cache"], "method": info["cite"]["method"]},
    }


def _policy(policy: Info) -> str:
    defaults = ViewPolicy(size=policy["size"]).to_json()
    own = [f"{k} {_value(v)}" for k, v in policy.items() if defaults.get(k) != v and k != "size"]
    differing = f"; non-default: {', '.join(own)}" if own else ", defaults"
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


def fidelity(name: str, info: Info) -> str:
    """Return how an encoding reproduces targets: exactly, approximately, or by draws."""
    if name == Sampled.name:
        return f"by unbiased draws, {info['sampled']['draws']} per location"
    return "exactly" if info["encodings"][name]["exact"] else "approximately"


def _encoding(name: str, info: Info) -> str:
    encoding = info["encodings"][name]
    kinds = " and ".join(encoding["serves"])
    lowest, highest = encoding["min_temperature"], encoding["max_temperature"]
    limits = f" at temperatures from {lowest}" if lowest else ""
    limits = f" at temperature {lowest}" if lowest == highest else limits
    each = encoding["bytes_per_view"]
    unknown = "size unknown" if encoding["bytes"] is None else "no view yet"
    size = unknown if each is None else f"{each:.4g} bytes a view"
    return f"{size}; {kinds} targets, {fidelity(name, info)}{limits}"


def _provenance(info: Info) -> str:
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
    others = f"; and {len(info['other_versions'])} other sets" if info["other_versions"] else ""
    return f"{info['created']}{source}, with {libraries}{others}"


def _identity(parent: Info) -> str:
    if parent["digest"] is None:
        return f"an unfinished cache, manifest {parent['manifest_sha256'][:12]}…"
    return f"sha256:{parent['digest']}"


def _value(value: Any) -> str:
    return "/".join(f"{v:g}" for v in value) if isinstance(value, list) else f"{value}"
