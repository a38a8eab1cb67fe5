"""Units are committed atomically, and only to a cache with the same manifest."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cskd_pipeline.cache import durable, layout
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.units import Unit
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.errors import CacheError, CskdError, OutputError, UsageError
from cskd_pipeline.runtime import atomic
from tests.cache.factories import (
    data_files,
    dataset,
    fill,
    make,
    manifest,
    teacher,
    tree,
    unit_data,
    write_all,
)

# Processes with modules preloaded that share no thread or lock with the test.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "jsonschema", "tests.cache.factories"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("finished") / "cache"
    make(path)
    return tree(path)


# Units


def test_todo_lists_all_unfinished_blocks_of_all_shards(tmp_path: Path) -> None:
    writer = CacheWriter.create(tmp_path / "c", manifest())
    units = writer.todo()
    assert units == [Unit(b, s, range(2 * b, 2 * b + 2)) for b in range(2) for s in range(3)]
    assert writer.todo(shards=[2], views=range(2, 4)) == [units[5]]
    fill(writer, units[:4])
    assert writer.todo() == units[4:]
    assert CacheWriter.open(tmp_path / "c").todo() == units[4:]


@pytest.mark.parametrize(
    ("selection", "message"),
    [({"views": [0]}, "views 0-0"), ({"views": range(4, 6)}, "views 4-5"),
     ({"views": [-2, -1]}, "views -2--1"), ({"shards": [3]}, "shards 3-3")],
)  # fmt: skip
def test_units_that_do_not_exist_are_refused(
    tmp_path: Path, selection: dict[str, Any], message: str
) -> None:
    writer = CacheWriter.create(tmp_path / "c", manifest())
    with pytest.raises(UsageError, match=message):
        writer.todo(**selection)


def test_the_bytes_do_not_depend_on_the_order_of_units(
    tmp_path: Path, finished: dict[str, bytes]
) -> None:
    for order in (1, 2):
        write_all(tmp_path / str(order), order)
        assert tree(tmp_path / str(order)) == finished


def test_unused_lines_are_not_stored(tmp_path: Path, finished: dict[str, bytes]) -> None:
    writer = CacheWriter.create(tmp_path / "c", manifest())
    for unit in writer.todo():
        data = unit_data(unit, writer.manifest)
        arrays = dict(data.arrays)
        lines = arrays["envelope/lines"]
        longer = np.full((*lines.shape[:2], 20, *lines.shape[3:]), 65535, np.uint16)
        longer[:, :, : lines.shape[2]] = lines
        arrays["envelope/lines"] = longer
        writer.write_unit(unit, replace(data, arrays=arrays))
    assert tree(tmp_path / "c") == finished


def test_a_finished_unit_is_not_rewritten(tmp_path: Path) -> None:
    writer = make(tmp_path / "c")
    before = tree(tmp_path / "c")
    unit = Unit(0, 1, range(2))
    data = unit_data(unit, writer.manifest)
    assert not writer.write_unit(unit, replace(data, seeds=data.seeds + np.uint64(1)))
    assert tree(tmp_path / "c") == before


def test_keys_that_do_not_match_the_manifest_are_refused(tmp_path: Path) -> None:
    writer = CacheWriter.create(tmp_path / "c", manifest())
    unit = writer.todo()[0]
    data = unit_data(unit, writer.manifest)
    with pytest.raises(CacheError, match="not those of the cache's data set"):
        writer.write_unit(unit, replace(data, keys=data.keys[::-1]))
    assert data_files(tmp_path / "c") == []


@pytest.mark.parametrize("name", ["labels", "image_crc32"])
def test_a_later_unit_must_agree_with_the_first(tmp_path: Path, name: str) -> None:
    writer = CacheWriter.create(tmp_path / "c", manifest())
    units = writer.todo(shards=[1])
    fill(writer, units[:1])
    data = unit_data(units[1], writer.manifest)
    other = getattr(data, name).copy()
    other[2] += 1
    with pytest.raises(CacheError) as caught:
        writer.write_unit(units[1], replace(data, **{name: other}))
    message = str(caught.value)
    assert f"{other[2]} for sample {data.keys[2]}; 1 samples differ" in message
    assert f"{other[2] - 1}, in " in message
    assert "shard 1 (train-0001.tar)" in message
    assert writer.todo(shards=[1]) == units[1:]


# Creating, resuming, extending


def test_creating_an_existing_cache_resumes_it(tmp_path: Path, finished: dict[str, bytes]) -> None:
    writer = CacheWriter.create(tmp_path / "c", manifest())
    fill(writer, writer.todo()[:2])
    again = CacheWriter.create(
        tmp_path / "c", manifest(created="2031-01-01T00:00:00Z", notes="again")
    )
    assert len(again.todo()) == 4
    fill(again)
    assert tree(tmp_path / "c") == finished


def test_a_different_manifest_is_refused_listing_every_difference(tmp_path: Path) -> None:
    make(tmp_path / "c")
    before = tree(tmp_path / "c")
    other = manifest(
        dataset=dataset((5, 3, 6)),
        teacher=teacher(weights_sha256="cd" * 32),
        root_seed=8,
        encodings=("dense",),
    )
    with pytest.raises(CacheError) as caught:
        CacheWriter.create(tmp_path / "c", other)
    assert {line.split(":")[0] for line in caught.value.problems} == {
        "dataset.shards[2].count", "dataset.shards[2].bytes", "dataset.shards[2].keys_sha256",
        "teacher.weights_sha256", "root_seed", "encodings",
    }  # fmt: skip
    assert tree(tmp_path / "c") == before


def test_other_versions_are_refused_unless_accepted_and_then_recorded(tmp_path: Path) -> None:
    path = tmp_path / "c"
    make(path)
    newer = {**manifest().versions, "torch": "3.0"}
    with pytest.raises(CacheError, match="other library versions") as caught:
        CacheWriter.create(path, manifest(versions=newer))
    assert caught.value.problems == ["torch: 2.9.0 and 3.0"]
    for _ in range(2):
        writer = CacheWriter.create(path, manifest(versions=newer), accept_versions=True)
        assert writer.manifest.other_versions == (newer,)
    assert open_cache(path).manifest.other_versions == (newer,)
    CacheWriter.create(path, manifest(versions=newer))  # now recorded


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "digest"])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(OutputError, match="contains other files") as caught:
        CacheWriter.create(tmp_path, manifest())
    assert caught.value.found == name
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_zarr_group_without_a_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    for make_or_open in (CacheWriter.open, lambda p: CacheWriter.create(p, manifest())):
        with pytest.raises(CacheError, match="not a teacher cache"):
            make_or_open(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["zarr.json"]


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        CacheWriter.create(tmp_path / "c", manifest())


def test_an_interrupted_creation_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: dict[str, bytes]
) -> None:
    """Fail at the first, second, ... file of the creation, then create again."""
    documents = [name for name in finished if name.endswith("zarr.json")]
    for number in range(len(documents)):
        path = tmp_path / str(number)
        with monkeypatch.context() as patch:
            fail_at(patch, number)
            with pytest.raises(OutputError):
                CacheWriter.create(path, manifest())
        with pytest.raises(CacheError):
            open_cache(path)
        CacheWriter.create(path, manifest())
        assert tree(path) == {name: finished[name] for name in documents}


def test_a_cache_is_extended_by_whole_blocks(tmp_path: Path) -> None:
    path = tmp_path / "c"
    make(path, views=2)
    early = open_cache(path)
    writer = CacheWriter.open(path)
    with pytest.raises(CacheError, match="choose 6"):
        writer.extend(5)
    writer.extend(4)
    assert [unit.block for unit in writer.todo()] == [1, 1, 1]
    reader = open_cache(path)
    assert reader.views == 4
    reader.require_done(views=range(2))
    with pytest.raises(CacheError, match="3 of 6 units missing"):
        reader.require_done()
    assert early.views == 2  # an open reader is not affected
    assert early.seeds(1, 0).shape == (5,)
    fill(writer)
    make(tmp_path / "full")
    assert tree(path) == tree(tmp_path / "full")
    writer.extend(2)  # never shrinks
    assert writer.manifest.views == open_cache(path).views == 4


def test_an_interrupted_extension_is_harmless_and_can_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "full")
    documents = [n for n in tree(tmp_path / "full") if n.endswith("zarr.json")]
    for number in range(len(documents) + 1):  # the marker of the extension comes first
        path = tmp_path / str(number)
        writer = make(path, views=2)
        with monkeypatch.context() as patch:
            fail_at(patch, number)
            with pytest.raises(OutputError):
                writer.extend(4)
        open_cache(path).require_done()
        writer = CacheWriter.open(path)
        assert writer.todo() == []
        writer.extend(4)
        fill(writer)
        assert tree(path) == tree(tmp_path / "full")


def test_an_extension_during_opening_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extending writer was killed before it removed its marker; the first manifest is old."""
    writer = make(tmp_path / "c", views=2)
    real = durable.exclusive

    def extended_meanwhile(folder: Path) -> Any:
        monkeypatch.setattr("cskd_pipeline.cache.writer.exclusive", real)
        writer.extend(4)
        (tmp_path / "c" / layout.EXTENDING).write_text("4\n")
        return real(folder)

    monkeypatch.setattr("cskd_pipeline.cache.writer.exclusive", extended_meanwhile)
    assert CacheWriter.open(tmp_path / "c").manifest.views == 4
    assert open_cache(tmp_path / "c").views == 4


