"""The curves of training runs: what is drawn, under which name, and one figure for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from cskd_pipeline.tools.report import page, plots
from cskd_pipeline.tools.report.records import RunRecord

_DISTILLED = ("deit", "cskd")
_SPATIAL = ("cskd",)
_ALL = ("none", *_DISTILLED)


@dataclass(frozen=True)
class Curve:
    """One column of the log.

    Args:
        name: of the plot's file, without ending.
        caption: what it is, for a page.
        scale: what the logged number is multiplied by.
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
        *("loss_global", "Loss on the global answer", "global", "global loss"),
        "Of the distillation head, against the teacher's answer for the whole view.",
        methods=_DISTILLED,
    ),
    Curve(
        *("loss_spatial", "Loss on the answer at every place", "spatial", "spatial loss"),
        "Of the dense head, against the teacher's fused answer, which changes with r.",
        methods=_SPATIAL,
    ),
)
TOP1 = tuple(
    Curve(name, title, column, "top-1, %", caption, shared="top1")
    for name, title, column, caption in (
        ("top1", "Top-1", "top1", "Of the mean of the heads, which is the student's answer."),
        ("top1_ema", "Top-1, EMA", "ema_top1", "The same with the running average of the weights."),
        ("top1_cls", "Top-1, class head", "top1_cls", "Alone."),
        ("top1_dist", "Top-1, distillation head", "top1_dist", "Alone."),
        ("top1_dense", "Top-1, dense head", "top1_dense", "Alone, the mean over all places."),
    )
)
COURSE = (
    Curve("lr", "Learning rate", "lr", "learning rate", "In the last update of an epoch.", floor=0),
    Curve(
        *("ckf_ratio", "CKF ratio", "ckf_ratio", "r"),
        "1: the teacher's local answers alone, 0: its global one. In the last update of an epoch.",
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


@dataclass(frozen=True)
class Plot:
    """A figure with what is told of it; ``description`` is for those who cannot see it."""

    name: str
    title: str
    figure: Figure
    caption: str
    description: str


def series(runs: Sequence[RunRecord], curve: Curve) -> list[plots.Series]:
    """One per run that has the curve, over epochs; a run has the same style in every plot."""
    found = []
    for style, run in enumerate(runs):
        epochs, values = run.column(curve.column)
        if epochs and run.method in curve.methods:
            scaled = [curve.scale * value for value in values]
            found.append(plots.Series(run.name, epochs, scaled, style))
    return found


def draw(runs: Sequence[RunRecord], curves: Sequence[Curve]) -> Iterator[Plot]:
    """The plots of those curves that any run has."""
    drawn = {curve: found for curve in curves if (found := series(runs, curve))}
    for curve, found in drawn.items():
        together = [one for other, s in drawn.items() if other.shared == curve.shared for one in s]
        figure = plots.lines(
            [plots.Series(one.name if len(runs) > 1 else "", one.x, one.y, one.style)
             for one in found],
            x_label="epoch",
            y_label=curve.y_label,
            y_limits=_limits(together if curve.shared else found, curve),
        )  # fmt: skip
        yield Plot(curve.name, curve.title, figure, curve.caption, _description(found, curve))


def side_by_side(drawn: Sequence[Plot]) -> str:
    """The plots for a page, as many in a row as it has room for."""
    figures = [page.plot(p.figure, p.title, p.caption, p.description) for p in drawn]
    return f'<div class="plots">{"".join(figures)}</div>'


def _limits(found: Sequence[plots.Series], curve: Curve) -> tuple[float, float] | None:
    """A common range for curves that are compared across plots, or one from the floor up."""
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
