"""A merged cache equals that of a single dump; incompatible caches are refused."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numcodecs.zstd import Zstd

from cskd_pipeline.cache import chunks, layout
from cskd_pipeline.cache.chunks import encode_file
from cskd_pipeline.cache.manifest import CacheManifest, DatasetManifest, ShardInfo
from cskd_pipeline.cache.merge import merge
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.slabs import SlabReader
from cskd_pipeline.cache.units import Unit
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.errors import CacheError, OutputError, UsageError
from cskd_pipeline.runtime import atomic
from cskd_pipeline.runtime.classes import COMMAND_SWITCH, ClassGuard
from tests.cache.factories import (
    BLOCK,
    CLASSES,
    COUNTS,
    data_files,
    dataset,
    fill,
    keys,
    make,
    manifest,
    rewrite_records,
    teacher,
    tree,
    unit_data,
)
from tests.cache.test_writer import fail_at, processes

UNITS = [
    Unit(b, s, range(b * BLOCK, (b + 1) * BLOCK)) for b in range(2) for s in range(len(COUNTS))
]


def merge_into(out: Path, *parts: Path, **options: Any) -> dict[str, Any]:
    return merge(parts, out, **options)


def part(path: Path, units: list[Unit], **changes: Any) -> Path:
    fill(CacheWriter.create(path, manifest(**changes)), units)
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of the finished cache except its manifest, which contains the creation time."""
    path = tmp_path_factory.mktemp("full") / "c"
    make(path)
    return without_manifest(path)


def without_manifest(path: Path) -> dict[str, bytes]:
    result = tree(path)
    del result["zarr.json"]
    return result


# Merged content


@pytest.mark.parametrize("seed", range(4))
def test_merged_parts_equal_a_single_write_of_their_units(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    shares = [[unit for unit in UNITS if rng.random() < 0.5] for _ in range(3)]
    parts = [part(tmp_path / str(n), share) for n, share in enumerate(shares)]
    result = merge_into(tmp_path / "out", *parts)
    units = sorted({unit for share in shares for unit in share})
    part(tmp_path / "alone", units)
    assert without_manifest(tmp_path / "out") == without_manifest(tmp_path / "alone")
    assert result["units_copied"] == len(units)
    assert result["units_compared"] == sum(map(len, shares)) - len(units)
    assert result["units_missing"] == len(UNITS) - len(units)
    assert result["views_copied"] == BLOCK * sum(COUNTS[unit.shard] for unit in units)


def test_files_are_copied_without_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: dict[str, bytes]
) -> None:
    a = part(tmp_path / "a", UNITS)
    monkeypatch.setattr(SlabReader, "rows", None)
    merge_into(tmp_path / "out", a)
    assert without_manifest(tmp_path / "out") == full


def test_parts_with_different_numbers_of_views_merge(
    tmp_path: Path, full: dict[str, bytes]
) -> None:
    parts = [part(tmp_path / "a", UNITS[:3], views=2), part(tmp_path / "b", UNITS[3:])]
    for order in (parts, parts[::-1]):
        out = tmp_path / order[0].name.upper()
        assert merge_into(out, *order)["complete"]
        assert open_cache(out).views == 4
        assert without_manifest(out) == full


def test_merging_again_changes_nothing(tmp_path: Path, full: dict[str, bytes]) -> None:
    parts = [part(tmp_path / "a", UNITS[:4]), part(tmp_path / "b", UNITS[3:])]
    merge_into(tmp_path / "out", *parts)
    before = tree(tmp_path / "out")
    result = merge_into(tmp_path / "out", *parts, *parts)
    assert (result["units_copied"], result["units_compared"]) == (0, 2 * 7)
    assert tree(tmp_path / "out") == before
    assert without_manifest(tmp_path / "out") == full


def test_unfinished_units_are_not_copied(tmp_path: Path) -> None:
    a = part(tmp_path / "a", UNITS[:2])
    os.unlink(a / "digest/c/0/1")
    assert merge_into(tmp_path / "out", a)["units_missing"] == 5
    assert {name for name in data_files(tmp_path / "out") if name.startswith("seed")} == {
        "seed/c/0/0/0"
    }


