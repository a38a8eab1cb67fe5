"""Distortion against bytes, as an SVG of its own: no plotting library, no fonts, no scripts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 56, 92
_FLOOR = 1e-5  # nats: less is drawn in the lane "exact"
_COLOURS = {"1": "#0b6bcb", "4": "#c2410c"}


def scatter(report: Mapping[str, Any]) -> str:
    """The report of ``bench encodings`` as SVG: bytes a view across, mean KL up, both logarithmic.

    Encodings that lose nothing of what they serve stand in a lane of their own at the bottom.
    """
    points = list(_points(report))
    x_low, x_high = _decades([p[1] for p in points])
    losses = [p[2] for p in points if p[2] >= _FLOOR]
    y_low, y_high = _decades(losses or [1e-3, 1e-1])

    def x(size: float) -> float:
        return LEFT + (math.log10(size) - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        share = (math.log10(loss) - y_low) / (y_high - y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    lane = HEIGHT - BOTTOM + 22
    parts = [_text(LEFT, 24, _title(report), size=15)]
    for power in range(x_low, x_high + 1):
        at = x(10.0**power)
        parts.append(_line(at, TOP, at, lane + 12, "#d4d4d8"))
        parts.append(_text(at, lane + 28, _bytes(10**power), anchor="middle"))
    for power in range(y_low, y_high + 1):
        at = y(10.0**power)
        parts.append(_line(LEFT, at, WIDTH - RIGHT, at, "#d4d4d8"))
        parts.append(_text(LEFT - 8, at + 4, f"1e{power}", anchor="end"))
    parts.append(_line(LEFT, lane, WIDTH - RIGHT, lane, "#a1a1aa"))
    parts.append(_text(LEFT - 8, lane + 4, "exact", anchor="end"))
    parts.append(_text(WIDTH - RIGHT, lane + 48, "bytes per view", anchor="end"))
    parts.append(_text(LEFT - 60, TOP - 12, "mean KL, nats"))
    for i, (tau, colour) in enumerate(_COLOURS.items()):
        at = WIDTH - RIGHT - 150 + 80 * i
        parts.append(f'<circle cx="{at}" cy="{TOP - 16}" r="5" fill="{colour}"/>')
        parts.append(_text(at + 10, TOP - 12, f"tau = {tau}"))
    labelled: set[str] = set()
    for name, size, loss, colour in points:
        at = y(loss) if loss >= _FLOOR else lane
        parts.append(f'<circle cx="{x(size):.1f}" cy="{at:.1f}" r="5" fill="{colour}"/>')
        if name not in labelled:
            end = x(size) > WIDTH - RIGHT - 70
            offset = -9 if end else 9
            parts.append(_text(x(size) + offset, at - 8, name, anchor="end" if end else "start"))
            labelled.add(name)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img">\n<title>{escape(_title(report))}</title>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _points(report: Mapping[str, Any]) -> Iterator[tuple[str, float, float, str]]:
    """(name, bytes, loss, colour); what serves hard labels only stands at 0."""
    for name, measured in report["encodings"].items():
        if measured["kl"] is None:
            label = f"{name} (hard labels)"
            yield label, measured["bytes_per_view"], 1 - measured["hard_agreement"], "#15803d"
            continue
        for tau, loss in measured["kl"].items():
            yield name, measured["bytes_per_view"], loss["mean"], _COLOURS[tau]


def _decades(values: list[float]) -> tuple[int, int]:
    """Powers of ten below and above all values, at least one decade."""
    low = math.floor(math.log10(min(values)))
    return low, max(low + 1, math.ceil(math.log10(max(values))))


def _title(report: Mapping[str, Any]) -> str:
    height, width = report["grid"]
    return f"{report['views']} views, {report['classes']} classes, {height}x{width} places"


def _bytes(size: int) -> str:
    return f"{size // 1000} kB" if size >= 1000 else f"{size} B"


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-family="sans-serif" font-size="{size}" '
        f'fill="#18181b" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
