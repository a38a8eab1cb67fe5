"""Students' labels at every location of a view, next to the teacher's.

Students are loaded from their run's folder and predict in evaluation mode.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cskd_pipeline.cache.digests import split_pin
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.data.assemble import assemble, normalise
from cskd_pipeline.data.batches import render_batch
from cskd_pipeline.data.join import Join, classes_of, lenient_join
from cskd_pipeline.errors import UsageError
from cskd_pipeline.models.checkpoint import StudentHeader, load_student, read_header, student_file
from cskd_pipeline.runtime.classes import ClassGuard
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.tools.report import plots
from cskd_pipeline.tools.report.gallery import GalleryView, choose_views, class_names, replay_views
from cskd_pipeline.tools.report.labels import RATIO_AXIS, RATIOS, Labels, read_labels
from cskd_pipeline.tools.report.page import PageOptions
from cskd_pipeline.tools.report.plot_files import Plot
from cskd_pipeline.tools.report.records import RunRecord

IMAGES = 8
SAMPLES = 256
_BATCH = 32  # views in a forward pass


@dataclass(frozen=True)
class StudentLabels:
    """The labels of one run's student.

    Args:
        style: number of the run, which is the style of its curves.
        labels: (n, h, w) int64, class of the largest dense logit, for the views shown.
        agreement: (101,) share of locations, over all counted views, at which that class is the
            teacher's label at ``RATIOS``.
    """

    run: RunRecord
    style: int
    file: Path
    header: StudentHeader
    labels: np.ndarray
    agreement: np.ndarray

    def at(self, r: float) -> float:
        """Return the agreement at the nearest of ``RATIOS``."""
        return float(self.agreement[np.abs(RATIOS - r).argmin()])

    @property
    def last_ratio(self) -> float:
        """Return the CKF ratio of the run's last finished epoch; 1 before the first."""
        ratio = self.run.last("ckf_ratio")
        return 1.0 if ratio is None else min(1.0, max(0.0, ratio))

    def figures(self) -> dict[str, Any]:
        """Return the student's file, weights, epoch and agreement."""
        return {
            "student": str(self.file),
            "weights": self.header.weights,
            "epoch": self.header.epoch,
            "agreement": {"r=1": self.at(1), "r=0": self.at(0), "last": self.at(self.last_ratio)},
        }


@dataclass(frozen=True)
class Comparison:
    """Views with labels of the teacher and of at least one student.

    Args:
        counted: (views, rows, columns) over which agreement is counted.
    """

    cache: Cache
    counted: tuple[int, ...]
    views: list[GalleryView]
    teacher: Labels
    students: tuple[StudentLabels, ...]


def compare(
    runs: Sequence[RunRecord], guard: ClassGuard, options: PageOptions
) -> tuple[Comparison | None, dict[str, str]]:
    """Compare students' labels with the teacher's; return also why a run is left out, by name.

    Agreement is counted over ``options.samples`` views of different images, spread over the cache;
    the views shown are among them.

    Args:
        guard: compares the classes of shards, cache and students.
        options: options that name ``shards``.

    Returns:
        The comparison, None if no student has a dense head that fits the cache, and the reasons.
    """
    without = {
        run.name: f"method {run.method} trains no dense head"
        for run in runs
        if run.method != "cskd"
    }
    dense = [run for run in runs if run.name not in without]
    if not dense:
        return None, without
    reader = open_cache(options.cache or _cache_of(dense[0]))
    without |= {run.name: why for run in dense if (why := _misfit(run, reader, guard))}
    fitting = [(style, run) for style, run in enumerate(runs) if run.name not in without]
    if not fitting:
        return None, without
    joined = lenient_join(reader, options.shards or "", guard, split=options.split)
    guard.report_new()
    images, samples = options.images or IMAGES, options.samples or SAMPLES
    rows = choose_views(joined, max(images, samples))
    shown = np.unique(np.linspace(0, len(rows) - 1, min(images, len(rows))).astype(int))
    teacher = read_labels(reader, rows)
    students = []
    for style, run in fitting:
        file = student_file(run.folder)
        header, labels = _dense_labels(file, joined, rows)
        agreement = teacher.agreement(labels)
        students.append(StudentLabels(run, style, file, header, labels[shown], agreement))
    compared = Comparison(
        cache=reader,
        counted=(len(rows), *teacher.planes.shape[2:]),
        views=replay_views(joined, rows[shown]),
        teacher=replace(teacher, planes=teacher.planes[shown]),
        students=tuple(students),
    )
    return compared, without