# Kills, full disks, concurrent writers


def fail_at(patch: pytest.MonkeyPatch, number: int, code: int = errno.ENOSPC) -> None:
    """Make the write of the ``number``-th file fail halfway."""
    writes = iter(range(10**9))
    write_bytes = Path.write_bytes

    def failing(self: Path, data: bytes) -> int:
        if next(writes) == number:
            write_bytes(self, bytes(data)[: len(data) // 2])
            raise OSError(code, os.strerror(code), str(self))
        return write_bytes(self, data)

    patch.setattr(Path, "write_bytes", failing)


def test_a_full_disk_at_any_file_leaves_the_unit_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "template"
    writer = CacheWriter.create(template, manifest(view_block=4))
    unit = writer.todo()[0]
    data = unit_data(unit, writer.manifest)
    shutil.copytree(template, tmp_path / "full")
    CacheWriter.open(tmp_path / "full").write_unit(unit, data)
    full = tree(tmp_path / "full")
    count = len(full) - len(tree(template))
    assert count == 3 + 3 + 5 + 2 + 1  # tar shard, views, dense (a file per view), envelope, done
    for number in range(count):
        path = tmp_path / str(number)
        shutil.copytree(template, path)
        writer = CacheWriter.open(path)
        with monkeypatch.context() as patch:
            fail_at(patch, number)
            with pytest.raises(OutputError, match="no space left"):
                writer.write_unit(unit, data)
        assert unit in writer.todo()
        assert writer.write_unit(unit, data)
        assert tree(path) == full


def test_a_genuinely_full_disk_is_reported(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        writer = CacheWriter.create(disk / "c", manifest())
        with pytest.raises(OutputError, match="no space left") as caught:
            fill(writer)
        assert str(disk) in str(caught.value)
        open_cache(disk / "c").require_done(views=range(2), shards=[0])
        assert 0 < len(writer.todo()) < 6
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_record_is_written_after_every_file_and_folder_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CacheWriter.create(tmp_path, manifest())
    unit = writer.todo()[0]
    data = unit_data(unit, writer.manifest)
    synced: list[str] = []
    state: list[tuple[str, set[str]]] = []  # the files synced before each rename
    fsync, replace_file = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        assert str(source) in synced, "renamed before it was synced"
        state.append((str(target), set(synced)))
        replace_file(source, target)

    monkeypatch.setattr(atomic.os, "fsync", watched_fsync)
    monkeypatch.setattr(atomic.os, "replace", watched_replace)
    writer.write_unit(unit, data)
    last, before = state[-1]
    assert last == str(tmp_path / "digest/c/0/0")
    for target, _ in state[:-1]:
        for folder in Path(target).parents:
            if folder == tmp_path.parent:
                break
            assert str(folder) in before, folder
    for folder in Path(last).parents[:4]:
        assert folder == tmp_path or str(folder) in synced[len(before) :]


def test_a_writer_killed_at_random_moments_resumes_to_the_same_cache(
    tmp_path: Path, finished: dict[str, bytes]
) -> None:
    path = tmp_path / "c"
    moments, pace = random.Random(20), 0.05
    kills: list[int] = []  # number of files at each kill
    while len(kills) < 20 or (len(set(kills)) < 8 and len(kills) < 200):
        started = processes.Event()
        process = processes.Process(target=write_all, args=(path, 0, started))
        process.start()
        assert started.wait(60)
        time.sleep(moments.expovariate(1 / pace))
        process.kill()
        process.join()
        if process.exitcode == 0:
            assert tree(path) == finished
            shutil.rmtree(path)
            pace *= 0.7
        else:
            assert process.exitcode == -9
            kills.append(len(tree(path)))
            check_finished_units(path)
            if kills[-1:] == kills[-2:-1]:  # killed before any progress
                pace *= 1.2
    assert len(set(kills)) >= 8, "the kills came at too few different moments"
    write_all(path)
    assert tree(path) == finished


def check_finished_units(path: Path) -> None:
    """Check that every finished unit is complete."""
    if not all((path / name / "zarr.json").exists() for name in ("digest", "dense", "envelope")):
        return  # killed during creation
    reader = open_cache(path)
    for block, shard in np.argwhere(reader.done()).tolist():
        for view in range(2 * block, 2 * block + 2):
            expected = unit_data(Unit(block, shard, range(2 * block, 2 * block + 2)), manifest())
            assert np.array_equal(reader.seeds(view, shard), expected.seeds[view - 2 * block])
            reader.rows("dense", view, shard, range(reader.counts[shard]))
            reader.rows("envelope", view, shard, range(reader.counts[shard]))


@pytest.mark.parametrize("orders", [(1, 2, 3), (4, 4, 4)], ids=["different", "same"])
def test_concurrent_writers_produce_one_cache(
    tmp_path: Path, finished: dict[str, bytes], orders: tuple[int, ...]
) -> None:
    """Each creates the cache and writes every unit, in its own order or the same."""
    path = tmp_path / "c"
    writers = [processes.Process(target=write_all, args=(path, order)) for order in orders]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
    assert [process.exitcode for process in writers] == [0, 0, 0]
    assert tree(path) == finished


@pytest.mark.parametrize("name", ["key", "dense/spatial", layout.RECORD])
def test_two_writers_of_one_unit_do_not_conflict_without_locks(
    name: str, tmp_path: Path, finished: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second writes the whole unit while the first writes the file of ``name``."""

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(durable.fcntl, "flock", no_locks)
    first = CacheWriter.create(tmp_path, manifest())
    second = CacheWriter.open(tmp_path)
    unit = first.todo()[0]
    data = unit_data(unit, first.manifest)
    write_bytes = Path.write_bytes

    def meanwhile(path: Path, content: bytes) -> int:
        count = write_bytes(path, content)
        if path.is_relative_to(tmp_path / name):
            monkeypatch.setattr(Path, "write_bytes", write_bytes)
            assert second.write_unit(unit, data)
        return count

    monkeypatch.setattr(Path, "write_bytes", meanwhile)
    first.write_unit(unit, data)
    assert second.is_done(unit)
    assert tree(tmp_path).items() <= finished.items()


def create_or_report(path: Path, seed: int, results: Any) -> None:
    try:
        results.put(CacheWriter.create(path, manifest(root_seed=seed)).manifest.root_seed)
    except CskdError as error:
        results.put(type(error).__name__)


def test_one_of_two_concurrent_creations_wins(tmp_path: Path) -> None:
    for number in range(5):
        path, results = tmp_path / str(number), processes.Queue()
        both = [
            processes.Process(target=create_or_report, args=(path, seed, results))
            for seed in (1, 2)
        ]
        for process in both:
            process.start()
        found = [results.get(timeout=60) for _ in both]
        for process in both:
            process.join(60)
        seed = open_cache(path).manifest.root_seed
        assert sorted(map(str, found)) == sorted([str(seed), "CacheError"])


def test_a_stopped_writer_does_not_block_others_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CacheWriter.create(tmp_path, manifest())
    folder = tmp_path / "key/c/0/0"
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        with durable.exclusive(folder):
            os.write(write, b".")
            os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    try:
        os.read(read, 1)
        monkeypatch.setattr(durable, "LOCK_TIMEOUT", 0.1)
        unit = writer.todo()[0]
        with pytest.raises(OutputError, match="does not release it") as caught:
            writer.write_unit(unit, unit_data(unit, writer.manifest))
        assert caught.value.where == folder
        assert not open_cache(tmp_path).done().any()
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    assert writer.write_unit(unit, unit_data(unit, writer.manifest))
