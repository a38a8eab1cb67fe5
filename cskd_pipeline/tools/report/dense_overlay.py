"""What students say of every place of a view, beside what the teacher said there.

Students are asked as they stand after their run, in evaluation mode.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cskd_pipeline.cache.digests import split_pin
from cskd_pipeline.cache.reader import CacheReader
from cskd_pipeline.data.assemble import assemble, normalise
from cskd_pipeline.data.batches import render_batch
from cskd_pipeline.data.join import Join, classes_of, join_to_look
from cskd_pipeline.data.replay import renderer_of
from cskd_pipeline.errors import JoinError, UsageError
from cskd_pipeline.models.checkpoint import load_student, read_card, student_file
from cskd_pipeline.models.header import StudentCard
from cskd_pipeline.runtime.classes import ClassGuard
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.tools.report.gallery import GalleryViews, choose_views, make_views
from cskd_pipeline.tools.report.labels import Labels, read_labels
from cskd_pipeline.tools.report.records import RunRecord
from cskd_pipeline.tools.report.statistics import RATIOS, Truth, truth

log = logging.getLogger(__name__)

_AT_ONCE = 32  # views that a student sees together


@dataclass(frozen=True)
class StudentLabels:
    """What one run's student says.

    Args:
        style: the run's place among the runs, which decides how its curves look.
        labels: (n, h, w) int64, the class of the largest dense logit, of the views shown.
        agreement: (101,) share of the places of all views that were counted at which that is the
            teacher's label, at ``RATIOS``.
    """

    run: RunRecord
    style: int
    file: Path
    card: StudentCard
    labels: np.ndarray
    agreement: np.ndarray

    def at(self, r: float) -> float:
        """The agreement at the nearest of ``RATIOS``."""
        return float(self.agreement[np.abs(RATIOS - r).argmin()])


@dataclass(frozen=True)
class Comparison:
    """n views with the teacher's labels and at least one student's.

    ``counted``: (views, rows, columns) over which agreement was counted.
    """

    cache: CacheReader
    counted: tuple[int, ...]
    views: GalleryViews
    teacher: Labels
    truth: Truth
    students: tuple[StudentLabels, ...]


def compare(
    runs: Sequence[RunRecord],
    shards: str,
    guard: ClassGuard,
    *,
    cache: str | None = None,
    split: str | None = None,
    images: int,
    samples: int,
) -> tuple[Comparison | None, dict[str, str]]:
    """Students' labels beside the teacher's, and run name -> why its student is not there.

    Args:
        shards, split: the images that the cache was made from.
        guard: compares the classes of shards, cache and students.
        cache: what the runs were trained from; None: the folder that the first recipe names.
        images: how many views are shown, of as many images spread over the cache.
        samples: over how many views agreement is counted; those that are shown are among them.

    Returns:
        None instead of a comparison where no student has a dense head that fits.

    Raises:
        CskdError: cache or shards cannot be used, or are not each other's; a student's file is
            missing or damaged.
    """
    without = {
        run.name: f"method {run.method} trains no dense head"
        for run in runs
        if run.method != "cskd"
    }
    dense = [run for run in runs if run.name not in without]
    if not dense:
        return None, without
    reader = CacheReader(cache or _cache_of(dense[0]))
    files = {run.name: student_file(run.folder) for run in dense}
    cards = {name: read_card(file) for name, file in files.items()}
    without |= {name: why for name, card in cards.items() if (why := _misfit(card, reader))}
    for name in cards.keys() - without.keys():
        student = replace(cards[name].classes(files[name]), of=f"the student of {name}")
        guard.compare(student, classes_of(reader))
    if len(without) == len(runs):
        return None, without
    found = join_to_look(reader, shards, guard, split=split)
    guard.tell(log.warning)
    rows = choose_views(found, max(images, samples))
    if not len(rows):
        raise JoinError(
            "none of the cache's finished views can be made from these shards",
            where=reader.path,
            found=f"{found.missing} of {found.samples.total} samples missing",
            action="give the shards that the cache was made from",
        )
    shown = np.unique(np.linspace(0, len(rows) - 1, min(images, len(rows))).astype(np.int64))
    teacher = read_labels(reader, rows)
    at = np.stack([teacher.at(r) for r in RATIOS])  # (101, m, h, w)
    students = []
    for style, run in enumerate(runs):
        if run.name not in without:
            file = files[run.name]
            labels, card = _ask(file, found, rows)
            agreement = (at == labels).mean(axis=(1, 2, 3))
            students.append(StudentLabels(run, style, file, card, labels[shown], agreement))
    compared = Comparison(
        cache=reader,
        counted=at.shape[1:],
        views=make_views(found, rows[shown]),
        teacher=replace(teacher, planes=teacher.planes[shown]),
        truth=truth(found, rows[shown]),
        students=tuple(students),
    )
    return compared, without


def _cache_of(run: RunRecord) -> str:
    """The folder that a recipe names; a URL, which may be a stranger's, is not fetched."""
    named = run.recipe.data.cache
    if not named or not Path(split_pin(named)[0]).is_dir():
        raise UsageError(
            "the run's cache is not here",
            where=f"data.cache of {run.folder}",
            found=named or "nothing",
            expected="a folder",
            action="give --cache CACHE",
        )
    return named


def _misfit(card: StudentCard, reader: CacheReader) -> str:
    """Why a student cannot be shown this cache's views; empty if it can."""
    manifest = reader.manifest
    if card.grid is None:
        return "its student has no dense head"
    for name, mine, theirs in (
        ("grid", card.grid, manifest.grid),
        ("image size", card.size, manifest.policy.size),
        ("number of classes", card.num_classes, manifest.dataset.num_classes),
    ):
        if mine != theirs:
            return f"its student's {name} is {mine}, the cache's is {theirs}"
    return ""


@torch.inference_mode()
def _ask(file: Path, found: Join, rows: np.ndarray) -> tuple[np.ndarray, StudentCard]:
    """The classes that a student says: (m, h, w) int64."""
    student, card = load_student(file, torch.device("cpu"))
    student.eval()
    renderer, labels = renderer_of(found, strict=False), []
    with progress(len(rows), "views", f"asking {file.parent.name}") as meter:
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            seen = assemble(render_batch(renderer, part), renderer.policy)
            heads = student(normalise(seen, student.mean, student.std), card.grid)
            labels.append(heads.dense.argmax(dim=1).numpy())
            meter.advance(len(part))
    return np.concatenate(labels), card


def last_ratio(run: RunRecord) -> float:
    """The CKF ratio of the run's last finished epoch; 1 before the first."""
    ratio = run.last("ckf_ratio")
    return 1.0 if ratio is None else min(1.0, max(0.0, ratio))
