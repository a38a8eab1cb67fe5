"""The report of ``bench encodings`` drawn: what an encoding loses against the bytes it takes."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from cskd_pipeline.tools.report import plots

_FLOOR = 1e-5  # nats: less is drawn in the lane "exact"
_HARD = "hard labels"


class Point(NamedTuple):
    """Hold one mark: ``kind`` is what it measures, ``bytes`` of a view, ``loss`` in nats."""

    encoding: str
    kind: str
    bytes: float
    loss: float


def encodings_plot(report: Mapping[str, Any]) -> Figure:
    """Draw bytes a view across, mean KL up, both logarithmic.

    Encodings that lose nothing of what they serve stand in a lane of their own at the bottom. Of
    those that serve hard labels only, the share of labels that differ is drawn.
    """
    points = list(_points(report))
    series: dict[str, list[Point]] = {}
    named: dict[str, Point] = {}
    for point in points:
        series.setdefault(point.kind, []).append(point)
        named.setdefault(point.encoding, point)
    return plots.scatter(
        [
            plots.Series(kind, [p.bytes for p in found], [p.loss for p in found], style)
            for style, (kind, found) in enumerate(series.items())
        ],
        x_label="bytes a view",
        y_label="mean KL, nats",
        lane=("exact", _FLOOR),
        labels=[(p.encoding, p.bytes, p.loss) for p in named.values()],
    )


def _points(report: Mapping[str, Any]) -> Iterator[Point]:
    for name, measured in report["encodings"].items():
        size = measured["bytes_per_view"]
        if measured["kl"] is None and measured["hard_agreement"] is None:
            continue  # draws have neither
        if measured["kl"] is None:
            yield Point(name, _HARD, size, 1 - measured["hard_agreement"])
            continue
        for tau, loss in measured["kl"].items():
            yield Point(name, f"KL at temperature {tau}", size, loss["mean"])
