"""``bench all`` writes each result at once, stops cleanly at its time limit, and resumes."""

from __future__ import annotations

import contextlib
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
    return dict(json.loads((out / bench.RESULTS).read_text())["results"])


def test_a_run_stopped_by_its_time_limit_resumes_and_writes_a_table(
    small: World, scale: bench.Scale, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out, real = tmp_path / "out", bench.bench_dump.bench_dump

    def interrupted(*args: object, **kwargs: object) -> object:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        time.sleep(5)
        raise AssertionError("the time limit did not stop it")

    monkeypatch.setattr(bench.bench_dump, "bench_dump", interrupted)
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
    assert {name: after[name] for name in before} == before  # nothing is measured again
    table = (out / bench.TABLE).read_text()
    assert table.splitlines()[0].strip("*") in shown
    assert table.startswith(f"**cpu, {bench.cores()} CPU cores, python ")
    lines = table.splitlines()
    assert [line for line in lines if line.endswith("| 0 | yes |")] == lines[4:6]
    assert f"| {TINY}, off, batches of 4: step time, cskd from a cache / none |" in table
    assert "| ≤ 1.03 |" in table
    assert "loader / timm's, one core, 3 views per decoded image, 32 px" in table


def test_failed_measurements_are_retried_and_ctrl_c_stops_the_study(
    small: World, scale: bench.Scale, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls: list[str] = []

    def measurements(config: bench.AllConfig, scale: bench.Scale) -> dict[str, bench.Measurement]:
        def fails() -> dict[str, Any]:
            calls.append("fails")
            raise OutputError("no space | 2 GiB", where="disk")

        def works() -> dict[str, Any]:
            calls.append("works")
            return {"result": 1}

        def figures(report: dict[str, Any]) -> Iterator[Figure]:
            yield Figure("works", str(report["result"]))

        return {"a": bench.Measurement(fails, figures), "b": bench.Measurement(works, figures)}

    monkeypatch.setattr(bench, "_measurements", measurements)
    assert world.cli(*words(small, tmp_path / "out")) == 1
    shown = capsys.readouterr()
    assert "works" in shown.out  # other figures are printed anyway
    assert "some measurements failed" in shown.err
    assert "- a: OutputError: no space | 2 GiB where: disk" in shown.err
    table = (tmp_path / "out" / bench.TABLE).read_text()
    assert "| a | failed: OutputError: no space \\| 2 GiB where: disk |" in table
    assert "| works | 1 |" in table

    def stopped(commands: Any, *args: Any, grace: float) -> Iterator[Any]:
        assert "C/*train-*.tar" in commands["study"]
        assert world.cli(*commands["study"]) == 1  # valid arguments, missing shards
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(bench, "side_by_side", stopped)
    assert world.cli(*words(small, tmp_path / "out", "--cifar10", "C", "--quiet")) == 130
    assert (
        "finished results are kept, continue with: cskd-pipeline bench all"
        in capsys.readouterr().err
    )
    assert calls == ["fails", "works", "fails"]


def test_results_of_another_machine_or_other_shards_are_refused(
    small: World, scale: bench.Scale, tmp_path: Path, capsys: Capture
) -> None:
    known = {"machine": {"device": "NVIDIA H200"}, "results": {}, "errors": {}}
    (tmp_path / bench.RESULTS).write_text(json.dumps(known))
    assert world.cli(*words(small, tmp_path)) == 1
    assert "the results in this folder are from another machine" in capsys.readouterr().err
    machine = bench._machine(torch.device("cpu"))
    other = {"machine": machine, "shards": "other.tar", "results": {}}
    for text, message in ((json.dumps(other), "other shards"), ("{}", "damaged")):
        (tmp_path / bench.RESULTS).write_text(text)
        assert world.cli(*words(small, tmp_path)) == 1
        assert message in capsys.readouterr().err


# --- checks of the teacher ------------------------------------------------------------------------


def test_a_correct_teacher_passes_both_checks(small: World) -> None:
    report = check_teacher(world.dump_recipe(small.shards, Path()), 16)
    assert (report["companions"]["differ"], report["cache"]["differ"]) == (0, 0)
    assert report["companions"]["compared"] == (16 + 8 + 8 + 1) * 4 * (4 * 4 + 1)
    assert report["cache"]["compared"] == 2 * 16 * (1 + 5 * 4 * 4)


def test_logits_that_depend_on_companions_are_counted(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Teacher.respond

    def leaks(teacher: Teacher, x: Tensor) -> Logits:
        logits = real(teacher, x)
        return Logits(logits.spatial + (1 if x[0].sum() < x[-1].sum() else 0), logits.global_)

    monkeypatch.setattr(Teacher, "respond", leaks)
    report = check_teacher(world.dump_recipe(small.shards, Path()), 16)
    assert report["companions"]["differ"] > 0


def test_cached_labels_that_differ_from_the_teachers_are_counted(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Teacher.respond

    def shifted(teacher: Teacher, x: Tensor) -> Logits:
        return Logits(*(values.roll(1, dims=0) for values in real(teacher, x)))

    monkeypatch.setattr(Teacher, "respond", shifted)
    report = check_teacher(world.dump_recipe(small.shards, Path()), 16)
    assert report["cache"]["differ"] > 0


def test_a_study_that_ignores_sigterm_is_killed_at_the_time_limit(
    small: World, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"

    studies: list[subprocess.Popen[bytes]] = []

    def start(words: list[str], log: Path, own_group: bool) -> subprocess.Popen[bytes]:
        studies.append(subprocess.Popen([sys.executable, "-c", code], start_new_session=own_group))
        return studies[0]

    monkeypatch.setattr(commands, "_start", start)
    monkeypatch.setattr(bench, "_measurements", lambda *_: {})
    monkeypatch.setattr(bench, "GRACE", 0.1)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:  # as in a background job of a shell
        flags = ("--cifar10", tmp_path, "--seconds", 1)
        assert world.cli(*words(small, tmp_path / "out", *flags)) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert [study.poll() for study in studies] == [-signal.SIGKILL]
    assert "stopped after 1 s" in capsys.readouterr().err


def test_a_time_limit_whose_exception_a_library_loses_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "_AGAIN", 0.05)

    def lose_the_first() -> None:
        with bench._deadline(0.05):
            with contextlib.suppress(bench._TimeLimit):
                time.sleep(60)
            time.sleep(60)

    with pytest.raises(bench._TimeLimit):
        lose_the_first()


def test_a_figure_shows_whether_it_meets_its_goal() -> None:
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
    assert (cached.goal, cached.met) == ("≤ 1.03", True)
    assert (live.goal, live.met) == ("≥ 4.5", False)
    assert images.result == "none 1,234"
    text = markdown_table(bench.COLUMNS, [figure.cells for figure in (cached, live, images)])
    assert text.splitlines()[-3].endswith("| 1.02 (1 to 1.05) | ≤ 1.03 | yes |")
