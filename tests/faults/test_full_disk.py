"""A disk that fills under every writer: one clear message, nothing half done, and it goes on."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.errors import CacheError
from tests.faults.commands import Stages, Whole, left_by

KINDS = ["dump", "convert", "merge", "train"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], object]]]:
    """A small disk, and what gives it another size in bytes."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(*options: str) -> int:
        words = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(path)]
        return subprocess.run(words, capture_output=True, check=False).returncode

    if shutil.which("mount") is None or mount("size=64k"):
        pytest.skip("mounting is not permitted here")
    try:
        yield path, lambda size: mount("remount", f"size={size}")
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_stops_a_command_which_goes_on_when_there_is_room(
    kind: str,
    stages: Stages,
    whole: Callable[[str], Whole],
    disk: tuple[Path, Callable[[int], object]],
) -> None:
    command, (path, resize) = getattr(stages, kind), disk
    need = whole(kind).bytes
    for share in (0.3, 0.7):
        resize(max(64 * 1024, int(share * need)))
        ended = stages.server.run(*command(path / "out", workers=0), log=stages.log)
        assert ended.code == 1, ended.output
        assert "no space left" in ended.output
        assert "Traceback" not in ended.output
        if kind != "train" and (path / "out/zarr.json").exists():
            check_what_is_done(path / "out")
    resize(4 * need + 2**20)
    ended = stages.server.run(*command(path / "out"), log=stages.log)
    assert ended.code == 0, ended.output
    assert left_by(kind, path / "out") == whole(kind).left


def check_what_is_done(cache: Path) -> None:
    try:
        reader = open_cache(cache)
    except CacheError:  # the disk was full before the last document
        return
    size = reader.manifest.view_block
    for block, shard in np.argwhere(reader.done()).tolist():
        for encoding in reader.encodings:
            reader.rows(encoding, block * size, shard, range(reader.counts[shard]))


@pytest.mark.parametrize("kind", ["dump", "train"])
def test_files_that_may_not_grow_are_told_as_no_space(
    kind: str, stages: Stages, whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    """A limit on lengths: real short writes for whoever writes, also where none may mount."""
    command = getattr(stages, kind)
    limit = {"FSIZE": 60_000 if kind == "train" else 1_500}
    ended = stages.server.run(*command(tmp_path / "out"), log=stages.log, limits=limit)
    assert ended.code == 1, ended.output
    assert "no space left" in ended.output
    assert "File too large" in ended.output
    assert "Traceback" not in ended.output
    ended = stages.server.run(*command(tmp_path / "out"), log=stages.log)
    assert ended.code == 0, ended.output
    assert left_by(kind, tmp_path / "out") == whole(kind).left
