"""Batches arrive from loader processes on any system, or an error says why not."""

from __future__ import annotations

import errno
import gc
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cskd_pipeline.data import handover
from cskd_pipeline.data.handover import Handover
from cskd_pipeline.data.workers import Loader
from cskd_pipeline.errors import DataError
from cskd_pipeline.runtime.device import memory_limit

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@dataclass(frozen=True)
class Thing:
    number: int
    large: Tensor
    small: dict[str, Tensor]
    array: np.ndarray


def thing(number: int, size: int) -> Thing:
    generator = np.random.default_rng(number)
    return Thing(
        number,
        torch.from_numpy(generator.integers(0, 256, (size, 3), np.uint8)),
        {"half": torch.arange(7, dtype=torch.float16), "none": torch.empty(0, 4)},
        generator.integers(0, 9, size, np.int64),
    )


class Things(Dataset[Thing]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, number: int) -> Thing:
        return thing(number, self.size)


def same(one: Thing, other: Thing) -> bool:
    pairs = [
        (one.large, other.large),
        *((one.small[name], other.small[name]) for name in ("half", "none")),
        (torch.from_numpy(one.array), torch.from_numpy(other.array)),
    ]
    return one.number == other.number and all(a.dtype == b.dtype and a.equal(b) for a, b in pairs)


@pytest.mark.parametrize(
    ("size", "start_method"), [(10, "fork"), (50_000, "fork"), (50_000, "spawn")]
)
def test_items_arrive_unchanged_and_writable(size: int, start_method: str) -> None:
    found = list(Loader(Things(size), range(5), workers=2, start_method=start_method))
    assert len(found) == 5
    for number, item in enumerate(found):
        assert same(item, thing(number, size))
        item.large.add_(1)  # read-only memory would make torch warn and numpy raise
        item.array[0] += 1


def test_no_descriptor_stays_open_after_the_batches() -> None:
    before = handed_over()
    for item in Loader(Things(50_000), range(40), workers=2):
        if item.number == 20:
            del item
            break
    assert handed_over() <= before


def handed_over() -> int:
    """Count the open descriptors of batches and of the sockets that transfer them."""
    gc.collect()
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            count += os.readlink(link).startswith(("/memfd:batch", "socket:"))
    return count


LARGE = """
import sys, torch
from torch.utils.data import Dataset
from cskd_pipeline.errors import CskdError
from cskd_pipeline.data.workers import Loader

class Large(Dataset):
    def __getitem__(self, number):
        return torch.full((3 * 2**20,), number, dtype=torch.uint8)

try:
    print([int(batch[-1]) for batch in Loader(Large(), range(8), workers=2)])
except CskdError as error:
    print(error)
"""


def run_with_shm(options: str, folder: Path) -> str:
    """Return the output of ``LARGE`` with ``/dev/shm`` mounted again with ``options``."""
    program = folder / "program.py"
    program.write_text(LARGE)
    mount = f"mount -t tmpfs -o {options} tmpfs /dev/shm"
    words = ["unshare", "--mount", "sh", "-c", f'{mount} || exit 99; exec "$@"', "sh"]
    try:
        done = subprocess.run(
            [*words, sys.executable, str(program)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip("may not mount")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_container_with_little_shared_memory_can_load(tmp_path: Path) -> None:
    """Docker provides 64 MB of ``/dev/shm``; this test 1 MiB for batches of 3 MiB."""
    assert run_with_shm("size=1m", tmp_path) == f"{list(range(8))}\n"


@pytest.mark.parametrize("options", ["ro,size=64m", "size=4k"])
def test_shared_memory_without_space_is_reported(options: str, tmp_path: Path) -> None:
    output = run_with_shm(options, tmp_path)
    assert "the loader processes cannot be started" in output
    for remedy in ("--workers 0", "--shm-size", "/dev/shm"):
        assert remedy in output


def test_a_long_temporary_folder_does_not_matter(tmp_path: Path) -> None:
    """Sockets have names of at most 108 bytes."""
    long = tmp_path / ("x" * 120)
    long.mkdir()
    (tmp_path / "program.py").write_text(LARGE)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        env=os.environ | {"TMPDIR": str(long)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout == f"{list(range(8))}\n"


def reason(caught: pytest.ExceptionInfo[DataError]) -> str:
    assert "cannot send a batch" in caught.value.problem
    assert "--workers 0" in str(caught.value.action)
    return str(caught.value.found)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM, errno.EMFILE])
def test_an_allocation_failure_is_raised_in_place_of_the_batch(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(handover, "_anonymous_file", refused)  # forked processes inherit it
    with pytest.raises(DataError) as caught:
        list(Loader(Things(50_000), range(6), workers=2, start_method="fork"))
    assert reason(caught) == os.strerror(number)


@pytest.mark.parametrize(("batches", "fits"), [(5, True), (4.9, False)])
def test_batches_that_will_not_fit_are_refused_before_the_first_arrives(
    batches: float, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two processes may be two batches ahead, and the parent has one."""
    large = 2**20
    monkeypatch.setattr(handover, "memory_limit", lambda: int(batches * large))
    loader = iter(Loader(Rows(large), range(9), workers=2))
    if fits:
        assert len(next(loader)) == large
        return
    with pytest.raises(DataError, match="will not fit in memory") as caught:
        next(loader)
    assert caught.value.found == "5 batches of 1.0 MiB"
    assert "--workers 0" in str(caught.value.action)


class Rows(Dataset[Tensor]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, number: int) -> Tensor:
        return torch.zeros(self.size, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"memory.max": "1000\n"}, 1000),
        ("0::/a/b", {"a/memory.max": "2000\n", "a/b/memory.max": "max\n"}, 2000),
        ("0::/a/b", {"a/memory.max": "2000\n", "a/b/memory.max": "1500\n"}, 1500),
        ("5:cpu:/x\n4:memory:/job", {"memory/job/memory.limit_in_bytes": "3000\n"}, 3000),
        ("0::/a:b", {"a:b/memory.max": "4000"}, 4000),
        ("0::/", {"memory.max": "max\n"}, None),
        (None, {}, None),
    ],
)
def test_the_memory_limit_is_the_containers(
    groups: str | None, files: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_limit(tmp_path) == (expected or everything)


@pytest.fixture
def few_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_files")
def test_too_many_open_files_are_reported() -> None:
    with pytest.raises(DataError) as caught:
        list(Loader(Things(50_000), range(100), workers=1))  # every kept batch has one open
    assert reason(caught) == "Too many open files"


def test_a_file_on_disk_is_used_without_memfd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    found = list(Loader(Things(50_000), range(3), workers=1, start_method="fork"))
    assert all(same(item, thing(number, 50_000)) for number, item in enumerate(found))


def test_closing_discards_unread_messages() -> None:
    sockets = Handover(2, ahead=1)
    sockets.sender.pack(0, thing(1, 50_000))
    sockets.close()
    assert not handover._RECEIVING
