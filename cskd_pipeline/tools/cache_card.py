"""The README that a published cache lies beside: a dataset card in the Hugging Face hub's form.

Everything in it follows from the manifest and the files. Names, notes and licenses are the text of
whoever made the cache: in Markdown they stay text.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cskd_pipeline.cache.info import describe
from cskd_pipeline.cache.summary import size, summarise
from cskd_pipeline.errors import OutputError, printable
from cskd_pipeline.runtime import atomic

MARK = "<!-- written by cskd-pipeline cache card -->"
NAME = "README.md"
# Of the hub's identifiers, those that data comes with; others are "other", with their own name.
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


def write_card(
    cache: Path,
    out: Path | None = None,
    location: str | None = None,
) -> dict[str, Any]:
    """Write the card of the cache in ``cache``.

    Args:
        out: the file; default: ``README.md`` in the cache, where a hub shows it.
        location: where the cache will be read from; default: its folder's name.

    Raises:
        CacheError, ManifestError: there is no cache, or it is damaged.
        OutputError: ``out`` is there, and is not a card.
    """
    info = describe(cache)
    path = cache / NAME if out is None else out
    if path.exists() and not _is_card(path):
        raise OutputError(
            "the file is there, and was not written by this command",
            where=path,
            expected="no file, or an older card",
            action="move it away, or name another file: --out FILE",
        )
    atomic.write_text(path, card(info, location or cache.resolve().name))
    return {"card": str(path), "digest": info["digest"]}


def _is_card(path: Path) -> bool:
    with open(path, encoding="utf-8", errors="replace") as file:
        return MARK in file.read(10_000)


def card(info: Info, location: str) -> str:
    """Return the card's text.

    Args:
        info: what :func:`cskd_pipeline.cache.info.describe` found.
    """
    about = summarise(info)
    data, teacher = info["dataset"], info["teacher"]
    parts = [
        _front_matter(info),
        MARK,
        f"# {text(_title(info))}",
        "A CNN's logits of augmented views of a data set, location by location, to train vision "
        "transformers with Cumulative Spatial Knowledge Distillation (ICCV 2023) or plain "
        "distillation without running the CNN again. It holds no images.",
        "## Use",
        _commands(info, location),
        "`cache verify` replays a sample of the views from your images and compares them bit "
        "by bit. The images may lie in other tar shards, and in another order. What follows "
        "`@sha256:` names the contents of the whole cache: any other is refused.",
        "## What it is",
        table(
            ("", ""),
            [
                ("data set", about["data"]),
                ("teacher", about["teacher"]),
                ("teacher's top-1", about["teacher_top1"]),
                ("views", about["views"]),
                ("policy", about["policy"]),
                ("complete", about["complete"]),
                ("made", about["made"]),
                ("teacher's weights, SHA-256", teacher["weights_sha256"]),
                ("contents", about["digest"]),
                ("manifest, SHA-256", info["manifest_sha256"]),
                ("license", about["license"]),
            ],
        ),
        "## Sizes",
        _sizes(info),
        f"With {info['bytes_per_view']['seeds_and_digests'] or 0:.4g} bytes a view for seeds and "
        f"digests: {size(info['bytes'])} in all, for {info['samples']} samples of "
        f"{data['num_classes']} classes.",
        "## Format",
        "A zarr v3 group with axes (view, shard, offset), readable by any zarr library; the "
        "manifest is in the group's attributes. Every chunk has a checksum; nothing in it is "
        "executed.",
        "## Citation",
        f"```bibtex\n{_fenced(info['cite']['bibtex'])}```",
        text(info["cite"]["method"]),
    ]
    if info["notes"]:
        parts[-2:-2] = ["## Notes", *(text(line) for line in info["notes"].splitlines() if line)]
    return "\n\n".join(parts) + "\n"


def text(value: object) -> str:
    """Return ``value`` as Markdown that shows just these characters, on one line."""
    line = re.sub(r"([\\`*_\[\]{}()#+!|~$@]|:(?=//))", r"\\\1", printable(value, 2000).strip())
    line = re.sub(
        r"^([-=])", r"\\\1", re.sub(r"^(\d+)([.)])(?= )", r"\1\\\2", line)
    )  # lists, rules
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _title(info: Info) -> str:
    return f"Teacher cache: {info['teacher']['name']} on {info['dataset']['name']}"


def _front_matter(info: Info) -> str:
    """Return YAML; strings as JSON has them, which YAML reads alike."""
    license_ = info["license"].strip()
    known = license_.lower() in _LICENSES
    fields: dict[str, Any] = {"pretty_name": printable(_title(info))}
    if license_:
        fields["license"] = license_.lower() if known else "other"
        if not known:
            fields["license_name"] = printable(license_)
    views = info["samples"] * info["views"]
    fields["task_categories"] = ["image-classification"]
    fields["size_categories"] = [next((n for most, n in _SIZES if views < most), "n>1T")]
    fields["tags"] = ["knowledge-distillation", "teacher-cache", "cskd", "zarr"]
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _commands(info: Info, location: str) -> str:
    location = _fenced(shlex.quote(printable(location)))
    soft = " --set distill.global_kind=soft --set distill.spatial_kind=soft"
    kinds = "" if "hard" in info["losses"]["cskd"] else soft
    if info["digest"] is not None:
        location += f"@sha256:{info['digest']}"
    return (
        "```\n"
        f"cskd-pipeline cache verify {location} --depth structure --shards 'YOUR/train-*.tar'\n"
        f"cskd-pipeline train --cache {location} --shards 'YOUR/train-*.tar' --method cskd{kinds} "
        f"--epochs {info['epochs']} --out run\n"
        "```"
    )


def _sizes(info: Info) -> str:
    rows = []
    for name, encoding in info["encodings"].items():
        per_view = encoding["bytes_per_view"]
        kept = "exactly" if encoding["exact"] else "approximately"
        rows.append(
            (
                name,
                f"{' and '.join(encoding['serves'])} targets, {kept}",
                "-" if per_view is None else f"{per_view:,.4g}",
                size(encoding["bytes"]),
            )
        )
    return table(("encoding", "serves", "bytes a view", "in all"), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table whose cells show just their characters."""
    lines = [head, ["---"] * len(head)]
    shown = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*shown, *(f"| {' | '.join(map(text, row))} |" for row in rows)])


def _fenced(block: str) -> str:
    """Return text for a fence, inside which only a fence would be read."""
    return block.replace("```", "'''")
