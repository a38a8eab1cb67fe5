"""What students say of every place, beside the teacher: their part of the page of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cskd_pipeline.errors import printable
from cskd_pipeline.tools.report import controls, page, plots
from cskd_pipeline.tools.report.curves import Plot, side_by_side
from cskd_pipeline.tools.report.dense_overlay import Comparison, last_ratio
from cskd_pipeline.tools.report.gallery import SMALL, encoded
from cskd_pipeline.tools.report.records import which
from cskd_pipeline.tools.report.statistics import RATIOS


def agreement_plot(compared: Comparison) -> Plot:
    """How many of the places a student and the teacher call alike, over the teacher's r."""
    figure = plots.lines(
        [
            plots.Series(one.run.name, RATIOS.tolist(), (100 * one.agreement).tolist(), one.style)
            for one in compared.students
        ],
        x_label="r: 0 is the global answer, 1 the local one",
        y_label="places that agree, %",
    )
    caption = (
        f"Of {math.prod(compared.counted)} places in {compared.counted[0]} views, the share at "
        f"which a student's class is the teacher's label, read from {compared.teacher.encoding}."
    )
    values = "; ".join(
        f"{plots.shown(one.run.name)}: {one.at(0):.1%} at r = 0, {one.at(1):.1%} at r = 1"
        for one in compared.students
    )
    title = "Places at which student and teacher agree"
    return Plot("dense_agreement", title, figure, caption, f"{caption} {values}")


def section(compared: Comparison | None, without: Mapping[str, str], drawn: Sequence[Plot]) -> str:
    reasons = [page.paragraph(f"{name} is not here: {why}.") for name, why in without.items()]
    title = "What the students say of every place"
    if compared is None:
        return page.section(title, *reasons, name="dense")
    about = (
        "The class of a student's dense predictions at every place, beside the teacher's label "
        "there. A dot marks a place at which a student agrees. The views are the training's, the "
        "students the runs' best, or their last where nothing was evaluated."
    )
    notes = [page.paragraph(about)]
    if not compared.teacher.exact:
        source = page.text(compared.teacher.encoding)
        notes.append(
            f'<p class="note">The teacher\'s labels come from {source}, which approximates what it '
            "said.</p>"
        )
    table = page.table(
        ("run", "student", "agrees at r = 1, %", "at its last r, %", "last r", "at r = 0, %"),
        [
            (
                one.run.name,
                which(one.card.epoch, one.card.weights),
                *(round(100 * one.at(r), 1) for r in (1.0, last_ratio(one.run))),
                round(last_ratio(one.run), 3),
                round(100 * one.at(0.0), 1),
            )
            for one in compared.students
        ],
    )
    figures = "".join(_figure(i, compared) for i in range(len(compared.views.rows)))
    small = " small" if compared.views.pixels.shape[1] <= SMALL else ""
    return page.section(
        title,
        *notes,
        table,
        *reasons,
        side_by_side(drawn),
        controls.controls(last_ratio(compared.students[0].run)),
        f'<div class="compared{small}" id="gallery">{figures}</div>',
        name="dense",
    )


def _figure(i: int, compared: Comparison) -> str:
    """The view alone, under the teacher's labels, and under each student's."""
    views, cache = compared.views, compared.cache
    view, shard, offset = views.rows[i].tolist()
    content, marked = controls.content(compared.truth, i, controls.class_names(cache))
    image = page.picture(*encoded(views.pixels[i]), f"a view of {content}")
    panels = [f'<div><div class="stage">{image}</div><p class="whose">the view</p></div>']
    for who, name in enumerate(["teacher", *(one.run.name for one in compared.students)]):
        panels.append(
            f'<div data-who="{who}"><div class="stage">{image}<div class="places" role="grid" '
            f'aria-label="{page.text(f"{name}: labels of {content}")}"></div></div>'
            f'<p class="whose">{page.text(name)} <span class="share"></span></p>'
            '<ul class="legend"></ul></div>'
        )
    key = printable(cache.keys(shard)[offset])
    return (
        f'<figure data-view="{i}"><figcaption><strong>{marked}</strong> '
        f"{page.text(f'{key}, view {view}')}{controls.warning(views, i)}</figcaption>"
        f'<div class="panels" style="--panels: {len(panels)}">{"".join(panels)}</div>'
        '<div class="here" aria-live="polite"></div></figure>'
    )


def data_of(compared: Comparison) -> dict[str, Any]:
    """What ``runs.js`` reads."""
    names = controls.class_names(compared.cache)
    said = [one.labels.ravel() for one in compared.students]
    classes = np.unique(np.concatenate([controls.classes(compared.teacher.planes), *said]))
    return {
        "grid": compared.cache.manifest.grid,
        "views": [controls.places(planes) for planes in compared.teacher.planes],
        "names": {int(k): names[k] for k in classes},
        "students": [
            {"name": one.run.name, "views": one.labels.reshape(len(one.labels), -1).tolist()}
            for one in compared.students
        ],
    }
