"""The page of training runs: their curves side by side, and what their students say of places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cskd_pipeline.runtime.atomic import write_text
from cskd_pipeline.runtime.classes import ClassGuard
from cskd_pipeline.tools.report import curves, page, plots, predictions
from cskd_pipeline.tools.report.cache_page import PAGE
from cskd_pipeline.tools.report.curves import side_by_side
from cskd_pipeline.tools.report.dense_overlay import StudentLabels, compare, last_ratio
from cskd_pipeline.tools.report.records import RunRecord, read_runs, recipe_differences, which

IMAGES = 8
SAMPLES = 256
_KEYS = 200  # of recipes that differ, shown


def show_runs(
    folders: Sequence[Path],
    out: Path,
    *,
    shards: str | None = None,
    cache: str | None = None,
    split: str | None = None,
    images: int = IMAGES,
    samples: int = SAMPLES,
    export: str | None = None,
    accept_classes: bool = False,
) -> dict[str, Any]:
    """``cskd-pipeline show RUN...``: write ``out/index.html``.

    Args:
        shards, split: the images that the runs' cache was made from; None: no predictions.
        cache: what the runs were trained from; None: the folder that the first recipe names.
        images: views that are shown with predictions.
        samples: views over which agreement is counted.
        export: one of ``plots.FORMATS``, in which each plot becomes a file too, named as its curve
            (:data:`cskd_pipeline.tools.report.curves.GROUPS`) or ``dense_agreement``.
        accept_classes: class k is the same in shards, cache and students, whatever the names say.

    Returns:
        The files, the page's bytes, and each run's figures, by its name.

    Raises:
        CskdError: a run, the cache or the shards cannot be used, or do not belong together.
    """
    runs = read_runs(folders)
    differences = recipe_differences(runs)
    drawn = {name: list(curves.draw(runs, group)) for name, group in curves.GROUPS.items()}
    sections = [
        _overview(runs, differences),
        *(page.section(name, side_by_side(found)) for name, found in drawn.items() if found),
    ]
    compared, without, guard = None, dict[str, str](), ClassGuard(accept=accept_classes)
    if shards is not None:
        compared, without = compare(
            runs,
            shards,
            guard,
            cache=cache,
            split=split,
            images=images,
            samples=samples,
        )
        if compared is not None:
            drawn["dense"] = [predictions.agreement_plot(compared)]
        sections.append(predictions.section(compared, without, drawn.get("dense", [])))
    document = page.page(
        runs[0].name if len(runs) == 1 else f"{len(runs)} training runs",
        sections,
        data={} if compared is None else predictions.data_of(compared),
        script="" if compared is None else page.asset("places.js") + page.asset("runs.js"),
    )
    write_text(out / PAGE, document)
    every = [] if export is None else [plot for found in drawn.values() for plot in found]
    files = [out / f"{plot.name}.{export}" for plot in every]
    for file, plot in zip(files, every, strict=True):
        plots.write(plot.figure, file, plot.title, plot.description)
    students = () if compared is None else compared.students
    return {
        "page": str(out / PAGE),
        "bytes": len(document.encode()),
        "plots": [str(file) for file in files],
        "runs": {run.name: _figures(run, students, without) for run in runs},
        "accepted_classes": guard.accepted,
        "differences": differences,
    }


def _figures(
    run: RunRecord, students: Sequence[StudentLabels], without: Mapping[str, str]
) -> dict[str, Any]:
    """A run in numbers; top-1 and data wait in percent and share, as the log has them."""
    found: dict[str, Any] = {
        "folder": str(run.folder),
        "method": run.method,
        "student": run.recipe.student.name,
        "schedule": run.recipe.distill.schedule if run.method == "cskd" else None,
        "epochs": run.epochs,
        "epochs_in_all": run.recipe.schedule.epochs,
        "best": run.best(),
        **{column: run.last(column) for column in ("loss", "top1", "ema_top1")},
        **{column: run.mean(column) for column in ("images_per_second", "data_wait")},
    }
    for one in students:
        if one.run is run:
            found["dense"] = {
                "student": str(one.file),
                "weights": one.card.weights,
                "epoch": one.card.epoch,
                "agreement": {"r=1": one.at(1), "r=0": one.at(0), "last": one.at(last_ratio(run))},
            }
    if run.name in without:
        found["dense"] = without[run.name]
    return found


def _overview(runs: Sequence[RunRecord], differences: Mapping[str, Sequence[str]]) -> str:
    columns = ("run", "method", "CKF schedule", "epochs", "best top-1, %", "of", "last top-1, %",
               "last EMA top-1, %", "images/s", "data wait, %")  # fmt: skip
    told = [page.table(columns, map(_row, runs))]
    students = dict.fromkeys(run.recipe.student.name for run in runs)
    told.append(page.paragraph(f"Student: {', '.join(students)}."))
    told += [
        page.paragraph(f"{run.name} has not finished an epoch yet: there is nothing to draw.")
        for run in runs
        if not run.rows
    ]
    if differences:
        rows = [(name, *values) for name, values in differences.items()]
        told.append("<h3>Where their recipes differ</h3>")
        told.append(page.table(("recipe", *(run.name for run in runs)), rows[:_KEYS]))
        if len(rows) > _KEYS:
            told.append(page.paragraph(f"And {len(rows) - _KEYS} keys more, which --json lists."))
    elif len(runs) > 1:
        told.append(page.paragraph("Their recipes do not differ."))
    return page.section("Runs" if len(runs) > 1 else "The run", *told, name="runs")


def _row(run: RunRecord) -> tuple[object, ...]:
    best, wait, speed = run.best(), run.mean("data_wait"), run.mean("images_per_second")
    of = run.recipe.schedule.epochs
    return (
        run.name,
        run.method,
        run.recipe.distill.schedule if run.method == "cskd" else None,
        str(of) if run.finished else f"{run.epochs} of {of}",
        None if best is None else round(best["top1"], 2),
        None if best is None else which(best["epoch"], best["weights"]),
        *(None if (v := run.last(name)) is None else round(v, 2) for name in ("top1", "ema_top1")),
        None if speed is None else round(speed),
        None if wait is None else round(100 * wait, 1),
    )
