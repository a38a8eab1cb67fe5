"""The results of the study: a table, verdicts on the paper's claims, and a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cskd_pipeline.runtime.atomic import write_text
from cskd_pipeline.tools.report import plots
from cskd_pipeline.tools.report.plot_files import FORMATS, write_plot
from cskd_pipeline.tools.study.arms import ARMS, FUSION, ORDERING, Claim, StudyRun
from cskd_pipeline.tools.study.verdicts import MeanOfRuns, Verdict, judge, ordering
from cskd_pipeline.tools.tables import Printed, Table

COLUMNS = ("trained with", "seeds", "top-1 %, mean ± deviation", "each seed", "seconds a run")
NOTE = (
    "Deviations are sample standard deviations over seeds; a paired difference has its standard "
    "error, and is within noise below two of them. One teacher and one cache serve all seeds."
)


def make_report(
    runs: Sequence[StudyRun], results: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return methods and verdicts as plain data.

    Args:
        results: a run's name -> ``top1`` in percent, ``per_head``, ``seconds``; of every run.
    """
    top1: dict[str, dict[int, float]] = {}
    for run in runs:
        top1.setdefault(run.arm.name, {})[run.seed] = results[run.name]["top1"]
    claims = {claim: judge(top1[claim.better], top1[claim.worse]) for claim in (*ORDERING, FUSION)}
    methods = []
    for arm in ARMS:
        spread = MeanOfRuns.of(list(top1[arm.name].values()))
        own = [results[run.name] for run in runs if run.arm == arm]
        methods.append(
            {
                "name": arm.name,
                "method": arm.method,
                "schedule": arm.schedule,
                "label": arm.label,
                "n": spread.n,
                "mean": spread.mean,
                "deviation": spread.deviation,
                "text": str(spread),
                "top1": {str(seed): value for seed, value in top1[arm.name].items()},
                "per_head": {
                    str(run.seed): results[run.name]["per_head"] for run in runs if run.arm == arm
                },
                "seconds": sum(one["seconds"] for one in own) / len(own),
            }
        )
    return {
        "methods": methods,
        "claims": [_claim(claim, verdict) for claim, verdict in claims.items()],
        "ordering": {
            "claim": "cskd > deit > none",
            "verdict": ordering([claims[claim] for claim in ORDERING]),
        },
    }


def _claim(claim: Claim, verdict: Verdict) -> dict[str, Any]:
    return {
        "claim": claim.text,
        "better": claim.better,
        "worse": claim.worse,
        "held": verdict.held,
        "clear": verdict.clear,
        "difference": verdict.difference.mean,
        "error": verdict.difference.error,
        "paired": list(verdict.differences),
        "verdict": verdict.word,
        "numbers": verdict.numbers,
    }


def verdict_lines(report: Mapping[str, Any]) -> list[str]:
    """Return one line for the ordering, then one for each claim."""
    ordered = report["ordering"]
    return [
        f"the paper's ordering {ordered['claim']}: {ordered['verdict']}",
        *(f"{one['claim']}: {one['verdict']} ({one['numbers']})" for one in report["claims"]),
    ]


def rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the table's cells, in the order of :data:`COLUMNS`."""
    return [
        [
            method["label"],
            str(method["n"]),
            method["text"],
            " ".join(f"{value:.2f}" for value in method["top1"].values()),
            f"{method['seconds']:.0f}",
        ]
        for method in report["methods"]
    ]


def teacher_line(report: Mapping[str, Any]) -> str:
    """Return how good the teacher is, and what it was trained on."""
    teacher, images = report["teacher"], report["images"]
    return (
        f"teacher {teacher['student']}: top-1 {teacher['top1']:.2f} % on {images['validation']:,} "
        f"images, trained on {images['training']:,} for {teacher['epochs']} epochs"
    )


def printed(report: Mapping[str, Any]) -> Printed:
    """Yield the students, the claims, and what else there is to know."""
    yield Table("Students' top-1, last weights", COLUMNS, rows(report))
    ordered = report["ordering"]
    claims = [(one["claim"], one["verdict"], one["numbers"]) for one in report["claims"]]
    yield Table(
        "The paper's claims",
        ("claim", "verdict", "means; paired differences"),
        [(ordered["claim"], ordered["verdict"], ""), *claims],
    )
    yield teacher_line(report)
    yield NOTE
    yield f"{report['seconds']:.0f} s; everything is in {report['out']}"


def write_files(report: Mapping[str, Any], out: Path) -> None:
    """Write ``table.md``, ``table.csv`` (a row a run), ``study.svg`` and ``study.png``."""
    cells = [list(COLUMNS), ["---"] * len(COLUMNS), *rows(report)]
    table = "".join(f"| {' | '.join(row)} |\n" for row in cells)
    lines = [teacher_line(report), *verdict_lines(report), NOTE]
    write_text(out / "table.md", f"{table}\n" + "".join(f"- {line}\n" for line in lines))
    write_text(out / "table.csv", _csv(report))
    figure = plots.means(
        [method["label"] for method in report["methods"]],
        [list(method["top1"].values()) for method in report["methods"]],
        [method["mean"] for method in report["methods"]],
        [method["deviation"] for method in report["methods"]],
        x_label="top-1, %",
    )
    description = "; ".join(f"{m['label']} {m['text']}" for m in report["methods"])
    for ending in FORMATS:
        write_plot(
            figure, out / f"study.{ending}", "Students' top-1: mean, deviation, seeds", description
        )


def _csv(report: Mapping[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = ("cls", "dist", "dense")
    writer.writerow(["method", "schedule", "seed", "top1", *(f"top1_{head}" for head in heads)])
    for method in report["methods"]:
        for seed, top1 in method["top1"].items():
            found = method["per_head"][seed]
            values = [found.get(head, "") for head in heads]
            writer.writerow([method["method"], method["schedule"] or "", seed, top1, *values])
    return text.getvalue()
