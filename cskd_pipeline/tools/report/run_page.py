"""The page of training runs: their ranking, their curves, and their students' dense labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cskd_pipeline.runtime.classes import COMMAND_SWITCH, ClassGuard
from cskd_pipeline.tools.report import curves
from cskd_pipeline.tools.report.dense_overlay import (
    StudentLabels,
    compare,
    draw_agreement,
    script_data,
)
from cskd_pipeline.tools.report.page import PageOptions, render, write_page
from cskd_pipeline.tools.report.ranking import SEEDS_DIFFER_IN, Contender, duration, rank, verdict
from cskd_pipeline.tools.report.records import RunRecord, epoch_name, read_runs, recipe_differences


def show_runs(folders: Sequence[Path], out: Path, options: PageOptions) -> dict[str, Any]:
    """Write ``out/index.html`` for ``cskd-pipeline show RUN...``.

    Exported plots are ``top1_epochs``, ``top1_time``, ``dense_agreement``, and one for each curve
    of :data:`cskd_pipeline.tools.report.curves.GROUPS`, by its name.

    Returns:
        The files written, the page's size in bytes, and each run's figures, by name.
    """
    runs = read_runs(folders)
    differences = recipe_differences(runs)
    ranked = rank(runs)
    contenders = sorted(ranked, key=lambda one: one.style)
    top1 = list(curves.draw_top1(contenders))
    drawn = {name: list(curves.draw(contenders, group)) for name, group in curves.GROUPS.items()}
    plots = [*top1, *(plot for group in drawn.values() for plot in group)]
    guard = ClassGuard(COMMAND_SWITCH, accept=options.accept_classes)
    compared, without = None, dict[str, str]()
    if options.shards is not None:
        compared, without = compare(runs, guard, options)
    students = () if compared is None else compared.students
    dense: dict[str, dict[str, Any]] = {one.run.name: {"dense": one.figures()} for one in students}
    dense |= {name: {"dense": reason} for name, reason in without.items()}
    agreement_plot = None if compared is None else draw_agreement(compared)
    document = render(
        "runs.html",
        runs[0].name if len(runs) == 1 else f"{len(runs)} training runs",
        data={} if compared is None else script_data(compared),
        scripts=() if compared is None else ("locations.js", "runs.js"),
        runs=runs,
        winner=ranked[0].name,
        verdict=verdict(ranked),
        ranking=_ranking(ranked),
        names=[one.name for one in contenders],
        top1=top1,
        overview=[_overview(run) for run in runs],
        students=list(dict.fromkeys(run.recipe.student.name for run in runs)),
        differences=[
            (name, *values)
            for name, values in recipe_differences([one.runs[0] for one in contenders]).items()
            if name not in SEEDS_DIFFER_IN
        ],
        curves=drawn,
        compared=compared,
        without=without,
        agreement=[_agreement(one) for one in students],
        agreement_plot=agreement_plot,
    )
    if agreement_plot is not None:
        plots.append(agreement_plot)
    return {
        **write_page(out, document, plots, options.export),
        "runs": {run.name: _figures(run) | dense.get(run.name, {}) for run in runs},
        "accepted_classes": guard.accepted,
        "differences": differences,
    }


def _figures(run: RunRecord) -> dict[str, Any]:
    """Return a run's numbers; top-1 in percent and data wait as a fraction, as in the log."""
    return {
        "folder": str(run.folder),
        "method": run.method,
        "student": run.recipe.student.name,
        "schedule": run.schedule,
        "epochs": run.epochs,
        "epochs_in_all": run.recipe.schedule.epochs,
        "best": run.best(),
        **{column: run.last(column) for column in ("loss", "top1", "ema_top1")},
        **{column: run.mean(column) for column in ("images_per_second", "data_wait")},
        "seconds": None if (spent := run.elapsed()) is None else spent[-1],
    }


def _ranking(ranked: Sequence[Contender]) -> list[tuple[object, ...]]:
    """Return a row for each recipe: top-1, gap to the first, and cost."""
    first, lines = ranked[0].best, list[tuple[object, ...]]()
    for one in ranked:
        best, epochs = one.best, min(run.epochs for run in one.runs)
        gap = None
        if best is not None and first is not None and one is not ranked[0]:
            gap = f"{best.mean - first.mean:.2f}"
        lines.append(
            (
                {"name": one.name, "style": one.style},
                None if best is None else str(best),
                gap,
                len(one.runs),
                _progress(epochs, one.runs[0].recipe.schedule.epochs),
                None if one.seconds is None else duration(one.seconds),
                *_speed(one),
            )
        )
    return lines


def _overview(run: RunRecord) -> tuple[object, ...]:
    best = run.best()
    return (
        run.name,
        run.method,
        run.schedule,
        _progress(run.epochs, run.recipe.schedule.epochs),
        None if best is None else round(best["top1"], 2),
        None if best is None else epoch_name(best["epoch"], best["weights"]),
        *(None if (v := run.last(name)) is None else round(v, 2) for name in ("top1", "ema_top1")),
        *_speed(run),
    )


def _progress(epochs: int, planned: int) -> str:
    return str(planned) if epochs >= planned else f"{epochs} of {planned}"


def _speed(one: RunRecord | Contender) -> tuple[object, object]:
    """Return images per second, and the share of time spent waiting for data, in percent."""
    speed, wait = one.mean("images_per_second"), one.mean("data_wait")
    return None if speed is None else round(speed), None if wait is None else round(100 * wait, 1)


def _agreement(one: StudentLabels) -> tuple[object, ...]:
    return (
        one.run.name,
        epoch_name(one.header.epoch, one.header.weights),
        *(round(100 * one.at(r), 1) for r in (1.0, one.last_ratio)),
        round(one.last_ratio, 3),
        round(100 * one.at(0.0), 1),
    )