def _cache_of(run: RunRecord) -> str:
    """Return the cache folder that the recipe names; a URL could be anyone's and is not opened."""
    named = run.recipe.data.cache
    if not named or not Path(split_pin(named)[0]).is_dir():
        raise UsageError(
            "the run's cache is not a local folder",
            where=f"data.cache of {run.folder}",
            found=named or "no cache",
            action="give --cache CACHE",
        )
    return named


def _misfit(run: RunRecord, reader: Cache, guard: ClassGuard) -> str:
    """Return why a run's student does not fit this cache; empty if it does.

    Raises:
        ClassesError: the class names of student and cache differ.
    """
    file, manifest = student_file(run.folder), reader.manifest
    header = read_header(file)
    if header.grid is None:
        return "its student has no dense head"
    for name, student, cache in (
        ("grid", header.grid, manifest.teacher.grid),
        ("image size", header.size, manifest.policy.size),
        ("number of classes", header.num_classes, manifest.dataset.num_classes),
    ):
        if student != cache:
            return f"its student's {name} is {student}, the cache's is {cache}"
    classes = replace(header.classes(file), of=f"the student of {run.name}")
    guard.compare(classes, classes_of(reader))
    return ""


@torch.inference_mode()
def _dense_labels(file: Path, joined: Join, rows: np.ndarray) -> tuple[StudentHeader, np.ndarray]:
    """Return a student's header and the class of its largest dense logit, (m, h, w) int64."""
    student, header = load_student(file, torch.device("cpu"))
    student.eval()
    renderer, labels = joined.renderer, []
    with progress(len(rows), "views", f"predicting with {file.parent.name}") as meter:
        for part in np.split(rows, range(_BATCH, len(rows), _BATCH)):
            images = assemble(render_batch(renderer, part), renderer.policy)
            heads = student(normalise(images, student.mean, student.std), header.grid)
            labels.append(heads.dense.argmax(dim=1).numpy())
            meter.advance(len(part))
    return header, np.concatenate(labels)


def draw_agreement(compared: Comparison) -> Plot:
    """Draw the share of locations at which a student agrees with the teacher, over r."""
    series = [
        plots.Series(one.run.name, RATIOS.tolist(), (100 * one.agreement).tolist(), one.style)
        for one in compared.students
    ]
    caption = (
        f"Share of {math.prod(compared.counted)} locations in {compared.counted[0]} views at which "
        f"a student's class is the teacher's label, read from {compared.teacher.encoding}."
    )
    values = "; ".join(
        f"{plots.short_name(one.run.name)}: {one.at(0):.1%} at r = 0, {one.at(1):.1%} at r = 1"
        for one in compared.students
    )
    return Plot(
        "dense_agreement",
        "Locations at which student and teacher agree",
        plots.lines(series, x_label=RATIO_AXIS, y_label="locations that agree, %", x_limits=(1, 0)),
        caption,
        f"{caption} {values}",
    )


def script_data(compared: Comparison) -> Mapping[str, Any]:
    """Return the labels of all views, for ``runs.js``."""
    names = class_names(compared.cache)
    labels = [one.labels.reshape(len(one.labels), -1) for one in compared.students]
    classes = np.unique(np.concatenate([compared.teacher.classes(), *map(np.ravel, labels)]))
    return {
        "grid": compared.cache.manifest.teacher.grid,
        "views": compared.teacher.by_location(),
        "names": {int(k): names[k] for k in classes},
        "students": [
            {"name": one.run.name, "views": predicted.tolist()}
            for one, predicted in zip(compared.students, labels, strict=True)
        ],
    }
