"""The files of a training run, which do not depend on interruptions."""

from __future__ import annotations

import csv
import io
import json
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.data import evalset
from cskd_pipeline.errors import ViewDriftError
from cskd_pipeline.models.checkpoint import read_header
from cskd_pipeline.models.train_state import load_state
from cskd_pipeline.pipeline import train as stage_two
from cskd_pipeline.pipeline.evaluate import EvalOptions, evaluate
from cskd_pipeline.pipeline.train import train
from cskd_pipeline.runtime.console import Terminal
from cskd_pipeline.views import apply
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.processes import server, until

Capture = pytest.CaptureFixture[str]


def run_to_end(recipe: Any, resume: bool = False) -> dict[str, Any]:
    """Run as the command does, with its log on stderr."""
    Terminal().attach()
    return train(recipe, resume=resume)


def final_state(out: Path) -> dict[str, Any]:
    """Return the state in which two finished runs must agree, without timings."""
    state = load_state(out / "state.pt")
    for row in state["rows"]:
        for name in ("seconds", "images_per_second", "data_wait"):
            del row[name]
    return state


def assert_equal(one: Any, other: Any, at: str = "state") -> None:
    assert type(one) is type(other), at
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), at
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one:
            assert_equal(one[key], other[key], f"{at}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), at
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{at}[{number}]")
    else:
        assert one == other, at


class DiedError(Exception):
    pass


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_run_killed_anywhere_resumes_exactly(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amp: str
) -> None:
    sets = [
        "run.checkpoint_every=2",
        f"run.amp={amp}",
        "student.drop_path=0.2",
        "batch.accumulation=2",
        f'data.val_shards="{small.validation}"',
    ]
    run_to_end(world.train_recipe(small.shards, small.cache, tmp_path / "full", sets=sets))

    recipe = world.train_recipe(small.shards, small.cache, tmp_path / "resumed", sets=sets)
    step = stage_two.Trainer.step
    for fatal in (3, 4, 9, 17):

        def fatal_step(trainer: Any, batches: Any, fatal: int = fatal) -> torch.Tensor:
            if trainer.update == fatal:
                raise DiedError
            return step(trainer, batches)

        monkeypatch.setattr(stage_two.Trainer, "step", fatal_step)
        with pytest.raises(DiedError):
            run_to_end(recipe, resume=fatal != 3)
    monkeypatch.setattr(stage_two.Trainer, "step", step)
    run_to_end(recipe, resume=True)
    assert_equal(final_state(tmp_path / "full"), final_state(tmp_path / "resumed"))
    for name in ("last", "last_ema", "best"):
        one, other = (tmp_path / run / f"{name}.safetensors" for run in ("full", "resumed"))
        assert one.read_bytes() == other.read_bytes()
    rows = list(csv.DictReader((tmp_path / "resumed" / "summary.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]


def test_a_run_stopped_by_sigint_prints_how_to_resume_and_resumes(
    small: World, tmp_path: Path
) -> None:
    sets = ["run.checkpoint_every=1"]

    def recipe(out: str) -> TrainRecipe:
        return world.train_recipe(
            small.shards, small.cache, tmp_path / out, sets=sets, epochs=3, batch_size=8
        )

    command = [
        *("train", "--method", "cskd", "--student", world.STUDENT, "--shards", small.shards),
        *("--cache", small.cache, "--epochs", 3, "--batch-size", 8, "--workers", 1),
        *("--device", "cpu", "--out", tmp_path / "resumed"),
        *world.as_flags([*world.train_sets(), *sets]),
    ]
    process = server().start(*command, log=tmp_path / "log")
    _wait_for_progress(tmp_path / "resumed" / "state.pt")
    process.send(signal.SIGINT)
    ended = process.wait()
    assert ended.code == 130
    assert "--resume" in ended.output
    assert "Traceback" not in ended.output
    assert 0 < load_state(tmp_path / "resumed" / "state.pt")["update"] < 3 * 12
    run_to_end(recipe("resumed"), resume=True)
    run_to_end(recipe("full"))
    assert_equal(final_state(tmp_path / "full"), final_state(tmp_path / "resumed"))


def _wait_for_progress(state: Path) -> None:
    """Wait until the state has been written twice more."""

    def written() -> int:
        return state.stat().st_mtime_ns if state.exists() else 0

    for _ in range(2):
        before = written()
        until(lambda before=before: written() != before)


def test_students_load_into_timm_and_evaluate_to_the_runs_metrics(
    small: World, tmp_path: Path
) -> None:
    sets = [f'data.val_shards="{small.validation}"']
    out = tmp_path / "run"
    summary = run_to_end(world.train_recipe(small.shards, small.cache, out, sets=sets))
    card = read_header(out / "best.safetensors")
    model = timm.create_model(
        card.model,
        num_classes=card.num_classes,
        checkpoint_path=str(out / "best.safetensors"),
        **card.kwargs,
    )
    state = load_state(out / "state.pt")
    last = timm.create_model(
        card.model,
        num_classes=card.num_classes,
        checkpoint_path=str(out / "last.safetensors"),
        **card.kwargs,
    )
    assert_equal(dict(last.state_dict()), dict(state["student"]))
    assert model.num_classes == len(world.CLASSES)

    measured = evaluate(out, str(small.validation), EvalOptions(workers=0, device="cpu"))
    assert measured["top1"] == pytest.approx(summary["best"]["top1"])
    assert measured["samples"] == 16
    assert set(measured["per_head"]) == {"cls", "dist", "dense", "mean"}


@pytest.mark.parametrize(
    ("method", "student", "kwargs", "heads"),
    [
        ("none", "resnet10t", "{channels=[8, 8, 8, 8]}", ["cls"]),
        ("none", world.STUDENT, world.STUDENT_KWARGS, ["cls"]),
        ("deit", "vit_tiny_patch16_224", world.STUDENT_KWARGS, ["cls"]),
        ("cskd", "vit_tiny_patch16_224", world.STUDENT_KWARGS, ["cls", "dense"]),
        ("cskd", world.STUDENT, world.STUDENT_KWARGS, ["cls", "dist", "dense"]),
    ],
)
def test_every_method_predicts_with_the_heads_it_trained(
    small: World, tmp_path: Path, method: str, student: str, kwargs: str, heads: list[str]
) -> None:
    cache = None if method == "none" else small.cache
    sets = [f'data.val_shards="{small.validation}"', *(world.VIEWS if cache is None else [])]
    recipe = world.train_recipe(
        small.shards,
        cache,
        tmp_path / "run",
        method,
        sets,
        epochs=2,
        student=student,
        kwargs=kwargs,
    )
    summary = run_to_end(recipe)
    assert 0 <= summary["last"]["top1"] <= 100
    measured = evaluate(tmp_path / "run", str(small.validation), EvalOptions(device="cpu"))
    assert measured["heads"] == heads
    assert list(measured["per_head"]) == [*heads, "mean"]
    logged = {name for name in summary["last"] if name.startswith("top1_")}
    assert logged == {f"top1_{head}" for head in heads}
    state = load_file(tmp_path / "run" / "last.safetensors")
    if "head_dist.weight" in state:  # zero unless it was trained
        assert bool(state["head_dist.bias"].any()) == ("dist" in heads)
        assert bool(state["head_dist.weight"].any()) == ("dist" in heads)


def test_runs_and_students_are_evaluated_with_the_recipes_preprocessing(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Students' headers record it for ``evaluate`` and ``export``; a flag overrides it."""
    seen: list[tuple[float, str]] = []
    original = evalset.EvalImages.__init__

    def record(self: Any, dataset: Any, shown: Any) -> None:
        seen.append((shown.crop_pct, shown.interpolation))
        original(self, dataset, shown)

    monkeypatch.setattr(evalset.EvalImages, "__init__", record)
    sets = [
        f'data.val_shards="{small.validation}"',
        "eval.crop_pct=0.5",
        "eval.interpolation=nearest",
    ]
    out = tmp_path / "run"
    run_to_end(world.train_recipe(small.shards, small.cache, out, "cskd", sets, epochs=2))
    assert seen == [(0.5, "nearest")] * 4  # last and EMA weights, two epochs
    words = ("evaluate", out, "--shards", small.validation, "--json", "--workers", 0)
    for flags, expected in (((), (0.5, "nearest")), (("--crop-pct", 1), (1.0, "nearest"))):
        assert world.cli(*words, *flags) == 0
        report = world.last_json(capsys.readouterr().out)
        assert (report["crop_pct"], report["interpolation"]) == seen.pop() == expected
    assert world.cli("export", out, "--out", tmp_path / "exported") == 0
    config = json.loads((tmp_path / "exported" / "config.json").read_text())["pretrained_cfg"]
    assert (config["crop_pct"], config["interpolation"]) == (0.5, "nearest")


def test_a_run_with_more_epochs_than_views_repeats_them_with_a_warning(
    small: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def warned(epochs: int) -> str:
        recipe = world.train_recipe(
            small.shards,
            small.cache,
            tmp_path / str(epochs),
            epochs=epochs,
        )
        run_to_end(recipe)
        return capsys.readouterr().err

    assert "again" not in warned(4)
    assert "views repeat from epoch 5 on" in warned(5)


def test_drifted_views_are_refused_or_counted(
    small: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A digest that is off by one simulates another Pillow, which would draw other pixels."""
    digest = apply.digest
    monkeypatch.setattr(apply, "digest", lambda pixels: digest(pixels) ^ 1)
    recipe = world.train_recipe(small.shards, small.cache, tmp_path / "refused", epochs=2)
    with pytest.raises(ViewDriftError, match="not those the teacher saw"):
        run_to_end(recipe)
    accepted = world.train_recipe(
        small.shards, small.cache, tmp_path / "accepted", sets=["data.drift=warn"], epochs=2
    )
    run_to_end(accepted)
    assert "epoch 1: 96 views differ from those the teacher saw" in capsys.readouterr().err

    stopped = replace(accepted, run=replace(accepted.run, out=str(tmp_path / "stopped")))
    monkeypatch.setattr(stage_two, "_time_to_stop", lambda trainer, _: trainer.update == 2)
    with pytest.raises(KeyboardInterrupt):
        run_to_end(stopped)
    seen = 2 * accepted.batch.batch_size
    assert f"epoch 1: {seen} views differ from those the teacher saw" in capsys.readouterr().err


def test_a_warm_up_that_outlasts_the_run_causes_a_warning(
    small: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def warned(epochs: int) -> bool:
        out = tmp_path / str(epochs)
        run_to_end(world.train_recipe(small.shards, small.cache, out, epochs=epochs))
        return "outlasts the run" in capsys.readouterr().err

    assert warned(1)
    assert not warned(2)


@pytest.mark.parametrize(("threshold", "side"), [(0.0, "data"), (1.1, "device")])
def test_an_epochs_line_names_the_limiting_side(
    small: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threshold: float,
    side: str,
) -> None:
    err = io.StringIO()
    monkeypatch.setattr("cskd_pipeline.runtime.progress.DATA_LIMITS", threshold)
    recipe = world.train_recipe(small.shards, small.cache, tmp_path / "run", "deit", epochs=1)
    Terminal(err=err).attach()
    images = train(recipe)["updates"] * recipe.batch.batch_size
    [line] = [line for line in err.getvalue().splitlines() if line.startswith("epoch 1/1")]
    wait = re.search(rf"  data wait (\d+) %  limit: {side}$", line)
    assert wait, line
    [row] = csv.DictReader((tmp_path / "run/summary.csv").read_text().splitlines())
    assert int(wait[1]) == round(100 * float(row["data_wait"]))
    assert 0 < float(row["data_wait"]) < 1
    images_seen = float(row["seconds"]) * float(row["images_per_second"])
    assert images_seen == pytest.approx(images, rel=0.01)


def test_training_loads_no_teacher_and_needs_no_network(small: World, tmp_path: Path) -> None:
    """In a process where every connection fails and every created model is recorded."""
    script = f"""
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import timm
created = []
create = timm.create_model
def create_model(name, *args, **kwargs):
    created.append((name, kwargs.get("pretrained", False)))
    return create(name, *args, **kwargs)
timm.create_model = create_model
from cskd_pipeline.cli import main
code = main(sys.argv[1:])
assert code == 0, code
assert created == [({world.STUDENT!r}, False)], created
loaded = sorted(m for m in sys.modules if "teacher" in m or m == "cskd_pipeline.pipeline.dump")
assert loaded == [], loaded
"""
    command = [
        *("train", "--method", "cskd", "--epochs", 1, "--shards", small.shards),
        *("--cache", small.cache, "--student", world.STUDENT, "--batch-size", 16),
        *("--out", tmp_path / "run", "--workers", 0, "-q", *world.as_flags(world.train_sets())),
    ]
    ended = server().run(*command, log=tmp_path / "log", code=script)
    assert ended.code == 0, ended.output
