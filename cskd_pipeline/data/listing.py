"""The tars that a user specifies: a folder, braces, globs, comma lists, ``_info.json``, a manifest.

Each may be a URL (``https://``, ``s3://``, ``gs://``, ``hf://``); folders and globs only in stores
that list their files. A manifest on this machine may refer to tars at a URL.
"""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.shardlists import expand_urls

from cskd_pipeline.cache.chunks import DamageError
from cskd_pipeline.cache.manifest import DatasetManifest
from cskd_pipeline.cache.remote_files import CONNECTIONS, is_remote, require_url
from cskd_pipeline.data.remote_tar import RemoteTar, Tar, tars_in
from cskd_pipeline.errors import DataError
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.progress import progress

log = logging.getLogger(__name__)

INFO = "_info.json"
EXPECTED = (
    "a tar, a folder of tars, a pattern like 'train-{0000..0009}.tar' or 'train-*.tar', "
    "a comma list, an _info.json or a manifest.json"
)

Spec = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Listing:
    """Paths or URLs of tars, in order, and their manifest if that is what lists them.

    ``counts``: samples of each tar, from an ``_info.json``.
    """

    names: tuple[Path | str, ...]
    manifest: DatasetManifest | None = None
    counts: tuple[int, ...] | None = None


def list_shards(
    spec: Spec, *, split: str | None = None, prefer: Sequence[str] = ("train",)
) -> tuple[tuple[Tar, ...], Listing]:
    """Return the tars of ``spec``: lists and braces as written, globs in natural order.

    Args:
        split: split of an ``_info.json``.
        prefer: splits to choose from, in order, if several exist and none is given.

    Raises:
        DataError: no shards, missing or duplicate ones, or an invalid list or pattern.
        UsageError: an unsupported URL.
        RemoteError: a server that denies access, cannot be reached, or is too slow.
        ManifestError: a manifest that does not match its schema.
    """
    parts = [str(part) for part in ([spec] if isinstance(spec, str | Path) else spec)]
    parts = [piece for part in parts for piece in _pieces(part)]
    if not parts:
        raise DataError("no shards are given", expected=EXPECTED)
    listings = [_resolve(part, split, prefer) for part in parts]
    names = tuple(name for listing in listings for name in listing.names)
    tars = _find(names, parts)
    counts = Counter(str(tar.resolve() if isinstance(tar, Path) else tar) for tar in tars)
    duplicates = [f"duplicate: {tar}" for tar, count in counts.items() if count > 1]
    if duplicates:
        raise DataError(
            "shards are listed more than once", where=", ".join(parts), problems=duplicates
        )
    return tars, listings[0] if len(listings) == 1 else Listing(names)


def _pieces(text: str) -> Iterator[str]:
    """Yield the parts of ``text`` between commas; existing names may contain commas and braces."""
    while text := os.path.expanduser(text.strip(" ,")):
        end = _end_of_first(text)
        yield text[:end].rstrip()
        text = text[end:]


def _end_of_first(text: str) -> int:
    """Return the end of the first path: a comma outside braces, or the end of ``text``."""
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
    """Return the longest prefix of ``text``, up to a slash, that is literally a folder."""
    end, slash = 0, text.find("/") + 1
    while slash and os.path.isdir(text[:slash]):
        end, slash = slash, text.find("/", slash) + 1
    return text[:end]


def _resolve(text: str, split: str | None, prefer: Sequence[str]) -> Listing:
    if text.startswith("pipe:"):
        raise DataError(
            "a pipe: would run a program, and is not supported",
            where=text,
            expected=EXPECTED,
            action="give the URL itself: https://, s3://, gs:// and hf:// are read without a pipe",
        )
    if is_remote(text):
        return _resolve_url(text.rstrip("/"), split, prefer)
    path = Path(text)
    if path.is_dir() and (path / INFO).is_file():
        path = path / INFO
    if path.suffix == ".json":
        return _from_document(_read_list(path), path, split, prefer)
    _refuse_split(split, text)
    if path.is_dir():
        found = sorted(glob.glob(f"{glob.escape(text)}/*.tar"), key=_natural)
        if not found:
            raise DataError("the folder contains no tars", where=path, expected=EXPECTED)
        return Listing(tuple(map(Path, found)))
    return Listing(tuple(Path(name) for pattern in _expand_braces(text) for name in _glob(pattern)))


def _resolve_url(text: str, split: str | None, prefer: Sequence[str]) -> Listing:
    require_url(text, "shards")
    folder, _, name = text.rpartition("/")
    if name.endswith(".json"):
        try:
            data = tars_in(folder).document(name, schemas.MAX_BYTES)
        except DamageError as error:
            raise DataError("the list of shards cannot be read", where=text, found=error) from error
        return _from_document(schemas.parse(data, text), text, split, prefer)
    if not re.search(r"\.tar\b|[*\[{]", name):
        found = tars_in(text).find_document(INFO)
        if found is not None:
            return _from_document(found, f"{text}/{INFO}", split, prefer)
        text = f"{text}/*.tar"
    _refuse_split(split, text)
    return Listing(tuple(url for pattern in _expand_braces(text) for url in _glob_url(pattern)))


def _glob_url(pattern: str) -> list[str]:
    folder, _, name = pattern.rpartition("/")
    if glob.has_magic(folder):
        raise DataError("only the last part of a URL may be a pattern", where=pattern)
    if not glob.has_magic(name):
        return [pattern]
    tars = tars_in(folder)
    if not tars.lists:
        raise DataError(
            "a web server does not list its files",
            where=pattern,
            expected="an _info.json in the folder, or names such as 'train-{0000..0009}.tar'",
        )
    names = fnmatch.filter(tars.names(""), name)
    if not names:
        raise DataError("no file matches the pattern", where=pattern, expected=EXPECTED)
    return [f"{folder}/{name}" for name in sorted(names, key=_natural)]