def test_a_later_merge_adds_newly_finished_units(tmp_path: Path, full: dict[str, bytes]) -> None:
    a, b = part(tmp_path / "a", UNITS[:2]), part(tmp_path / "b", [], views=2)
    assert merge_into(tmp_path / "out", a, b)["units_missing"] == 4
    writer = CacheWriter.open(b)
    writer.extend(4)
    fill(writer, UNITS[2:])
    assert merge_into(tmp_path / "out", a, b)["units_copied"] == 4
    assert without_manifest(tmp_path / "out") == full


def test_license_notes_and_parent_are_merged(tmp_path: Path) -> None:
    parent = {**manifest().as_parent(None), "manifest_sha256": "0" * 64}
    changes: list[dict[str, Any]] = [
        {"license": "CC0", "notes": "one", "parent": parent},
        {"license": "MIT", "notes": "two", "parent": parent},
        {"license": "CC0", "notes": "one", "parent": parent},
    ]
    parts = [part(tmp_path / str(n), UNITS[n : n + 1], **c) for n, c in enumerate(changes)]
    merge_into(tmp_path / "out", *parts)
    result = open_cache(tmp_path / "out").manifest
    assert (result.license, result.notes, result.parent) == ("CC0; MIT", "one\ntwo", parent)
    merge_into(tmp_path / "other", parts[0], part(tmp_path / "none", []))
    assert open_cache(tmp_path / "other").manifest.parent is None


# Slices: other lists of tar shards of one data set


def slice_of(path: Path, shards: slice, **changes: Any) -> Path:
    """Write a cache of some tar shards, as ``cache convert --shards`` does."""
    from cskd_pipeline.cache.convert import Conversion, convert

    source = path.with_name(f"source of {path.name}")
    make(source, **changes)
    convert(source, path, Conversion(shards=(shards.start, shards.stop)))
    return path


def test_slices_are_concatenated_in_the_given_order(tmp_path: Path, full: dict[str, bytes]) -> None:
    """The longest tar shard is in the first slice: the others have files of another shape."""
    cuts = (slice(0, 1), slice(1, 2), slice(2, 3))
    parts = [slice_of(tmp_path / f"{cut.start}", cut) for cut in cuts]
    assert merge_into(tmp_path / "out", *parts)["complete"]
    assert without_manifest(tmp_path / "out") == full
    assert open_cache(tmp_path / "out").manifest.dataset == dataset()
    merge_into(tmp_path / "turned", *parts[::-1])
    reversed_ = open_cache(tmp_path / "turned")
    assert reversed_.shard_ids == dataset().shard_ids[::-1]
    assert np.array_equal(reversed_.seeds(1, 2), open_cache(tmp_path / "out").seeds(1, 0))


def test_a_slice_is_compared_with_the_full_cache_by_value(tmp_path: Path) -> None:
    make(tmp_path / "all")
    cut = slice_of(tmp_path / "cut", slice(1, 3))
    result = merge_into(tmp_path / "out", tmp_path / "all", cut)
    assert (result["units_copied"], result["units_compared"]) == (6, 4)
    one = part(tmp_path / "b", UNITS[:1])
    assert merge_into(tmp_path / "also", cut, one)["units_missing"] == 1


@pytest.mark.parametrize("field", ["name", "class_names"])
def test_slices_of_another_data_set_are_refused(tmp_path: Path, field: str) -> None:
    other: Any = "birds" if field == "name" else ("?",) * CLASSES
    parts = [
        slice_of(tmp_path / "a", slice(0, 1)),
        slice_of(tmp_path / "b", slice(1, 3), dataset=replace(dataset(), **{field: other})),
    ]
    with pytest.raises(CacheError, match="do not belong together") as caught:
        merge_into(tmp_path / "out", *parts)
    [line] = caught.value.problems
    assert line.startswith(f"dataset.{field}: ")
    assert str(parts[0]) in line
    assert str(parts[1]) in line


def test_a_different_class_order_is_refused_unless_accepted(tmp_path: Path) -> None:
    """Also for caches of the same tar shards: their contents do not show which list is right."""
    names = tuple(f"c{k}" for k in range(CLASSES))
    parts = [
        part(tmp_path / str(n), [unit], dataset=replace(dataset(), class_names=own))
        for n, (unit, own) in enumerate(zip(UNITS, (None, names, names[::-1]), strict=False))
    ]
    with pytest.raises(CacheError, match="do not belong together") as caught:
        merge_into(tmp_path / "out", *parts, guard=ClassGuard(COMMAND_SWITCH))
    [line] = caught.value.problems
    assert line.startswith(f"dataset.class_names: the same {CLASSES} names in another order (class")
    assert f'"{names[-1]}" in {parts[2]}, "c0" in {parts[1]}' in line
    assert line.endswith("--accept-classes accepts it")
    assert not (tmp_path / "out").exists()
    guard = ClassGuard(COMMAND_SWITCH, accept=True)
    result = merge_into(tmp_path / "out", *parts, guard=guard)
    assert len(result["accepted_classes"]) == 1
    assert guard.unknown == [
        f"no class names in {parts[0]}: class k is taken as class k of {parts[1]}"
    ]
    assert open_cache(tmp_path / "out").manifest.dataset.class_names == names


