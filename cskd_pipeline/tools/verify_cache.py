"""``cache verify``: check a cache's files and bytes, and whether it fits the user's images.

Structure and bytes need only the cache. With shards, the cache's samples are matched with theirs
and some of its views are replayed; with a teacher, the logits of those views are recomputed.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cskd_pipeline.cache.check import Problem, check_bytes, check_structure
from cskd_pipeline.cache.manifest import TeacherInfo, library_versions
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.cache.store import RESTORE
from cskd_pipeline.config.sections import is_factory
from cskd_pipeline.data.batches import render_batch
from cskd_pipeline.data.full_batches import logits_of
from cskd_pipeline.data.join import Join, lenient_join
from cskd_pipeline.data.replay import Replay, replay, same_images, spread_views
from cskd_pipeline.distill.encodings import Encoding, temperature_near
from cskd_pipeline.distill.targets import labels_draws_or_logs
from cskd_pipeline.errors import CacheError
from cskd_pipeline.models.teacher import Teacher, TeacherSource, load_teacher
from cskd_pipeline.runtime.classes import COMMAND_SWITCH, ClassGuard
from cskd_pipeline.runtime.console import format_value
from cskd_pipeline.runtime.device import pick_device
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.tools.tables import Printed, Table

log = logging.getLogger(__name__)

SAMPLES = 512  # views replayed by default
MEAN_AGREEMENT = 0.98
"""Minimum over all views, see :func:`agreement`. Logits rounded to float16 tie at 0.4 % of the
locations (K = 1000), where another machine's last bits change the label; other weights or pixels
change far more."""
VIEW_AGREEMENT = 0.5
"""Minimum for each view: a tie of its global logits costs a third."""
RATIOS = (1.0, 0.5)
COMPARED = ("weights_sha256", "mean", "std", "grid", "num_classes", "size", "precision")
"""Fields of a manifest's teacher that the user's must share; its name may differ."""


@dataclass(frozen=True)
class TeacherChoice:
    """The user's teacher; ``name``, ``weights``, ``mean`` and ``std`` as for dump-teacher."""

    name: str
    weights: str = "hub"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    batch_size: int = 32
    device: str = "auto"


@dataclass(frozen=True)
class UserImages:
    """The images that a cache should fit.

    Args:
        samples: number of views to replay.
        accept_classes: whether class names and labels may differ from the cache's.
        teacher: teacher to run on the replayed views, if any.
    """

    shards: str
    split: str | None = None
    samples: int = SAMPLES
    accept_classes: bool = False
    teacher: TeacherChoice | None = None


class Check(NamedTuple):
    """The counts of a check, by name, and the problems it found."""

    depth: str
    counts: dict[str, Any]
    problems: Sequence[Problem]


def verify_cache(
    cache: Path | str,
    *,
    depth: str = "bytes",
    partial: bool = False,
    images: UserImages | None = None,
) -> dict[str, Any]:
    """Check a cache, and report every problem.

    Args:
        depth: ``structure``, or ``bytes``, which includes it.
        partial: whether units may be missing.
        images: the user's images; None checks the cache alone.

    Returns:
        The counts of each check, all ``problems``, and ``ok``.
    """
    reader = open_cache(cache)
    checks = list(_own_checks(reader, depth, partial))
    broken = any(check.problems for check in checks[1:])
    differences = reader.manifest.version_differences(library_versions())
    if images is not None and broken:
        log.warning("the cache is damaged: it is not compared with the shards")
    elif images is not None:
        checks += _image_checks(reader, images, differences)
    return {
        "cache": str(reader.path),
        "digest": None if broken else reader.digest(),
        "ok": not any(check.problems for check in checks),
        "checks": {
            check.depth: {**check.counts, "problems": len(check.problems)} for check in checks
        },
        "other_versions_here": list(differences),
        "problems": [asdict(problem) for check in checks for problem in check.problems],
    }


def _own_checks(reader: Cache, depth: str, partial: bool) -> Iterator[Check]:
    """Check units, structure and, depending on ``depth``, bytes."""
    done, store = reader.done(), reader.store
    units, missing = (
        [(block, shard) for shard, block in np.argwhere(which.T).tolist()]
        for which in (done, ~done)
    )
    problems = [
        Problem("units", str(reader.path), f"not finished: {store.unit_name(*unit)}")
        for unit in missing
    ]
    counts = {"done": len(units), "total": done.size}
    yield Check("units", counts, () if partial else problems)
    files = len({key for unit in units for _, key in store.recorded_files(*unit)})
    problems = check_structure(store, units)
    yield Check("structure", {"files": files}, problems)
    if depth == "bytes" and not problems:
        views = sum(reader.manifest.view_block * reader.counts[shard] for _, shard in units)
        yield Check("bytes", {"views": views}, check_bytes(reader, units))