def _refuse_split(split: str | None, text: str) -> None:
    if split:
        raise DataError("only an _info.json has splits", where=text, found=split)


def _expand_braces(text: str) -> list[str]:
    """Expand the braces of a path, except those in the names of existing folders."""
    if os.path.exists(text):
        return [text]
    folders = _existing_folders(text)
    try:
        return [folders + rest for rest in expand_urls(text[len(folders) :])]
    except ValueError as error:  # unbalanced braces
        raise DataError(
            "the pattern's braces cannot be expanded",
            where=text,
            found=str(error),
            expected="balanced braces, as in 'train-{0000..0009}.tar' or '{a,b}.tar'",
        ) from error


def _glob(pattern: str) -> list[str]:
    if os.path.exists(pattern) or not glob.has_magic(pattern):
        return [pattern]
    folders = _existing_folders(pattern)
    names = glob.glob(glob.escape(folders) + pattern[len(folders) :])
    if not names:
        raise DataError("no file matches the pattern", where=pattern, expected=EXPECTED)
    return sorted(names, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts ``train-2`` before ``train-10``."""
    pieces = re.findall(r"\d+|\D+", name)
    return [(int(p), p) if p.isascii() and p.isdigit() else (-1, p) for p in pieces]


def _read_list(path: Path) -> Any:
    try:
        return schemas.read(path)
    except OSError as error:
        raise DataError(
            "the list of shards cannot be read", where=path, found=error.strerror
        ) from error


def _from_document(
    document: Any, path: Path | str, split: str | None, prefer: Sequence[str]
) -> Listing:
    """Return the tars that a document lists, next to it or at the URL that it states."""
    folder: Path | str = path.rpartition("/")[0] if isinstance(path, str) else path.parent

    def locate(name: str) -> Path | str:
        return folder / name if isinstance(folder, Path) else f"{folder}/{name}"

    if isinstance(document, dict) and "splits" in document:
        entry = _split_entry(document["splits"], path, split, prefer)
        paths = tuple(map(locate, entry["filenames"]))
        counts = entry.get("shard_lengths")
        if isinstance(counts, list) and len(counts) == len(paths):
            return Listing(paths, counts=tuple(counts))
        return Listing(paths)
    if split:
        raise DataError("a manifest has no splits", where=path, found=split)
    manifest = DatasetManifest.from_json(document, path)
    if manifest.location is not None:
        folder = manifest.location
        log.info(f"{path}: its shards are at {folder}")
    return Listing(tuple(locate(shard.name) for shard in manifest.shards), manifest)


def _split_entry(
    splits: Any, path: Path | str, split: str | None, prefer: Sequence[str]
) -> dict[str, Any]:
    """Return a split of an ``_info.json``; refuse file names that leave the folder."""
    if not isinstance(splits, dict) or not splits:
        raise DataError("the _info.json has no splits", where=path, expected='{"splits": {...}}')
    chosen = split or next((n for n in prefer if n in splits), None)
    if chosen is None and len(splits) == 1:
        chosen = next(iter(splits))
    if chosen not in splits:
        raise DataError(
            "the _info.json has several splits" if not split else "no such split",
            where=path,
            found=split or None,
            expected="one of " + ", ".join(map(str, splits)),
            action="pass --split NAME",
        )
    entry = splits[chosen]
    names = entry.get("filenames") if isinstance(entry, dict) else None
    if not (isinstance(names, list) and names and all(map(_stays_inside, names))):
        raise DataError(
            "the _info.json has unusable file names",
            where=f"{path}: splits.{chosen}.filenames",
            expected="a list of file names inside the folder",
        )
    assert isinstance(entry, dict)
    return entry


def _stays_inside(name: object) -> bool:
    if not isinstance(name, str) or not name.isprintable() or "\\" in name or ":" in name:
        return False
    return not ({"", ".", ".."} & set(name.split("/")))


def _find(names: Sequence[Path | str], parts: Sequence[str]) -> tuple[Tar, ...]:
    """Return the tars; ask the servers about remote ones, and refuse missing ones."""
    remote = _find_remote([name for name in names if isinstance(name, str)])
    tars = [
        remote.get(name) if isinstance(name, str) else name if name.is_file() else None
        for name in names
    ]
    missing = [f"missing: {name}" for name, tar in zip(names, tars, strict=True) if tar is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} shards are missing",
            where=", ".join(parts),
            expected=EXPECTED,
            problems=missing,
        )
    return tuple(tar for tar in tars if tar is not None)


def _find_remote(urls: Sequence[str]) -> dict[str, RemoteTar]:
    """Return the tars that exist, by URL, with what their servers report."""
    if not urls:
        return {}
    folders = dict.fromkeys(url.rpartition("/")[0] for url in urls)
    listed = {folder: tars_in(folder).list_tars() for folder in folders}

    def find(url: str) -> RemoteTar | None:
        folder, _, name = url.rpartition("/")
        try:
            return listed[folder].get(name) or tars_in(folder).find(name)
        except DamageError:  # missing
            return None

    found = {}
    with (
        progress(len(urls), "shards", "looking for shards") as meter,
        ThreadPoolExecutor(CONNECTIONS) as pool,
    ):
        for url, tar in zip(urls, pool.map(find, urls), strict=True):
            if tar is not None:
                found[url] = tar
            meter.advance()
    return found
