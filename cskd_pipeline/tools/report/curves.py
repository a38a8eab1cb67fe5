"""The curves of training runs: one plot for each column of the log."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cskd_pipeline.tools.report import plots
from cskd_pipeline.tools.report.plot_files import Plot
from cskd_pipeline.tools.report.ranking import Contender, unit_of

_DISTILLED = ("deit", "cskd")
_SPATIAL = ("cskd",)
_ALL = ("none", *_DISTILLED)


@dataclass(frozen=True)
class Curve:
    """One column of the log, drawn as a curve.

    Args:
        name: name of the plot's file, without ending.
        methods: methods whose runs are drawn; the others log a constant.
        shares_axis: whether its y axis is that of all other such curves.
    """

    name: str
    title: str
    column: str
    y_label: str
    caption: str
    methods: tuple[str, ...] = _ALL
    shares_axis: bool = False


LOSSES = (
    Curve("loss", "Loss", "loss", "loss", "The sum of its parts, weighted by alpha and lambda."),
    Curve(
        *("loss_base", "Loss on the labels", "base", "base loss"),
        "Cross entropy with the images' labels, mixed and smoothed.",
    ),
    Curve(
        *("loss_global", "Loss on the global logits", "global", "global loss"),
        "Distillation head against the teacher's global logits.",
        methods=_DISTILLED,
    ),
    Curve(
        *("loss_spatial", "Loss on the logits of every location", "spatial", "spatial loss"),
        "Dense head against the teacher's fused logits, which change with r.",
        methods=_SPATIAL,
    ),
)
TOP1 = tuple(
    Curve(name, title, column, "top-1, %", caption, shares_axis=True)
    for name, title, column, caption in (
        ("top1", "Top-1", "top1", "Mean of the heads, which is the student's prediction."),
        ("top1_ema", "Top-1, EMA", "ema_top1", "The same with the averaged weights."),
        ("top1_cls", "Top-1, class head", "top1_cls", ""),
        ("top1_dist", "Top-1, distillation head", "top1_dist", ""),
        ("top1_dense", "Top-1, dense head", "top1_dense", "Mean over all locations."),
    )
)
GROUPS: dict[str, tuple[Curve, ...]] = {
    "Loss and its parts": LOSSES,
    "Top-1 of each head": TOP1,
}
"""Curves under each heading of the page; every plot's file has its curve's name."""


def series(contenders: Sequence[Contender], curve: Curve) -> list[plots.Series]:
    """Return the curve over epochs of each contender that logs it."""
    drawn = [one for one in contenders if one.method in curve.methods]
    return [found for one in drawn if (found := one.curve(curve.column))]


def draw_top1(contenders: Sequence[Contender]) -> Iterator[Plot]:
    """Yield top-1 over epochs, and over training time if that was logged."""
    averaged = ", ".join(plots.short_name(c.name) for c in contenders if c.column == "ema_top1")
    caption = "On the validation images" + (f"; EMA weights of {averaged}." if averaged else ".")
    if any(len(one.runs) > 1 for one in contenders):
        caption += " Bands span the seeds, lowest to highest."
    for name, title, timed in (
        ("top1_epochs", "Top-1 over epochs", False),
        ("top1_time", "Top-1 over training time", True),
    ):
        found = [c for one in contenders if (c := one.curve(one.column, timed=timed))]
        if not found:
            continue
        unit, size = unit_of(max(one.x[-1] for one in found)) if timed else ("epoch", 1)
        scaled = [replace(one, x=[x / size for x in one.x]) for one in found]
        figure = plots.lines(scaled, x_label=unit, y_label="top-1, %")
        text = "Without evaluation, and without dumping the cache." if timed else caption
        yield Plot(name, title, figure, text, _description(scaled, "top-1, %", unit))


def draw(contenders: Sequence[Contender], curves: Sequence[Curve]) -> Iterator[Plot]:
    """Yield a plot of each curve for which any contender has at least two points."""
    drawn = {curve: found for curve in curves if (found := series(contenders, curve))}
    together = [one for curve, found in drawn.items() if curve.shares_axis for one in found]
    for curve, found in drawn.items():
        figure = plots.lines(
            found,
            x_label="epoch",
            y_label=curve.y_label,
            y_limits=_limits(together) if curve.shares_axis else None,
        )
        description = _description(found, curve.y_label, "epoch")
        yield Plot(curve.name, curve.title, figure, curve.caption, description)


def _limits(found: Sequence[plots.Series]) -> tuple[float, float]:
    """Return a common y range for curves compared across plots."""
    values = [y for one in found for y in (*one.y, *one.low, *one.high)]
    margin = 0.05 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 1.0
    return min(values) - margin, max(values) + margin


def _description(found: Sequence[plots.Series], y_label: str, unit: str) -> str:
    number = plots.number
    parts = [
        f"{plots.short_name(one.name)}: {number(one.y[0])} at {unit} {number(one.x[0])}, "
        f"{number(one.y[-1])} at {unit} {number(one.x[-1])}"
        for one in found
    ]
    return f"{y_label} over {unit}. {'; '.join(parts)}"
