"""Interrupted and failed runs can be resumed, as their messages advise."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cskd_pipeline.config.reading import load_recipe
from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.config.writing import deciding_keys
from cskd_pipeline.errors import ImageError, OutputError, TrainingError
from cskd_pipeline.models.checkpoint import read_header
from cskd_pipeline.models.train_state import find_nonfinite, load_state, save_state
from cskd_pipeline.pipeline import train as stage_two
from cskd_pipeline.pipeline.train_job import changed_keys, require_same_data
from cskd_pipeline.pipeline.trainer import Trainer
from cskd_pipeline.runtime.atomic import LOCK, sole_writer
from cskd_pipeline.runtime.signals import Requeue
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.pipeline.test_training import assert_equal, final_state, run_to_end

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


def test_a_signal_while_a_state_is_written_stays_a_signal(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    """torch replaces the exception that interrupts it with its own."""
    save = torch.save

    class Interrupted:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            if self.file.tell() > 200:
                raise KeyboardInterrupt
            return int(self.file.write(data))

        def flush(self) -> None:
            self.file.flush()

    monkeypatch.setattr(torch, "save", lambda state, file: save(state, Interrupted(file)))
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path / "state.pt", {"weights": torch.zeros(1000)})
    assert not list(tmp_path.iterdir())


def recipe_of(small: World, out: Path, *sets: str, epochs: int = 2) -> TrainRecipe:
    """Return a recipe with three updates per epoch."""
    every = ["schedule.warmup_epochs=0", "data.check=0", *sets]
    return world.train_recipe(
        small.shards, small.cache, out, sets=every, epochs=epochs, batch_size=32
    )


def words(small: World, out: Path, *more: object) -> list[object]:
    """Return the same run as a command."""
    return [
        *("train", "--shards", small.shards, "--cache", small.cache, "--out", out, "--quiet"),
        *("--student", world.STUDENT, "--method", "cskd", "--epochs", 2, "--batch-size", 32),
        *("--workers", 0, "--device", "cpu", *world.as_flags(world.train_sets())),
        *("--set", "schedule.warmup_epochs=0", "--set", "data.check=0", *more),
    ]


# The state is written before the evaluation


def damage(tar: Path) -> None:
    with tarfile.open(tar) as shard:
        image = next(m for m in shard if not m.name.endswith((".cls", ".json")))
    with open(tar, "r+b") as file:
        file.seek(image.offset_data)
        file.write(bytes(image.size // 2))


def test_a_failed_evaluation_loses_no_update_and_is_repeated(
    small: World, tmp_path: Path, capsys: Capture
) -> None:
    shards = tmp_path / "validation"
    shutil.copytree(small.validation, shards)
    [tar] = shards.glob("*.tar")
    original = tar.read_bytes()
    sets = [f'data.val_shards="{shards}"']
    run_to_end(recipe_of(small, tmp_path / "full", *sets))
    damage(tar)
    recipe = recipe_of(small, tmp_path / "resumed", *sets)
    for epoch in (1, 2):
        with pytest.raises(ImageError):
            run_to_end(recipe, resume=epoch == 2)
        assert f"epoch {epoch} is saved; --resume evaluates it" in capsys.readouterr().err
        assert load_state(tmp_path / "resumed/state.pt")["update"] == 3 * epoch
        if epoch == 1:
            tar.write_bytes(original)
            interrupt_first_update(recipe)
            damage(tar)
    tar.write_bytes(original)
    run_to_end(recipe, resume=True)
    assert_equal(final_state(tmp_path / "full"), final_state(tmp_path / "resumed"))
    for name in ("last", "last_ema", "best"):
        one, other = (tmp_path / run / f"{name}.safetensors" for run in ("full", "resumed"))
        assert one.read_bytes() == other.read_bytes()


def interrupt_first_update(recipe: TrainRecipe) -> None:
    """Resume, and send SIGTERM during the first update."""
    step = Trainer.step

    def interrupted_step(trainer: Trainer, batches: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, batches)

    with Patch.context() as patch:
        patch.setattr(Trainer, "step", interrupted_step)
        with pytest.raises(Requeue):
            run_to_end(recipe, resume=True)


def test_a_signal_in_an_evaluation_ends_it_at_once(
    small: World, tmp_path: Path, monkeypatch: Patch
) -> None:
    sets = [f'data.val_shards="{small.validation}"', "run.eval_batch_size=4"]
    run_to_end(recipe_of(small, tmp_path / "full", *sets))
    count_images, batches = stage_two.count_images, 0

    def interrupted_count(*args: Any) -> Any:
        nonlocal batches
        for batch in count_images(*args):
            batches += 1
            os.kill(os.getpid(), signal.SIGUSR1)
            yield batch

    recipe = recipe_of(small, tmp_path / "stopped", *sets)
    with monkeypatch.context() as patch:
        patch.setattr(stage_two, "count_images", interrupted_count)
        with pytest.raises(Requeue):
            run_to_end(recipe)
    assert batches == 1
    run_to_end(recipe, resume=True)
    assert_equal(final_state(tmp_path / "full"), final_state(tmp_path / "stopped"))


def test_checkpoint_every_is_the_interval_of_states(
    small: World, tmp_path: Path, monkeypatch: Patch
) -> None:
    saved = []
    save = stage_two.save_state
    monkeypatch.setattr(
        stage_two, "save_state", lambda path, s: (saved.append(s["update"]), save(path, s))
    )
    for every, expected in ((0, {3, 6}), (1, {1, 2, 3, 4, 5, 6}), (2, {2, 3, 5, 6})):
        saved.clear()
        run_to_end(recipe_of(small, tmp_path / f"{every}", f"run.checkpoint_every={every}"))
        assert set(saved) == expected


# Only finite numbers are saved, and a diverged run can be resumed as advised


def test_a_diverged_run_keeps_its_last_good_state_and_resumes_as_advised(
    small: World, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    out = tmp_path / "run"
    step = Trainer.step

    def diverging_step(trainer: Trainer, batches: Any) -> torch.Tensor:
        parts = step(trainer, batches)
        if trainer.update == 5:
            with torch.no_grad():
                next(trainer.student.parameters()).view(-1)[0] = torch.nan
        return parts

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", diverging_step)
        with pytest.raises(TrainingError, match="the weights are not finite") as caught:
            run_to_end(recipe_of(small, out, "run.checkpoint_every=2"))
    assert str(caught.value.found).startswith("NaN or infinity in student.")
    state = load_state(out / "state.pt")
    assert state["update"] == 3
    assert find_nonfinite(state) is None
    capsys.readouterr()
    changes = (
        "run.checkpoint_every=2",
        "optim.lr=0.01",
        "optim.clip_grad=1",
        "batch.accumulation=2",
    )
    summary = run_to_end(recipe_of(small, out, *changes, epochs=3), resume=True)
    lines = [
        "update 3: batch.accumulation 1 -> 2",
        "update 3: optim.clip_grad 0.0 -> 1.0",
        "update 3: optim.lr 0.05 -> 0.01",
        "update 3: schedule.epochs 2 -> 3",
    ]
    assert sorted(summary["recipe_changes"]) == lines
    assert sorted(read_header(out / "last.safetensors").recipe_changes) == lines
    err = capsys.readouterr().err
    assert all(f"the recipe changes at {line}" in err for line in lines)
    [change] = [json.loads(line) for line in (out / "changes.jsonl").read_text().splitlines()]
    assert change["update"] == 3
    assert change["changed"]["optim.lr"] == [0.05, 0.01]
    assert summary["last"]["lr"] < 0.01 * 32 / 1024
    assert summary["last"]["epoch"] == 3
    run_to_end(recipe_of(small, out, *changes, epochs=3), resume=True)  # no further change
    assert len((out / "changes.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_values_are_found_anywhere_in_a_state(value: float) -> None:
    good, bad = torch.ones(3), torch.tensor([0, value])
    state = {"ema": None, "optimizer": {"state": {0: {"exp_avg": good, "step": 3}}}, "n": [good]}
    assert find_nonfinite(state) is None
    state["optimizer"]["state"][0]["exp_avg_sq"] = bad  # type: ignore[index]
    assert find_nonfinite(state) == "optimizer.state.0.exp_avg_sq"
    assert find_nonfinite({"sums": bad, "n": [good]}) == "sums"


@pytest.mark.parametrize(("first", "then"), [("off", "fp16"), ("fp16", "bf16")])
def test_a_run_resumes_in_another_precision(
    small: World, tmp_path: Path, first: str, then: str
) -> None:
    run_to_end(recipe_of(small, tmp_path / "run", f"run.amp={first}", epochs=1))
    run_to_end(recipe_of(small, tmp_path / "run", f"run.amp={then}"), resume=True)
    assert load_state(tmp_path / "run/state.pt")["update"] == 6


# Keys that may change, and keys that may not


ADJUSTABLE = {
    *("data.missing", "data.drift", "optim.lr", "optim.clip_grad", "batch.accumulation"),
    *("schedule.epochs", "schedule.warmup_epochs", "schedule.warmup_lr", "schedule.min_lr"),
    *("data.corrupt", "run.amp", "run.eval_every", "eval.crop_pct", "eval.interpolation"),
}


def test_every_deciding_key_is_adjustable_or_refused_by_name(tmp_path: Path) -> None:
    recipe = load_recipe(TrainRecipe)
    state = tmp_path / "state.pt"
    assert changed_keys(deciding_keys(recipe), recipe, state) == {}
    for name, value in deciding_keys(recipe).items():
        before = deciding_keys(recipe) | {name: [value, "another"]}
        if name in ADJUSTABLE:
            assert changed_keys(before, recipe, state) == {name: [before[name], value]}
            continue
        with pytest.raises(OutputError, match="saved with another recipe") as caught:
            changed_keys(before, recipe, state)
        assert [line.split(":")[0] for line in caught.value.problems] == [name]
        assert f"{tmp_path}/recipe.toml" in str(caught.value.action)


def test_another_recipe_or_other_data_are_refused_with_all_differences(
    small: World, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run_to_end(recipe_of(small, out, epochs=1))
    before = (out / "state.pt").read_bytes()
    with pytest.raises(OutputError) as caught:
        run_to_end(recipe_of(small, out, "distill.alpha=0.3", "run.seed=7"), resume=True)
    assert caught.value.problems == [
        "distill.alpha: was 0.5, now 0.3",
        "run.seed: was 0, now 7",
    ]
    assert (out / "state.pt").read_bytes() == before
    state = load_state(out / "state.pt")
    with pytest.raises(OutputError, match="other data") as caught:
        require_same_data(state["data"], state["data"] | {"root_seed": 9}, out / "state.pt")
    assert caught.value.problems == ["views: different root seed: was 0, now 9"]


def test_a_run_can_be_shortened_but_not_below_its_current_epoch(
    small: World, tmp_path: Path
) -> None:
    """Its last epoch is evaluated, although it was not the last when it ended."""
    sets = [f'data.val_shards="{small.validation}"', "run.eval_every=9"]
    run_to_end(recipe_of(small, tmp_path / "run", *sets, "run.checkpoint_every=1", epochs=3))
    state = tmp_path / "run/state.pt"
    with pytest.raises(OutputError, match="past the end") as caught:
        run_to_end(recipe_of(small, tmp_path / "run", *sets, epochs=2), resume=True)
    assert "set schedule.epochs to 3 or more" in str(caught.value.action)

    step = Trainer.step

    def interrupted_step(trainer: Trainer, batches: Any) -> torch.Tensor:
        parts = step(trainer, batches)
        if trainer.update == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return parts

    with Patch.context() as patch:
        patch.setattr(Trainer, "step", interrupted_step)
        with pytest.raises(Requeue):
            run_to_end(recipe_of(small, tmp_path / "short", *sets, epochs=3))
    state = tmp_path / "short/state.pt"
    assert "top1" not in load_state(state)["rows"][-1]
    summary = run_to_end(recipe_of(small, tmp_path / "short", *sets, epochs=1), resume=True)
    assert len(load_state(state)["rows"]) == 1
    assert "top1" in summary["last"]


# One run per folder, which may contain unrelated files


LOCK_HOLDER = """
import sys
from pathlib import Path
from cskd_pipeline.runtime.atomic import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def hold_lock(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOCK_HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("command", ["train", "study"])
def test_a_second_run_in_a_folder_is_refused_while_the_first_is_alive(
    small: World, tmp_path: Path, capsys: Capture, command: str
) -> None:
    out = tmp_path / "run"
    if command == "train":
        line = words(small, out, "--resume")
    else:
        line = ["study", "--shards", tmp_path, "--val-shards", tmp_path, "--out", out]
    with hold_lock(out) as process:
        (out / ".state.pt.0.partial").write_bytes(b"being written by the first")
        assert world.cli(*line) == 1
        err = capsys.readouterr().err
        assert "another run is using this folder" in err
        assert f"process {process.pid} on " in err
        assert (out / ".state.pt.0.partial").exists()
    assert (out / LOCK).exists()  # as a crash leaves it
    if command == "train":
        assert world.cli(*line) == 0
        assert not list(out.glob(".*"))


def test_a_lock_that_is_a_link_is_refused_and_its_target_kept(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("years of work")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to(target)
    with pytest.raises(OutputError, match="link"), sole_writer(tmp_path / "out"):
        pass
    assert target.read_text() == "years of work"


def test_a_run_starts_and_resumes_next_to_a_jobs_log(
    small: World, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "slurm-1.out").write_text("hello")
    assert world.cli(*words(small, out)) == 0
    assert world.cli(*words(small, out)) == 1
    assert "resume the existing run with --resume" in capsys.readouterr().err
    assert world.cli(*words(small, out, "--resume")) == 0
    assert (out / "slurm-1.out").read_text() == "hello"


@pytest.mark.parametrize("flags", [[], ["--resume"]])
@pytest.mark.parametrize("name", ["summary.csv", "last.safetensors", "zarr.json"])
def test_files_that_a_run_would_overwrite_are_left_alone(
    small: World, tmp_path: Path, capsys: Capture, name: str, flags: list[str]
) -> None:
    (tmp_path / name).write_text("mine")
    assert world.cli(*words(small, tmp_path, *flags)) == 1
    err = capsys.readouterr().err
    assert f"found:    {name}" in err
    assert "choose another --out" in err
    assert "--resume" not in err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
