"""Curves on Weights & Biases: the real package, offline; its errors never stop a run."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.config.writing import result_digest
from cskd_pipeline.errors import ManifestError, MissingPackageError
from cskd_pipeline.pipeline import run_log
from cskd_pipeline.pipeline import train as stage_two
from cskd_pipeline.pipeline.run_log import RunLog
from cskd_pipeline.pipeline.train import train
from cskd_pipeline.runtime.console import Terminal
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.pipeline.test_training import DiedError, assert_equal, final_state
from tests.processes import server, until

BLOCK = 32768


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Ignore the machine's own settings, which wandb reads once per process."""
    wandb.teardown()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    yield
    wandb.teardown()


def recipe_of(small: World, out: Path, *sets: str, **extra: Any) -> TrainRecipe:
    return world.train_recipe(
        small.shards, small.cache, out, sets=["run.wandb=trials", *sets], **({"epochs": 2} | extra)
    )


def records(file: Path) -> Iterator[Any]:
    """Yield wandb's records: LevelDB's log format, after a header of seven bytes."""
    data, position, record = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        remaining = BLOCK - position % BLOCK
        if remaining < 7:
            position += remaining
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # complete, or the last part
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            record = b""
            yield message


@dataclass
class RunFile:
    """One wandb file: the run's names, its config, and its points by update."""

    identity: str = ""
    project: str = ""
    name: str = ""
    exit_code: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    points: dict[int, dict[str, float]] = field(default_factory=dict)


def read_run(file: Path) -> RunFile:
    run_file = RunFile()
    for record in records(file):
        if record.HasField("run"):
            run_file.identity, run_file.project = record.run.run_id, record.run.project
            run_file.name = record.run.display_name
            for item in record.run.config.update:
                run_file.config[item.key] = json.loads(item.value_json)
        elif record.HasField("exit"):
            run_file.exit_code = record.exit.exit_code
        elif record.HasField("history"):
            values = {
                item.key or item.nested_key[0]: json.loads(item.value_json)
                for item in record.history.item
            }
            step = record.history.step.num
            run_file.points[step] = {k: v for k, v in values.items() if not k.startswith("_")}
    return run_file