def test_a_target_with_a_different_class_order_is_refused(tmp_path: Path) -> None:
    names = dataset().class_names
    assert names is not None
    reversed_ = replace(dataset(), class_names=names[::-1])
    a, out = part(tmp_path / "a", UNITS[:1]), part(tmp_path / "out", [], dataset=reversed_)
    with pytest.raises(CacheError, match="contains another cache") as caught:
        merge_into(out, a)
    assert "dataset.class_names: the same" in caught.value.problems[0]


def test_the_same_samples_in_different_tar_shards_are_refused(tmp_path: Path) -> None:
    """Its tar shards have other names and contents, but training would repeat images."""
    shard = ShardInfo.of("cut-0.tar", keys(0, 5)[::-1], 10240, "e" * 64)
    other = DatasetManifest("toy", CLASSES, (shard,), dataset().class_names)
    parts = [make(tmp_path / "a").path, tmp_path / "b"]
    cache_manifest = manifest(dataset=other)
    writer = CacheWriter.create(parts[1], cache_manifest)
    for unit in writer.todo():
        writer.write_unit(unit, replace(unit_data(unit, cache_manifest), keys=keys(0, 5)[::-1]))
    with pytest.raises(CacheError, match="the same samples in different tar shards") as caught:
        merge_into(tmp_path / "out", *parts)
    assert "5 keys more than once, for example train/0-0" in str(caught.value.found)
    assert f"train-0000.tar of {parts[0]} and cut-0.tar of {parts[1]}" in str(caught.value.where)
    assert not (tmp_path / "out").exists()


# Incompatible caches


@pytest.mark.parametrize(
    ("changes", "at"),
    [
        ({"teacher": teacher(weights_sha256="cd" * 32)}, "teacher.weights_sha256"),
        ({"teacher": teacher(precision="bfloat16")}, "teacher.precision"),
        ({"policy": replace(manifest().policy, flip=0.25)}, "policy.flip"),
        ({"root_seed": 8}, "root_seed"),
        ({"encodings": ("dense",)}, "encodings"),
        ({"view_block": 4}, "view_block"),
    ],
)
def test_conflicting_manifests_are_refused_naming_both_caches(
    tmp_path: Path, changes: dict[str, Any], at: str
) -> None:
    a, b = part(tmp_path / "a", []), part(tmp_path / "b", [], **changes)
    with pytest.raises(CacheError, match="do not belong together") as caught:
        merge_into(tmp_path / "out", a, b)
    [line] = caught.value.problems
    assert line.startswith(f"{at}: ")
    assert f" in {a}, " in line
    assert line.endswith(f" in {b}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value"), [("sha256", "f" * 64), ("keys_sha256", "f" * 64), ("count", 6)]
)
def test_different_tar_shards_of_the_same_name_are_refused(
    tmp_path: Path, field: str, value: Any
) -> None:
    shards = list(dataset().shards)
    shards[1] = replace(shards[1], **{field: value})
    other = replace(dataset(), shards=tuple(shards))
    a, b = part(tmp_path / "a", []), part(tmp_path / "b", [], dataset=other)
    with pytest.raises(CacheError, match="do not belong together") as caught:
        merge_into(tmp_path / "out", a, b)
    [line] = caught.value.problems
    assert line.startswith(f"tar shard train-0001.tar: {field}: ")
    assert f" in {a}, {value} in {b}" in line


def test_a_missing_tar_sha256_is_taken_from_another_part(tmp_path: Path) -> None:
    shards = tuple(replace(shard, sha256=None) for shard in dataset().shards)
    unknown = replace(dataset(), shards=shards)
    a, b = part(tmp_path / "a", UNITS[:1], dataset=unknown), part(tmp_path / "b", UNITS[1:2])
    merge_into(tmp_path / "out", a, b)
    assert open_cache(tmp_path / "out").manifest.dataset == dataset()
    merge_into(tmp_path / "out", a)  # an unknown digest is not a difference


