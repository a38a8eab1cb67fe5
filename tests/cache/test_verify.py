"""``check_structure`` and ``check_bytes`` report every problem of a cache."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from cskd_pipeline.cache.check import Problem, check_bytes, check_structure
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.cache.store import CacheStore
from cskd_pipeline.cache.writer import CacheWriter
from tests.cache.factories import data_files, fill, manifest, tree, unit_data


@pytest.fixture
def cache(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "cache")
    return tmp_path / "cache"


def units(reader: Cache) -> list[tuple[int, int]]:
    return [(int(block), int(shard)) for block, shard in np.argwhere(reader.done())]


def structure(cache: Path) -> list[Problem]:
    reader = open_cache(cache)
    return check_structure(CacheStore(cache), units(reader))


def damage(cache: Path) -> list[Problem]:
    reader = open_cache(cache)
    return check_bytes(reader, units(reader))


def test_an_intact_cache_has_no_problems(cache: Path) -> None:
    assert structure(cache) == []
    assert damage(cache) == []


def test_every_data_file_is_checked(cache: Path) -> None:
    store = CacheStore(cache)
    reader = open_cache(cache)
    known = {key for unit in units(reader) for _, key in store.recorded_files(*unit)}
    known |= {store.record_key(*unit) for unit in units(reader)}
    assert known == set(data_files(cache))


def test_every_missing_or_truncated_file_is_named(cache: Path) -> None:
    names = [name for name in data_files(cache) if not name.startswith("digest/")]
    missing, truncated = names[::3], names[1::3]
    for name in missing:
        os.unlink(cache / name)
    for name in truncated:
        os.truncate(cache / name, 12)
    found = {problem.where: problem.found for problem in structure(cache)}
    assert found.keys() == {*missing, *truncated}
    assert all(found[name] == "the file is missing" for name in missing)
    assert all("truncated: 12 bytes" in found[name] for name in truncated)


def test_unfinished_units_are_not_checked(tmp_path: Path) -> None:
    writer = CacheWriter.create(tmp_path / "cache", manifest())
    fill(writer, writer.todo()[:2])
    assert structure(tmp_path / "cache") == []
    assert damage(tmp_path / "cache") == []


def test_a_flipped_bit_is_reported_only_for_its_file(cache: Path) -> None:
    rng = random.Random(0)
    for name in data_files(cache):
        data = bytearray((cache / name).read_bytes())
        original = bytes(data)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (cache / name).write_bytes(data)
        assert {problem.where for problem in damage(cache)} == {name}, name
        (cache / name).write_bytes(original)
    assert damage(cache) == []


def test_damage_in_many_files_is_reported_together(cache: Path) -> None:
    names = [name for name in data_files(cache) if not name.startswith("digest/")]
    for name in names:
        data = bytearray((cache / name).read_bytes())
        data[len(data) // 2] ^= 255
        (cache / name).write_bytes(data)
    found = damage(cache)
    assert {problem.where for problem in found} == set(names)
    assert len(found) == len(set(found))


def test_labels_out_of_range_are_detected(tmp_path: Path) -> None:
    writer = CacheWriter.create(tmp_path / "cache", manifest())
    for unit in writer.todo():
        data = unit_data(unit, writer.manifest)
        if unit.shard == 1:
            data.labels[2] = 20
        writer.write_unit(unit, data)
    (problem,) = damage(tmp_path / "cache")
    assert problem.where == "label/c/1/0"
    assert problem.found == "1 labels out of range for 20 classes, first 20"


def test_keys_of_other_samples_are_detected(cache: Path) -> None:
    """The file is complete, but belongs to another tar shard."""
    (cache / "key/c/0/0/0").write_bytes(tree(cache)["key/c/2/0/0"])
    problems = damage(cache)
    assert {problem.where for problem in problems} == {"key/c/0/0/0"}
    assert all("a file of another unit" in problem.found for problem in problems)
