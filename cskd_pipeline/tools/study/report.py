"""The study's report: tables, verdicts on the paper's claims, and a plot."""

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
"""Name of a run -> ``top1``, ``per_head``, ``ema``, ``attention``, ``rows``, ``seconds``."""
Top1 = Mapping[str, Mapping[int, float]]
"""One of :data:`MEASURES`, if the arm has it -> seed -> top-1 in percent."""

HEADS = ("cls", "dist", "dense")
MEASURES = ("mean", *HEADS, "EMA")
COLUMNS = ("trained with", "seeds", "top-1 %", "each seed", *HEADS, "EMA", "attention, px")
CLAIM_COLUMNS = ("claim", "verdict", *(f"Δ {measure}" for measure in MEASURES))
NOTE = (
    "Top-1 is that of the last weights: the mean of the trained heads, each head alone, and the "
    "weights' moving average (EMA). Means have their sample standard deviation over seeds. Δ: mean "
    "difference paired by seed, with its standard error; within noise below two standard errors. "
    "Attention: mean attention distance in the first and last layer. All seeds share one teacher "
    "and one cache."
)


def make_report(results: Results, forks: Mapping[int, ForkPoint]) -> dict[str, Any]:
    """Return arms, forks and verdicts as plain data.

    Args:
        results: results of every arm with each seed of ``forks``.
        forks: seed -> fork point of its trunk.
    """
    runs = {arm: {seed: results[StudyRun(arm, seed).name] for seed in forks} for arm in ARMS}
    top1 = {arm.name: _top1(by_seed) for arm, by_seed in runs.items()}
    judged = {claim: _judge(top1[claim.better], top1[claim.worse]) for claim in CLAIMS}
    return {
        "arms": [_arm(arm, by_seed, top1[arm.name]) for arm, by_seed in runs.items()],
        "forks": {str(seed): asdict(fork) for seed, fork in forks.items()},
        "claims": [_claim(claim, verdicts) for claim, verdicts in judged.items()],
        "ordering": {
            "claim": "cskd > deit > none",
            "verdict": ordering([judged[claim]["mean"] for claim in ORDERING]),
        },
    }


def _top1(runs: Mapping[int, Mapping[str, Any]]) -> Top1:
    by_measure: dict[str, dict[int, float]] = {measure: {} for measure in MEASURES}
    for seed, run in runs.items():
        top1 = {"mean": run["top1"], **run["per_head"]}
        if "mean" in run["ema"]:
            top1["EMA"] = run["ema"]["mean"]
        for measure, value in top1.items():
            by_measure[measure][seed] = value
    return {measure: values for measure, values in by_measure.items() if values}


def _judge(better: Top1, worse: Top1) -> dict[str, Verdict]:
    return {name: judge(better[name], worse[name]) for name in better if name in worse}


def _arm(arm: Arm, runs: Mapping[int, Mapping[str, Any]], top1: Top1) -> dict[str, Any]:
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
    by_head = {measure: each.difference for measure, each in verdicts.items()}
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
            measure: {"difference": difference.mean, "error": difference.error}
            for measure, difference in by_head.items()
        },
    }


def _tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the arms, then the claims with their verdicts and each head's paired difference."""
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
        [claim["claim"], claim["verdict"], *(_delta(claim["by_head"].get(m)) for m in MEASURES)]
        for claim in report["claims"]
    ]
    yield Table("The paper's claims", CLAIM_COLUMNS, claims)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _delta(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return "-"
    error = "" if measured["error"] is None else f" ± {measured['error']:.2f}"
    return f"{measured['difference']:+.2f}{error}"


def _about(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the teacher's accuracy and training, and each seed's fork point."""
    teacher, images = report["teacher"], report["images"]
    yield (
        f"teacher {teacher['student']}: trained on {images['training']:,} images for "
        f"{teacher['epochs']} epochs; top-1 {teacher['top1']:.2f} % on {images['validation']:,} "
        f"validation images, local accuracy {teacher['local']:.2f} % (locations that predict the "
        "image's class)"
    )
    for seed, fork in report["forks"].items():
        reached = "reaching" if fork["reached"] else "still below"
        yield (
            f"seed {seed}: forked after epoch {fork['epoch']} with the dense head's top-1 at "
            f"{_percent(fork['dense'])} %, {reached} the teacher's local accuracy"
        )


def _ordering(report: Mapping[str, Any]) -> str:
    return "the paper's ordering {claim}: {verdict}".format(**report["ordering"])


def printed(report: Mapping[str, Any]) -> Printed:
    """Yield the students, the claims, teacher and forks, and a note on the figures."""
    yield from _tables(report)
    yield _ordering(report)
    yield from _about(report)
    yield NOTE
    yield f"took {report['seconds']:.0f} s; results in {report['out']}"


def write_files(report: Mapping[str, Any], out: Path) -> None:
    """Write ``table.md``, ``table.csv`` (one row per run), ``curves.csv`` (one row per epoch), and
    ``study.svg`` and ``study.png``.
    """
    tables = "\n".join(markdown_table(table.columns, table.rows) for table in _tables(report))
    claims = ["{claim}: {verdict} ({numbers})".format(**claim) for claim in report["claims"]]
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
    title = "Students' top-1: mean, standard deviation, seeds"
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
