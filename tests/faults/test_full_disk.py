"""A full disk stops every writer with a clear message; the same command then continues."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.errors import CacheError
from tests.faults.commands import Reference, Stages, output_of

KINDS = ["dump", "convert", "merge", "train"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], object]]]:
    """A small disk, and a function that resizes it to a number of bytes."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(*options: str) -> int:
        words = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(path)]
        return subprocess.run(words, capture_output=True, check=False).returncode

    if shutil.which("mount") is None or mount("size=64k"):
        pytest.skip("mounting is not permitted")
    try:
        yield path, lambda size: mount("remount", f"size={size}")
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_stopped_by_a_full_disk_continues_once_there_is_space(
    kind: str,
    stages: Stages,
    reference: Callable[[str], Reference],
    disk: tuple[Path, Callable[[int], object]],
) -> None:
    command, (path, resize) = getattr(stages, kind), disk
    need = reference(kind).bytes
    for share in (0.3, 0.7):
        resize(max(64 * 1024, int(share * need)))
        result = stages.server.run(*command(path / "out", workers=0), log=stages.log)
        assert result.code == 1, result.output
        assert "no space left" in result.output
        assert "Traceback" not in result.output
        if kind != "train" and (path / "out/zarr.json").exists():
            check_finished_units(path / "out")
    resize(4 * need + 2**20)
    result = stages.server.run(*command(path / "out"), log=stages.log)
    assert result.code == 0, result.output
    assert output_of(kind, path / "out") == reference(kind).files


def check_finished_units(cache: Path) -> None:
    try:
        reader = open_cache(cache)
    except CacheError:  # the disk was full before the cache's metadata was complete
        return
    size = reader.manifest.view_block
    for block, shard in np.argwhere(reader.done()).tolist():
        for encoding in reader.encodings:
            reader.rows(encoding, block * size, shard, range(reader.counts[shard]))


@pytest.mark.parametrize("kind", ["dump", "train"])
def test_a_limit_on_file_sizes_is_reported_as_no_space(
    kind: str, stages: Stages, reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    """The limit causes real short writes, even on machines where mounting is not permitted."""
    command = getattr(stages, kind)
    limit = {"FSIZE": 60_000 if kind == "train" else 1_500}
    result = stages.server.run(*command(tmp_path / "out"), log=stages.log, limits=limit)
    assert result.code == 1, result.output
    assert "no space left" in result.output
    assert "File too large" in result.output
    assert "Traceback" not in result.output
    result = stages.server.run(*command(tmp_path / "out"), log=stages.log)
    assert result.code == 0, result.output
    assert output_of(kind, tmp_path / "out") == reference(kind).files