def _image_checks(reader: Cache, images: UserImages, differences: Sequence[str]) -> Iterator[Check]:
    """Check the cache against the user's images; ``differences`` are of library versions."""
    # The guard collects all differences; they become problems unless the user accepts them.
    guard = ClassGuard(COMMAND_SWITCH, accept=True)
    found = lenient_join(reader, images.shards, guard, split=images.split)
    yield _classes_check(found, guard, images.accept_classes)
    replayed = replay(found, spread_views(found, images.samples))
    total = found.samples.total
    counts = {"samples": total, "found": total - found.missing, "unused": found.unused}
    missing = [Problem("join", one.key, "not in the shards") for one in found.left_out()]
    yield Check("join", {**counts, "shards_alike": found.same_shards}, missing)
    yield from _replay_checks(found, replayed, differences)
    if images.teacher is not None:
        yield from _teacher_checks(found, replayed, images.teacher)


def _classes_check(found: Join, guard: ClassGuard, accept: bool) -> Check:
    """Check class names, and labels by key; log what the user accepts."""
    if accept:
        guard.report_new()
    else:
        for line in guard.unknown:
            log.warning(line)
    problems = [Problem("classes", "class names and labels", line) for line in guard.accepted]
    problems += [
        Problem(
            "classes",
            found.images.where(shard, offset),
            f"the label differs from the cache's, {label}",
        )
        for shard, offset, label in found.relabelled.tolist()
    ]
    counts = {"labels_compared": found.compared, "relabelled": len(found.relabelled)}
    return Check("classes", counts, () if accept else problems)


def _replay_checks(found: Join, replayed: Replay, differences: Sequence[str]) -> Iterator[Check]:
    """Check the replayed views' images and, where these are the cache's, their pixels."""
    rows, same, seeded = replayed.rows, replayed.same_image, replayed.same_seed

    def problems(depth: str, wrong: np.ndarray, text: str) -> list[Problem]:
        return [
            Problem(depth, found.images.where(shard, offset), text.format(view=view))
            for view, shard, offset in rows[wrong].tolist()
        ]

    other_image = problems("images", ~same, "not the image that the teacher saw")
    yield Check("images", {"compared": len(rows), "equal": int(same.sum())}, other_image)
    rounded = same & seeded & ~replayed.exact
    versions = f" ({'; '.join(differences)})" if differences else ""
    counts = {
        "replayed": same,
        "bit_exact": same & seeded & replayed.exact,
        "differing_by_rounding": rounded,
        "other_image": ~same,
        "other_seed": ~seeded,
    }
    yield Check(
        "views",
        {name: int(views.sum()) for name, views in counts.items()},
        problems("views", ~seeded, "view {view} has a different seed")
        + problems("views", rounded, "view {view} differs by rounding" + versions),
    )


def _teacher_checks(found: Join, replayed: Replay, choice: TeacherChoice) -> Iterator[Check]:
    """Compare the teacher with the cache's and, if it is the same, its logits with the stored."""
    recorded = found.cache.manifest.teacher
    teacher = _load_teacher(choice, recorded)
    problems = [
        Problem("teacher", teacher.name, f"{name} is {own}, in the cache's manifest {expected}")
        for name in COMPARED
        if (own := getattr(teacher, name)) != (expected := getattr(recorded, name))
    ]
    counts = {"compared": len(COMPARED), "equal": len(COMPARED) - len(problems)}
    yield Check("teacher", counts, problems)
    if not problems:
        yield _responses_check(found, replayed, teacher)


def _load_teacher(choice: TeacherChoice, recorded: TeacherInfo) -> Teacher:
    """Load the teacher; only timm's and torchvision's models get the cache's recorded arguments.

    Those are known to be safe with a stranger's arguments; the user's own factory is not.
    """
    kwargs = {} if is_factory(choice.name) else recorded.kwargs
    if kwargs != recorded.kwargs:
        log.warning(
            f"{choice.name} is called without the arguments that the cache records: a factory that "
            "needs arguments must set them itself"
        )
    source = TeacherSource(
        choice.name,
        choice.weights,
        recorded.num_classes,
        kwargs,
        mean=choice.mean or (),
        std=choice.std or (),
        precision=recorded.precision,
    )
    return load_teacher(
        source, size=recorded.size, batch_size=choice.batch_size, device=pick_device(choice.device)
    )


