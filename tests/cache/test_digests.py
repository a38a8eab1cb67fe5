"""Damage that checksums cannot detect: complete files, units and arrays of other caches."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.check import check_bytes, check_structure
from cskd_pipeline.cache.convert import Conversion, convert
from cskd_pipeline.cache.digests import split_pin
from cskd_pipeline.cache.manifest import CacheManifest
from cskd_pipeline.cache.merge import merge
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.store import CacheStore
from cskd_pipeline.cache.units import UnitData
from cskd_pipeline.cache.upgrade import upgrade
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.errors import CacheError, UsageError
from cskd_pipeline.runtime import schemas
from tests.cache.factories import (
    COUNTS,
    VIEWS,
    dataset,
    fill,
    make,
    manifest,
    teacher,
    tree,
    unit_data,
)

UNITS = VIEWS // 2 * len(COUNTS)


def read_all(path: Path | str) -> None:
    """Read from a cache everything that training does."""
    reader = open_cache(path)
    for shard, count in enumerate(COUNTS):
        reader.keys(shard), reader.labels(shard), reader.image_crc32(shard)
        for view in range(VIEWS):
            reader.seeds(view, shard), reader.view_digests(view, shard), reader.top1_of(view, shard)
            for name in reader.encodings:
                reader.rows(name, view, shard, range(count))


def problems(path: Path) -> list[str]:
    """Return the problems that ``cache verify`` finds in the cache alone, by file."""
    reader = open_cache(path)
    units = [(block, shard) for block, shard in np.argwhere(reader.done()).tolist()]
    found = check_structure(CacheStore(path), units)
    return [problem.where for problem in found or check_bytes(reader, units)]


def swap(first: Path, other: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    other.rename(first)
    aside.rename(other)


def other_teacher(path: Path) -> Path:
    """Write a cache of the same data, views and shapes from another teacher."""
    writer = CacheWriter.create(path, manifest(teacher=teacher(weights_sha256="cd" * 32)))
    for unit in writer.todo():
        data = unit_data(unit, writer.manifest)
        spatial = data.arrays["dense/spatial"]
        data.arrays = {**data.arrays, "dense/spatial": spatial[:, :, ::-1].copy()}
        writer.write_unit(unit, data)
    return path


def copy_over(source: Path, target: Path, names: Callable[[str], bool]) -> None:
    """Copy the files ``names`` of one cache over another's, like a mistaken rsync."""
    for name, content in tree(source).items():
        if names(name):
            (target / name).write_bytes(content)


def rewrite_manifest(path: Path, change: Callable[[CacheManifest], CacheManifest]) -> None:
    """Change the manifest by hand, with matching documents and checksums."""
    edited = change(CacheStore(path).manifest)
    for key, document in layout.array_documents(edited).items():
        (path / key).write_bytes(document)
    (path / layout.GROUP).write_bytes(layout.manifest_document(edited))


EXCHANGES: dict[str, Callable[[Path, Path], None]] = {
    "lines of two shards": lambda c, _: swap(
        c / "envelope/lines/c/0/0/0/0/0/0/0", c / "envelope/lines/c/0/2/0/0/0/0/0"
    ),
    "logits of two views": lambda c, _: swap(
        c / "dense/spatial/c/0/1/0/0/0/0", c / "dense/spatial/c/1/1/0/0/0/0"
    ),
    "lines of two blocks": lambda c, _: swap(
        c / "envelope/lines/c/0/0/0/0/0/0/0", c / "envelope/lines/c/1/0/0/0/0/0/0"
    ),
    "records of two blocks": lambda c, _: swap(c / "digest/c/0/0", c / "digest/c/1/0"),
    "records of two shards": lambda c, _: swap(c / "digest/c/0/0", c / "digest/c/0/1"),
    "seeds of another block": lambda c, _: shutil.copy(c / "seed/c/0/0/0", c / "seed/c/1/0/0"),
    "counts of another block": lambda c, _: shutil.copy(c / "top1/c/0/1/0", c / "top1/c/1/1/0"),
    "an encoding of another teacher": lambda c, other: copy_over(
        other, c, lambda name: name.startswith("dense/spatial/c")
    ),
    "all but the manifest of another teacher": lambda c, other: copy_over(
        other, c, lambda name: not name.endswith("zarr.json")
    ),
    "the manifest of another teacher": lambda c, other: copy_over(
        other, c, lambda name: name.endswith("zarr.json")
    ),
    "an edited policy": lambda c, _: rewrite_manifest(
        c, lambda m: replace(m, policy=replace(m.policy, erase=0.5))
    ),
    "an edited seed": lambda c, _: rewrite_manifest(c, lambda m: replace(m, root_seed=8)),
    "edited class names": lambda c, _: rewrite_manifest(
        c,
        lambda m: replace(
            m,
            # The toy cache has class names.
            dataset=replace(m.dataset, class_names=m.dataset.class_names[::-1]),  # type: ignore[index]
        ),
    ),
}


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_replaced_files_are_refused_by_the_reader_and_verify(tmp_path: Path, exchange: str) -> None:
    cache, other = tmp_path / "c", other_teacher(tmp_path / "other")
    make(cache)
    read_all(cache)
    EXCHANGES[exchange](cache, other)
    with pytest.raises(CacheError, match="the cache is damaged") as caught:
        read_all(cache)
    assert str(caught.value.where).startswith(f"{cache}/")
    assert problems(cache) != []


