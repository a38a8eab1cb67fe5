"""The report of ``bench encodings`` drawn: what an encoding loses against the bytes it takes."""

from collections.abc import Iterator, Mapping
from typing import Any

from cskd_pipeline.tools.report import plots
from cskd_pipeline.tools.report.plot_files import Plot

_FLOOR = 1e-5  # nats: less is drawn as exact


def encodings_plot(report: Mapping[str, Any], title: str) -> Plot:
    """Draw bytes a view across, mean KL up, both logarithmic.

    Encodings that lose nothing of what they serve stand at the bottom. Of those that serve hard
    labels only, the share of labels that differ is drawn.
    """
    points: dict[str, list[tuple[float, float]]] = {}  # by what the loss is
    labels: dict[str, tuple[str, float, float]] = {}
    for name, measured in report["encodings"].items():
        size = measured["bytes_per_view"]
        for kind, loss in _losses(measured):
            points.setdefault(kind, []).append((size, loss))
            labels.setdefault(name, (name, size, loss))
    figure = plots.scatter(
        [
            plots.Series(kind, [x for x, _ in found], [y for _, y in found], style)
            for style, (kind, found) in enumerate(points.items())
        ],
        x_label="bytes a view",
        y_label="mean KL, nats",
        floor=_FLOOR,
        labels=list(labels.values()),
    )
    return Plot("encodings", title, figure)


def _losses(measured: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield what is lost, in nats; nothing of draws, which have neither KL nor hard labels."""
    if measured["kl"] is not None:
        for tau, loss in measured["kl"].items():
            yield f"KL at temperature {tau}", loss["mean"]
    elif measured["hard_agreement"] is not None:
        yield "hard labels", 1 - measured["hard_agreement"]