def test_a_target_with_a_different_manifest_is_refused(tmp_path: Path) -> None:
    a, out = part(tmp_path / "a", UNITS[:1]), part(tmp_path / "out", [], root_seed=8)
    with pytest.raises(CacheError, match="contains another cache") as caught:
        merge_into(out, a)
    assert caught.value.problems == ["root_seed: 8 and 7"]


def test_a_cache_is_not_merged_into_itself(tmp_path: Path) -> None:
    a, b = part(tmp_path / "a", []), part(tmp_path / "b", [])
    with pytest.raises(UsageError, match="into itself"):
        merge_into(tmp_path / "." / "a", b, a)


def test_other_versions_are_refused_unless_accepted_and_then_recorded(tmp_path: Path) -> None:
    versions = [{**manifest().versions, "torch": v} for v in ("2.9.0", "3.0", "3.1")]
    parts = [part(tmp_path / str(n), UNITS[n : n + 1], versions=v) for n, v in enumerate(versions)]
    with pytest.raises(CacheError, match="different library versions") as caught:
        merge_into(tmp_path / "out", *parts[:2])
    assert caught.value.problems == [f"{parts[1]}: torch: 2.9.0 and 3.0"]
    assert not (tmp_path / "out").exists()
    merge_into(tmp_path / "out", *parts[:2], accept_versions=True)
    assert open_cache(tmp_path / "out").manifest.other_versions == (versions[1],)
    # A single part whose versions the target does not list.
    with pytest.raises(CacheError, match="other library versions"):
        merge_into(tmp_path / "out", parts[2])
    merge_into(tmp_path / "out", parts[0], parts[2], accept_versions=True)
    assert open_cache(tmp_path / "out").manifest.other_versions == tuple(versions[1:])
    # Versions accepted when a part was written stay accepted.
    again = part(tmp_path / "3", [], other_versions=(versions[1],))
    merge_into(tmp_path / "also", again, parts[1])
    assert open_cache(tmp_path / "also").manifest.other_versions == (versions[1],)


# Units in several caches


def test_units_are_compared_by_value_and_not_by_compressed_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: dict[str, bytes]
) -> None:
    a = part(tmp_path / "a", UNITS)
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "Zstd", lambda level, checksum: Zstd(level=22, checksum=checksum))
        b = part(tmp_path / "b", UNITS)
    differing = [name for name in data_files(a) if tree(a)[name] != tree(b)[name]]
    assert {name.split("/c/")[0] for name in differing} >= {"dense/spatial", "envelope/lines"}
    assert merge_into(tmp_path / "out", a, b)["units_compared"] == 6
    assert without_manifest(tmp_path / "out") == full


NAMES = ["seed", "view_digest", "top1", "dense/spatial", "dense/global", "envelope/lines",
         "envelope/global_label"]  # fmt: skip


def altered(unit: Unit, cache_manifest: CacheManifest, name: str) -> Any:
    """Return the unit's data with one value changed in its second view."""
    data = unit_data(unit, cache_manifest)
    fields = {"seed": "seeds", "view_digest": "view_digests", "top1": "top1"}
    if name in fields:
        values = getattr(data, fields[name]).copy()
        values.reshape(len(values), -1)[1, 0] ^= 1
        return replace(data, **{fields[name]: values})
    values = data.arrays[name].copy()
    values.view(np.uint16).reshape(*values.shape[:2], -1)[1, 1, 0] ^= 1
    return replace(data, arrays={**data.arrays, name: values})


@pytest.mark.parametrize("name", NAMES)
def test_a_differing_unit_is_refused_and_located(tmp_path: Path, name: str) -> None:
    a = part(tmp_path / "a", UNITS)
    b = part(tmp_path / "b", UNITS[:4])
    unit = UNITS[4]  # views 2-3 of shard 1
    writer = CacheWriter.open(b)
    writer.write_unit(unit, altered(unit, writer.manifest, name))
    with pytest.raises(CacheError, match="differ where they should be equal") as caught:
        merge_into(tmp_path / "out", a, b)
    result = str(caught.value.found)
    assert f"array {name}, views 2-3 of shard 1 (train-0001.tar): " in result
    if name != "top1":
        assert f"1 of 3 samples differ, the first is {keys(1, 3)[name in NAMES[3:]]}" in result
    one, other = str(caught.value.where).split(" and ")
    assert one.startswith(f"{a}/{name}/c/")
    assert other == one.replace(str(a), str(b))
    assert Path(one).is_file()
    assert not open_cache(tmp_path / "out").done()[1, 1]