def test_labels_replaced_with_zeros_are_refused(tmp_path: Path) -> None:
    """The checksums are valid, and later units have the same labels."""
    make(tmp_path / "c")
    zeros = CacheWriter.create(tmp_path / "zeros", manifest())
    for unit in zeros.todo():
        data: UnitData = unit_data(unit, zeros.manifest)
        data.labels = np.zeros_like(data.labels)
        zeros.write_unit(unit, data)
    shutil.copy(tmp_path / "zeros/label/c/1/0", tmp_path / "c/label/c/1/0")
    with pytest.raises(CacheError, match="a file of another unit or cache") as caught:
        open_cache(tmp_path / "c").labels(1)
    assert caught.value.where == tmp_path / "c/label/c/1/0"
    assert set(problems(tmp_path / "c")) == {"label/c/1/0"}


def test_a_unit_of_other_images_is_detected(tmp_path: Path) -> None:
    """The unit has its own record, but the tar shard's files match another unit's record."""
    a, b = tmp_path / "a", tmp_path / "b"
    make(a)
    writer = CacheWriter.create(b, manifest())
    for unit in writer.todo():
        data = unit_data(unit, writer.manifest)
        data.image_crc32 = data.image_crc32 + np.uint32(1)
        writer.write_unit(unit, data)
    copy_over(b, a, lambda name: f"{name}/".startswith(("digest/c/1/2/", "seed/c/1/2/")))
    assert "image_crc32/c/2/0" in problems(a)


