"""The results of the study: tables, verdicts on the paper's claims, and a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from cskd_pipeline.runtime.atomic import write_csv, write_text
from cskd_pipeline.tools.report import plots
from cskd_pipeline.tools.report.plot_files import FORMATS, Plot
from cskd_pipeline.tools.study.arms import ARMS, CLAIMS, ORDERING, Arm, Claim, ForkPoint, StudyRun
from cskd_pipeline.tools.study.verdicts import MeanOfRuns, Verdict, judge, ordering
from cskd_pipeline.tools.tables import Printed, Table, markdown_table

Results = Mapping[str, Mapping[str, Any]]
"""A run's name -> ``top1``, ``per_head``, ``ema``, ``attention``, ``rows``, ``seconds``."""
Measured = Mapping[str, Mapping[int, float]]
"""One of :data:`MEASURES` -> seed -> top-1 in percent; without those that an arm does not have."""

HEADS = ("cls", "dist", "dense")
MEASURES = ("mean", *HEADS, "EMA")
COLUMNS = ("trained with", "seeds", "top-1 %", "each seed", *HEADS, "EMA", "attention, px")
CLAIM_COLUMNS = ("claim", "verdict", *(f"{measure}, paired" for measure in MEASURES))
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
    runs = {arm: {seed: results[StudyRun(arm, seed).name] for seed in forks} for arm in ARMS}
    measured = {arm.name: _measured(own) for arm, own in runs.items()}
    judged = {claim: _judge(measured[claim.better], measured[claim.worse]) for claim in CLAIMS}
    return {
        "arms": [_arm(arm, own, measured[arm.name]) for arm, own in runs.items()],
        "forks": {str(seed): asdict(fork) for seed, fork in forks.items()},
        "claims": [_claim(claim, verdicts) for claim, verdicts in judged.items()],
        "ordering": {
            "claim": "cskd > deit > none",
            "verdict": ordering([judged[claim]["mean"] for claim in ORDERING]),
        },
    }


def _measured(runs: Mapping[int, Mapping[str, Any]]) -> Measured:
    found: dict[str, dict[int, float]] = {measure: {} for measure in MEASURES}
    for seed, run in runs.items():
        top1 = {"mean": run["top1"], **run["per_head"]}
        if "mean" in run["ema"]:
            top1["EMA"] = run["ema"]["mean"]
        for measure, value in top1.items():
            found[measure][seed] = value
    return {measure: values for measure, values in found.items() if values}


def _judge(better: Measured, worse: Measured) -> dict[str, Verdict]:
    return {name: judge(better[name], worse[name]) for name in better if name in worse}


def _arm(arm: Arm, runs: Mapping[int, Mapping[str, Any]], top1: Measured) -> dict[str, Any]:
    means = {measure: MeanOfRuns.of(list(values.values())) for measure, values in top1.items()}
    layers = zip(*(run["attention"] for run in runs.values()), strict=True)
    return {
        "name": arm.name,
        "method": arm.method,
        "fork": arm.fork,
        "label": arm.label,
        **asdict(means["mean"]),
        "text": str(means["mean"]),
        "top1": {str(seed): value for seed, value in top1["mean"].items()},
        "measures": {name: means[name].mean if name in means else None for name in MEASURES},
        "attention": [fmean(layer) for layer in layers],
        "runs": {str(seed): run for seed, run in runs.items()},
        "seconds": fmean(run["seconds"] for run in runs.values()),
    }


def _claim(claim: Claim, verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    verdict = verdicts["mean"]
    by_head = {measure: found.difference for measure, found in verdicts.items()}
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
            measure: {"difference": found.mean, "error": found.error}
            for measure, found in by_head.items()
        },
    }


def _tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the arms, then the claims: their verdicts, and the paired difference by every head."""
    arms = [
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
    yield Table("Students' top-1, last weights", COLUMNS, arms)
    claims = [
        [one["claim"], one["verdict"], *(_difference(one["by_head"].get(m)) for m in MEASURES)]
        for one in report["claims"]
    ]
    yield Table("The paper's claims", CLAIM_COLUMNS, claims)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    error = "" if found["error"] is None else f" ± {found['error']:.2f}"
    return f"{found['difference']:+.2f}{error}"


def _about(report: Mapping[str, Any]) -> Iterator[str]:
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


def _ordering(report: Mapping[str, Any]) -> str:
    return "the paper's ordering {claim}: {verdict}".format(**report["ordering"])


def printed(report: Mapping[str, Any]) -> Printed:
    """Yield the students, the claims, and what else there is to know."""
    yield from _tables(report)
    yield _ordering(report)
    yield from _about(report)
    yield NOTE
    yield f"{report['seconds']:.0f} s; everything is in {report['out']}"


def write_files(report: Mapping[str, Any], out: Path) -> None:
    """Write ``table.md``, ``table.csv`` (a row a run), ``curves.csv`` (a row an epoch), and
    ``study.svg`` and ``study.png``.
    """
    tables = "\n".join(markdown_table(table.columns, table.rows) for table in _tables(report))
    claims = [f"{one['claim']}: {one['verdict']} ({one['numbers']})" for one in report["claims"]]
    lines = [*_about(report), _ordering(report), *claims, NOTE]
    write_text(out / "table.md", f"{tables}\n" + "".join(f"- {line}\n" for line in lines))
    names = [f"{ema}top1{head}" for ema in ("", "ema_") for head in ("", *map("_{}".format, HEADS))]
    write_csv(out / "table.csv", ["arm", "seed", *names, "attention"], _run_rows(report))
    epochs = (
        {"arm": arm["name"], "seed": seed} | row
        for arm in report["arms"]
        for seed, run in arm["runs"].items()
        for row in run["rows"]
    )
    write_csv(out / "curves.csv", ["arm", "seed", "epoch", "ckf_ratio", *names], epochs)
    arms = report["arms"]
    figure = plots.means(
        [arm["label"] for arm in arms],
        [list(arm["top1"].values()) for arm in arms],
        [arm["mean"] for arm in arms],
        [arm["deviation"] for arm in arms],
        x_label="top-1, %",
    )
    title = "Students' top-1: mean, deviation, seeds"
    description = "; ".join(f"{arm['label']} {arm['text']}" for arm in arms)
    for ending in FORMATS:
        Plot("study", title, figure, description).write(out / f"study.{ending}")


def _run_rows(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for arm in report["arms"]:
        for seed, run in arm["runs"].items():
            heads = {f"top1_{head}": value for head, value in run["per_head"].items()}
            averaged = {
                "ema_top1" if head == "mean" else f"ema_top1_{head}": value
                for head, value in run["ema"].items()
            }
            layers = " ".join(f"{layer:.3f}" for layer in run["attention"])
            row = {"arm": arm["name"], "seed": seed, "top1": run["top1"], "attention": layers}
            yield row | heads | averaged