def files_of(out: Path) -> list[Path]:
    """Return the files in order of creation, once wandb's own process has ended."""
    wandb.teardown()
    return sorted(out.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def tensorboard(out: Path) -> dict[int, dict[str, float]]:
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    points: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            points.setdefault(event.step, {})[name] = event.value
    return points


def backdate(out: Path) -> None:
    """Rename the event files as if the run had started more than a second earlier."""
    for path in (out / "tensorboard").iterdir():
        path.rename(path.with_name(f"events.out.tfevents.0000000001.{path.name}"))


@pytest.mark.parametrize("finished", [0, 2])
def test_tensorboard_has_no_duplicate_points_after_a_resume(tmp_path: Path, finished: int) -> None:
    log = RunLog(tmp_path, 0)
    for update in (1, 2, 3):
        log.scalars(update, {"train/loss": 1.0})
    log.close(ended=False)
    backdate(tmp_path)
    log = RunLog(tmp_path, finished)
    for update in range(finished + 1, 5):
        log.scalars(update, {"train/loss": 2.0})
    log.close(ended=True)
    points = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [point.step for point in points] == [1, 2, 3, 4]
    assert [point.value for point in points] == [1.0] * finished + [2.0] * (4 - finished)


def test_wandb_gets_tensorboards_scalars_and_the_recipe_as_config(
    small: World, tmp_path: Path
) -> None:
    recipe = recipe_of(small, tmp_path / "run", f'data.val_shards="{small.validation}"')
    train(recipe)
    [file] = files_of(tmp_path / "run")
    run_file = read_run(file)
    assert (run_file.project, run_file.name, run_file.exit_code) == ("trials", "run", 0)
    assert run_file.config["optim"]["lr"] == recipe.optim.lr
    assert run_file.config["student"]["name"] == world.STUDENT
    assert run_file.config["recipe_sha256"] == result_digest(recipe)
    expected = tensorboard(tmp_path / "run")
    assert run_file.points.keys() == expected.keys() == set(range(1, 13))
    assert "epoch/top1" in run_file.points[12]
    for update, values in expected.items():
        assert run_file.points[update] == pytest.approx(values, rel=1e-6), update


def test_curves_do_not_change_a_run(small: World, tmp_path: Path) -> None:
    train(recipe_of(small, tmp_path / "with"))
    plain = world.train_recipe(small.shards, small.cache, tmp_path / "without", epochs=2)
    before = random.getstate()
    train(plain)
    assert_equal(final_state(tmp_path / "with"), final_state(tmp_path / "without"))
    assert random.getstate() == before
    for name in ("last.safetensors", "last_ema.safetensors"):
        one, other = (tmp_path / run / name for run in ("with", "without"))
        assert one.read_bytes() == other.read_bytes()
    assert not list((tmp_path / "without").glob("wandb*"))


def test_a_resumed_run_continues_the_same_curves(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(small, tmp_path / "run")
    step = stage_two.Trainer.step

    def fatal_step(trainer: Any, batches: Any) -> Any:
        if trainer.update == 8:
            raise DiedError
        return step(trainer, batches)

    monkeypatch.setattr(stage_two.Trainer, "step", fatal_step)
    with pytest.raises(DiedError):
        train(recipe)
    monkeypatch.setattr(stage_two.Trainer, "step", step)
    backdate(tmp_path / "run")
    train(recipe, resume=True)
    points = tensorboard(tmp_path / "run")
    assert all("train/loss" in points[update] for update in range(1, 13))
    assert [update for update in points if "epoch/loss" in points[update]] == [6, 12]
    first, second = (read_run(file) for file in files_of(tmp_path / "run"))
    assert first.identity == second.identity
    assert json.loads((tmp_path / "run/wandb.json").read_text()) == {"id": first.identity}
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert set(first.points) == set(range(1, 9))
    assert set(second.points) == set(range(7, 13))  # since the last state
    for update in (7, 8):  # computed twice, and equal
        assert first.points[update]["train/loss"] == second.points[update]["train/loss"]


def test_the_flag_names_the_project_and_one_rank_sends(small: World, tmp_path: Path) -> None:
    command = [
        *("train", "--shards", small.shards, "--cache", small.cache, "--student", world.STUDENT),
        *("--method", "cskd", "--epochs", 1, "--batch-size", 16, "--workers", 0, "--device", "cpu"),
        *("--out", tmp_path / "run", "--wandb", "trials", *world.as_flags(world.train_sets())),
    ]
    port, processes = world.free_port(), []
    for rank in ("0", "1"):
        job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(server().start(*command, log=tmp_path / rank, environment=job))
    ended = [process.wait() for process in processes]
    assert [process.code for process in ended] == [0, 0], ended
    assert ["Weights & Biases: offline" in process.output for process in ended] == [True, False]
    [file] = files_of(tmp_path / "run")
    assert read_run(file).project == "trials"


def test_curves_are_complete_after_ctrl_c_to_the_process_group(
    small: World, tmp_path: Path
) -> None:
    """As a terminal sends it: also to wandb's own process."""
    command = [
        *("train", "--shards", small.shards, "--cache", small.cache, "--student", world.STUDENT),
        *("--method", "cskd", "--epochs", 500, "--batch-size", 16, "--workers", 0),
        *("--device", "cpu", "--out", tmp_path / "run", "--wandb", "trials"),
        *world.as_flags([*world.train_sets(), "run.checkpoint_every=1"]),
    ]
    process = server().start(*command, log=tmp_path / "log", session=True)
    until((tmp_path / "run/summary.csv").exists)
    os.killpg(process.pid, signal.SIGINT)
    ended = process.wait()
    assert ended.code == 130, ended.output
    assert "Traceback" not in ended.output
    assert "--resume" in ended.output
    [file] = files_of(tmp_path / "run")
    run_file = read_run(file)
    assert run_file.exit_code == 1
    state = stage_two.load_state(tmp_path / "run/state.pt")
    assert set(range(1, state["update"] + 1)) == set(run_file.points)


# Errors


def stderr_of(small: World, out: Path, capsys: pytest.CaptureFixture[str], **extra: Any) -> str:
    Terminal().attach()
    summary = train(recipe_of(small, out, epochs=1), **extra)
    assert summary["last"]["epoch"] == 1
    return capsys.readouterr().err.replace("\n", " ")


def test_without_a_login_curves_are_kept_with_the_run(
    small: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home/netrc"))
    output = stderr_of(small, tmp_path / "run", capsys)
    assert "No API key configured" in output
    assert "`wandb sync` sends them" in output
    [file] = files_of(tmp_path / "run")
    assert "epoch/loss" in read_run(file).points[6]


def test_an_unreachable_server_does_not_stop_a_run(
    small: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # no server
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    output = stderr_of(small, tmp_path / "run", capsys)
    assert "Weights & Biases cannot be used" in output
    [file] = files_of(tmp_path / "run")
    assert len(read_run(file).points) == 6


def test_wandbs_own_variable_disables_it(
    small: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert "Weights & Biases: disabled" in stderr_of(small, tmp_path / "run", capsys)
    assert not files_of(tmp_path / "run")


@pytest.mark.parametrize("method", ["log", "finish"])
def test_an_error_while_sending_is_logged_once(
    small: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionResetError("connection lost\nand more")

    calls: list[int] = []
    fake: Any = SimpleNamespace(step=0, settings=SimpleNamespace(mode="offline"), url=None)
    fake.log, fake.finish = (lambda *a, **k: calls.append(k["step"])), (lambda *a, **k: None)
    setattr(fake, method, fail)
    monkeypatch.setattr(wandb, "init", lambda **arguments: fake)
    output = stderr_of(small, tmp_path / "run", capsys)
    assert output.count("no more curves on Weights & Biases: connection lost") == 1
    assert "and more" not in output
    assert len(calls) == (0 if method == "log" else 7)  # six updates and the epoch


def test_a_run_continues_if_wandb_never_starts(
    small: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**arguments: Any) -> None:
        raise OSError(f"no {arguments['mode']}")

    monkeypatch.setattr(wandb, "init", fail)
    output = stderr_of(small, tmp_path / "run", capsys)
    assert "(no None)" in output
    assert "(no offline): no curves will be sent" in output


def test_a_missing_package_is_reported_before_anything_is_written(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cskd_pipeline.errors.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError) as caught:
        train(recipe_of(small, tmp_path / "run"))
    assert "cskd-pipeline[wandb]" in str(caught.value)
    assert not (tmp_path / "run").exists()
    plain = world.train_recipe(small.shards, small.cache, tmp_path / "run", epochs=1)
    train(plain)


@pytest.mark.parametrize("content", ["[]", "{}", '{"id": 5}', '{"id": "../x"}', '{"id": "A b"}'])
def test_an_invalid_wandb_id_is_refused(small: World, tmp_path: Path, content: str) -> None:
    recipe = recipe_of(small, tmp_path / "run", epochs=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/wandb.json").write_text(content)
    with pytest.raises(ManifestError, match="delete the file"):
        run_log.open_wandb(recipe)


def test_wandb_is_imported_only_on_request() -> None:
    """timm imports it whenever it is installed, so a run's modules cannot show this."""
    code = (
        "import sys\nimport cskd_pipeline.pipeline.run_log\n"
        "assert not {'wandb', 'timm'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
