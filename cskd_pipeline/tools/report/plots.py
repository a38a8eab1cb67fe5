"""Matplotlib figures from plain data.

Figures use matplotlib's classes only: no pyplot, no backend, no global settings, no matplotlibrc.
Equal data give equal bytes. Names are foreign text, shown literally, never as mathtext or markup.

Axes and text are drawn in one dark ink, which :mod:`cskd_pipeline.tools.report.plot_files` replaces
by the page's. Series colours are readable on light and dark backgrounds; dashes and markers
distinguish the series without colour.
"""

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from cskd_pipeline.errors import printable

INK = "#1a1c20"
PALETTE = ("#2f7fc1", "#d1580f", "#12936b", "#b8609a", "#9a7d0a", "#7b7f86")
"""Contrast of at least 3:1 against white and near black."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P")
SIZE = (4.8, 3.0)
"""Inches; 9-point text stays legible at the width of a phone."""

_NAME = 48  # characters of a name
_LEGEND_ROWS = 3  # that fit a figure of SIZE
_ROW = 0.17  # inches of a legend's row
_SETTINGS: Any = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.unicode_minus": True,
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: same layout everywhere
    "font.size": 9,
    "grid.alpha": 0.16,
    "grid.color": INK,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Series:
    """Points joined in order; a non-finite ``y`` leaves a gap.

    Args:
        name: name in the legend.
        style: number of the colour, dash and marker, the same in every plot.
        low, high: edges of a band around the curve; empty for none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def lines(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_limits: tuple[float, float] | None = None,
    y_limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw curves, with markers on short ones and a legend for more than one.

    Args:
        x_limits, y_limits: range of an axis; None: that of the data.
    """
    with settings():
        figure, axes = _axes(SIZE, x_label, y_label)
        for one in series:
            axes.plot(one.x, one.y, **_line(one.style, markers=len(one.x) <= 12))
            if one.low:
                colour = PALETTE[one.style % len(PALETTE)]
                axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.2, linewidth=0)
        if x_limits is not None:
            axes.set_xlim(*x_limits)
        if y_limits is not None:
            axes.set_ylim(*y_limits)
        if all(float(value).is_integer() for one in series for value in one.x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        if len(series) > 1:
            _legend(figure, {one.name: _line(one.style) for one in series})
    return figure


def scatter(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    floor: float,
    labels: Sequence[tuple[str, float, float]],
) -> Figure:
    """Draw points on two logarithmic axes.

    Args:
        floor: y below which a point is drawn at the bottom, labelled ``exact``.
        labels: (name, x, y), text next to a point.
    """
    with settings():
        figure, axes = _axes((6.4, 4.2), x_label, y_label)
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=floor)
        for one in series:
            axes.plot(one.x, [y if y >= floor else 0.0 for y in one.y], **_dots(one.style))
        axes.update_datalim([(1, 0), (1, floor)], updatex=False)  # always show "exact"
        axes.autoscale_view()
        low, high = axes.get_xlim()
        if high < 100 * low:  # powers of ten alone would leave one tick or none
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(lambda x, _: number(x))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(lambda y, _: number(y) if y else "exact")
        for name, x, y in labels:
            _label(axes, short_name(name), (x, y if y >= floor else 0.0))
        _legend(figure, {one.name: _dots(one.style) for one in series})
    return figure


def means(
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    centres: Sequence[float],
    deviations: Sequence[float | None],
    *,
    x_label: str,
) -> Figure:
    """Draw one row per name: single values as dots, mean and deviation as an error bar.

    Args:
        deviations: half length of each bar; None: no bar.
    """
    with settings():
        figure, axes = _axes((SIZE[0], 0.9 + 0.32 * len(names)), x_label, "")
        axes.grid(visible=False, axis="y")
        axes.set_yticks(range(len(names)), [short_name(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)  # the first on top
        for row, (single, centre, deviation) in enumerate(
            zip(values, centres, deviations, strict=True)
        ):
            axes.plot(single, [row] * len(single), **_dots(0) | {"alpha": 0.5, "markersize": 4.5})
            half = None if deviation is None else [deviation]
            axes.errorbar([centre], [row], xerr=half, fmt="|", color=PALETTE[1], capsize=3,
                          markersize=13, markeredgewidth=1.8, elinewidth=1.4)  # fmt: skip
    return figure


@contextmanager
def settings() -> Iterator[None]:
    """Apply matplotlib's defaults and ours while a figure is drawn or written."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def _axes(size: tuple[float, float], x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    axes.set(xlabel=short_name(x_label), ylabel=short_name(y_label))
    return figure, axes


def _label(axes: Axes, name: str, point: tuple[float, float]) -> None:
    """Write next to a point, on the side with more room."""
    pixels = axes.transData.transform(point)
    right = axes.transAxes.inverted().transform(pixels)[0] > 0.6
    axes.annotate(
        name,
        point,
        (-7 if right else 7, 4),
        textcoords="offset points",
        ha="right" if right else "left",
        in_layout=False,
        annotation_clip=False,
    )


def _line(style: int, *, markers: bool = False) -> dict[str, Any]:
    """Return matplotlib's properties of a curve; the first 24 styles are all different."""
    turn = style // len(PALETTE)
    return {
        "color": PALETTE[style % len(PALETTE)],
        "linestyle": DASHES[(style + turn) % len(DASHES)],
        "linewidth": 1.6,
        "marker": MARKERS[style % len(MARKERS)] if markers else "",
        "markersize": 4,
    }


def css_style(style: int) -> tuple[str, str]:
    """Return a curve's colour and its dashes, as an SVG ``stroke-dasharray``."""
    line = _line(style)
    dashes = line["linestyle"]
    return line["color"], "none" if dashes == "-" else " ".join(str(1.6 * n) for n in dashes[1])


def _dots(style: int) -> dict[str, Any]:
    return _line(style, markers=True) | {"linestyle": "", "markersize": 6}


def _legend(figure: Figure, named: dict[str, dict[str, Any]]) -> None:
    """Add a legend above the axes; a long one makes the figure taller, not the axes smaller."""
    if not named:
        return
    handles = [Line2D([], [], **line) for line in named.values()]
    columns = 1 if max(map(len, named)) > 24 else 2 if max(map(len, named)) > 11 else 3
    rows = -(-len(named) // columns)
    if rows > _LEGEND_ROWS:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + _ROW * (rows - _LEGEND_ROWS))
    legend = figure.legend(
        handles,
        [str(i) for i in range(len(handles))],  # matplotlib drops names that begin with _
        loc="outside upper left",
        ncols=min(columns, len(named)),
        handlelength=2.6,
        fontsize=8,
    )
    for text, name in zip(legend.get_texts(), named, strict=True):
        text.set_text(short_name(name))


def number(value: float) -> str:
    """Format a number with at most four digits: 0.0125, 31.8, 12k, 3.4M, 1e-5."""
    if not math.isfinite(value):
        return "-"
    size = abs(value)
    if size and size < 1e-3:
        return re.sub(r"e-0?", "e-", f"{value:.3g}")
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):.4g}{letter}"
    return f"{value:.4g}"


def short_name(name: str) -> str:
    """Return a name on one line, cut in the middle: names often differ at their ends."""
    line = printable(name, 10 * _NAME)
    half = _NAME // 2
    return line if len(line) <= _NAME else f"{line[: half - 1]}…{line[-half:]}"