@pytest.mark.parametrize("name", ["labels", "image_crc32"])
@pytest.mark.parametrize("units", [UNITS[1:2], UNITS[4:5]], ids=["same unit", "other unit"])
def test_labels_and_images_must_agree_across_units_of_a_tar_shard(
    tmp_path: Path, name: str, units: list[Unit]
) -> None:
    a = part(tmp_path / "a", UNITS[1:2])
    writer = CacheWriter.create(tmp_path / "b", manifest())
    data = unit_data(units[0], writer.manifest)
    other = getattr(data, name).copy()
    other[2] += 1
    writer.write_unit(units[0], replace(data, **{name: other}))
    array = name.removesuffix("s")
    for sources in ([a, tmp_path / "b"], [tmp_path / "b", a]):
        with pytest.raises(CacheError, match="differ where they should be equal") as caught:
            merge_into(tmp_path / "out", *sources)
        assert f"array {array}, shard 1 (train-0001.tar): 1 of 3" in str(caught.value.found)
        files_named = [f"{source}/{array}/c/1/0" for source in sources]
        assert str(caught.value.where) == " and ".join(files_named)
    merge_into(tmp_path / "kept", a)
    with pytest.raises(CacheError, match="differ where they should be equal"):
        merge_into(tmp_path / "kept", tmp_path / "b")


def test_units_merged_earlier_are_compared_too(tmp_path: Path) -> None:
    merge_into(tmp_path / "out", part(tmp_path / "a", UNITS))
    before = tree(tmp_path / "out")
    writer = CacheWriter.create(tmp_path / "b", manifest())
    writer.write_unit(UNITS[2], altered(UNITS[2], writer.manifest, "dense/spatial"))
    with pytest.raises(CacheError, match="differ where they should be equal") as caught:
        merge_into(tmp_path / "out", tmp_path / "b")
    assert str(caught.value.where).startswith(f"{tmp_path / 'out'}/dense/spatial/c/1/2/")
    assert tree(tmp_path / "out") == before


# Damage, kills, full disks, concurrent writers


