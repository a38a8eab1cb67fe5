"""Plots: plain data to a matplotlib figure, and a figure to SVG inside a page, SVG or PNG files.

Figures are made with matplotlib's classes alone: no pyplot, no backend, no settings that last. The
user's matplotlibrc does not reach them, and equal data give equal bytes. Names come from other
people: they are shown letter by letter, never as mathtext or markup.

Every figure is drawn in one dark ink. In a page the ink becomes ``currentColor`` and the background
nothing, so that text and axes follow the page's light or dark scheme; files are on white. The
series' colours can be told from either background, and each also has a dash and a marker of its own
for those who cannot tell the colours.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from cskd_pipeline.errors import OutputError, printable
from cskd_pipeline.runtime.atomic import atomic_write

INK = "#1a1c20"
PALETTE = ("#2f7fc1", "#d1580f", "#12936b", "#b8609a", "#9a7d0a", "#7b7f86")
"""At least 3:1 against white and against near black."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P")
FORMATS = ("png", "svg")
SIZE = (4.8, 3.0)
"""Inches. Text of 9 points stays legible where the figure is as wide as a phone."""

_NAME = 48  # letters of a name that are shown
_LEGEND_ROWS = 3  # that a figure of the usual size has room for
_ROW = 0.17  # inches
_SETTINGS: Any = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.unicode_minus": True,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the layout is the same everywhere
    "font.size": 9,
    "grid.alpha": 0.16,
    "grid.color": INK,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "cskd-pipeline",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Series:
    """Points in the order in which they are joined; a ``y`` that is not finite leaves a gap.

    Args:
        name: stands in the legend; empty for none.
        style: colour, dash and marker; give the same thing the same number in every plot.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0


# --- figures --------------------------------------------------------------------------------------


def lines(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_limits: tuple[float, float] | None = None,
    size: tuple[float, float] = SIZE,
) -> Figure:
    """Curves over a common x. A curve of a single point is a marker, as are those of few points.

    Args:
        y_limits: what the y axis spans; None: what is drawn.
    """
    with _settings():
        figure, axes = _axes(size, x_label, y_label)
        for one in series:
            axes.plot(one.x, one.y, **_look(one.style, markers=len(one.x) <= 12))
        if y_limits is not None:
            axes.set_ylim(*y_limits)
        if all(float(value).is_integer() for one in series for value in one.x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        _legend(figure, [(one.name, _look(one.style)) for one in series])
    return figure


def scatter(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    lane: tuple[str, float] | None = None,
    labels: Sequence[tuple[str, float, float]] = (),
    size: tuple[float, float] = SIZE,
) -> Figure:
    """Points without lines.

    Args:
        lane: a name and a bound: points below the bound stand in a lane of that name under the
            axes, where a logarithmic axis has no place for them.
        labels: (name, x, y) written beside a point.
    """
    with _settings():
        figure, upper = _axes(size, x_label, y_label, lane=lane is not None)
        lower = figure.axes[-1]
        bound = -math.inf if lane is None else lane[1]
        for one in series:
            places = list(zip(one.x, one.y, strict=True))
            above = [(x, y) for x, y in places if y >= bound]
            upper.plot([x for x, _ in above], [y for _, y in above], **dots(one.style))
            if lane is not None:
                below = [x for x, y in places if y < bound]
                lower.plot(below, [0] * len(below), **dots(one.style))
        for which, wanted in (("x", log_x), ("y", log_y)):
            if wanted:
                logarithmic(upper, which)
        for name, x, y in labels:
            where, place = (upper, (x, y)) if y >= bound else (lower, (x, 0.0))
            _label(where, shown(name), place)
        if lane is not None:
            lower.set_yticks([0], [shown(lane[0])])
            lower.set_ylim(-1, 1)
            upper.tick_params(labelbottom=False)
        _legend(figure, [(one.name, dots(one.style)) for one in series])
    return figure


def bars(
    names: Sequence[str],
    values: Sequence[float],
    *,
    x_label: str,
    style: int = 0,
    width: float = SIZE[0],
) -> Figure:
    """One horizontal bar a name, the first on top, each with its value."""
    with _settings():
        figure, axes = _axes((width, 0.9 + 0.24 * max(len(names), 1)), x_label, "")
        places = range(len(names))
        drawn = axes.barh(places, values, height=0.7, color=PALETTE[style % len(PALETTE)])
        axes.bar_label(drawn, [number(value) for value in values], padding=3, fontsize=8)
        axes.margins(x=0.15)
        axes.grid(visible=False, axis="y")
        axes.set_yticks(places, [shown(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
    return figure


def means(
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    centres: Sequence[float],
    deviations: Sequence[float | None],
    *,
    x_label: str,
    size: tuple[float, float] | None = None,
) -> Figure:
    """One row a name, the first on top: single values as dots, their mean and deviation as a bar.

    Args:
        deviations: half the length of each bar; None for none.
    """
    with _settings():
        figure, axes = _axes(size or (SIZE[0], 0.9 + 0.32 * max(len(names), 1)), x_label, "")
        for place, (single, centre, deviation) in enumerate(
            zip(values, centres, deviations, strict=True)
        ):
            axes.plot(single, [place] * len(single), **dots(0) | {"alpha": 0.5, "markersize": 4.5})
            half = None if deviation is None else [deviation]
            axes.errorbar([centre], [place], xerr=half, fmt="|", color=PALETTE[1], capsize=3,
                          markersize=13, markeredgewidth=1.8, elinewidth=1.4)  # fmt: skip
        axes.grid(visible=False, axis="y")
        axes.set_yticks(range(len(names)), [shown(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
    return figure


@contextmanager
def _settings() -> Iterator[None]:
    """matplotlib's defaults and ours, for as long as a figure is made or written."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def _axes(
    size: tuple[float, float], x_label: str, y_label: str, *, lane: bool = False
) -> tuple[Figure, Axes]:
    """A figure and its axes; with ``lane``, second axes below of the same x."""
    figure = Figure(figsize=size, layout="constrained")
    heights = [9, 1] if lane else [1]
    columns = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)
    for axes in columns[:, 0]:
        axes.grid(visible=True)
        axes.set_axisbelow(True)
    columns[-1, 0].set_xlabel(shown(x_label))
    columns[0, 0].set_ylabel(shown(y_label))
    return figure, columns[0, 0]


