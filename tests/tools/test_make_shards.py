"""``make-shards`` packs a tree of images into tar shards."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import webdataset

from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.errors import DataError, OutputError
from cskd_pipeline.tools import make_shards as make
from cskd_pipeline.tools.make_shards import FolderImage, make_shards, scan_image_folder
from tests.images import CLASSES


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_image_is_packed_once_and_unchanged(tmp_path: Path, image_folder: Path) -> None:
    summary = make_shards(image_folder, tmp_path / "out", shard_size=10)
    packed = {}
    for path in sorted((tmp_path / "out").glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            about = json.loads(sample["json"])
            image = next(sample[field] for field in ("jpg", "png", "webp") if field in sample)
            packed[about["filename"]] = image
            assert int(sample["cls"]) == about["label"] == CLASSES.index(about["class"])
            assert about["filename"].startswith(about["class"] + "/")
    files = [path for path in image_folder.rglob("*") if path.is_file()]
    assert packed == {str(p.relative_to(image_folder)): p.read_bytes() for p in files}
    assert summary["samples"] == len(files) == 23
    assert summary["skipped"] == 0


def test_shards_are_even_indexed_and_loadable(tmp_path: Path, image_folder: Path) -> None:
    out = tmp_path / "out"
    summary = make_shards(image_folder, out, shard_size=10, split="val")
    dataset = load_dataset(out)
    assert dataset.counts == (8, 8, 7)
    assert dataset.class_names == CLASSES
    info = json.loads((out / "_info.json").read_text())["splits"]["val"]
    assert info["shard_lengths"] == [8, 8, 7]
    assert info["num_samples"] == 23
    assert info["filenames"] == ["val-0000.tar", "val-0001.tar", "val-0002.tar"]
    assert summary["bytes"] == sum(path.stat().st_size for path in out.glob("*.tar"))
    labels = [shard.index.label.tolist() for shard in dataset.shards]
    assert all(len(set(part)) > 2 for part in labels)  # shuffled, not class by class


def test_bytes_depend_only_on_the_tree_and_the_seed(tmp_path: Path, image_folder: Path) -> None:
    copy = shutil.copytree(image_folder, tmp_path / "copy")
    for number, seed in enumerate((0, 0, 1)):
        make_shards(copy if number else image_folder, tmp_path / str(number), seed=seed)
    assert content(tmp_path / "0") == content(tmp_path / "1")
    assert content(tmp_path / "0") != content(tmp_path / "2")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("n01440764/n01440764_10026.JPEG", "n01440764_10026"),  # as published
        ("cat/7.png", "cat_7"),
        ("cat/cat_7.png", "cat_7"),
        ("cat/cats.v2.png", "cat_cats_v2"),
        ("v1.0/deep/er/7.jpg", "v1_0_deep_er_7"),
    ],
)
def test_keys_match_the_published_shards(name: str, key: str) -> None:
    assert FolderImage(Path(name), name, 0).key == key


def test_skipped_files_are_counted_and_named(tmp_path: Path, image_folder: Path) -> None:
    copy = shutil.copytree(image_folder, tmp_path / "tree")
    for name in (
        *(".cache/1.jpg", "@eaDir/1.jpg", "__MACOSX/1.jpg", "cat/.thumbs/1.jpg"),
        *("cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "cat/.DS_Store", "cat/._1.jpg"),
        *("notes.txt", "loose.jpg", "cat/readme.txt", "dog/clip.gif"),
    ):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"x")
    summary = make_shards(copy, tmp_path / "out")
    assert summary["samples"] == 23
    assert summary["classes"] == len(CLASSES)
    skipped = [
        *(".cache/", "@eaDir/", "__MACOSX/", "loose.jpg", "notes.txt"),
        *("cat/.DS_Store", "cat/._1.jpg", "cat/.thumbs/", "cat/@eaDir/", "cat/readme.txt"),
        "dog/clip.gif",
    ]
    assert summary["skipped_examples"] == skipped
    assert summary["skipped"] == len(skipped)


def test_images_behind_linked_folders_are_packed(tmp_path: Path, image_folder: Path) -> None:
    copy = shutil.copytree(image_folder, tmp_path / "tree")
    shutil.move(copy / "cat", tmp_path / "disk2")
    (tmp_path / "disk2/deep").mkdir()
    shutil.copy(next((copy / "dog").iterdir()), tmp_path / "disk2/deep/1.jpg")
    (copy / "cat").mkdir()
    (copy / "cat/disk2").symlink_to(tmp_path / "disk2")
    summary = make_shards(copy, tmp_path / "out")
    assert (summary["samples"], summary["skipped"]) == (24, 0)
    names = [image.name for image in scan_image_folder(copy).images]
    assert "cat/disk2/deep/1.jpg" in names


def test_a_cyclic_link_is_not_followed_and_named(tmp_path: Path, image_folder: Path) -> None:
    copy = shutil.copytree(image_folder, tmp_path / "tree")
    (copy / "cat/all").symlink_to(copy)  # a folder that contains it
    (copy / "dog/self").symlink_to(".")
    other = tmp_path / "other"
    other.mkdir()
    (other / "back").symlink_to(copy / "fox")  # through an outside folder
    (copy / "fox/other").symlink_to(other)
    tree = scan_image_folder(copy)
    assert len(tree.images) == 23
    assert set(tree.skipped) == {"cat/all/", "dog/self/", "fox/other/back/"}


def test_a_folder_that_cannot_be_read_is_refused(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(image_folder, tmp_path / "tree")
    (copy / "cat/closed").mkdir()
    scandir = os.scandir

    def closed(path: Any) -> Any:  # permissions do not stop root
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(make.os, "scandir", closed)
    with pytest.raises(DataError, match="a folder cannot be read") as caught:
        scan_image_folder(copy)
    assert caught.value.where == copy / "cat/closed"


def test_a_folder_of_splits_is_refused(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "train")
    shutil.copytree(image_folder, tmp_path / "val")
    with pytest.raises(DataError, match="splits, not classes") as caught:
        make_shards(tmp_path, tmp_path / "out")
    assert caught.value.found == "train, val"
    assert f"make-shards {tmp_path / 'train'}" in str(caught.value.action)


@pytest.mark.parametrize("kind", ["absent", "empty", "loose", "no images"])
def test_a_tree_without_classes_or_images_is_refused(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "tree"
    if kind != "absent":
        root.mkdir()
    if kind == "loose":
        (root / "1.jpg").touch()
    if kind == "no images":
        (root / "cat").mkdir()
    expected = {
        "absent": "no such folder",
        "empty": "no class folders",
        "loose": "no class folders",
        "no images": "1 class folders contain no images",
    }
    with pytest.raises(DataError, match=expected[kind]) as caught:
        make_shards(root, tmp_path / "out")
    assert ("outside class folders" in str(caught.value)) == (kind == "loose")
    assert not (tmp_path / "out").exists()


def test_all_images_with_equal_keys_are_named(tmp_path: Path) -> None:
    for name in ("a/x.jpg", "a/x.png", "a/b_x.png", "a/b/x.jpg"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        scan_image_folder(tmp_path / "tree")
    assert caught.value.problems == [
        "a/x.jpg and a/x.png would both have the key a_x",
        "a/b_x.png and a/b/x.jpg would both have the key a_b_x",
    ]


def test_names_that_are_not_utf8_are_refused(tmp_path: Path, image_folder: Path) -> None:
    copy = shutil.copytree(image_folder, tmp_path / "tree")
    odd = os.fsencode(copy / "cat") + b"/\xff.jpg"
    try:
        with open(odd, "wb") as file:
            file.write(b"x")
    except OSError:
        pytest.skip("the file system accepts UTF-8 names only")
    with pytest.raises(DataError, match="cannot be named") as caught:
        scan_image_folder(copy)
    assert caught.value.problems == [r"'cat/\udcff.jpg' is not UTF-8"]


def test_all_empty_or_unreadable_images_are_named(tmp_path: Path, image_folder: Path) -> None:
    copy = shutil.copytree(image_folder, tmp_path / "tree")
    (copy / "cat/gone.jpg").symlink_to(tmp_path / "absent")
    (copy / "cat/empty.jpg").touch()
    (copy / "dog/empty.png").touch()
    os.mkfifo(copy / "dog/pipe.jpg")
    with pytest.raises(DataError, match="4 of 27 images are empty") as caught:
        make_shards(copy, tmp_path / "out")
    assert caught.value.problems == [
        "cat/empty.jpg: 0 bytes",
        "cat/gone.jpg: No such file or directory",
        "dog/empty.png: 0 bytes",
        "dog/pipe.jpg: not a file",
    ]
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_refused(tmp_path: Path, image_folder: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="contains other files"):
        make_shards(image_folder, tmp_path)
    assert content(tmp_path) == {"mine.txt": b"mine"}


def test_an_interrupted_run_leaves_no_files_and_a_killed_one_is_replaced(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting:
        remaining = 5

        def advance(self, count: int = 1) -> None:
            self.remaining -= count
            if not self.remaining:
                raise KeyboardInterrupt

    @contextmanager
    def interrupting(total: int | None, unit: str, description: str) -> Iterator[Interrupting]:
        assert (total, unit) == (23, "images")
        yield Interrupting()

    monkeypatch.setattr(make, "progress", interrupting)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make_shards(image_folder, out)
    monkeypatch.undo()
    assert not any(out.iterdir())
    (out / ".partial").mkdir()
    (out / ".partial/train-0000.tar").write_bytes(b"half")
    make_shards(image_folder, out)
    assert sorted(content(out)) == ["_info.json", "classes.json", "train-0000.tar"]


def test_a_full_disk_is_reported_and_no_files_are_left(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: Any, sample: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(make.TarWriter, "write", write)
    with pytest.raises(OutputError, match="no space left"):
        make_shards(image_folder, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_tars_are_readable_by_tarfile(tmp_path: Path, image_folder: Path) -> None:
    make_shards(image_folder, tmp_path / "out")
    with tarfile.open(tmp_path / "out/train-0000.tar") as tar:
        assert {member.mtime for member in tar} == {0}
        assert len(tar.getmembers()) == 3 * 23
