"""``bench all`` writes each result as it comes, is cut off cleanly, and goes on from there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cskd_pipeline.errors import OutputError
from cskd_pipeline.models.teacher import Logits, Teacher
from cskd_pipeline.tools import commands
from cskd_pipeline.tools.bench import bench_all as bench
from cskd_pipeline.tools.bench import bench_step
from cskd_pipeline.tools.bench.gpu_checks import check_teacher
from cskd_pipeline.tools.bench.timing import Figure
from cskd_pipeline.tools.tables import markdown_table
from tests.pipeline import world
from tests.pipeline.conftest import World

Capture = pytest.CaptureFixture[str]
TINY = "deit_tiny_distilled_patch16_224"
NAMES = ("teacher float32", f"step {TINY} off", "dump", "loader")


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> bench.Scale:
    small = bench.Scale("resnet10t", (TINY,), ("off",), 32, 4, 4, 1)
    monkeypatch.setitem(bench.SCALES, "cpu", small)
    return small


def words(small: World, out: Path, *more: object) -> list[object]:
    return ["bench", "all", "--shards", small.shards, "--out", out, "--device", "cpu", *more]


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / bench.RESULTS).read_text())["results"]
    return found


def test_all_is_measured_and_ends_with_a_table_of_this_machine(
    small: World, scale: bench.Scale, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out, real = tmp_path / "out", bench.bench_dump.bench_dump

    def rings(*given: object, **options: object) -> object:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        time.sleep(5)
        raise AssertionError("the deadline did not end it")

    monkeypatch.setattr(bench.bench_dump, "bench_dump", rings)
    assert world.cli(*words(small, out, "--seconds", 500, "--json", "--quiet")) == 0
    cut = world.last_json(capsys.readouterr().out)
    assert tuple(cut["results"]) == NAMES[:2]
    assert cut["missing"] == list(NAMES[2:])
    before = results(out)
    monkeypatch.setattr(bench.bench_dump, "bench_dump", real)
    assert world.cli(*words(small, out, "--quiet")) == 0
    shown = capsys.readouterr().out
    after = results(out)
    assert tuple(after) == NAMES
    assert {name: after[name] for name in before} == before  # nothing is measured twice
    table = (out / bench.TABLE).read_text()
    assert table.splitlines()[0].strip("*") in shown
    assert table.startswith(f"**cpu, {bench.cores()} CPU cores, python ")
    lines = table.splitlines()
    assert [line for line in lines if line.endswith("| 0 | yes |")] == lines[4:6]
    assert f"| {TINY}, off, batches of 4: step from a cache / plain step |" in table
    assert "| ≤ 1.03 |" in table
    assert "loader / timm's, one core, 3 views a decoded image, 32 px" in table


def test_what_fails_is_said_and_tried_again_and_a_person_can_stop_it(
    small: World, scale: bench.Scale, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: list[str] = []

    def measurements(config: bench.AllConfig, scale: bench.Scale) -> dict[str, bench.Measurement]:
        def fails() -> dict[str, Any]:
            asked.append("fails")
            raise OutputError("no room | 2 GiB", where="here")

        def works() -> dict[str, Any]:
            asked.append("works")
            return {"found": 1}

        def figures(report: dict[str, Any]) -> Iterator[Figure]:
            yield Figure("works", str(report["found"]))

        return {"a": bench.Measurement(fails, figures), "b": bench.Measurement(works, figures)}

    monkeypatch.setattr(bench, "_measurements", measurements)
    assert world.cli(*words(small, tmp_path / "out")) == 1
    told = capsys.readouterr()
    assert "works" in told.out  # the figures come all the same
    assert "measurements failed" in told.err
    assert "- a: OutputError: no room | 2 GiB where: here" in told.err
    table = (tmp_path / "out" / bench.TABLE).read_text()
    assert "| a | failed: OutputError: no room \\| 2 GiB where: here |" in table
    assert "| works | 1 |" in table

    def stopped(calls: Any, *args: Any, grace: float) -> Iterator[Any]:
        assert "C/*train-*.tar" in calls["study"]
        assert world.cli(*calls["study"]) == 1  # no such shards, but right words
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(bench, "side_by_side", stopped)
    assert world.cli(*words(small, tmp_path / "out", "--cifar10", "C", "--quiet")) == 130
    assert (
        "what is finished is kept, continue with: cskd-pipeline bench all"
        in capsys.readouterr().err
    )
    assert asked == ["fails", "works", "fails"]


def test_another_machines_results_are_refused(
    small: World, scale: bench.Scale, tmp_path: Path, capsys: Capture
) -> None:
    known = {"machine": {"device": "NVIDIA H200"}, "results": {}, "errors": {}}
    (tmp_path / bench.RESULTS).write_text(json.dumps(known))
    assert world.cli(*words(small, tmp_path)) == 1
    assert "the results in this folder are another machine's" in capsys.readouterr().err
    machine = bench._machine(torch.device("cpu"))
    of_others = {"machine": machine, "shards": "other.tar", "results": {}}
    for text, found in ((json.dumps(of_others), "other shards"), ("{}", "damaged")):
        (tmp_path / bench.RESULTS).write_text(text)
        assert world.cli(*words(small, tmp_path)) == 1
        assert found in capsys.readouterr().err


# --- the checks find what they are for ------------------------------------------------------------


def test_a_sound_teacher_differs_nowhere(small: World) -> None:
    found = check_teacher(world.dump_recipe(small.shards, Path()), 16)
    assert (found["companions"]["differ"], found["cache"]["differ"]) == (0, 0)
    assert found["companions"]["compared"] == (16 + 8 + 8 + 1) * 4 * (4 * 4 + 1)
    assert found["cache"]["compared"] == 2 * 16 * (1 + 5 * 4 * 4)


def test_logits_that_depend_on_companions_are_counted(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Teacher.respond

    def leaks(teacher: Teacher, x: Tensor) -> Logits:
        found = real(teacher, x)
        return Logits(found.spatial + (1 if x[0].sum() < x[-1].sum() else 0), found.global_)

    monkeypatch.setattr(Teacher, "respond", leaks)
    found = check_teacher(world.dump_recipe(small.shards, Path()), 16)
    assert found["companions"]["differ"] > 0


def test_labels_of_a_cache_that_are_not_its_teachers_are_counted(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Teacher.respond

    def others(teacher: Teacher, x: Tensor) -> Logits:
        return Logits(*(values.roll(1, dims=0) for values in real(teacher, x)))

    monkeypatch.setattr(Teacher, "respond", others)
    found = check_teacher(world.dump_recipe(small.shards, Path()), 16)
    assert found["cache"]["differ"] > 0


def test_a_study_that_does_not_stop_ends_with_the_time_all_the_same(
    small: World, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"

    def start(words: list[str], log: Path, own_group: bool) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code], start_new_session=own_group)

    monkeypatch.setattr(commands, "_start", start)
    monkeypatch.setattr(bench, "_measurements", lambda *_: {})
    monkeypatch.setattr(bench, "GRACE", 0.1)
    before, started = signal.signal(signal.SIGINT, signal.SIG_IGN), time.monotonic()
    try:  # a shell's background jobs ignore SIGINT
        flags = ("--cifar10", tmp_path, "--seconds", 1)
        assert world.cli(*words(small, tmp_path / "out", *flags)) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 30
    assert "the 1 seconds are over" in capsys.readouterr().err


def test_a_figure_says_whether_it_reaches_its_goal() -> None:
    spread = {"median": 1.02, "low": 1.0, "high": 1.05}
    report = {
        "amp": "bf16", "batch_size": 128, "teacher": "regnety_160",
        "goal": {"cskd": 1.03, "live": {"tiny": 4.5}},
        "students": {"tiny": {
            "ratio": {"deit": spread, "cskd": spread, "live": spread},
            "images_per_second": {"none": {"median": 1234.5}},
        }},
    }  # fmt: skip
    cached, live, images = bench_step.figures(report)
    assert (cached.goal, cached.reached) == ("≤ 1.03", True)
    assert (live.goal, live.reached) == ("≥ 4.5", False)
    assert images.found == "none 1,234"
    text = markdown_table(bench.COLUMNS, [one.cells for one in (cached, live, images)])
    assert text.splitlines()[-3].endswith("| 1.02 (1 to 1.05) | ≤ 1.03 | yes |")
