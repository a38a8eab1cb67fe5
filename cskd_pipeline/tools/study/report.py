"""The results of the study: tables, verdicts on the paper's claims, and a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cskd_pipeline.runtime.atomic import write_text
from cskd_pipeline.tools.report import plots
from cskd_pipeline.tools.report.plot_files import FORMATS, write_plot
from cskd_pipeline.tools.study.arms import (
    ARMS,
    CLAIMS,
    ORDERING,
    Arm,
    Claim,
    ForkPoint,
    StudyRun,
)
from cskd_pipeline.tools.study.verdicts import MeanOfRuns, judge, ordering
from cskd_pipeline.tools.tables import Printed, Table

Results = Mapping[str, Mapping[str, Any]]
"""A run's name -> ``top1``, ``per_head``, ``ema``, ``attention``, ``rows``, ``seconds``."""

HEADS = ("cls", "dist", "dense")
MEASURES = ("mean", *HEADS, "EMA")
COLUMNS = ("trained with", "seeds", "top-1 %", "each seed", *HEADS, "EMA", "attention, px")
NOTE = (
    "Top-1 of the last weights by the mean of the heads that the method trains, then each head's "
    "alone, then the weights' moving average. Deviations are sample standard deviations over "
    "seeds; a paired difference has its standard error, and is within noise below two of them. "
    "Attention: how far a patch looks, first and last layer. One teacher and one cache serve all "
    "seeds."
)


def make_report(results: Results, forks: Mapping[int, ForkPoint]) -> dict[str, Any]:
    """Return arms, forks and verdicts as plain data; of every seed of ``forks`` all arms are there.

    Args:
        results: by the runs' names.
        forks: seed -> where its trunk was forked.
    """
    seeds = list(forks)
    top1 = {arm.name: _values(results, arm, seeds, "mean") for arm in ARMS}
    claims = [_claim(claim, results, seeds) for claim in CLAIMS]
    chain = [judge(top1[claim.better], top1[claim.worse]) for claim in ORDERING]
    return {
        "arms": [_arm(arm, results, seeds) for arm in ARMS],
        "forks": {str(seed): asdict(fork) for seed, fork in forks.items()},
        "claims": claims,
        "ordering": {"claim": "cskd > deit > none", "verdict": ordering(chain)},
    }


def _values(results: Results, arm: Arm, seeds: Sequence[int], measure: str) -> dict[int, float]:
    """Return seed -> top-1 in percent by one of :data:`MEASURES`; none where it has no such."""
    found = {}
    for seed in seeds:
        result = results[StudyRun(arm, seed).name]
        by_measure = {"mean": result["top1"], **result["per_head"]}
        if "mean" in result["ema"]:
            by_measure["EMA"] = result["ema"]["mean"]
        if measure in by_measure:
            found[seed] = by_measure[measure]
    return found


def _arm(arm: Arm, results: Results, seeds: Sequence[int]) -> dict[str, Any]:
    own = [results[StudyRun(arm, seed).name] for seed in seeds]
    means: dict[str, Any] = {}
    for measure in MEASURES:
        values = _values(results, arm, seeds, measure)
        means[measure] = MeanOfRuns.of(list(values.values())) if values else None
    spread = means["mean"]
    layers = zip(*(result["attention"] for result in own), strict=True)
    return {
        "name": arm.name,
        "method": arm.method,
        "fork": arm.fork,
        "label": arm.label,
        "n": spread.n,
        "mean": spread.mean,
        "deviation": spread.deviation,
        "text": str(spread),
        "top1": {str(seed): result["top1"] for seed, result in zip(seeds, own, strict=True)},
        "measures": {name: found and found.mean for name, found in means.items()},
        "attention": [sum(layer) / len(own) for layer in layers],
        "runs": {str(seed): result for seed, result in zip(seeds, own, strict=True)},
        "seconds": sum(result["seconds"] for result in own) / len(own),
    }


def _claim(claim: Claim, results: Results, seeds: Sequence[int]) -> dict[str, Any]:
    sides = {arm.name: arm for arm in ARMS}
    pairs = {
        measure: tuple(
            _values(results, sides[name], seeds, measure) for name in (claim.better, claim.worse)
        )
        for measure in MEASURES
    }
    verdict = judge(*pairs["mean"])
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
        "by_head": {
            measure: {"difference": (found := judge(*pair).difference).mean, "error": found.error}
            for measure, pair in pairs.items()
            if pair[0] and pair[1]
        },
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
            arm["label"],
            str(arm["n"]),
            arm["text"],
            " ".join(f"{value:.2f}" for value in arm["top1"].values()),
            *(_percent(arm["measures"][name]) for name in MEASURES[1:]),
            f"{arm['attention'][0]:.1f}, {arm['attention'][-1]:.1f}",
        ]
        for arm in report["arms"]
    ]