def test_digests_match_the_specification(tmp_path: Path) -> None:
    """Computed from the specification with only zarr and hashlib."""
    make(tmp_path / "c")
    group = zarr.open_group(tmp_path / "c", mode="r")
    # zarr types attributes as any JSON; ours is an object.
    document = dict(group.attrs["cskd"]["manifest"])  # type: ignore[arg-type, index, call-overload]
    fields = ("format_version", "dataset", "teacher", "policy", "root_seed", "encodings")
    document = {name: document[name] for name in (*fields, "view_block")}
    for part, name in (("dataset", "name"), ("teacher", "source"), ("teacher", "top1")):
        del document[part][name]
    for shard in document["dataset"]["shards"]:
        del shard["name"]

    def sha256(value: Any) -> str:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    lineage = sha256(document)
    units = b""
    for block in range(VIEWS // 2):
        for shard in range(len(COUNTS)):
            keys = [f"key/c/{shard}/0/0", f"label/c/{shard}/0", f"image_crc32/c/{shard}/0"]
            keys += [f"seed/c/{block}/{shard}/0", f"view_digest/c/{block}/{shard}/0"]
            keys += [f"top1/c/{block}/{shard}/0"]
            keys += [f"dense/spatial/c/{2 * block + i}/{shard}/0/0/0/0" for i in range(2)]
            keys += [f"dense/global/c/{block}/{shard}/0/0"]
            keys += [f"envelope/lines/c/{block}/{shard}/0/0/0/0/0"]
            keys += [f"envelope/global_label/c/{block}/{shard}/0"]
            files = {key: hashlib.sha256((tmp_path / "c" / key).read_bytes()) for key in keys}
            unit = sha256({"cache": lineage, "files": {k: f.hexdigest() for k, f in files.items()}})
            record = b"".join(
                [bytes.fromhex(unit), bytes.fromhex(lineage), *(f.digest() for f in files.values())]
            )
            # A group may contain groups; this member is an array.
            row = np.asarray(group["digest"][block]).reshape(len(COUNTS), -1)[shard]  # type: ignore[index]
            assert row.tobytes() == record
            units += bytes.fromhex(unit)
    root = hashlib.sha256(bytes.fromhex(lineage) + VIEWS.to_bytes(8, "little") + units)
    assert open_cache(tmp_path / "c").digest() == root.hexdigest()


def test_the_root_digest_depends_only_on_content(tmp_path: Path) -> None:
    make(tmp_path / "a")
    root = open_cache(tmp_path / "a").digest()
    renamed = replace(dataset(), name="my copy")
    other = CacheWriter.create(
        tmp_path / "b",
        manifest(
            dataset=renamed,
            created="2027-01-01T00:00:00Z",
            versions={"python": "3.13"},
            license="MIT",
            notes="x",
        ),
    )
    units = other.todo()
    random.Random(1).shuffle(units)
    fill(other, units[:4])
    assert open_cache(tmp_path / "b").digest() is None
    fill(other, units[4:])
    assert open_cache(tmp_path / "b").digest() == root
    differing = [
        manifest(root_seed=8),
        manifest(view_block=4),
        manifest(encodings=("dense",)),
        manifest(views=6),
        manifest(teacher=teacher(mean=(0.4, 0.5, 0.5))),
    ]
    roots = {root}
    for number, changed in enumerate(differing):
        fill(CacheWriter.create(tmp_path / f"{number}", changed))
        roots.add(open_cache(tmp_path / f"{number}").digest())
    assert len(roots) == 1 + len(differing)


def test_merged_parts_have_the_digest_of_a_cache_written_in_one_run(tmp_path: Path) -> None:
    make(tmp_path / "full")
    root = open_cache(tmp_path / "full").digest()
    for name, chosen in (("a", slice(0, 3)), ("b", slice(2, None))):
        writer = CacheWriter.create(tmp_path / name, manifest())
        fill(writer, writer.todo()[chosen])
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert open_cache(tmp_path / "out").digest() == root
    for name, shards in (("c", (0, 1)), ("d", (1, 3))):  # different shards, so different lineages
        convert(tmp_path / "full", tmp_path / name, Conversion(shards=shards))
    merge([tmp_path / "c", tmp_path / "d"], tmp_path / "again")
    assert open_cache(tmp_path / "again").digest() == root


def test_an_extended_cache_has_the_digest_of_one_written_in_one_run(tmp_path: Path) -> None:
    writer = make(tmp_path / "c", views=2)
    small = open_cache(tmp_path / "c").digest()
    writer.extend(VIEWS)
    assert open_cache(tmp_path / "c").digest() is None
    fill(writer)
    make(tmp_path / "full")
    assert open_cache(tmp_path / "c").digest() == open_cache(tmp_path / "full").digest() != small


# A requested digest


def test_a_requested_digest_accepts_only_its_content(tmp_path: Path) -> None:
    make(tmp_path / "c")
    root = open_cache(tmp_path / "c").digest()
    read_all(f"{tmp_path / 'c'}@sha256:{root}")
    with pytest.raises(CacheError, match="does not have the requested digest") as caught:
        open_cache(f"{tmp_path / 'c'}@sha256:{'0' * 64}")
    assert caught.value.found == f"sha256:{root}"
    # A forger who rewrites every record: only the requested digest detects it.
    writer = CacheWriter.create(tmp_path / "forged", manifest())
    for unit in writer.todo():
        data = unit_data(unit, writer.manifest)
        data.labels = np.zeros_like(data.labels)
        writer.write_unit(unit, data)
    read_all(tmp_path / "forged")
    assert problems(tmp_path / "forged") == []
    with pytest.raises(CacheError, match="does not have the requested digest"):
        open_cache(f"{tmp_path / 'forged'}@sha256:{root}")


def test_an_unfinished_cache_does_not_match_a_requested_digest(tmp_path: Path) -> None:
    writer = CacheWriter.create(tmp_path / "c", manifest())
    fill(writer, writer.todo()[:2])
    with pytest.raises(CacheError, match="does not have the requested digest") as caught:
        open_cache(f"{tmp_path / 'c'}@sha256:{'0' * 64}")
    assert caught.value.found == f"no digest: 2 of {UNITS} units are finished"


def test_a_unit_replaced_after_opening_is_refused(tmp_path: Path) -> None:
    """Its record is replaced too, so that only the root digest detects it."""
    make(tmp_path / "c")
    reader = open_cache(f"{tmp_path / 'c'}@sha256:{open_cache(tmp_path / 'c').digest()}")
    other = CacheWriter.create(tmp_path / "other", manifest())
    for unit in other.todo():
        data = unit_data(unit, other.manifest)
        data.top1 = data.top1 + np.uint32(1)
        other.write_unit(unit, data)
    copy_over(
        tmp_path / "other", tmp_path / "c", lambda name: name in ("digest/c/1/1", "top1/c/1/1/0")
    )
    reader.rows("dense", 0, 1, [0])
    with pytest.raises(CacheError, match="has changed since it was opened"):
        reader.rows("dense", 2, 1, [0])


@pytest.mark.parametrize("digest", ["", "00", "x" * 64, "0" * 63, "0" * 65])
def test_a_malformed_digest_is_refused(digest: str) -> None:
    with pytest.raises(UsageError, match="malformed cache digest"):
        split_pin(f"cache@sha256:{digest}")


def test_locations_without_a_digest_are_unchanged() -> None:
    for location in ("cache", "https://host/c@ache", "a@b", "s3://b/@sha256", "x@sha256:0/y"):
        assert split_pin(location) == (location, None)
    assert split_pin(f"hf://a/b@sha256:{'AB' * 32}") == ("hf://a/b", "ab" * 32)


def test_convert_records_the_digest_of_its_source(tmp_path: Path) -> None:
    make(tmp_path / "c", encodings=("dense",))
    root = open_cache(tmp_path / "c").digest()
    source = f"{tmp_path / 'c'}@sha256:{root}"
    convert(source, tmp_path / "small", Conversion(["envelope"]))
    parent = open_cache(tmp_path / "small").manifest.parent
    assert parent is not None
    assert parent["digest"] == root


# When files are hashed


def test_a_file_is_hashed_once_across_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "c")
    reader = open_cache(tmp_path / "c", memory=0)
    log = tmp_path / "log"
    folder = type(reader.store.folder)
    hashed = folder.sha256

    def logging_sha256(self: Any, key: str) -> bytes:
        with open(log, "a") as file:
            file.write(f"{key}\n")
        return hashed(self, key)

    monkeypatch.setattr(folder, "sha256", logging_sha256)
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            reader.rows("dense", 1, 0, [0, 1])
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    reader.rows("dense", 0, 0, [0])
    assert sorted(log.read_text().split()) == [
        "dense/global/c/0/0/0/0",
        "dense/spatial/c/0/0/0/0/0/0",
        "dense/spatial/c/1/0/0/0/0/0",
    ]


