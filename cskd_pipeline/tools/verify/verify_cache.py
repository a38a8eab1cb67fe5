"""Verification of a cache: its files, its bytes, and what they mean for the images at hand.

``verify_cache`` is the whole of it. Structure and bytes need only the cache; with shards, the
cache's samples are looked for among them and some of its views are replayed; with a teacher, the
logits of those views are computed again too.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cskd_pipeline.cache.check import Problem, check_bytes, check_structure
from cskd_pipeline.cache.manifest import library_versions
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.cache.store import RESTORE
from cskd_pipeline.data.join import Join, join_to_look
from cskd_pipeline.data.replay import Replay, replay, spread_views
from cskd_pipeline.errors import CacheError
from cskd_pipeline.runtime.classes import COMMAND_SWITCH, ClassGuard
from cskd_pipeline.runtime.console import format_value
from cskd_pipeline.tools.tables import Printed, Table
from cskd_pipeline.tools.verify.verify_responses import Check, TeacherChoice, check_teacher

log = logging.getLogger(__name__)

SAMPLES = 512  # views that are replayed unless another number is given


@dataclass(frozen=True)
class UserImages:
    """Name the images that a cache is to fit.

    Args:
        samples: how many views are replayed from them.
        accept_classes: class names and labels that are not the cache's are no problem.
        teacher: runs on the replayed views; None: none does.
    """

    shards: str
    split: str | None = None
    samples: int = SAMPLES
    accept_classes: bool = False
    teacher: TeacherChoice | None = None


def verify_cache(
    cache: Path | str,
    *,
    depth: str = "bytes",
    partial: bool = False,
    images: UserImages | None = None,
) -> dict[str, Any]:
    """Check everything, and report all that is wrong.

    Args:
        depth: ``structure``, or ``bytes``, which is that too.
        partial: units that are not made yet are no problem.
        images: the user's own; None: the cache is looked at alone.

    Returns:
        Per depth what was counted, all ``problems``, and ``ok``.

    Raises:
        CskdError: there is no cache, or no data set, to look at.
    """
    reader = open_cache(cache)
    checks = _own_checks(reader, depth, partial)
    broken = any(check.problems for check in checks[1:])
    differences = reader.manifest.version_differences(library_versions())
    if images is not None and broken:
        log.warning("the cache itself is damaged: it is not compared with the shards")
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


def _own_checks(reader: Cache, depth: str, partial: bool) -> list[Check]:
    """Check units, structure and, by ``depth``, bytes: what needs nothing but the cache."""
    done = reader.done()
    units = [(block, shard) for shard, block in np.argwhere(done.T).tolist()]
    store = reader.store
    missing = [
        Problem("units", str(reader.path), f"not made yet: {store.unit_name(block, shard)}")
        for shard, block in np.argwhere(~done.T).tolist()
    ]
    counts = {"done": len(units), "total": done.size}
    checks = [Check("units", counts, () if partial else missing)]
    files = len({key for unit in units for _, key in store.recorded_files(*unit)})
    problems = check_structure(store, units)
    checks.append(Check("structure", {"files": files}, problems))
    if depth == "bytes" and not problems:
        views = sum(reader.manifest.view_block * reader.counts[shard] for _, shard in units)
        problems = check_bytes(reader, units)
        checks.append(Check("bytes", {"views": views}, problems))
    return checks


def _image_checks(reader: Cache, images: UserImages, differences: Sequence[str]) -> list[Check]:
    """Check the cache against the user's images; ``differences`` are those of library versions."""
    guard = ClassGuard(
        COMMAND_SWITCH, accept=True
    )  # every difference becomes a problem, unless it is accepted
    found = join_to_look(reader, images.shards, guard, split=images.split)
    checks = [_classes_check(found, guard, images.accept_classes)]
    replayed = replay(found, spread_views(found, images.samples))
    checks += [_join_check(found), *_replay_checks(found, replayed, differences)]
    if images.teacher is not None:
        checks += check_teacher(found, replayed, images.teacher)
    return checks


