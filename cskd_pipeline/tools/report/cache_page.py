"""The page of a cache: its provenance, the teacher's labels over real views, their statistics."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cskd_pipeline.cache.info import describe
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.cache.summary import size, summarise
from cskd_pipeline.data.join import join_to_look
from cskd_pipeline.distill.ckf import SCHEDULES, ckf_ratio
from cskd_pipeline.runtime.classes import COMMAND_SWITCH, ClassGuard
from cskd_pipeline.tools.report.gallery import choose_views, class_names, make_views
from cskd_pipeline.tools.report.labels import Labels, read_labels
from cskd_pipeline.tools.report.page import PageOptions, render, write_page
from cskd_pipeline.tools.report.statistics import (
    Statistics,
    draw_truth,
    measure,
    sample_rows,
)

log = logging.getLogger(__name__)

IMAGES = 12
SAMPLES = 2048
EPOCHS = 300


def show_cache(path: Path | str, out: Path, options: PageOptions) -> dict[str, Any]:
    """Write ``out/index.html`` for ``cskd-pipeline show CACHE``.

    Returns:
        The files, the page's size in bytes, and its main figures.

    Raises:
        CskdError: the cache, or the shards, cannot be used, or do not belong together.
    """
    reader = open_cache(path)
    guard = ClassGuard(COMMAND_SWITCH, accept=options.accept_classes)
    shards = options.shards or ""
    found = join_to_look(reader, shards, guard, split=options.split)
    guard.report_new()
    rows = choose_views(found, options.images or IMAGES)
    views = make_views(found, rows)
    labels = read_labels(reader, rows)
    sampled = sample_rows(found, options.samples or SAMPLES)
    counted = measure(found, sampled)
    info = describe(reader)
    plot = draw_truth(counted)
    document = render(
        "cache.html",
        f"{info['teacher']['name']} on {info['dataset']['name']}",
        data=_script_data(reader, labels, counted, options.epochs or EPOCHS),
        scripts=("locations.js", "cache.js"),
        **_provenance(info),
        labels=labels,
        schedules=list(_schedules(1)),
        views=views,
        counted=counted,
        plot=plot,
    )
    return {
        **write_page(out, document, [plot], options.export),
        "accepted_classes": guard.accepted,
        "views_shown": len(views),
        "views_exact": sum(view.same and view.exact for view in views),
        "views_counted": counted.views,
        "labels_from": counted.encoding,
        "labels_exact": counted.exact,
        "agreement": {"r=1": counted.agreement[-1], "r=0": counted.agreement[0]},
        "labels_a_place": counted.mean_lines,
    }


def _script_data(reader: Cache, labels: Labels, counted: Statistics, epochs: int) -> dict[str, Any]:
    names = class_names(reader)
    return {
        "grid": reader.manifest.grid,
        "views": labels.by_location(),
        "names": {int(k): names[k] for k in labels.classes()},
        "schedules": _schedules(epochs),
        "epochs": epochs,
        "agreement": counted.agreement.round(4).tolist(),
    }


def _schedules(epochs: int) -> dict[str, list[float]]:
    """Return r of every epoch, of the schedules along which it falls."""
    falling = [name for name in SCHEDULES if ckf_ratio(name, 0.0) != ckf_ratio(name, 1.0)]
    return {
        name: [round(ckf_ratio(name, epoch / epochs), 5) for epoch in range(epochs)]
        for name in falling
    }


def _provenance(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template shows of a cache's description."""
    apart = ("encodings", "largest", "cite")
    facts = {name: value for name, value in summarise(info).items() if name not in apart}
    return {
        "about": {name.replace("_", " "): v for name, v in facts.items() if v is not None},
        "encodings": [
            (
                name,
                " and ".join(one["serves"]),
                one["exact"],
                one["bytes_per_view"],
                None if one["bytes"] is None else size(one["bytes"]),
            )
            for name, one in info["encodings"].items()
        ],
        "cite": info["cite"],
        "units": info["units"],
        "missing": [
            (shard["name"], shard["samples"], shard["views_done"], info["views"])
            for shard in info["shards"]
            if shard["views_done"] < info["views"]
        ],
    }