def _label(axes: Axes, name: str, place: tuple[float, float]) -> None:
    """Write beside a point, on the side that has more room."""
    pixels = axes.transData.transform(place)
    right = axes.transAxes.inverted().transform(pixels)[0] > 0.6
    axes.annotate(
        name,
        place,
        (-7 if right else 7, 4),
        textcoords="offset points",
        ha="right" if right else "left",
        in_layout=False,
        annotation_clip=False,
    )


def _look(style: int, *, markers: bool = False) -> dict[str, Any]:
    """How a curve looks: the same number, the same look, and no two of the first 24 alike."""
    turn = style // len(PALETTE)
    return {
        "color": PALETTE[style % len(PALETTE)],
        "linestyle": DASHES[(style + turn) % len(DASHES)],
        "linewidth": 1.6,
        "marker": MARKERS[style % len(MARKERS)] if markers else "",
        "markersize": 4,
    }


def dots(style: int) -> dict[str, Any]:
    """How a point looks."""
    return _look(style, markers=True) | {"linestyle": "", "markersize": 6}


def _legend(figure: Figure, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """One entry a name, above the axes; many make the figure taller, not the axes smaller."""
    named = {name: look for name, look in entries if name}
    if not named:
        return
    handles = [Line2D([], [], **look) for look in named.values()]
    columns = 1 if max(map(len, named)) > 24 else 2 if max(map(len, named)) > 11 else 3
    rows = -(-len(named) // columns)
    if rows > _LEGEND_ROWS:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + _ROW * (rows - _LEGEND_ROWS))
    legend = figure.legend(
        handles,
        [str(i) for i in range(len(handles))],  # names that begin with _ would be left out
        loc="outside upper left",
        ncols=min(columns, len(named)),
        handlelength=2.6,
        fontsize=8,
    )
    for text, name in zip(legend.get_texts(), named, strict=True):
        text.set_text(shown(name))


def logarithmic(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers at the powers of ten, also where nothing is drawn."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    drawn = [
        value for line in axes.lines for value in np.ravel(getattr(line, f"get_{which}data")())
    ]
    if not any(value > 0 for value in drawn):
        axes.set(**{f"{which}lim": (1e-3, 1e-1)})
    axes.set(**{f"{which}scale": "log"})
    low, high = axis.get_view_interval()
    if high < 100 * low:  # powers of ten alone would be one number, or none
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())