@pytest.mark.parametrize("name", [*NAMES, "key", "label", "image_crc32", "digest"])
@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_a_damaged_part_is_not_copied(tmp_path: Path, name: str, how: str) -> None:
    a = part(tmp_path / "a", UNITS)
    path = next(p for p in sorted((a / name / "c").rglob("*")) if p.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    if how == "flipped":
        path.write_bytes(content)
    else:
        path.unlink()
    if (name, how) == ("digest", "missing"):
        assert merge_into(tmp_path / "out", a)["units_missing"] == 1
        return
    with pytest.raises(CacheError, match="damaged") as caught:
        merge_into(tmp_path / "out", a)
    assert caught.value.where == path
    assert data_files(tmp_path / "out") == []  # so that other parts may still provide the labels


@pytest.mark.parametrize("started", [False, True], ids=["first", "compared"])
@pytest.mark.parametrize("name", ["key", "label", "image_crc32"])
def test_files_that_match_their_record_are_validated_before_copying(
    tmp_path: Path, name: str, started: bool
) -> None:
    """Keys of another data set or invalid zstd, in files that match their record."""
    a, out = part(tmp_path / "a", UNITS[:1]), tmp_path / "out"
    if started:  # an interrupted unit left its tar shard's files
        merge_into(out, a)
        os.unlink(out / "digest/c/0/0")
    before = data_files(out) if started else []
    path = next(p for p in (a / name / "c").rglob("*") if p.is_file())
    array = layout.stored_arrays(manifest())["key"]
    reversed_keys = layout.key_matrix(keys(0, 5)[::-1], array)
    path.write_bytes(encode_file(array, reversed_keys[None]) if name == "key" else b"no zstd")
    rewrite_records(a)
    with pytest.raises(CacheError, match="the cache is damaged") as caught:
        merge_into(out, a)
    assert caught.value.where == path
    assert data_files(out) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first", [True, False], ids=["in the target", "in another part"])
def test_damage_in_either_copy_of_a_unit_is_detected(
    tmp_path: Path, name: str, first: bool
) -> None:
    a, b = (part(tmp_path / of, UNITS) for of in "ab")
    out = tmp_path / "out"
    if first:
        merge_into(out, a)
    path = min(p for p in ((out if first else b) / name / "c").rglob("*") if p.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    with pytest.raises(CacheError, match="damaged") as caught:
        merge_into(out, a, b)
    assert caught.value.where == path


def test_an_interrupted_merge_resumes(tmp_path: Path, full: dict[str, bytes]) -> None:
    parts = [part(tmp_path / "a", UNITS[:4]), part(tmp_path / "b", UNITS[2:])]
    for number in range(len(UNITS)):
        interruptions = iter([False] * number + [True])
        with pytest.raises(KeyboardInterrupt):
            merge_into(tmp_path / "out", *parts, stopped=lambda a=interruptions: next(a))
        assert open_cache(tmp_path / "out").done().sum() == number
    assert merge_into(tmp_path / "out", *parts)["units_copied"] == 1
    assert without_manifest(tmp_path / "out") == full


def test_a_merge_resumes_after_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = part(tmp_path / "a", [Unit(0, 1, range(4))], view_block=4)
    template = tmp_path / "template"
    CacheWriter.create(template, manifest(view_block=4))
    count = 3 + 3 + 5 + 2  # tar shard, views, dense (a file per view), envelope; then the record
    for number in range(count + 1):
        out = tmp_path / str(number)
        shutil.copytree(template, out)
        with monkeypatch.context() as patch:
            fail_at(patch, number)
            with pytest.raises(OutputError, match="no space left"):
                merge_into(out, a)
        assert open_cache(out).done().sum() == 0
        assert merge_into(out, a)["units_copied"] == 1
        assert without_manifest(out) == without_manifest(a)


def merge_and_die(out: Path, parts: list[Path], moment: int) -> None:
    """Merge in this subprocess, and exit abruptly at the renaming of file ``moment``."""
    left, rename = [moment], os.replace

    def dying_replace(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        rename(source, target)

    os.replace = dying_replace  # type: ignore[assignment]  # fewer ways to call it
    merge_into(out, *parts)


def test_a_killed_merge_resumes_to_the_same_cache(tmp_path: Path, full: dict[str, bytes]) -> None:
    parts = [part(tmp_path / "a", UNITS[:4]), part(tmp_path / "b", UNITS[3:])]
    moments = random.Random(0)
    for _ in range(12):
        dying = multiprocessing.get_context("fork").Process(
            target=merge_and_die, args=(tmp_path / "out", parts, moments.randrange(12))
        )
        dying.start()
        dying.join(60)
        assert dying.exitcode == 9
    assert 0 < merge_into(tmp_path / "out", *parts)["units_copied"] < len(UNITS)
    assert without_manifest(tmp_path / "out") == full  # and no partial files


def test_files_are_synced_before_renaming_and_records_come_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = part(tmp_path / "a", UNITS[:2])
    CacheWriter.create(tmp_path / "out", manifest())
    synced: set[str] = set()
    named: list[str] = []
    rename = os.replace

    def watched_replace(source: Path, target: Path) -> None:
        assert str(source) in synced
        named.append(os.path.relpath(target, tmp_path / "out"))
        rename(source, target)

    def sync(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(atomic.os, "fsync", sync)
    monkeypatch.setattr(atomic.os, "replace", watched_replace)
    merge_into(tmp_path / "out", a)
    assert sorted(named) == sorted(data_files(a))
    last = {name.split("/")[-1]: name for name in named if name.startswith("digest")}
    for shard in ("0", "1"):
        own = [name for name in named if f"/c/0/{shard}/" in name or name == last[shard]]
        assert own[-1] == last[shard]
    folders = {f"{tmp_path}/out/{name.rpartition('/')[0]}" for name in named}
    assert folders <= synced


def test_two_concurrent_merges_and_a_writer_produce_one_cache(
    tmp_path: Path, full: dict[str, bytes]
) -> None:
    parts = [part(tmp_path / "a", UNITS[:4]), part(tmp_path / "b", UNITS[3:])]
    workers = [
        processes.Process(target=merge_into, args=(tmp_path / "out", *order))
        for order in (parts, parts[::-1])
    ]
    workers.append(processes.Process(target=part, args=(tmp_path / "out", UNITS[1:5])))
    for process in workers:
        process.start()
    for process in workers:
        process.join(60)
        assert process.exitcode == 0
    assert without_manifest(tmp_path / "out") == full