def _responses_check(found: Join, replayed: Replay, teacher: Teacher) -> Check:
    """Run the teacher on the bit-exact views whose partners' images are the cache's too."""
    cache, renderer = found.cache, found.renderer
    rows = replayed.rows[replayed.exact & replayed.same_seed]
    rows = rows[same_images(found, renderer.pair(rows).partner)] if len(rows) else rows
    parts: dict[str, list[np.ndarray]] = {name: [] for name in cache.encodings}
    with progress(len(rows), "views", "recomputing logits") as meter:
        for start in range(0, len(rows), teacher.batch_size):
            part = rows[start : start + teacher.batch_size]
            batch = render_batch(renderer, part).to(teacher.device)
            logits = logits_of(teacher, batch, cache.manifest.policy)
            seeds = np.array([cache.seeds(v, s)[o] for v, s, o in part.tolist()], np.uint64)
            for name, encoding in cache.encodings.items():
                live = encoding.encode(logits.spatial.cpu(), logits.global_.cpu(), seeds)
                stored = cache.gather(name, part)
                tensors = {n: torch.from_numpy(values) for n, values in stored.items()}
                parts[name].append(agreement(encoding, live, tensors))
            meter.advance(len(part))
    values = {name: np.concatenate(each) for name, each in parts.items() if each}
    means = {name: float(each.mean()) for name, each in values.items()}
    problems = [p for name, each in values.items() for p in _disagreeing(found, rows, name, each)]
    return Check("logits", {"views": len(rows), **means}, problems)


def _disagreeing(found: Join, rows: np.ndarray, name: str, values: np.ndarray) -> list[Problem]:
    problems = [
        Problem(
            "logits",
            found.images.where(shard, offset),
            f"{name}, view {view}: agreement {value:.3f}, expected at least {VIEW_AGREEMENT}",
        )
        for (view, shard, offset), value in zip(rows.tolist(), values.tolist(), strict=True)
        if value < VIEW_AGREEMENT
    ]
    if not problems and values.mean() < MEAN_AGREEMENT:
        mean = f"{name}: agreement {values.mean():.4f}, expected at least {MEAN_AGREEMENT}"
        problems = [Problem("logits", "the mean of all views", mean)]
    return problems


def agreement(
    encoding: Encoding, live: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> np.ndarray:
    """Return the agreement of two responses to each view, from 0 to 1: (B,) float64.

    It is the fraction of equal hard labels if the encoding has them, of equal draws, or else the
    overlap of the distributions (1 - total variation), averaged over r = 1, r = 0.5 and the global
    response.

    Args:
        live, stored: rows of the same views, see :meth:`Encoding.encode`.
    """
    tau, measures = temperature_near(encoding), []
    forms = (
        labels_draws_or_logs(encoding.targets(rows), encoding.serves, tau, RATIOS)
        for rows in (live, stored)
    )
    for a, b in zip(*forms, strict=True):
        same = torch.minimum(a, b).exp().sum(1) if a.is_floating_point() else a == b
        measures.append(same.double().reshape(len(same), -1).mean(1))
    return torch.stack(measures).mean(0).numpy()


def printed(report: Mapping[str, Any]) -> Printed:
    """Yield the report as a table, one row per check."""
    rows = []
    for depth, found in report["checks"].items():
        counts = [f"{name} {format_value(n)}" for name, n in found.items() if name != "problems"]
        rows.append((depth, ", ".join(counts).replace("_", " "), found["problems"]))
    yield Table("cache verify", ("depth", "checked", "problems"), rows)


ACTIONS = {
    "units": "run its dump-teacher command again to write the missing units, or pass --partial",
    "structure": RESTORE,
    "bytes": RESTORE,
    "classes": "pack the images again from class folders with the cache's names; or, if class k "
    f"is the same on both sides anyway, pass {COMMAND_SWITCH}",
    "join": "get the missing images, or train without them: --set data.missing=skip",
    "images": "get the original images, or train without these: --set data.drift=skip",
    "views": "install the versions that the cache was made with, or train on the views of the "
    "installed ones: --set data.drift=warn",
    "teacher": "pass the cache's teacher, as cache info shows it, by --teacher, --weights, --mean "
    "and --std",
    "logits": "the teacher is the cache's but its logits are not: compare the library versions "
    "that cache info shows, and the code of a factory; else copy the cache again",
}


def require_ok(report: Mapping[str, Any]) -> None:
    """Raise CacheError if the report has problems."""
    if report["ok"]:
        return
    failed = {
        depth: found["problems"] for depth, found in report["checks"].items() if found["problems"]
    }
    raise CacheError(
        "the cache failed verification",
        where=report["cache"],
        found=", ".join(f"{count} in {depth}" for depth, count in failed.items()),
        expected="no problems",
        action="; ".join(dict.fromkeys(ACTIONS[depth] for depth in failed)),
        problems=[str(Problem(**problem)) for problem in report["problems"]],
        report=report,
    )
