"""Pack an ImageFolder tree into webdataset shards: shuffled, of even size, bytes unchanged."""

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import TarWriter

from cskd_pipeline.data.index import CLASSES
from cskd_pipeline.data.listing import INFO
from cskd_pipeline.data.tar_index import MAX_IMAGE_BYTES, is_metadata
from cskd_pipeline.errors import DataError
from cskd_pipeline.runtime import atomic
from cskd_pipeline.runtime.progress import Meter, progress
from cskd_pipeline.views.bits import BitStream, derive_seed

EXTENSIONS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class FolderImage:
    """An image of the tree; ``name`` is its path below the root, with forward slashes."""

    path: Path
    name: str
    label: int

    @property
    def key(self) -> str:
        """Return ``synset_7`` for ``synset/synset_7.JPEG``, and ``class_7`` for ``class/7.png``.

        ImageNet's published shards have the same keys, so their caches fit these shards.
        """
        *folders, file = self.name.split("/")
        stem = file.rpartition(".")[0].replace(".", "_")
        if len(folders) == 1 and stem.startswith(f"{folders[0]}_"):
            return stem
        return "_".join([*(folder.replace(".", "_") for folder in folders), stem])


@dataclass(frozen=True)
class ImageFolder:
    """The contents of a tree with one folder per class, in sorted order.

    ``skipped`` lists everything else below the root: other files, images outside class folders,
    hidden and system files. A skipped folder is one entry and ends with a slash.
    """

    images: tuple[FolderImage, ...]
    classes: tuple[str, ...]
    skipped: tuple[str, ...]


def make_shards(
    image_folder: Path, out: Path, *, shard_size: int = 1000, seed: int = 0, split: str = "train"
) -> dict[str, Any]:
    """Write ``out/{split}-0000.tar`` …, ``out/_info.json`` and ``out/classes.json``.

    Class folders are numbered in sorted order and searched recursively, following links. Files
    without a jpg, png or webp ending, hidden files and folders, ``__MACOSX`` and ``@eaDir`` are
    skipped and counted. Shards contain at most ``shard_size`` samples and differ by at most one.
    The same tree, seed and size give the same bytes. The files appear in ``out`` once all are
    written.

    Returns:
        ``out``, ``shards``, ``samples``, ``classes``, ``bytes``, ``skipped`` (a count) and
        ``skipped_examples``.
    """
    out = Path(out)
    partial = out / ".partial"  # not a sibling: ``out`` may be a mount point
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
    atomic.require_empty(out, action="choose an empty or new folder for the shards")
    tree = scan_image_folder(Path(image_folder))
    with atomic.translate_os_errors(out):
        partial.mkdir(parents=True)
        try:
            with progress(len(tree.images), "images", "packing") as meter:
                written = _write(tree, partial, shard_size, seed, split, meter)
            _move_up(partial)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return {
        "out": str(out),
        "shards": len(written),
        "samples": len(tree.images),
        "classes": len(tree.classes),
        "bytes": sum(written),
        "skipped": len(tree.skipped),
        "skipped_examples": list(tree.skipped[:20]),
    }


def scan_image_folder(root: Path) -> ImageFolder:
    """Find the images of a tree with one folder per class.

    Raises:
        DataError: no class folders, or images that are unusable or would share a key; lists all.
    """
    if not root.is_dir():
        raise DataError("no such folder", where=root, expected="a folder with one folder per class")
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    folders = [entry.name for entry in entries if _is_folder(entry)]
    _refuse_odd_trees(root, folders)
    images: list[FolderImage] = []
    skipped = [_listed(root, entry) for entry in entries if not _is_folder(entry)]
    empty: list[str] = []
    for label, folder in enumerate(folders):
        before = len(images)
        for name in _files_below(root, root / folder, (), skipped):
            images.append(FolderImage(root / name, name, label))
        if len(images) == before:
            empty.append(f"no jpg, png or webp in {root / folder}")
    if empty:
        raise DataError(
            f"{len(empty)} class folders contain no images",
            where=root,
            problems=empty,
            action="remove them, or add their images: they would shift the labels",
        )
    _check_files(images)
    _check_keys(images)
    return ImageFolder(tuple(images), tuple(folders), tuple(skipped))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not is_metadata(entry.name)


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in EXTENSIONS


def _listed(root: Path, entry: os.DirEntry[str]) -> str:
    """Return the path of an entry below ``root``; that of a folder ends with a slash."""
    return Path(entry.path).relative_to(root).as_posix() + ("/" if entry.is_dir() else "")


def _files_below(
    root: Path, folder: Path, above: tuple[str, ...], skipped: list[str]
) -> Iterator[str]:
    """Yield the paths below ``root`` of all images in ``folder``; add the rest to ``skipped``.

    Links to folders are followed, except those back to a folder that contains them.

    Args:
        above: real paths of the folders on the way to ``folder``.
    """
    above = (*above, os.path.realpath(folder))
    inner = []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError("a folder cannot be read", where=folder, found=error.strerror) from error
    for entry in entries:
        if _is_folder(entry):
            inner.append(entry)
        elif not is_metadata(entry.name) and _is_image(entry.name):
            yield _listed(root, entry)
        else:
            skipped.append(_listed(root, entry))
    for entry in inner:
        if entry.is_symlink() and _leads_back(entry.path, above):
            skipped.append(_listed(root, entry))
        else:
            yield from _files_below(root, Path(entry.path), above, skipped)