# Version 1


def downgrade(path: Path) -> None:
    """Turn a cache into format version 1."""
    document = json.loads((path / layout.GROUP).read_text())
    content = document["attributes"]["cskd"]
    content["manifest"]["format_version"] = 1
    content["sha256"] = schemas.sha256(content["manifest"])
    (path / layout.GROUP).write_bytes(layout.to_bytes(document))
    for record in (path / "digest/c").glob("*/*"):
        mark = path / "done/c" / record.relative_to(path / "digest/c")
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_bytes(b"1")
    shutil.rmtree(path / "digest")


def test_a_cache_of_version_1_is_refused_with_the_upgrade_command(
    tmp_path: Path,
) -> None:
    make(tmp_path / "c")
    original = tree(tmp_path / "c")
    downgrade(tmp_path / "c")
    for open_it in (open_cache, CacheWriter.open):
        with pytest.raises(CacheError, match="format version 1") as caught:
            open_it(tmp_path / "c")
        assert caught.value.action == f"cskd-pipeline cache upgrade {tmp_path / 'c'}"
    found = upgrade(tmp_path / "c")
    assert tree(tmp_path / "c") == original
    assert found["units"] == UNITS
    assert found["digest"] == open_cache(tmp_path / "c").digest()
    assert upgrade(tmp_path / "c")["units"] == 0
    assert tree(tmp_path / "c") == original


def test_an_interrupted_upgrade_continues(tmp_path: Path) -> None:
    make(tmp_path / "c")
    original = tree(tmp_path / "c")
    downgrade(tmp_path / "c")
    for number in range(UNITS):
        with pytest.raises(KeyboardInterrupt):
            upgrade(tmp_path / "c", stopped=iter([False] * number + [True]).__next__)
        with pytest.raises(CacheError, match="format version 1"):
            open_cache(tmp_path / "c")
    upgrade(tmp_path / "c")
    assert tree(tmp_path / "c") == original


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_cache_is_not_upgraded(tmp_path: Path, damage: str) -> None:
    make(tmp_path / "c")
    downgrade(tmp_path / "c")
    path = tmp_path / "c/seed/c/1/2/0"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content) if damage == "flipped" else path.unlink()
    with pytest.raises(CacheError) as caught:
        upgrade(tmp_path / "c")
    assert "seed/c/1/2/0" in str(caught.value)
    with pytest.raises(CacheError, match="format version 1"):
        open_cache(tmp_path / "c")


def test_a_folder_without_a_cache_is_not_upgraded(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="not a teacher cache"):
        upgrade(tmp_path)
