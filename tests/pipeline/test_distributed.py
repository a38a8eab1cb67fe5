"""Several ranks reproduce one process: the same curve, the same metrics, one set of files."""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.errors import ImageError, UsageError
from cskd_pipeline.runtime.distributed import Ranks, join_job, ranks_from_env
from cskd_pipeline.views import apply
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.processes import PATIENCE

# Whether a process may fork after a backward pass is decided at the first one, by the device types
# registered then; importing torch's exporter registers more of them.
torch.ones(1, requires_grad=True).sum().backward()

EPOCHS = 3
LOSSES = ("loss", "base", "global", "spatial")


def train_args(small: World, out: Path, *more: object, method: str = "cskd") -> list[object]:
    sets = [*world.train_sets(), "batch.batch_size=24", "run.seed=5", *map(str, more)]
    cache = () if method == "none" else ("--cache", small.cache)
    return [
        *("train", "--shards", small.shards, "--val-shards", small.validation, *cache),
        *("--student", world.STUDENT, "--method", method, "--epochs", EPOCHS, "--out", out),
        *("--workers", 0, "--device", "cpu", "--quiet", *world.as_flags(sets)),
    ]


def _rank(rank: int, ranks: int, port: int, words: list[object]) -> None:
    torch.set_num_threads(1)
    _enter(rank, ranks, port)
    raise SystemExit(world.cli(*words))