def _leads_back(link: str, above: Sequence[str]) -> bool:
    target = os.path.realpath(link)
    return any(os.path.commonpath([target, folder]) == target for folder in above)


def _refuse_odd_trees(root: Path, folders: Sequence[str]) -> None:
    if not folders:
        loose = any(_is_image(entry.name) for entry in os.scandir(root))
        raise DataError(
            "the folder has no class folders",
            where=root,
            found="images outside class folders" if loose else "no folders",
            expected="one folder per class, as in IMAGE_FOLDER/cat/1.jpg",
        )
    splits = [name for name in folders if name.lower() in SPLIT_NAMES]
    if len(splits) == len(folders) and all(
        any(_is_folder(entry) for entry in os.scandir(root / name)) for name in splits
    ):
        raise DataError(
            "these folders are splits, not classes",
            where=root,
            found=", ".join(splits),
            action=f"pack each separately: cskd-pipeline make-shards {root / splits[0]} OUT",
        )


def _check_files(images: Sequence[FolderImage]) -> None:
    problems = []
    for image in images:
        try:
            found = image.path.stat()
        except OSError as error:
            problems.append(f"{image.name}: {error.strerror}")
            continue
        if not stat.S_ISREG(found.st_mode):
            problems.append(f"{image.name}: not a file")
        elif not 0 < found.st_size <= MAX_IMAGE_BYTES:
            problems.append(f"{image.name}: {found.st_size} bytes")
    if problems:
        raise DataError(
            f"{len(problems)} of {len(images)} images are empty, too large or unreadable",
            expected=f"files of 1 to {MAX_IMAGE_BYTES} bytes",
            problems=problems,
            action="replace or remove them",
        )


def _check_keys(images: Sequence[FolderImage]) -> None:
    seen: dict[str, str] = {}
    problems = []
    for image in images:
        first = seen.setdefault(image.key, image.name)
        if first != image.name:
            problems.append(f"{first} and {image.name} would both have the key {image.key}")
        if any("\ud800" <= letter <= "\udfff" for letter in image.name):  # no UTF-8 on disk
            problems.append(f"{image.name!r} is not UTF-8")
    if problems:
        raise DataError(
            f"{len(problems)} images cannot be named in a shard",
            problems=problems,
            expected="UTF-8 names that differ in more than endings and separators",
            action="rename them",
        )


def permutation(count: int, seed: int) -> np.ndarray:
    """Return a permutation of ``count`` numbers, equal for equal seeds on every machine."""
    keys = BitStream(derive_seed("make-shards", seed)).raw(count)
    return np.argsort(keys, kind="stable")


def _write(
    tree: ImageFolder, folder: Path, shard_size: int, seed: int, split: str, meter: Meter
) -> list[int]:
    """Write the tars and the lists of shards and classes; return the size of each tar."""
    order = permutation(len(tree.images), seed)
    parts = np.array_split(order, -(-len(order) // shard_size))
    digits = max(4, len(str(len(parts) - 1)))
    named = {f"{split}-{number:0{digits}d}.tar": part for number, part in enumerate(parts)}
    sizes = []
    for name, part in named.items():
        path = folder / name
        with open(path, "wb") as file:
            # A fixed time gives the same bytes for the same tree; the default is now.
            with TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
                for i in part:
                    tar.write(_sample(tree, tree.images[i]))
                    meter.advance()
            file.flush()
            os.fsync(file.fileno())
        sizes.append(path.stat().st_size)
    write_info(folder, split, {name: len(part) for name, part in named.items()})
    atomic.write_json(folder / CLASSES, list(tree.classes))
    return sizes


def write_info(folder: Path, split: str, lengths: Mapping[str, int]) -> None:
    """Write ``folder/_info.json``, which lists a split's shards and their numbers of samples."""
    info = {
        "name": split,
        "num_samples": sum(lengths.values()),
        "filenames": list(lengths),
        "shard_lengths": list(lengths.values()),
    }
    atomic.write_json(folder / INFO, {"splits": {split: info}})


def _move_up(folder: Path) -> None:
    """Move the files in ``folder`` one level up, the list of shards last."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == INFO):
        os.replace(path, folder.parent / path.name)
    atomic.sync_folder(folder.parent)


def _sample(tree: ImageFolder, image: FolderImage) -> dict[str, str | bytes]:
    try:
        data = image.path.read_bytes()
    except OSError as error:
        raise DataError(
            "an image cannot be read", where=image.path, found=error.strerror
        ) from error
    if not 0 < len(data) <= MAX_IMAGE_BYTES:
        raise DataError("an image is empty or too large", where=image.path, found=len(data))
    about = {"label": image.label, "class": tree.classes[image.label], "filename": image.name}
    return {
        "__key__": image.key,
        EXTENSIONS[image.path.suffix.lower()]: data,
        "cls": str(image.label).encode(),
        "json": json.dumps(about, ensure_ascii=False).encode(),
    }
