"""Path traversal by names and links: nothing is read or written outside the folder."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.data.describe import index_shards
from cskd_pipeline.errors import CacheError, OutputError
from tests.cache.factories import fill, make, manifest, tree
from tests.faults.commands import Stages
from tests.images import sample

Refused = Callable[..., str]
TRAVERSALS = ["../secret.tar", "/etc/passwd", "a/../../secret.tar", "..", "a//b.tar", "c:\\x.tar"]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_a_shard_list_cannot_name_files_outside_its_folder(
    stages: Stages, tmp_path: Path, refused: Refused, name: str
) -> None:
    (tmp_path / "secret.tar").write_bytes(next(stages.shards.glob("*.tar")).read_bytes())
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": {"filenames": [name]}}}))
    shard = {"name": name, "count": 1, "bytes": 1, "sha256": "0" * 64, "keys_sha256": "0" * 64}
    document = {"format": "cskd-dataset", "format_version": 1, "name": "x", "num_classes": 4}
    document |= {"class_names": None, "shards": [{**shard, "key_bytes": 1}]}
    (folder / "manifest.json").write_text(json.dumps(document))
    for spec in (folder, folder / "manifest.json"):
        message = refused("index", spec, "--num-classes", 4, "--out", tmp_path / "out.json")
        assert "inside the folder" in message
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("key", ["../../escaped", "/tmp/escaped", "..", "a/./b", "~/escaped"])
def test_a_sample_key_is_never_used_as_a_path(tmp_path: Path, key: str) -> None:
    """Members are read in place, never extracted."""
    folder = tmp_path / "a/b/shards"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "t.tar", "w") as tar:
        for field, data in (("jpg", sample(0)[1]["jpg"]), ("cls", b"0")):
            member = tarfile.TarInfo(f"{key}/x.{field}")
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    assert index_shards(folder / "t.tar", num_classes=1).samples == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["t.tar"]


def test_links_in_a_cache_reveal_nothing_of_their_targets(tmp_path: Path) -> None:
    """Links to files are followed, as in Hub snapshots; the target's bytes are verified."""
    secret = tmp_path / "secret"
    secret.write_text("root:x:0:0:secret\n" * 9)
    cache = tmp_path / "cache"
    make(cache)
    for name, target in (
        ("label/c/0/0", secret),
        ("label/c/1/0", Path("/dev/zero")),
        ("label/c/2/0", cache / "label/c/2/0"),
        ("seed/c/0/0/0", tmp_path),
    ):
        (cache / name).unlink()
        (cache / name).symlink_to(target)
    reader = open_cache(cache)
    for read, message in (
        (lambda: reader.labels(0), "altered, or a file of another unit"),
        (lambda: reader.labels(1), "not a regular file"),
        (lambda: reader.labels(2), "cannot be opened"),
        (lambda: reader.seeds(0, 0), "not a regular file"),
    ):
        with pytest.raises(CacheError, match=message) as caught:
            read()
        assert "root" not in str(caught.value.found)
    blob = tmp_path / "blob"
    (cache / "image_crc32/c/0/0").rename(blob)
    (cache / "image_crc32/c/0/0").symlink_to(blob)
    assert len(reader.image_crc32(0)) == 5


@pytest.mark.parametrize("document", ["zarr.json", "seed/zarr.json"])
def test_an_endless_document_is_refused(tmp_path: Path, document: str) -> None:
    make(tmp_path)
    (tmp_path / document).unlink()
    (tmp_path / document).symlink_to("/dev/zero")
    with pytest.raises(CacheError, match=r"not a regular file|a teacher cache"):
        open_cache(tmp_path)


@pytest.mark.parametrize(
    "name", ["digest", "digest/c", "seed/c/0", "dense", "key/c", "envelope/lines"]
)
def test_nothing_is_written_through_a_linked_folder(tmp_path: Path, name: str) -> None:
    """Continuing or extending an untrusted cache could otherwise overwrite any file."""
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    writer = CacheWriter.create(cache, manifest())
    fill(writer, writer.todo()[:1])
    (cache / name).rename(outside)
    (cache / name).symlink_to(outside)
    (outside / ".zarr.json.mine.partial").write_text("not part of the cache")
    (outside / "thesis.tex").write_text("years of work")
    before = tree(outside)
    with pytest.raises(OutputError, match="link that leads out"):
        continue_and_extend(cache)
    assert tree(outside) == before


def continue_and_extend(cache: Path) -> None:
    writer = CacheWriter.open(cache)
    fill(writer)
    writer.extend(8)


def test_a_cache_behind_a_link_is_written(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "scratch")
    make(tmp_path / "cache")
    assert open_cache(tmp_path / "scratch").done().all()


@pytest.mark.parametrize(
    "name", ["-1", "1e0", "999", "9" * 200, "0.partial", "²", "a", " 0", "0\n", "..."]
)
def test_invalid_names_among_finished_units_are_ignored(tmp_path: Path, name: str) -> None:
    writer = CacheWriter.create(tmp_path, manifest())
    fill(writer, writer.todo()[:1])
    (tmp_path / "digest/c/0" / name).touch()
    os.makedirs(tmp_path / "digest/c" / name)
    assert np.count_nonzero(open_cache(tmp_path).done()) == 1