def _enter(rank: int, ranks: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _counter(rank: int, ranks: int, port: int, folder: Path) -> None:
    _enter(rank, ranks, port)
    with join_job(60) as job:
        numbers = list(itertools.takewhile(lambda n: n < 100, job.numbers("units")))
    (folder / str(rank)).write_text(" ".join(map(str, numbers)))


def test_each_number_is_drawn_by_exactly_one_rank(tmp_path: Path) -> None:
    assert finish(start(3, tmp_path, target=_counter)) == [0] * 3
    drawn = [[*map(int, (tmp_path / str(rank)).read_text().split())] for rank in range(3)]
    assert all(numbers == sorted(numbers) for numbers in drawn)
    assert sorted(itertools.chain(*drawn)) == list(range(100))
    assert list(itertools.islice(Ranks().numbers("units"), 3)) == [0, 1, 2]


def start(
    ranks: int, words: Any, missing: int = 0, target: Callable[..., None] = _rank
) -> list[Any]:
    """Start all ranks but the last ``missing``, forked to save importing torch again."""
    port, context = world.free_port(), multiprocessing.get_context("fork")
    processes = [
        context.Process(target=target, args=(rank, ranks, port, words))
        for rank in range(ranks - missing)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[Any]) -> list[int | None]:
    for process in processes:
        process.join(PATIENCE)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def run_in(ranks: int, words: list[object]) -> None:
    if ranks == 1:
        assert world.cli(*words) == 0
        return
    assert finish(start(ranks, words)) == [0] * ranks


def summary(out: Path) -> list[dict[str, float]]:
    with open(out / "summary.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def assert_same_curve(curve: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(curve) == len(expected) == EPOCHS
    for row, reference in zip(curve, expected, strict=True):
        assert row.keys() == reference.keys()
        for name in (*LOSSES, "lr", "ckf_ratio"):
            np.testing.assert_allclose(row[name], reference[name], rtol=2e-4, err_msg=name)
        # One image of 16 may flip, where two classes tie to the last bit.
        assert abs(row["top1"] - reference["top1"]) <= 100 / 16 + 1e-6


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_reproduce_the_loss_curve_of_one_process(
    small: World, tmp_path: Path, alone: list[dict[str, float]], ranks: int
) -> None:
    out = tmp_path / "run"
    run_in(ranks, train_args(small, out))
    assert_same_curve(summary(out), alone)
    written = {path.name for path in out.iterdir()}
    assert {"recipe.toml", "state.pt", "summary.csv", "last.safetensors"} <= written
    assert len(list((out / "tensorboard").iterdir())) == 1


def test_ranks_train_only_the_class_head_without_a_teacher(small: World, tmp_path: Path) -> None:
    """The distillation head then has no gradient, and ranks must not wait for one."""
    for ranks in (1, 2):
        run_in(ranks, train_args(small, tmp_path / str(ranks), *world.VIEWS, method="none"))
    assert_same_curve(summary(tmp_path / "2"), summary(tmp_path / "1"))


def test_only_one_rank_logs(
    small: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [w for w in train_args(small, tmp_path / "run") if w != "--quiet"]
    run_in(2, [*words, "--json", "--set", "schedule.warmup_epochs=3"])
    out, err = capfd.readouterr()
    assert world.last_json(out)["updates"] == 12
    assert err.count("the warm-up (3 epochs) outlasts the run") == 1
    assert sum(line.startswith("epoch 3/3") for line in err.splitlines()) == 1


def test_accumulation_over_ranks_keeps_the_loss_curve(
    small: World, tmp_path: Path, alone: list[dict[str, float]]
) -> None:
    run_in(2, train_args(small, tmp_path / "run", "batch.accumulation=2"))
    assert_same_curve(summary(tmp_path / "run"), alone)


def test_a_run_resumes_with_another_number_of_ranks(
    small: World,
    tmp_path: Path,
    alone: list[dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three ranks stop in the middle of the second epoch, two finish."""
    from cskd_pipeline.pipeline import train

    words = train_args(small, tmp_path / "run")
    original = train._time_to_stop
    # Forked ranks inherit the patch: only rank 1 gets the signal, and all of them stop.
    with monkeypatch.context() as patch:
        patch.setattr(train, "EXCHANGE_EVERY", 1)
        patch.setattr(
            train,
            "_time_to_stop",
            lambda trainer, stop: (
                trainer.ranks.any(trainer.ranks.rank == 1 and trainer.update == 6)
                or original(trainer, stop)
            ),
        )
        assert finish(start(3, words)) == [130] * 3
    state = torch.load(tmp_path / "run/state.pt", weights_only=True)
    assert state["update"] == 6
    run_in(2, [*words, "--resume"])
    assert_same_curve(summary(tmp_path / "run"), alone)


def test_drifted_views_are_counted_over_all_ranks(
    small: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    digest = apply.digest
    monkeypatch.setattr(apply, "digest", lambda pixels: digest(pixels) ^ 1)
    run_in(2, train_args(small, tmp_path / "run", "data.drift=warn"))
    assert "epoch 1: 96 views differ from those the teacher saw" in capfd.readouterr().err


def test_a_batch_size_that_the_ranks_do_not_divide_is_refused(
    small: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    codes = finish(start(2, train_args(small, tmp_path / "run", "batch.batch_size=25")))
    assert codes == [2, 2]
    message = capfd.readouterr().err
    assert "the batch cannot be cut into equal parts" in message
    assert "Traceback" not in message


def test_a_rank_that_dies_ends_the_job(
    small: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It ends with an error that names the reason, instead of waiting forever."""
    from cskd_pipeline.pipeline.trainer import Trainer

    original = Trainer.step

    def step(self: Trainer, batches: Any) -> Any:
        if self.ranks.rank == 1 and self.update == 3:
            os._exit(9)  # as the kernel's out-of-memory killer would
        return original(self, batches)

    monkeypatch.setattr(Trainer, "step", step)
    codes = finish(start(3, train_args(small, tmp_path / "run")))
    assert codes[1] == 9
    assert codes[0] == codes[2] == 1
    message = capfd.readouterr().err
    assert message.count("error: rank 1 of this job cannot be reached") == 2
    assert "pair.cc" not in message
    assert "Traceback" not in message


def test_an_error_on_one_rank_is_reported_and_ends_all(
    small: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "summary.csv").write_text("mine")
    codes = finish(start(2, train_args(small, out)))
    assert codes == [1, 1]
    assert "summary.csv" in capfd.readouterr().err
    assert (out / "summary.csv").read_text() == "mine"


def dump_args(small: World, cache: Path, views: int = 4) -> list[object]:
    return [
        *("dump-teacher", "--shards", small.shards, "--teacher", world.TEACHER),
        *("--weights", "random", "--cache", cache, "--workers", 0, "--device", "cpu"),
        *world.as_flags([*world.dump_sets(views=views), "dump.threads=1"]),
    ]


SHORT_TIMEOUT = ["--set", "dump.rank_timeout=3"]


def patch_unit(monkeypatch: pytest.MonkeyPatch, rank: int, act: Callable[[], object]) -> None:
    """Let one rank act instead of writing its first unit."""
    from cskd_pipeline.cache.writer import CacheWriter

    original = CacheWriter.write_unit

    def write_unit(self: CacheWriter, *arguments: Any) -> bool:
        if os.environ["RANK"] == str(rank):
            act()
        return original(self, *arguments)

    monkeypatch.setattr(CacheWriter, "write_unit", write_unit)


def patch_step(monkeypatch: pytest.MonkeyPatch, rank: int, act: Callable[[], object]) -> None:
    """Let one rank act instead of running the fourth update."""
    from cskd_pipeline.pipeline.trainer import Trainer

    original = Trainer.step

    def step(self: Trainer, batches: Any) -> Any:
        if self.ranks.rank == rank and self.update == 3:
            act()
        return original(self, batches)

    monkeypatch.setattr(Trainer, "step", step)


def suspend_self() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1)  # the signal may stop another thread first; this one must not continue


def finish_without(stopped: int, processes: list[Any]) -> list[int | None]:
    """Return the exit codes of all but the suspended process, which is killed at the end."""
    others = [process for number, process in enumerate(processes) if number != stopped]
    for process in others:
        process.join(PATIENCE)
    codes = [process.exitcode for process in others]
    for process in processes:
        process.kill()
        process.join()
    return codes


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_suspended_rank_ends_training_and_is_named(
    stopped: int,
    small: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The first rank also hosts the job's store, like torchrun's agent."""
    patch_step(monkeypatch, stopped, suspend_self)
    processes = start(2, train_args(small, tmp_path / "run", "run.rank_timeout=5"))
    assert finish_without(stopped, processes) == [1]
    message = capfd.readouterr().err
    assert f"error: rank {stopped} of this job cannot be reached" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_suspended_rank_ends_the_finished_dump_and_is_named(
    stopped: int,
    small: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Even if it hosts the job's store, without which the other continues."""
    patch_unit(monkeypatch, stopped, suspend_self)
    processes = start(2, [*dump_args(small, tmp_path / "c"), *SHORT_TIMEOUT])
    assert finish_without(stopped, processes) == [1]
    message = capfd.readouterr().err
    assert f"error: rank {stopped} of this job cannot be reached" in message
    assert ("no heartbeat for 3 s" if stopped else "does not respond") in message
    assert open_cache(tmp_path / "c").done().all()


def test_ranks_wait_for_a_slower_one(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timeout limits silence, not work."""
    patch_unit(monkeypatch, 1, lambda: time.sleep(4))
    words = [*dump_args(small, tmp_path / "c", views=2), *SHORT_TIMEOUT]
    run_in(2, words)
    assert open_cache(tmp_path / "c").done().all()


@pytest.mark.parametrize(("stage", "failing"), [("train", 2), ("dump", 0)])
def test_one_ranks_error_ends_all_ranks_unchanged(
    stage: str,
    failing: int,
    small: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    error = ImageError("an image is damaged", where="a.tar: k", found="noise", action="get another")

    def fail() -> None:
        raise error

    if stage == "train":
        patch_step(monkeypatch, failing, fail)
        words = train_args(small, tmp_path / "run")
    else:
        patch_unit(monkeypatch, failing, fail)
        words = dump_args(small, tmp_path / "c")
    assert finish(start(3, words)) == [1] * 3
    message = capfd.readouterr().err
    expected = (
        f"error: an image is damaged\n  where:    rank {failing}, a.tar: k\n"
        "  found:    noise\n  to do:    get another\n"
    )
    assert message.count(expected) == 3
    assert message.count("error:") == 3
    assert "Traceback" not in message


def test_a_bug_on_one_rank_is_reported_by_the_others(
    small: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    patch_step(monkeypatch, 1, lambda: 1 // 0)
    codes = finish(start(2, train_args(small, tmp_path / "run")))
    assert codes == [1, 1]
    message = capfd.readouterr().err
    assert "error: rank 1 of this job ended with ZeroDivisionError(" in message
    assert message.count("Traceback") == 1


ENVIRONMENT = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "node",
    "MASTER_PORT": "29500",
}


def test_the_environment_of_a_rank_is_read() -> None:
    assert ranks_from_env(ENVIRONMENT) == Ranks(1, 2, 0)
    for alone in ({}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}):
        assert ranks_from_env(alone) == Ranks()
    assert ranks_from_env({"MASTER_ADDR": "left over", "MASTER_PORT": "x"}) == Ranks()


@pytest.mark.parametrize(
    ("change", "variables"),
    [
        ({"LOCAL_RANK": None}, "no LOCAL_RANK"),
        ({"RANK": None}, "no RANK"),
        ({"WORLD_SIZE": None}, "no WORLD_SIZE"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "no MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "2"}, "RANK=2, WORLD_SIZE=2"),
        ({"RANK": "first"}, "RANK=first"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "1"}, "RANK=1, WORLD_SIZE=1"),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK=1.0"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
    ],
)
def test_an_incomplete_environment_is_refused_on_every_rank(
    change: dict[str, str | None], variables: str
) -> None:
    values = {name: value for name, value in {**ENVIRONMENT, **change}.items() if value is not None}
    with pytest.raises(UsageError, match="incomplete or contradictory") as caught:
        ranks_from_env(values)
    assert variables in str(caught.value.found)


@pytest.mark.parametrize("stage", ["train", "dump"])
def test_a_rank_without_a_local_rank_starts_nothing(
    stage: str, small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = {
        "train": train_args(small, tmp_path / "x"),
        "dump": dump_args(small, tmp_path / "x"),
    }
    assert world.cli(*words[stage]) == 2
    assert not (tmp_path / "x").exists()


def test_missing_ranks_are_an_error(
    small: World,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = train_args(small, tmp_path / "run", "run.rank_timeout=2")
    assert finish(start(2, words, missing=1)) == [1]
    message = capfd.readouterr().err
    assert "error: not all ranks of this job have connected" in message
    assert "1/2 clients" in message
    assert "Traceback" not in message


def test_ranks_dump_the_bytes_of_one_process(
    small: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_in(3, [*dump_args(small, tmp_path / "many"), "--json"])
    summary = world.last_json(capfd.readouterr().out)
    assert summary["complete"] is True
    assert (summary["units_written"], summary["views_written"]) == (6, 4 * 96)
    assert world.cache_files(tmp_path / "many") == world.cache_files(small.cache)


def test_a_rank_that_dies_fails_the_dump_after_others_finish_its_units(
    small: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from cskd_pipeline.cache.writer import CacheWriter

    original = CacheWriter.write_unit

    def write_unit(self: CacheWriter, *arguments: Any) -> bool:
        if os.environ["RANK"] == "1":
            os._exit(9)
        return original(self, *arguments)

    monkeypatch.setattr(CacheWriter, "write_unit", write_unit)
    words = dump_args(small, tmp_path / "c")
    assert finish(start(3, [*words, *SHORT_TIMEOUT])) == [1, 9, 1]
    message = capfd.readouterr().err
    assert message.count("error: rank 1 of this job cannot be reached") == 2
    assert "Traceback" not in message
    assert open_cache(tmp_path / "c").done().all()
