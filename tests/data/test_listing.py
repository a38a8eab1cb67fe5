"""The tars that a user specifies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cskd_pipeline.data.listing import list_shards
from cskd_pipeline.errors import DataError, ManifestError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b-2.tar", "b-10.tar", "b-1.tar", "a-0.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def names(spec: object, **options: object) -> list[str]:
    return [path.name for path in list_shards(spec, **options)[0]]  # type: ignore[arg-type]


def write_info(folder: Path, splits: object) -> Path:
    path = folder / "_info.json"
    path.write_text(json.dumps({"splits": splits}))
    return path


def test_a_folder_gives_its_tars_in_natural_order(folder: Path) -> None:
    assert names(folder) == ["a-0.tar", "b-1.tar", "b-2.tar", "b-10.tar"]
    assert names(str(folder)) == names(folder)


def test_a_glob_gives_natural_order(folder: Path) -> None:
    assert names(f"{folder}/b-*.tar") == ["b-1.tar", "b-2.tar", "b-10.tar"]


def test_braces_and_lists_keep_the_order_they_are_written_in(folder: Path) -> None:
    assert names(f"{folder}/b-{{2,10,1}}.tar") == ["b-2.tar", "b-10.tar", "b-1.tar"]
    assert names(f"{folder}/b-{{1..2}}.tar,{folder}/a-0.tar") == ["b-1.tar", "b-2.tar", "a-0.tar"]
    assert names([folder / "b-10.tar", f"{folder}/a-*.tar"]) == ["b-10.tar", "a-0.tar"]


def test_braces_count_with_leading_zeros(tmp_path: Path) -> None:
    for number in (8, 9, 10):
        (tmp_path / f"t-{number:04d}.tar").touch()
    assert names(f"{tmp_path}/t-{{0008..0010}}.tar") == [
        "t-0008.tar",
        "t-0009.tar",
        "t-0010.tar",
    ]


def test_a_path_that_exists_is_taken_literally(tmp_path: Path) -> None:
    odd = tmp_path / "a,b{1}.tar"
    odd.touch()
    assert names(str(odd)) == ["a,b{1}.tar"]


@pytest.mark.parametrize("name", ["data [v1]", "a,b", "{old}", "x{1..2}[y]*", "half{"])
def test_a_folder_with_special_characters_is_taken_literally(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    every = [f"t-{number}.tar" for number in range(3)]
    for tar in every:
        (folder / tar).touch()
    for spec in (folder, f"{folder}/t-*.tar", f"{folder}/t-{{0..2}}.tar"):
        assert names(spec) == every
    assert names(f"{folder}/t-[12].tar,{folder}/t-0.tar") == ["t-1.tar", "t-2.tar", "t-0.tar"]
    braces = f"{tmp_path}/{{{name},other}}/t-{{0,1}}.tar"
    if name == "data [v1]":
        (tmp_path / "other").mkdir()
        for tar in every:
            (tmp_path / "other" / tar).touch()
        assert names(braces) == every[:2] * 2


@pytest.mark.parametrize("name", ["t-[1].tar", "t,0.tar", "t-{0..1}.tar", "t-{.tar"])
def test_a_file_with_special_characters_is_taken_literally(tmp_path: Path, name: str) -> None:
    for tar in (name, "plain.tar"):
        (tmp_path / tar).touch()
    assert names(tmp_path / name) == [name]
    assert names(f"{tmp_path}/plain.tar, {tmp_path / name}") == ["plain.tar", name]
    assert names(f"{tmp_path / name},{tmp_path}/plain.tar") == [name, "plain.tar"]


@pytest.mark.parametrize("spec", ["t-{0..2.tar", "t-0..2}.tar", "{a,b.tar", "t-{0..1}}.tar"])
def test_unbalanced_braces_are_refused(tmp_path: Path, spec: str) -> None:
    for number in range(3):
        (tmp_path / f"t-{number}.tar").touch()
    with pytest.raises(DataError) as caught:
        list_shards(f"{tmp_path}/{spec}")
    assert spec in str(caught.value)


def test_a_list_longer_than_a_path_may_be_is_read(tmp_path: Path) -> None:
    every = [f"train-{number:04d}.tar" for number in range(300)]
    for tar in every:
        (tmp_path / tar).touch()
    assert names(",".join(str(tmp_path / tar) for tar in every)) == every


def test_hidden_files_are_not_shards(folder: Path) -> None:
    (folder / "._b-1.tar").write_bytes(b"half of a file, by macOS")
    assert names(folder) == ["a-0.tar", "b-1.tar", "b-2.tar", "b-10.tar"]


def test_an_info_gives_the_requested_split(folder: Path) -> None:
    info = write_info(
        folder,
        {"train": {"filenames": ["b-2.tar", "b-1.tar"]}, "validation": {"filenames": ["a-0.tar"]}},
    )
    for spec in (info, folder):
        assert names(spec) == ["b-2.tar", "b-1.tar"]
        assert names(spec, split="validation") == ["a-0.tar"]
        assert names(spec, prefer=("validation", "test")) == ["a-0.tar"]
    with pytest.raises(DataError, match="no such split") as caught:
        list_shards(folder, split="test")
    assert caught.value.expected == "one of train, validation"


def test_a_split_must_be_chosen_only_if_there_are_several(folder: Path) -> None:
    write_info(folder, {"odd": {"filenames": ["b-1.tar"]}})
    assert names(folder) == ["b-1.tar"]
    write_info(folder, {"odd": {"filenames": ["b-1.tar"]}, "even": {"filenames": ["b-2.tar"]}})
    with pytest.raises(DataError, match="several splits"):
        list_shards(folder)


@pytest.mark.parametrize(
    "name", ["../x.tar", "/x.tar", "a/../../x.tar", "c:x.tar", "", 5, "pipe:ls", "a\\x.tar", "\x1b"]
)
def test_file_names_that_leave_the_folder_are_refused(folder: Path, name: object) -> None:
    write_info(folder, {"train": {"filenames": ["b-1.tar", name]}})
    with pytest.raises(DataError, match="unusable file names"):
        list_shards(folder)


@pytest.mark.parametrize("splits", [[], {}, {"train": []}, {"train": {"filenames": []}}])
def test_an_info_without_usable_splits_is_refused(folder: Path, splits: object) -> None:
    write_info(folder, splits)
    with pytest.raises(DataError):
        list_shards(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "something"}'])
def test_a_json_that_lists_no_shards_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(ManifestError):
        list_shards(path)


@pytest.mark.parametrize("spec", ["pipe:cat x.tar", "x.tar,pipe:curl https://host/x.tar"])
def test_a_pipe_is_refused(spec: str) -> None:
    with pytest.raises(DataError, match="would run a program, and is not supported"):
        list_shards(spec)


def test_all_missing_files_are_listed(folder: Path) -> None:
    with pytest.raises(DataError, match="2 of 4 shards are missing") as caught:
        list_shards(f"{folder}/b-{{1..4}}.tar")
    assert [line.rpartition("/")[2] for line in caught.value.problems] == ["b-3.tar", "b-4.tar"]


@pytest.mark.parametrize("pattern", ["{}/c-*.tar", "{}/none.tar", "{}/empty", "", " , "])
def test_no_shards_are_an_error(folder: Path, pattern: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(DataError):
        list_shards(pattern.format(folder))


def test_a_duplicate_shard_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="shards are listed more than once"):
        list_shards(f"{folder}/b-*.tar,{folder}/b-1.tar")


def test_a_split_of_a_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="a manifest has no splits"):
        list_shards(tmp_path / "manifest.json", split="train")
    with pytest.raises(DataError, match="cannot be read"):
        list_shards(tmp_path / "absent.json")


def test_a_split_of_something_without_splits_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"only an _info\.json has splits"):
        list_shards(folder, split="train")
