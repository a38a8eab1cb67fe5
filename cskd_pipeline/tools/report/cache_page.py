"""The page of a cache: what it is, what the teacher says of real views, and how the labels lie."""

from __future__ import annotations

import html
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cskd_pipeline.cache.info import describe
from cskd_pipeline.cache.reader import CacheReader
from cskd_pipeline.cache.summary import size, summarise
from cskd_pipeline.data.join import join_to_look
from cskd_pipeline.distill.ckf import SCHEDULES, ckf_ratio
from cskd_pipeline.errors import JoinError
from cskd_pipeline.runtime.atomic import write_text
from cskd_pipeline.runtime.classes import ClassGuard
from cskd_pipeline.tools.report import controls, page, plots, statistics
from cskd_pipeline.tools.report.gallery import (
    SMALL,
    GalleryViews,
    choose_views,
    encoded,
    make_views,
)
from cskd_pipeline.tools.report.labels import Labels, read_labels
from cskd_pipeline.tools.report.statistics import Statistics, Truth

log = logging.getLogger(__name__)

PAGE = "index.html"
IMAGES = 12
SAMPLES = 2048
EPOCHS = 300
_SHARDS_SHOWN = 20


def show_cache(
    path: Path | str,
    shards: str,
    out: Path,
    *,
    split: str | None = None,
    images: int = IMAGES,
    samples: int = SAMPLES,
    epochs: int = EPOCHS,
    export: str | None = None,
    accept_classes: bool = False,
) -> dict[str, Any]:
    """``cskd-pipeline show CACHE``: write ``out/index.html``.

    Args:
        shards, split: the images that the cache was made from.
        images: views in the gallery.
        samples: views whose labels are counted.
        epochs: of the run that the schedules' slider goes through.
        export: one of ``plots.FORMATS``, in which each plot becomes a file too.
        accept_classes: class k of the shards is the cache's, whatever names and labels say.

    Returns:
        The files, the page's bytes, and the figures that it tells.

    Raises:
        CskdError: the cache, or the shards, cannot be used, or do not belong together.
    """
    reader = CacheReader(path)
    guard = ClassGuard(accept=accept_classes)
    found = join_to_look(reader, shards, guard, split=split)
    guard.tell(log.warning)
    rows = choose_views(found, images)
    sampled = statistics.sample_rows(found, samples)
    if not len(rows) or not len(sampled):
        raise JoinError(
            "there is nothing to show: no finished part of the cache has its images here",
            where=path,
            found=f"{found.missing} of {found.samples.total} samples missing",
            action="give the shards that the cache was made from, or finish the dump",
        )
    views = make_views(found, rows)
    labels = read_labels(reader, rows)
    counted = statistics.measure(found, sampled)
    names = controls.class_names(reader)
    info = describe(path)
    drawn = _plots(counted)
    sections = [
        _provenance(info),
        _gallery(views, labels, statistics.truth(found, rows), reader, names),
        _figures(drawn, counted, names),
        _completeness(info),
    ]
    data = {
        "grid": reader.manifest.grid,
        "views": [controls.places(planes) for planes in labels.planes],
        "names": {int(k): names[k] for k in controls.classes(labels.planes)},
        "schedules": _schedules(epochs),
        "epochs": epochs,
        "agreement": counted.agreement.round(4).tolist(),
    }
    title = f"{info['teacher']['name']} on {info['dataset']['name']}"
    document = page.page(
        title, sections, data=data, script=page.asset("places.js") + page.asset("cache.js")
    )
    write_text(out / PAGE, document)
    files = [] if export is None else [out / f"{name}.{export}" for name in drawn]
    for file, (figure, heading, caption) in zip(files, drawn.values(), strict=False):
        plots.write(figure, file, heading, caption)
    return {
        "page": str(out / PAGE),
        "bytes": len(document.encode()),
        "plots": [str(file) for file in files],
        "accepted_classes": guard.accepted,
        "views_shown": len(rows),
        "views_exact": int((views.same & views.exact).sum()),
        "views_counted": counted.views,
        "labels_from": counted.encoding,
        "labels_exact": counted.exact,
        "agreement": {"r=1": counted.agreement[-1], "r=0": counted.agreement[0]},
        "labels_a_place": counted.mean_lines,
    }


def _schedules(epochs: int) -> dict[str, list[float]]:
    """r of every epoch, of the schedules along which it falls."""
    falling = [name for name in SCHEDULES if ckf_ratio(name, 0.0) != ckf_ratio(name, 1.0)]
    return {
        name: [round(ckf_ratio(name, epoch / epochs), 5) for epoch in range(epochs)]
        for name in falling
    }


