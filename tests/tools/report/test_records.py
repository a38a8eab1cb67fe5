"""Run folders are read exactly, and anything else is refused with one message."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from cskd_pipeline.errors import RecipeError, RunError, UsageError
from cskd_pipeline.tools.report import curves
from cskd_pipeline.tools.report.ranking import Contender, rank, verdict
from cskd_pipeline.tools.report.records import (
    MAX_BYTES,
    MAX_RUNS,
    distinct_names,
    read_log,
    read_runs,
    recipe_differences,
)
from tests.tools.report.fake_runs import log_text, make_run, rows


def test_a_run_has_the_numbers_of_its_log(tmp_path: Path) -> None:
    make_run(tmp_path / "one", epochs=5, shift=0.5)
    [run] = read_runs([tmp_path / "one"])
    expected = rows(5, shift=0.5)
    for name in expected[0]:
        assert run.column(name) == {row["epoch"]: row[name] for row in expected}, name
    assert (run.name, run.method, run.epochs) == ("one", "cskd", 5)
    assert run.last("loss") == expected[-1]["loss"]
    assert run.mean("data_wait") == pytest.approx(sum(r["data_wait"] for r in expected) / 5)
    assert run.best() == {"top1": 36.75, "epoch": 5, "weights": "ema"}


def test_the_best_epoch_is_the_first_maximum_as_in_train(tmp_path: Path) -> None:
    make_run(tmp_path / "one")
    logged = rows(4)
    for row, top1, ema in zip(logged, (5.0, 9.0, 8.0, 9.0), (4.0, 9.0, 9.0, 3.0), strict=True):
        row |= {"top1": top1, "ema_top1": ema}
    (tmp_path / "one/summary.csv").write_text(log_text(logged))
    [run] = read_runs([tmp_path / "one"])
    assert run.best() == {"top1": 9.0, "epoch": 2, "weights": "last"}


def test_epochs_without_evaluation_have_no_point(tmp_path: Path) -> None:
    make_run(tmp_path / "one")
    logged = rows(4)
    for row in (logged[0], logged[2]):
        for name in [name for name in row if "top" in name]:
            del row[name]
    (tmp_path / "one/summary.csv").write_text(log_text(logged))
    [run] = read_runs([tmp_path / "one"])
    assert run.column("top1") == {2: 32.5, 4: 34.5}
    assert list(run.column("loss")) == [1, 2, 3, 4]


@pytest.mark.parametrize("cut", [1, 9, 60])
def test_an_incomplete_last_line_is_ignored(tmp_path: Path, cut: int) -> None:
    path = make_run(tmp_path / "one") / "summary.csv"
    path.write_bytes(path.read_bytes()[:-cut])
    [run] = read_runs([tmp_path / "one"])
    assert run.epochs == 3


def test_a_run_in_its_first_epoch_has_no_rows(tmp_path: Path) -> None:
    [run] = read_runs([make_run(tmp_path / "one", logged=0)])
    assert (run.rows, run.epochs, run.best(), run.last("loss")) == ((), 0, None, None)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (b"epoch,loss", b"loss,epoch", "line 1"),
        (b"epoch,loss", b"epoch,base", "line 1"),  # base is repeated
        (b"\n2,", b"\n2,7,", "line 3: 18 fields"),
        (b"\n2,", b"\n\n2,", "line 3"),
        (b"\n2,", b"\n1,", "line 3: epoch 1"),
        (b"\n2,", b"\n-2,", "line 3: epoch -2"),
        (b"\n2,", b"\n\xd9\xa2,", "line 3: epoch"),  # an Arabic two
        (b"\n2,", b"\n99999999,", "line 3: epoch"),
        (b"\n2,6.3", b"\n2,nan", "line 3: loss nan"),
        (b"\n2,6.3", b"\n2,1e999", "line 3: loss 1e999"),
        (b"\n2,6.3", b"\n2,1e31", "line 3: loss 1e31"),
        (b"\n2,6.3", b"\n2,<b>6</b>", "line 3: loss <b>6</b>"),
        (b"\n2,6.3", b'\n2,"6.3', "line 3"),
        (b"\n2,6.3", b"\n2,\xff", "line 3"),
        (b"\n2,6.3", b"\n2," + b"6" * 70_000, "line 3"),
    ],
)
def test_a_damaged_log_is_refused_with_its_line(
    tmp_path: Path, old: bytes, new: bytes, expected: str
) -> None:
    path = make_run(tmp_path / "one") / "summary.csv"
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    with pytest.raises(RunError, match="damaged") as caught:
        read_runs([tmp_path / "one"])
    assert expected in str(caught.value)


@pytest.mark.parametrize("data", [b"\n" * 60_000, b"," * 2**16, b"0" * (MAX_BYTES + 1)])
def test_an_oversized_log_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "summary.csv").write_bytes(data + b"\n")
    with pytest.raises(RunError, match="damaged"):
        read_log(tmp_path / "summary.csv")


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "pipe", logged=0)
    os.mkfifo(tmp_path / "pipe/summary.csv")
    (tmp_path / "empty").mkdir()
    problems = {"empty": "no recipe.toml", "nowhere": "no such folder", "pipe": "not a regular"}
    for name, problem in problems.items():
        with pytest.raises(RunError, match=problem):
            read_runs([tmp_path / name])
    make_run(tmp_path / "other")
    (tmp_path / "other/recipe.toml").write_text("[distill]\nmethod = '<b>x</b>'\n")
    with pytest.raises(RecipeError, match="<b>x</b>"):
        read_runs([tmp_path / "other"])


def test_runs_have_distinct_names(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/x/run", "b/x/run", "b/y/run", "single")]
    assert distinct_names(paths) == ["a/x/run", "b/x/run", "y/run", "single"]
    assert distinct_names([Path("/run"), Path("/a/run")]) == ["/run", "a/run"]
    run = make_run(tmp_path / "run")
    with pytest.raises(UsageError, match="duplicate run"):
        read_runs([run, tmp_path / "." / "run"])
    with pytest.raises(UsageError, match=str(MAX_RUNS)):
        read_runs([tmp_path / str(n) for n in range(MAX_RUNS + 1)])


def test_only_recipe_keys_that_differ_are_listed(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", sets=("run.ema=0.99996", "student.kwargs={depth=2}"))
    two = make_run(tmp_path / "two", sets=("run.ema=0.99995", "student.kwargs={width='<i>'}"))
    three = make_run(tmp_path / "three", method="none", sets=("run.ema=0.99996",))
    assert recipe_differences(read_runs([one, two, three])) == {
        "data.cache": ["cache", "cache", "-"],
        "student.kwargs.depth": ["2", "-", "-"],
        "student.kwargs.width": ["-", "<i>", "-"],
        "distill.method": ["cskd", "cskd", "none"],
        "run.ema": ["0.99996", "0.99995", "0.99996"],
    }
    assert recipe_differences(read_runs([one])) == {}


# Curves


def contenders(*folders: Path) -> list[Contender]:
    """Return the runs grouped by recipe, in the order given, as the page draws them."""
    return sorted(rank(read_runs(folders)), key=lambda one: one.style)


def test_curves_show_the_logged_numbers_in_the_style_of_each_run(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "one"), make_run(tmp_path / "two", shift=1.0, epochs=3)]
    drawn = contenders(make_run(tmp_path / "plain", method="none"), *folders)
    logged = [rows(4, method="none"), rows(4), rows(3, shift=1.0)]
    seen = set()
    for group in curves.GROUPS.values():
        for curve in group:
            by_style = {one.style: one for one in curves.series(drawn, curve)}
            expected = {1, 2} if "none" not in curve.methods else {0, 1, 2}
            expected -= {0} if curve.column == "top1_dense" else set()
            assert set(by_style) == expected, curve
            for style, one in by_style.items():
                assert one.name == drawn[style].name == ("plain", "one", "two")[style]
                assert list(one.x) == [row["epoch"] for row in logged[style]]
                assert one.y == [row[curve.column] for row in logged[style]]
                assert not one.low
            seen.add(curve.column)
    assert {"loss", "base", "global", "spatial"} < seen
    assert {"top1", "top1_cls", "top1_dist", "top1_dense", "ema_top1"} < seen


def test_runs_of_several_seeds_are_one_curve_with_a_band(tmp_path: Path) -> None:
    """It covers the epochs finished by all; a curve over time needs the times of all."""
    seeds = [
        make_run(tmp_path / f"cskd-{n}", shift=n, logged=4 - n, sets=(f"run.seed={n}",))
        for n in (0, 1)
    ]
    [one] = contenders(*seeds)
    assert (one.name, one.column) == ("cskd", "ema_top1")
    curve = one.curve("top1")
    assert curve is not None
    assert (curve.x, curve.y) == ([1, 2, 3], [32.0, 33.0, 34.0])
    assert (curve.low, curve.high) == ([31.5, 32.5, 33.5], [32.5, 33.5, 34.5])
    timed = one.curve("top1", timed=True)
    assert timed is not None
    assert (timed.x, timed.y) == ([11.5, 24.0, 37.5], curve.y)
    assert one.seconds == (50 + 39) / 2
    grouped = contenders(*seeds, make_run(tmp_path / "again"))
    assert [(each.name, len(each.runs)) for each in grouped] == [("cskd", 2), ("again", 1)]
    log = seeds[0] / "summary.csv"
    log.write_text(log.read_text().replace("seconds", "weeks", 1))
    [untimed] = contenders(*seeds)
    assert (untimed.seconds, untimed.curve("top1", timed=True)) == (None, None)


def test_forks_of_several_seeds_are_one_curve_apart_from_full_runs(tmp_path: Path) -> None:
    full = make_run(tmp_path / "cskd-1", sets=("run.seed=1",))
    forks = [
        make_run(tmp_path / f"fork-{n}", sets=(f"run.seed={n}", f"run.fork_from=cskd-{n}/state.pt"))
        for n in (1, 2)
    ]
    grouped = contenders(full, *forks)
    assert [(each.name, len(each.runs)) for each in grouped] == [("cskd-1", 1), ("fork", 2)]


def test_the_verdict_states_lead_cost_and_noise(tmp_path: Path) -> None:
    for method, shift in (("deit", 0.0), ("cskd", 1.5)):
        for n, scatter in enumerate((0.0, 0.5)):
            extra = scatter if method == "cskd" else 0.0
            folder = tmp_path / f"{method}-{n}"
            make_run(folder, method=method, shift=shift + extra, sets=(f"run.seed={n}",))
    runs = read_runs([tmp_path / f"{name}" for name in ("deit-0", "deit-1", "cskd-0", "cskd-1")])
    ranked = rank(runs)
    assert [one.name for one in ranked] == ["cskd", "deit"]
    assert verdict(ranked) == [
        "reaches 37.00 ± 0.35 % top-1 in 57 seconds of training.",
        "deit is second, 1.75 points behind in 50 seconds of training.",
        "Paired by seed, the difference is +1.75 ± 0.25: outside the noise.",
    ]
    alone = rank([runs[0], runs[2]])
    assert verdict(alone)[1:] == [
        "deit-0 is second, 1.50 points behind in 50 seconds of training.",
        "With fewer than two common seeds, the noise is unknown.",
    ]
    assert verdict(rank(read_runs([make_run(tmp_path / "new", logged=0)]))) == []


def test_no_plot_has_a_single_point(tmp_path: Path) -> None:
    drawn = contenders(make_run(tmp_path / "new", logged=1))
    assert list(curves.draw_top1(drawn)) == []
    assert not any(list(curves.draw(drawn, group)) for group in curves.GROUPS.values())


def test_drawn_curves_share_colours_names_and_the_axis_of_top1(tmp_path: Path) -> None:
    evil = "$x_1$ <script>alert(1)<|script>"
    runs = contenders(make_run(tmp_path / evil), make_run(tmp_path / "two", shift=1.0))
    spans, colours = set(), {}
    for plot in curves.draw(runs, curves.TOP1):
        axes = plot.figure.axes[0]
        spans.add(axes.get_ylim())
        colours[plot.name] = [line.get_color() for line in axes.lines]
        [legend] = plot.figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [evil, "two"]
        assert re.match(r"top-1, % over epoch\. \$x_1\$ .*; two: ", plot.description)
    assert len(spans) == 1
    assert len(colours) == 5
    assert len(set(map(tuple, colours.values()))) == 1
    [low, high] = spans.pop()
    assert low < 28.5
    assert high > 36.25


def test_one_run_has_no_legend_and_an_unlogged_column_no_plot(tmp_path: Path) -> None:
    runs = contenders(make_run(tmp_path / "one", method="none"))
    drawn = [plot for group in curves.GROUPS.values() for plot in curves.draw(runs, group)]
    names = [plot.name for plot in drawn]
    assert "loss_spatial" not in names
    assert {"loss", "top1", "top1_ema"} < set(names)
    assert not any(plot.figure.legends for plot in drawn)
    assert list(curves.draw(contenders(make_run(tmp_path / "new", logged=0)), curves.LOSSES)) == []


def test_many_long_names_do_not_shrink_the_axes(tmp_path: Path) -> None:
    """Long names keep their ends, where they differ."""
    name = "a-name-that-lists-every-setting-of-the-experiment-in-run-{}"
    figures = []
    for count in (2, 20):
        folders = [make_run(tmp_path / f"{count}/{name.format(i)}") for i in range(count)]
        plot = next(curves.draw(contenders(*folders), curves.LOSSES))
        plot.write(tmp_path / f"{count}.svg")  # lays it out
        figures.append(plot.figure)
    few, many = figures
    axes = [figure.axes[0].get_window_extent() for figure in (few, many)]
    assert axes[1].height > 0.75 * axes[0].height
    overlap = axes[1].y1 - many.legends[0].get_window_extent().y0
    assert overlap < 10  # pixels: the padding of both
    texts = {text.get_text() for text in many.legends[0].get_texts()}
    assert len(texts) == 20
    assert any(text.endswith("-in-run-19") for text in texts)
    assert max(map(len, texts)) <= 48