def claim_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each claim: its verdict, and the paired difference by every head."""
    return [
        [one["claim"], one["verdict"], *(_difference(one["by_head"].get(m)) for m in MEASURES)]
        for one in report["claims"]
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    error = "" if found["error"] is None else f" ± {found['error']:.2f}"
    return f"{found['difference']:+.2f}{error}"


def about(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield how good the teacher is, what it was trained on, and where the forks begin."""
    teacher, images = report["teacher"], report["images"]
    yield (
        f"teacher {teacher['student']}: top-1 {teacher['top1']:.2f} % on {images['validation']:,} "
        f"images, trained on {images['training']:,} for {teacher['epochs']} epochs; it is right at "
        f"{teacher['local']:.2f} % of the locations"
    )
    for seed, fork in report["forks"].items():
        reached = "as high as that" if fork["reached"] else "still lower, at half of the run"
        yield (
            f"seed {seed}: forked after epoch {fork['epoch']}, the dense head's top-1 "
            f"{_percent(fork['dense'])} %, {reached}"
        )


CLAIM_COLUMNS = ("claim", "verdict", *(f"{measure}, paired" for measure in MEASURES))


def printed(report: Mapping[str, Any]) -> Printed:
    """Yield the students, the claims, and what else there is to know."""
    yield Table("Students' top-1, last weights", COLUMNS, rows(report))
    yield Table("The paper's claims", CLAIM_COLUMNS, claim_rows(report))
    ordered = report["ordering"]
    yield f"the paper's ordering {ordered['claim']}: {ordered['verdict']}"
    yield from about(report)
    yield NOTE
    yield f"{report['seconds']:.0f} s; everything is in {report['out']}"


def write_files(report: Mapping[str, Any], out: Path) -> None:
    """Write ``table.md``, ``table.csv`` (a row a run), ``curves.csv`` (a row an epoch), and
    ``study.svg`` and ``study.png``.
    """
    tables = [(COLUMNS, rows(report)), (CLAIM_COLUMNS, claim_rows(report))]
    text = "\n".join(_markdown(columns, cells) for columns, cells in tables)
    lines = [*about(report), *verdict_lines(report), NOTE]
    write_text(out / "table.md", f"{text}\n" + "".join(f"- {line}\n" for line in lines))
    write_text(out / "table.csv", _csv(report))
    write_text(out / "curves.csv", _curves(report))
    arms = report["arms"]
    figure = plots.means(
        [arm["label"] for arm in arms],
        [list(arm["top1"].values()) for arm in arms],
        [arm["mean"] for arm in arms],
        [arm["deviation"] for arm in arms],
        x_label="top-1, %",
    )
    description = "; ".join(f"{arm['label']} {arm['text']}" for arm in arms)
    for ending in FORMATS:
        write_plot(
            figure, out / f"study.{ending}", "Students' top-1: mean, deviation, seeds", description
        )


def _markdown(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *cells]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def _runs(report: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for arm in report["arms"]:
        for seed, run in arm["runs"].items():
            yield arm["name"], seed, run


def _csv(report: Mapping[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [f"top1_{head}" for head in HEADS]
    ema = ["ema_top1", *(f"ema_{name}" for name in names)]
    writer.writerow(["arm", "seed", "top1", *names, *ema, "attention"])
    for arm, seed, run in _runs(report):
        heads = [run["per_head"].get(head, "") for head in HEADS]
        averaged = [run["ema"].get(head, "") for head in ("mean", *HEADS)]
        layers = " ".join(f"{layer:.3f}" for layer in run["attention"])
        writer.writerow([arm, seed, run["top1"], *heads, *averaged, layers])
    return text.getvalue()


def _curves(report: Mapping[str, Any]) -> str:
    text = io.StringIO()
    names = ["epoch", "ckf_ratio"]
    names += [
        f"{ema}top1{head}" for ema in ("", "ema_") for head in ("", *map("_{}".format, HEADS))
    ]
    writer = csv.DictWriter(text, ["arm", "seed", *names], restval="", lineterminator="\n")
    writer.writeheader()
    for arm, seed, run in _runs(report):
        writer.writerows({"arm": arm, "seed": seed} | row for row in run["rows"])
    return text.getvalue()