def _provenance(info: Mapping[str, Any]) -> str:
    told = {k: v for k, v in summarise(info).items() if k not in ("encodings", "largest", "cite")}
    shown = {name.replace("_", " "): value for name, value in told.items() if value is not None}
    sizes = page.table(
        ("encoding", "serves", "exact", "bytes a view", "in all"),
        [
            (
                name,
                " and ".join(one["serves"]),
                one["exact"],
                one["bytes_per_view"],
                None if one["bytes"] is None else size(one["bytes"]),
            )
            for name, one in info["encodings"].items()
        ],
    )
    cite = page.paragraph(info["cite"]["cache"]) + page.paragraph(info["cite"]["method"])
    return page.section("What this cache is", page.definitions(shown), sizes, cite, name="about")


def _completeness(info: Mapping[str, Any]) -> str:
    units, views = info["units"], info["views"]
    share = f"{units['done']} of {units['total']} units are finished"
    bar = (
        f'<progress max="{units["total"]}" value="{units["done"]}" aria-label="finished units">'
        f"</progress>"
    )
    missing = [shard for shard in info["shards"] if shard["views_done"] < views]
    told = [page.paragraph(f"{share}."), f"<p>{bar}</p>"]
    if missing:
        told.append(
            page.table(
                ("shard", "samples", "views finished", "views in all"),
                [
                    (s["name"], s["samples"], s["views_done"], views)
                    for s in missing[:_SHARDS_SHOWN]
                ],
            )
        )
        if len(missing) > _SHARDS_SHOWN:
            told.append(page.paragraph(f"And {len(missing) - _SHARDS_SHOWN} shards more."))
    return page.section("Completeness", *told, name="completeness")


def _gallery(
    views: GalleryViews, labels: Labels, truth: Truth, reader: CacheReader, names: list[str]
) -> str:
    options = "".join(
        f'<option value="{html.escape(name)}">epochs, {html.escape(name)}</option>'
        for name in _schedules(1)
    )
    drive = (
        f'<label>along <select id="drive"><option value="r">r</option>{options}</select></label>\n'
    )
    about = (
        "Views as the network saw them. Each place has the colour of its label: at r = 1 the "
        "teacher's class there, at r = 0 its class for the whole view. Point at a place, or walk "
        "with the arrow keys, to read its labels."
    )
    notes = [page.paragraph(about)]
    if not labels.exact:
        notes.append(
            f'<p class="note">These labels come from {page.text(labels.encoding)}, which '
            "approximates what the teacher said.</p>"
        )
    figures = [_figure(i, views, truth, reader, names) for i in range(len(views.rows))]
    small = " small" if views.pixels.shape[1] <= SMALL else ""
    return page.section(
        "What the teacher says",
        *notes,
        controls.controls(1.0, drive),
        f'<div class="gallery{small}" id="gallery">{"".join(figures)}</div>',
        name="views",
    )


def _figure(
    i: int, views: GalleryViews, truth: Truth, reader: CacheReader, names: list[str]
) -> str:
    view, shard, offset = views.rows[i].tolist()
    key = reader.keys(shard)[offset]
    content, marked = controls.content(truth, i, names)
    return "".join(
        [
            f'<figure data-view="{i}"><div class="stage">',
            page.picture(*encoded(views.pixels[i]), f"a view of {content}"),
            f'<div class="places" role="grid" aria-label="{page.text(f"labels of {content}")}">',
            "</div></div>",
            f"<figcaption><strong>{marked}</strong><br>{page.text(f'{key}, view {view}')}",
            controls.warning(views, i),
            '</figcaption><ul class="legend"></ul><div class="here" aria-live="polite"></div>',
            "</figure>",
        ]
    )


Drawn = dict[str, tuple[Figure, str, str]]


def _plots(found: Statistics) -> Drawn:
    """File name -> figure, title, caption."""
    of = f"Over all places of {found.views} views, labels from {found.encoding}"
    return {
        "agreement": (
            statistics.agreement_plot(found),
            "Agreement with the ground truth",
            f"{of}. Views are mixed of two pictures, so no label is right everywhere.",
        ),
        "labels": (
            statistics.lines_plot(found),
            "Labels of a place as r falls from 1 to 0",
            f"{of}: {found.mean_lines:.2f} on average. These are the lines of the upper envelope.",
        ),
        "balance": (
            statistics.balance_plot(found),
            "Class balance",
            f"{of}. Ground truth is the class of the larger picture; each curve is sorted.",
        ),
    }


def _figures(drawn: Drawn, found: Statistics, names: Sequence[str]) -> str:
    rows = [
        (names[k], *(round(100 * float(shares[k]), 3) for shares in found.balance))
        for k in statistics.most_displaced(found, 10)
    ]
    columns = ("class", "ground truth, %", "labels at r = 1, %", "labels at r = 0, %")
    return page.section(
        "How the labels lie",
        f'<div class="plots">{"".join(page.plot(*one) for one in drawn.values())}</div>',
        "<h3>Classes furthest from their share of the ground truth</h3>",
        page.table(columns, rows),
        name="labels-in-all",
    )
