"""A dump whose processes join, die and stop: one process's bytes, each unit computed once.

Agents are torchrun's, ranks and jobs are real processes; all are forked, to save imports. Every
unit takes a moment longer than necessary, so that other events fall in between.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cskd_pipeline.cache.claims import FOLDER
from cskd_pipeline.cache.units import Unit
from cskd_pipeline.pipeline.unit_writer import UnitWriter
from cskd_pipeline.tools.make_shards import make_shards
from tests.pipeline import test_distributed as ranks
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.processes import PATIENCE, until

FORK = multiprocessing.get_context("fork")
MOMENT = 0.07  # seconds


class Written(list[dict[str, Any]]):
    """The units written, and the process of each, as read from a file."""

    def __init__(self, path: Path) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        super().__init__(map(json.loads, lines))

    def by(self, **fields: object) -> list[dict[str, Any]]:
        return [row for row in self if fields.items() <= row.items()]


class Dump:
    """48 units of 4 images in 2 views, and the files that one process writes."""

    def __init__(self, root: Path) -> None:
        world.draw_images(root / "images", per_class=12, seed=3)
        make_shards(root / "images", root / "shards", shard_size=4)
        self.shards = root / "shards"
        assert world.cli(*self.words(root / "alone")) == 0
        self.bytes = world.cache_files(root / "alone")

    def words(self, cache: Path, *more: str) -> list[object]:
        sets = [*world.dump_sets(views=8), "dump.threads=1", "dump.batch_size=8", *more]
        return [
            *("dump-teacher", "--shards", self.shards, "--teacher", world.TEACHER, "--quiet"),
            *("--weights", "random", "--cache", cache, "--workers", 0, "--device", "cpu"),
            *world.as_flags(sets),
        ]


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Dump:
    return Dump(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Written]:
    """Return the units written so far by processes that are forked after this."""
    path, original = tmp_path / "written", UnitWriter._write

    def write(self: UnitWriter, unit: Unit, *data: Any) -> None:
        # The first node must still be working when the second one joins, however long that takes.
        alone = os.environ.get("WORLD_SIZE") == "1" and not Written(path).by(WORLD_SIZE="2")
        time.sleep(20 * MOMENT if alone else MOMENT)
        original(self, unit, *data)
        row = {"unit": [unit.block, unit.shard], "pid": os.getpid(), "at": time.time()}
        row |= {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")

    monkeypatch.setattr(UnitWriter, "_write", write)
    return lambda: Written(path)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start functions as processes that do not outlive the test."""
    started: list[Any] = []

    def _start(target: Callable[..., None], *arguments: Any) -> Any:
        process = FORK.Process(target=target, args=arguments)
        process.start()
        started.append(process)
        return process

    yield _start
    for process in started:
        for pid in (*children(process.pid), process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.join()


def children(pid: int) -> list[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def join(*processes: Any) -> list[int | None]:
    for process in processes:
        process.join(PATIENCE)
    return [process.exitcode for process in processes]


def command(words: list[object]) -> None:
    raise SystemExit(world.cli(*words))


def _rank(words: list[object]) -> None:
    code = world.cli(*words)
    if code:
        os._exit(code)


def agent(words: list[object], port: int, nodes: str, processes: int, shared_store: bool) -> None:
    """Run ``torchrun --nnodes NODES --nproc-per-node PROCESSES --max-restarts 3``."""
    logging.disable(logging.CRITICAL)  # torch imports its compiler to print a failure
    dynamic_rendezvous.get_method_name = str  # it reads the source of each of pytest's frames
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = str(int(not shared_store))
    minimum, _, maximum = nodes.partition(":")
    config = LaunchConfig(
        min_nodes=int(minimum),
        max_nodes=int(maximum),
        nproc_per_node=processes,
        run_id="test",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_backend="c10d",
        rdzv_configs={
            "last_call_timeout": 3,
            "keep_alive_interval": 1,
            "keep_alive_max_attempt": 10,
        },
        max_restarts=3,
        start_method="fork",
        shutdown_timeout=20,
    )
    elastic_launch(config, _rank)(words)


def once_each(written: Written) -> bool:
    counts = Counter(tuple(row["unit"]) for row in written)
    return len(counts) == 48 and set(counts.values()) == {1}


def test_a_dump_survives_a_node_that_joins_and_is_lost(
    dump: Dump, written: Callable[[], Written], start: Callable[..., Any], tmp_path: Path
) -> None:
    words, port = dump.words(tmp_path / "c", "dump.rank_timeout=2"), world.free_port()
    first = start(agent, words, port, "1:2", 1, False)
    until(lambda: len(written()) >= 2)
    second = start(agent, words, port, "1:2", 1, False)
    until(lambda: len({row["RANK"] for row in written().by(WORLD_SIZE="2")}) == 2)
    for pid in (second.pid, *children(second.pid)):
        os.kill(pid, signal.SIGKILL)
    assert not once_each(written()), "killed too late for a meaningful test"
    assert join(first) == [0]
    assert world.cache_files(tmp_path / "c") == dump.bytes
    assert once_each(written())


def test_a_killed_rank_is_restarted_and_its_unit_written(
    dump: Dump, written: Callable[[], Written], start: Callable[..., Any], tmp_path: Path
) -> None:
    started = start(agent, dump.words(tmp_path / "c"), world.free_port(), "1:1", 2, True)
    until(lambda: written().by(RANK="1"))
    os.kill(written().by(RANK="1")[0]["pid"], signal.SIGKILL)
    assert not once_each(written()), "killed too late for a meaningful test"
    assert join(started) == [0]
    assert len({row["pid"] for row in written()}) == 4
    assert world.cache_files(tmp_path / "c") == dump.bytes
    assert once_each(written())


def test_others_take_over_the_units_of_a_suspended_rank(
    dump: Dump, written: Callable[[], Written], tmp_path: Path
) -> None:
    """When it continues, it has one unit in progress and one being written."""
    started = ranks.start(3, dump.words(tmp_path / "c"))
    until(lambda: written().by(RANK="1"))
    os.kill(started[1].pid, signal.SIGSTOP)
    before = len(written().by(RANK="1"))
    until(lambda: len(written()) - len(written().by(RANK="1")) >= 48 - before - 2)
    os.kill(started[1].pid, signal.SIGCONT)
    assert ranks.finish(started) == [0, 0, 0]
    assert len(written().by(RANK="1")) <= before + 2
    assert world.cache_files(tmp_path / "c") == dump.bytes
    assert once_each(written())


def test_jobs_that_share_only_a_folder_compute_each_unit_once(
    dump: Dump, written: Callable[[], Written], start: Callable[..., Any], tmp_path: Path
) -> None:
    """One is preempted by Slurm, one killed; a later one computes the remaining units."""
    words = dump.words(tmp_path / "c")
    preempted, killed = start(command, words), start(command, words)
    for process, number in ((preempted, signal.SIGUSR1), (killed, signal.SIGKILL)):
        until(lambda pid=process.pid: written().by(pid=pid))
        os.kill(process.pid, number)
    assert join(preempted, killed) == [75, -9]
    claims = [path.read_text() for path in (tmp_path / "c" / FOLDER).glob("*")]
    named = [json.loads(text)["pid"] for text in claims if text]  # empty: killed before it wrote
    assert named == [killed.pid] * len(named)
    assert join(start(command, words), start(command, words)) == [0, 0]
    assert world.cache_files(tmp_path / "c") == dump.bytes
    assert once_each(written())


def test_training_restarted_by_torchrun_resumes_from_its_last_state(
    small: World,
    start: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alone: list[dict[str, float]],
) -> None:
    from cskd_pipeline.pipeline.trainer import Trainer

    original, killed = Trainer.step, tmp_path / "killed"

    def step(self: Trainer, batches: Any) -> Any:
        if self.ranks.rank == 1 and self.update == 6 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with open(tmp_path / f"updates {self.ranks.rank}", "a") as file:
            file.write(f"{self.update}\n")
        return original(self, batches)

    monkeypatch.setattr(Trainer, "step", step)
    words = ranks.train_args(small, tmp_path / "run")
    assert join(start(agent, words, world.free_port(), "1:1", 2, True)) == [0]
    assert (tmp_path / "updates 1").read_text().split() == [*map(str, [*range(6), *range(4, 12)])]
    ranks.assert_same_curve(ranks.summary(tmp_path / "run"), alone)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert world.cli(*words) == 1  # another job's run is not resumed
