"""The curves of training runs: their columns in the log, their names, and one plot for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cskd_pipeline.tools.report import plots
from cskd_pipeline.tools.report.plot_files import Plot
from cskd_pipeline.tools.report.records import RunRecord

_DISTILLED = ("deit", "cskd")
_SPATIAL = ("cskd",)
_ALL = ("none", *_DISTILLED)


@dataclass(frozen=True)
class Curve:
    """One column of the log.

    Args:
        name: of the plot's file, without ending.
        scale: factor on the logged number.
        methods: of the runs that have it; the others log a constant.
        shared: curves of one such name have a common y axis.
        floor: a y that the axis reaches down to.
    """

    name: str
    title: str
    column: str
    y_label: str
    caption: str
    scale: float = 1.0
    methods: tuple[str, ...] = _ALL
    shared: str = ""
    floor: float | None = None


LOSSES = (
    Curve("loss", "Loss", "loss", "loss", "Its parts, weighted by alpha and lambda."),
    Curve(
        *("loss_base", "Loss on the labels", "base", "base loss"),
        "Cross entropy with the images' labels, mixed as the views are, and smoothed.",
    ),
    Curve(
        *("loss_global", "Loss on the global logits", "global", "global loss"),
        "Of the distillation head, against the teacher's logits for the whole view.",
        methods=_DISTILLED,
    ),
    Curve(
        *("loss_spatial", "Loss on the logits of every location", "spatial", "spatial loss"),
        "Of the dense head, against the teacher's fused logits, which change with r.",
        methods=_SPATIAL,
    ),
)
TOP1 = tuple(
    Curve(name, title, column, "top-1, %", caption, shared="top1")
    for name, title, column, caption in (
        ("top1", "Top-1", "top1", "Of the mean of the heads, which is the student's prediction."),
        ("top1_ema", "Top-1, EMA", "ema_top1", "The same with the running average of the weights."),
        ("top1_cls", "Top-1, class head", "top1_cls", "Alone."),
        ("top1_dist", "Top-1, distillation head", "top1_dist", "Alone."),
        ("top1_dense", "Top-1, dense head", "top1_dense", "Alone, the mean over all locations."),
    )
)
COURSE = (
    Curve("lr", "Learning rate", "lr", "learning rate", "In the last update of an epoch.", floor=0),
    Curve(
        *("ckf_ratio", "CKF ratio", "ckf_ratio", "r"),
        "1: the teacher's local logits alone, 0: its global ones. In the last update of an epoch.",
        methods=_SPATIAL,
        floor=0,
    ),
    Curve(
        *("images_per_second", "Throughput", "images_per_second", "images/s"),
        "Of training alone, without evaluation.",
        floor=0,
    ),
    Curve(
        *("data_wait", "Data wait", "data_wait", "% of the time"),
        "How long training waited for data.",
        scale=100.0,
        floor=0,
    ),
)
GROUPS: dict[str, tuple[Curve, ...]] = {
    "Loss and its parts": LOSSES,
    "Top-1 on the validation images": TOP1,
    "Schedule and speed": COURSE,
}
"""Side by side under a heading each; every plot's file has its curve's name."""


def series(runs: Sequence[RunRecord], curve: Curve) -> list[plots.Series]:
    """Return one series per run that has the curve, over epochs, in the run's style."""
    found = []
    for style, run in enumerate(runs):
        epochs, values = run.column(curve.column)
        if epochs and run.method in curve.methods:
            scaled = [curve.scale * value for value in values]
            found.append(plots.Series(run.name, epochs, scaled, style))
    return found


def draw(runs: Sequence[RunRecord], curves: Sequence[Curve]) -> Iterator[Plot]:
    """Yield the plots of those curves that any run has."""
    drawn = {curve: found for curve in curves if (found := series(runs, curve))}
    for curve, found in drawn.items():
        together = [one for other, s in drawn.items() if other.shared == curve.shared for one in s]
        figure = plots.lines(
            found,
            x_label="epoch",
            y_label=curve.y_label,
            y_limits=_limits(together if curve.shared else found, curve),
            legend=len(runs) > 1,
        )
        yield Plot(curve.name, curve.title, figure, curve.caption, _description(found, curve))


def _limits(found: Sequence[plots.Series], curve: Curve) -> tuple[float, float] | None:
    """Return a common range for curves that are compared across plots, or one from the floor up."""
    if not curve.shared and curve.floor is None:
        return None
    values = [y for one in found for y in one.y]
    low = min(values) if curve.floor is None else min([curve.floor, *values])
    high = max(values)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low - room if curve.floor is None else low, high + room)


def _description(found: Sequence[plots.Series], curve: Curve) -> str:
    parts = [
        f"{plots.shown(one.name)}: {plots.number(one.y[0])} at epoch {one.x[0]}, "
        f"{plots.number(one.y[-1])} at epoch {one.x[-1]}"
        for one in found
    ]
    return f"{curve.y_label} over epochs. {'; '.join(parts)}"
