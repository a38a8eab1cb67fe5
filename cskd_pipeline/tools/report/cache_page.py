"""The page of a cache: the teacher's labels over real views, statistics and provenance."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cskd_pipeline.cache.info import describe
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.cache.summary import summarise
from cskd_pipeline.data.join import lenient_join
from cskd_pipeline.distill.ckf import SCHEDULES, ckf_ratio
from cskd_pipeline.runtime.classes import COMMAND_SWITCH, ClassGuard
from cskd_pipeline.runtime.console import format_size
from cskd_pipeline.tools.report import plots
from cskd_pipeline.tools.report.gallery import choose_views, class_names, ground_truth, replay_views
from cskd_pipeline.tools.report.labels import RATIO_AXIS, RATIOS, Labels, draw_rows, read_labels
from cskd_pipeline.tools.report.page import PageOptions, render, write_page
from cskd_pipeline.tools.report.plot_files import Plot

IMAGES = 12
SAMPLES = 2048
EPOCHS = 300


def show_cache(path: Path | str, out: Path, options: PageOptions) -> dict[str, Any]:
    """Write ``out/index.html`` for ``cskd-pipeline show CACHE``.

    Returns:
        The files written, the page's size in bytes, and its main figures.
    """
    reader = open_cache(path)
    guard = ClassGuard(COMMAND_SWITCH, accept=options.accept_classes)
    shards = options.shards or ""
    joined = lenient_join(reader, shards, guard, split=options.split)
    guard.report_new()
    rows = choose_views(joined, options.images or IMAGES)
    views = replay_views(joined, rows)
    labels = read_labels(reader, rows)
    sampled = draw_rows(reader, options.samples or SAMPLES)
    truth, counted = ground_truth(reader, sampled), read_labels(reader, sampled)
    own, partner, larger = (x[:, None, None] for x in (truth.own, truth.partner, truth.larger))
    agreement, either = counted.agreement(larger), counted.agreement(own, partner)
    mean_lines = float(counted.lines().mean())
    info = describe(reader)
    caption = f"All locations of {len(sampled)} views; labels from {labels.encoding}."
    plot = _agreement_plot(agreement, either, caption)
    document = render(
        "cache.html",
        f"{info['teacher']['name']} on {info['dataset']['name']}",
        data=_script_data(reader, labels, agreement, options.epochs or EPOCHS),
        scripts=("locations.js", "cache.js"),
        **_provenance(info),
        labels=labels,
        schedules=list(_schedules(1)),
        views=views,
        agreement=agreement,
        mean_lines=mean_lines,
        plot=plot,
    )
    return {
        **write_page(out, document, [plot], options.export),
        "accepted_classes": guard.accepted,
        "views_shown": len(views),
        "views_exact": sum(view.same and view.exact for view in views),
        "views_counted": len(sampled),
        "labels_from": labels.encoding,
        "labels_exact": labels.exact,
        "agreement": {"r=1": agreement[-1], "r=0": agreement[0]},
        "labels_per_location": mean_lines,
    }


def _agreement_plot(larger: np.ndarray, either: np.ndarray, caption: str) -> Plot:
    agreement = {"the larger image's class": larger, "either image's class": either}
    if np.array_equal(larger, either):
        agreement = {"the image's class": larger}
    figure = plots.lines(
        [
            plots.Series(name, RATIOS.tolist(), (100 * shares).tolist(), style)
            for style, (name, shares) in enumerate(agreement.items())
        ],
        x_label=RATIO_AXIS,
        y_label="locations, %",
        x_limits=(1, 0),
        y_limits=(0, 105 * max(shares.max() for shares in agreement.values()) or 1),
    )
    return Plot("agreement", "Agreement with the ground truth", figure, caption)


def _script_data(
    reader: Cache, labels: Labels, agreement: np.ndarray, epochs: int
) -> dict[str, Any]:
    names = class_names(reader)
    return {
        "grid": reader.manifest.teacher.grid,
        "views": labels.by_location(),
        "names": {int(k): names[k] for k in labels.classes()},
        "schedules": _schedules(epochs),
        "epochs": epochs,
        "agreement": agreement.round(4).tolist(),
    }


def _schedules(epochs: int) -> dict[str, list[float]]:
    """Return r at every epoch for each schedule along which it falls."""
    falling = [name for name in SCHEDULES if ckf_ratio(name, 0.0) != ckf_ratio(name, 1.0)]
    return {
        name: [round(ckf_ratio(name, epoch / epochs), 5) for epoch in range(epochs)]
        for name in falling
    }


def _provenance(info: Mapping[str, Any]) -> dict[str, Any]:
    separate = ("encodings", "largest", "cite")
    about = {name: value for name, value in summarise(info).items() if name not in separate}
    return {
        "about": {name.replace("_", " "): v for name, v in about.items() if v is not None},
        "encodings": [
            (
                name,
                " and ".join(facts["serves"]),
                facts["exact"],
                facts["bytes_per_view"],
                None if facts["bytes"] is None else format_size(facts["bytes"]),
            )
            for name, facts in info["encodings"].items()
        ],
        "cite": info["cite"],
        "units": info["units"],
        "missing": [
            (shard["name"], shard["samples"], shard["views_done"], info["views"])
            for shard in info["shards"]
            if shard["views_done"] < info["views"]
        ],
    }