def number(value: float) -> str:
    """Four digits at most: 0.0125, 31.8, 12k, 3.4M; 1e-5 where zeros would follow the point."""
    if not math.isfinite(value):
        return "-"
    size = abs(value)
    if size and size < 1e-3:
        return re.sub(r"e-0?", "e-", f"{value:.3g}")
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):.4g}{letter}"
    return f"{value:.4g}"


def shown(name: str) -> str:
    """A name as it stands in a plot: on one line, its letters as they are, and not too many: of
    long names the end too, in which those of several things differ.
    """
    line = printable(name, 10 * _NAME)
    half = _NAME // 2
    return line if len(line) <= _NAME else f"{line[: half - 1]}…{line[-half:]}"


# --- what they become -----------------------------------------------------------------------------


def svg(figure: Figure, title: str, description: str = "") -> str:
    """The figure for a page: an ``<svg>`` element as wide as its place, in the page's own ink.

    Args:
        title, description: for screen readers; not drawn.
    """
    root = _tree(figure, background="none")
    digest = hashlib.sha256(ET.tostring(root) + title.encode(errors="replace")).hexdigest()[:10]
    _own_names(root, f"p{digest}-")
    for element in root.iter():
        if "style" in element.attrib:
            element.set("style", element.attrib["style"].replace(INK, "currentColor"))
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    _entitle(root, title, description)
    return ET.tostring(root, encoding="unicode")


def svg_file(figure: Figure, title: str, description: str = "") -> bytes:
    """The figure as a file of its own, on white, with the title above it."""
    with _titled(figure, title):
        root = _tree(figure, background="white")
    _entitle(root, title, description)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="utf-8") + b"\n"


def png(figure: Figure, title: str, *, dpi: int = 200) -> bytes:
    """The figure as PNG, on white, with the title above it."""
    with _titled(figure, title), _settings():
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None}
        )
    return buffer.getvalue()


def write(figure: Figure, path: Path, title: str, description: str = "") -> None:
    """Write a figure to a file whose ending says as what, whole or not at all.

    Raises:
        OutputError: another ending than ``FORMATS``; no space, or no permission.
    """
    ending = path.suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise OutputError(
            "a plot cannot be written as this",
            where=path,
            found=path.suffix or "no ending",
            expected=" or ".join(f".{name}" for name in FORMATS),
        )
    data = png(figure, title) if ending == "png" else svg_file(figure, title, description)
    atomic_write(path, lambda partial: partial.write_bytes(data))


@contextmanager
def _titled(figure: Figure, title: str) -> Iterator[None]:
    axes = figure.axes[0]
    with _settings():
        axes.set_title(printable(title, 70), loc="left")
    try:
        yield
    finally:
        axes.set_title("", loc="left")


def _tree(figure: Figure, *, background: str) -> ET.Element:
    """The figure as SVG elements without namespaces, style sheets, links or dates."""
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with _settings():
        figure.savefig(buffer, format="svg", facecolor=background, metadata=nothing)
    root = ET.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in list(element.attrib):
            if "}" in key:  # xlink:href, which browsers also know as href
                element.set(key.rpartition("}")[2], element.attrib.pop(key))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("style", "metadata"):
                parent.remove(child)
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    for text in root.iter("text"):
        style = re.sub(
            r"'DejaVu Sans'(, [^;]*)?", "'DejaVu Sans', sans-serif", text.get("style", "")
        )
        text.set("style", style)
    return root


def _own_names(root: ET.Element, prefix: str) -> None:
    """Only ids that are pointed at, and none that another figure in the page may have."""
    pointer = re.compile(r"url\(#([^)]+)\)|^#(.+)$")
    used = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            for match in pointer.finditer(value) if key != "id" else ():
                used.add(match[1] or match[2])
            if key in ("clip-path", "style"):
                element.set(key, re.sub(r"url\(#", f"url(#{prefix}", value))
            elif key == "href":
                element.set(key, "#" + prefix + value.removeprefix("#"))
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{prefix}{name}")


def _entitle(root: ET.Element, title: str, description: str) -> None:
    root.set("role", "img")
    root.set("aria-label", printable(title))
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        if text:
            element = ET.Element(tag)
            element.text = printable(text, 2000)
            root.insert(min(place, len(root)), element)
