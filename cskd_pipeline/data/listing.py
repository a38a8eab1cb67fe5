"""The tars that a user names: a folder, braces, globs, comma lists, ``_info.json``, a manifest."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.shardlists import expand_urls

from cskd_pipeline.cache.manifest import DatasetManifest
from cskd_pipeline.errors import DataError
from cskd_pipeline.runtime import schemas

INFO = "_info.json"
EXPECTED = (
    "a tar, a folder of tars, a pattern like 'train-{0000..0009}.tar' or 'train-*.tar', "
    "a comma list, an _info.json or a manifest.json"
)

Spec = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Listing:
    """The tars in order, and what the user's list states.

    ``counts``: samples of each tar, by an ``_info.json``.
    """

    paths: tuple[Path, ...]
    manifest: DatasetManifest | None = None
    counts: tuple[int, ...] | None = None


def expand_shards(
    spec: Spec, *, split: str | None = None, prefer: Sequence[str] = ("train",)
) -> list[Path]:
    """List the tars of ``spec``: as listed, braces in their order, globs in natural order.

    Args:
        split: which one of an ``_info.json``.
        prefer: the splits to look for when none is given and there are several.

    Raises:
        DataError: nothing there, something missing, listed twice, or not a local file.
        ManifestError: a manifest that does not fit its schema.
    """
    return list(list_shards(spec, split=split, prefer=prefer).paths)


def list_shards(
    spec: Spec, *, split: str | None = None, prefer: Sequence[str] = ("train",)
) -> Listing:
    """List the tars of ``spec`` as :func:`expand_shards`, with the manifest, if it is one."""
    parts = [str(part) for part in ([spec] if isinstance(spec, str | Path) else spec)]
    parts = [piece for part in parts for piece in _pieces(part)]
    if not parts:
        raise DataError("no shards are named", expected=EXPECTED)
    listings = [_resolve(part, split, prefer) for part in parts]
    listing = listings[0]
    if len(listings) > 1:
        listing = Listing(tuple(path for one in listings for path in one.paths))
    _check(listing.paths, parts)
    return listing


def _pieces(text: str) -> Iterator[str]:
    """``text`` split at commas; commas and braces in names that exist are part of them."""
    while text := os.path.expanduser(text.strip(" ,")):
        end = _end_of_first(text)
        yield text[:end].rstrip()
        text = text[end:]


def _end_of_first(text: str) -> int:
    """Find the end of the first of the listed paths: at a comma outside braces, or at the end."""
    start = len(_existing_folders(text))
    commas = [i for i in range(start, len(text)) if text[i] == ","]
    for end in (len(text), *commas):
        if os.path.exists(text[:end]):
            return end
    for end in commas:
        if text.count("{", start, end) == text.count("}", start, end):
            return end
    return len(text)


def _existing_folders(text: str) -> str:
    """The longest beginning of ``text``, up to a slash, that is a folder as it is written."""
    end, following = 0, text.find("/") + 1
    while following and os.path.isdir(text[:following]):
        end, following = following, text.find("/", following) + 1
    return text[:end]


def _resolve(text: str, split: str | None, prefer: Sequence[str]) -> Listing:
    if text.startswith("pipe:") or "://" in text:
        raise DataError(
            "shards are read from local files only",
            where=text,
            expected=EXPECTED,
            action="download them first; a pipe: would run a program and is never opened",
        )
    path = Path(text)
    if path.is_dir() and (path / INFO).is_file():
        path = path / INFO
    if path.suffix == ".json":
        return _from_document(path, split, prefer)
    if split:
        raise DataError("only an _info.json has splits", where=text, found=split)
    if path.is_dir():
        found = sorted(map(Path, glob.glob(f"{glob.escape(text)}/*.tar")), key=_natural)
        if not found:
            raise DataError("the folder holds no tars", where=path, expected=EXPECTED)
        return Listing(tuple(found))
    return Listing(tuple(Path(name) for pattern in _expanded(text) for name in _glob(pattern)))


def _expanded(text: str) -> list[str]:
    """Expand the braces of a path; those in folders that exist are part of their names."""
    if os.path.exists(text):
        return [text]
    folders = _existing_folders(text)
    try:
        return [folders + rest for rest in expand_urls(text[len(folders) :])]
    except ValueError as error:  # braces without their other half
        raise DataError(
            "the pattern's braces cannot be expanded",
            where=text,
            found=str(error),
            expected="as in 'train-{0000..0009}.tar' or '{a,b}.tar'",
        ) from error


def _glob(pattern: str) -> list[str]:
    if os.path.exists(pattern) or not glob.has_magic(pattern):
        return [pattern]
    folders = _existing_folders(pattern)
    names = glob.glob(glob.escape(folders) + pattern[len(folders) :])
    if not names:
        raise DataError("no file matches the pattern", where=pattern, expected=EXPECTED)
    return sorted(names, key=lambda name: _natural(Path(name)))


def _natural(path: Path) -> list[tuple[int, str]]:
    """A sort key that puts ``train-2`` before ``train-10``."""
    pieces = re.findall(r"\d+|\D+", str(path))
    return [(int(p), p) if p.isascii() and p.isdigit() else (-1, p) for p in pieces]


def _from_document(path: Path, split: str | None, prefer: Sequence[str]) -> Listing:
    try:
        document = schemas.read(path)
    except OSError as error:
        raise DataError(
            "the list of shards cannot be read", where=path, found=error.strerror
        ) from error
    if isinstance(document, dict) and "splits" in document:
        entry = _split_entry(document["splits"], path, split, prefer)
        paths = tuple(path.parent / name for name in entry["filenames"])
        counts = entry.get("shard_lengths")
        if not (isinstance(counts, list) and len(counts) == len(paths)):
            return Listing(paths)
        return Listing(paths, counts=tuple(counts))
    if split:
        raise DataError("a manifest has no splits", where=path, found=split)
    manifest = DatasetManifest.from_json(document, path)
    return Listing(tuple(path.parent / shard.name for shard in manifest.shards), manifest)


def _split_entry(
    splits: Any, path: Path, split: str | None, prefer: Sequence[str]
) -> dict[str, Any]:
    """One split of an ``_info.json``; its file names are checked to stay inside the folder."""
    if not isinstance(splits, dict) or not splits:
        raise DataError("an _info.json without splits", where=path, expected='{"splits": {...}}')
    chosen = split or next((n for n in prefer if n in splits), None)
    if chosen is None and len(splits) == 1:
        chosen = next(iter(splits))
    if chosen not in splits:
        raise DataError(
            "several splits, and none is chosen" if not split else "no such split",
            where=path,
            found=split or None,
            expected="one of " + ", ".join(map(str, splits)),
            action="pass --split NAME",
        )
    entry = splits[chosen]
    names = entry.get("filenames") if isinstance(entry, dict) else None
    if not (isinstance(names, list) and names and all(map(_stays_inside, names))):
        raise DataError(
            "an _info.json whose file names cannot be used",
            where=f"{path}: splits.{chosen}.filenames",
            expected="a list of file names inside the folder",
        )
    assert isinstance(entry, dict)
    return entry


def _stays_inside(name: object) -> bool:
    if not isinstance(name, str) or not name.isprintable() or "\\" in name or ":" in name:
        return False
    return not ({"", ".", ".."} & set(name.split("/")))


def _check(paths: Sequence[Path], parts: Sequence[str]) -> None:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} shards are not there",
            where=", ".join(parts),
            expected=EXPECTED,
            problems=[f"missing: {path}" for path in missing],
        )
    twice = list(_repeated(paths))
    if twice:
        raise DataError(
            f"{len(twice)} shards are named twice",
            where=", ".join(parts),
            problems=[f"twice: {path}" for path in twice],
        )


def _repeated(paths: Sequence[Path]) -> Iterator[Path]:
    counts = Counter(path.resolve() for path in paths)
    yield from (path for path, count in counts.items() if count > 1)