def _classes_check(found: Join, guard: ClassGuard, accept: bool) -> Check:
    """Check names, and labels by key; what is accepted is logged."""
    if accept:
        guard.report_new()
    else:
        for line in guard.unknown:
            log.warning(line)
    images = found.images
    problems = [Problem("classes", "class names and labels", line) for line in guard.accepted]
    problems += [
        Problem("classes", images.where(shard, offset), f"another label than {label}, the cache's")
        for shard, offset, label in found.relabelled.tolist()
    ]
    counts = {"labels_compared": found.compared, "relabelled": len(found.relabelled)}
    return Check("classes", counts, () if accept else problems)


def _join_check(found: Join) -> Check:
    total = found.samples.total
    problems = [Problem("join", one.key, "not in the shards") for one in found.left_out()]
    counts = {"samples": total, "found": total - found.missing, "unused": found.unused}
    return Check("join", {**counts, "shards_alike": found.same_shards}, problems)


def _replay_checks(found: Join, replayed: Replay, differences: Sequence[str]) -> list[Check]:
    """Check images, and the views of those images that are the cache's."""
    rows, same = replayed.rows, replayed.same_image

    def problems(depth: str, wrong: np.ndarray, what: str) -> list[Problem]:
        return [
            Problem(depth, found.images.where(shard, offset), what.format(view=view))
            for view, shard, offset in rows[wrong].tolist()
        ]

    rounded = same & replayed.same_seed & ~replayed.exact
    versions = f" ({'; '.join(differences)})" if differences else ""
    other_image = problems("images", ~same, "another image than the teacher saw")
    wrong_views = problems("views", ~replayed.same_seed, "view {view} has another seed")
    wrong_views += problems("views", rounded, "view {view} differs by rounding" + versions)
    return [
        Check("images", {"compared": len(rows), "equal": int(same.sum())}, other_image),
        Check(
            "views",
            {
                "replayed": int(same.sum()),
                "bit_exact": int((same & replayed.same_seed & replayed.exact).sum()),
                "differing_by_rounding": int(rounded.sum()),
                "other_image": int((~same).sum()),
                "other_seed": int((~replayed.same_seed).sum()),
            },
            wrong_views,
        ),
    ]


def printed(report: Mapping[str, Any]) -> Printed:
    """Yield a table of what was checked."""
    rows = []
    for depth, found in report["checks"].items():
        counts = [f"{name} {format_value(n)}" for name, n in found.items() if name != "problems"]
        rows.append((depth, ", ".join(counts).replace("_", " "), found["problems"]))
    yield Table("cache verify", ("depth", "looked at", "problems"), rows)


TO_DO = {
    "units": "run its dump-teacher command again: it makes what is missing; or pass --partial",
    "structure": RESTORE,
    "bytes": RESTORE,
    "classes": "pack the images again from class folders with the cache's names; or, where class k "
    f"is the same on both sides all the same, pass {COMMAND_SWITCH}",
    "join": "get the missing images, or train without them: --set data.missing=skip",
    "images": "get the original images, or train without these: --set data.drift=skip",
    "views": "install the versions that the cache was made with, or train on what these give: "
    "--set data.drift=warn",
    "teacher": "give the teacher that made the cache by --teacher, --weights, --mean and --std: "
    "cache info shows them",
    "answers": "the teacher is the cache's but its logits are not: compare the library versions "
    "that cache info shows, and the code of a factory; else copy the cache again",
}


def require_ok(report: Mapping[str, Any]) -> None:
    """Refuse a cache with problems.

    Raises:
        CacheError: lists them, says what to do, and holds the report.
    """
    if report["ok"]:
        return
    failed = {depth: found["problems"] for depth, found in report["checks"].items()}
    failed = {depth: count for depth, count in failed.items() if count}
    raise CacheError(
        "the cache does not pass",
        where=report["cache"],
        found=", ".join(f"{count} in {depth}" for depth, count in failed.items()),
        expected="none",
        action="; ".join(dict.fromkeys(TO_DO[depth] for depth in failed)),
        problems=[str(Problem(**problem)) for problem in report["problems"]],
        report=report,
    )
