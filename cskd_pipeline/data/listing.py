"""The tars that a user names: a folder, braces, globs, comma lists, ``_info.json``, a manifest.

All of these may be URLs (``https://``, ``s3://``, ``gs://``, ``hf://``); folders and globs where
the store lists. A manifest on this machine may state that its tars lie at a URL.
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
    """Name tars in order, by path or URL, and what else the list of them states.

    ``counts``: samples of each tar, by an ``_info.json``.
    """

    names: tuple[Path | str, ...]
    manifest: DatasetManifest | None = None
    counts: tuple[int, ...] | None = None


def list_shards(
    spec: Spec, *, split: str | None = None, prefer: Sequence[str] = ("train",)
) -> tuple[tuple[Tar, ...], Listing]:
    """Return the tars of ``spec``: as listed, braces in their order, globs in natural order.

    Args:
        split: which one of an ``_info.json``.
        prefer: the splits to look for when none is given and there are several.

    Raises:
        DataError: nothing there, something missing, listed twice, or neither file nor URL.
        UsageError: a URL of a kind that is not read.
        RemoteError: a server that refuses, or cannot be reached.
        ManifestError: a manifest that does not fit its schema.
    """
    parts = [str(part) for part in ([spec] if isinstance(spec, str | Path) else spec)]
    parts = [piece for part in parts for piece in _pieces(part)]
    if not parts:
        raise DataError("no shards are named", expected=EXPECTED)
    found = [_resolve(part, split, prefer) for part in parts]
    names = tuple(name for listing in found for name in listing.names)
    tars = _looked_for(names, parts)
    counts = Counter(str(tar.resolve() if isinstance(tar, Path) else tar) for tar in tars)
    twice = [f"twice: {tar}" for tar, count in counts.items() if count > 1]
    if twice:
        raise DataError(
            f"{len(twice)} shards are named twice", where=", ".join(parts), problems=twice
        )
    return tars, found[0] if len(found) == 1 else Listing(names)


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
    if text.startswith("pipe:"):
        raise DataError(
            "a pipe: would run a program, and is never opened",
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
            raise DataError("the folder holds no tars", where=path, expected=EXPECTED)
        return Listing(tuple(map(Path, found)))
    return Listing(tuple(Path(name) for pattern in _expanded(text) for name in _glob(pattern)))


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
        found = tars_in(text).document_if_there(INFO)
        if found is not None:
            return _from_document(found, f"{text}/{INFO}", split, prefer)
        text = f"{text}/*.tar"
    _refuse_split(split, text)
    return Listing(tuple(url for pattern in _expanded(text) for url in _glob_url(pattern)))


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
            expected="an _info.json there, or names: 'train-{0000..0009}.tar'",
        )
    names = fnmatch.filter(tars.names(""), name)
    if not names:
        raise DataError("no file matches the pattern", where=pattern, expected=EXPECTED)
    return [f"{folder}/{name}" for name in sorted(names, key=_natural)]


def _refuse_split(split: str | None, text: str) -> None:
    if split:
        raise DataError("only an _info.json has splits", where=text, found=split)


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
    return sorted(names, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts ``train-2`` before ``train-10``."""
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
    """The tars that a document names, beside it or at the URL that it states."""
    folder: Path | str = path.rpartition("/")[0] if isinstance(path, str) else path.parent

    def beside(name: str) -> Path | str:
        return folder / name if isinstance(folder, Path) else f"{folder}/{name}"

    if isinstance(document, dict) and "splits" in document:
        entry = _split_entry(document["splits"], path, split, prefer)
        paths = tuple(map(beside, entry["filenames"]))
        counts = entry.get("shard_lengths")
        if isinstance(counts, list) and len(counts) == len(paths):
            return Listing(paths, counts=tuple(counts))
        return Listing(paths)
    if split:
        raise DataError("a manifest has no splits", where=path, found=split)
    manifest = DatasetManifest.from_json(document, path)
    if manifest.location is not None:
        folder = manifest.location
        log.info(f"{path}: its shards lie at {folder}")
    return Listing(tuple(beside(shard.name) for shard in manifest.shards), manifest)


def _split_entry(
    splits: Any, path: Path | str, split: str | None, prefer: Sequence[str]
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


def _looked_for(names: Sequence[Path | str], parts: Sequence[str]) -> tuple[Tar, ...]:
    """Look for every tar; of those at a URL, request what their servers state."""
    remote = _stated([name for name in names if isinstance(name, str)])
    tars = [
        remote.get(name) if isinstance(name, str) else name if name.is_file() else None
        for name in names
    ]
    missing = [f"missing: {name}" for name, tar in zip(names, tars, strict=True) if tar is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} shards are not there",
            where=", ".join(parts),
            expected=EXPECTED,
            problems=missing,
        )
    return tuple(tar for tar in tars if tar is not None)


def _stated(urls: Sequence[str]) -> dict[str, RemoteTar]:
    """Return what the servers state of the tars that are there, by URL."""
    if not urls:
        return {}
    folders = dict.fromkeys(url.rpartition("/")[0] for url in urls)
    listed = {folder: tars_in(folder).listed() for folder in folders}

    def state(url: str) -> RemoteTar | None:
        folder, _, name = url.rpartition("/")
        try:
            return listed[folder].get(name) or tars_in(folder).state(name)
        except DamageError:  # there is none
            return None

    found = {}
    with (
        progress(len(urls), "shards", "looking for shards") as meter,
        ThreadPoolExecutor(CONNECTIONS) as pool,
    ):
        for url, tar in zip(urls, pool.map(state, urls), strict=True):
            if tar is not None:
                found[url] = tar
            meter.advance()
    return found
