"""The study's commands in their order: ``run_study`` is the whole of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cskd_pipeline.cache.manifest import library_versions
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.runtime.atomic import write_json
from cskd_pipeline.runtime.device import cores, pick_device
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.tools.commands import Command, Summary, side_by_side, spoken
from cskd_pipeline.tools.study.arms import StudyRun, all_runs
from cskd_pipeline.tools.study.ledger import Ledger, Recipes, data_digest, load_recipes
from cskd_pipeline.tools.study.report import make_report, write_files

log = logging.getLogger(__name__)

TEACHER, DUMP = "teacher", "dump"


def run_study(
    shards: str,
    val_shards: str,
    out: Path,
    command: Command,
    *,
    size: str | None = None,
    recipes: Path | None = None,
    seeds: int = 3,
    jobs: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """``cskd-pipeline study``: run what is not finished yet, and report on all of it.

    Args:
        command: runs ``cskd-pipeline`` in this process and gives its summary.
        size: ``cpu`` or ``gpu``; None: what ``device`` is.
        recipes: a folder of recipes instead of the size's.
        seeds: the students' seeds are 1 to this; the teacher's is its recipe's.
        jobs: students at a time, each a process of its own where they are more than one; None: one
            on a GPU, else as many as have ``run.threads`` cores each.

    Returns:
        The report, which is also in ``out/study.json``.

    Raises:
        CskdError: a recipe, the data or a command's refusal; ``out`` holds something else.
        KeyboardInterrupt, Requeue: stopped; the same call goes on.
    """
    started = time.perf_counter()
    gpu = pick_device(device or "auto").type == "cuda"
    chosen = load_recipes(size or ("gpu" if gpu else "cpu"), recipes)
    threads = chosen.students["cskd"].run.threads or cores()
    jobs = jobs or (1 if gpu else max(1, cores() // threads))
    train = load_dataset(shards)
    validation = load_dataset(val_shards, prefer=("validation",))
    digests = {f"{role} recipe": digest for role, digest in chosen.digests.items()}
    digests["training images"] = data_digest(train.shard_ids)
    digests["validation images"] = data_digest(validation.shard_ids)
    ledger = Ledger(out, digests)
    stages = Stages(shards, val_shards, out, chosen, () if device is None else ("--device", device))

    parts: dict[str, dict[str, Any]] = {}
    for name, words, read in (
        (TEACHER, stages.teacher(), _trained),
        (DUMP, stages.dump(), _dumped),
    ):
        found = ledger.find(name, "seconds")
        if found is None:
            found = read(spoken(command)(*words))
            ledger.add(name, found)
        parts[name] = found

    runs = all_runs(range(1, seeds + 1))
    results = {run.name: ledger.find(run.name, "top1", "seconds") for run in runs}
    done = {name: found for name, found in results.items() if found is not None}
    todo = {run.name: stages.student(run) for run in runs if run.name not in done}
    with progress(len(runs), "students", "study", done=len(done)) as meter:
        for name, summary in _run(todo, jobs, out / "logs", command):
            done[name] = _trained(summary)
            ledger.add(name, done[name])
            meter.advance()
            log.info(f"{name}: top-1 {done[name]['top1']:.2f} %")
    report = make_report(runs, done) | {
        "teacher": parts[TEACHER],
        "cache": parts[DUMP],
        "recipes": dict(chosen.sources),
        "images": {"training": train.samples, "validation": validation.samples},
        "jobs": jobs,
        "device": "cuda" if gpu else f"cpu, {cores()} cores",
        "versions": library_versions(),
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }
    write_json(out / "study.json", report)
    write_files(report, out)
    return report


@dataclass(frozen=True)
class Stages:
    """The words of every command of the study. ``extra``: flags for all of them."""

    shards: str
    val_shards: str
    out: Path
    recipes: Recipes
    extra: tuple[str, ...]

    def teacher(self) -> list[str | Path]:
        return self._train(TEACHER, self.out / TEACHER)

    def dump(self) -> list[str | Path]:
        """Of the teacher's last weights: its best would be chosen on the validation images."""
        return [
            *("dump-teacher", "--recipe", self.recipes.sources[DUMP], "--shards", self.shards),
            *("--weights", self.out / TEACHER / "last.safetensors", "--cache", self.out / "cache"),
            *self.extra,
        ]

    def student(self, run: StudyRun) -> list[str | Path]:
        cache = () if run.arm.method == "none" else ("--cache", self.out / "cache")
        sets = (f"run.seed={run.seed}", *run.arm.sets)
        flags = [word for one in sets for word in ("--set", one)]
        return self._train(run.arm.method, self.out / "runs" / run.name, *cache, *flags)

    def _train(self, role: str, out: Path, *more: str | Path) -> list[str | Path]:
        """A run that was interrupted goes on; a new one begins."""
        return [
            *("train", "--recipe", self.recipes.sources[role], "--shards", self.shards),
            *("--val-shards", self.val_shards, "--out", out, *more, *self.extra, "--resume"),
        ]


def _run(
    calls: Mapping[str, list[str | Path]],
    jobs: int,
    logs: Path,
    command: Command,
) -> Iterator[tuple[str, Summary]]:
    """Name and summary of each call as it ends, ``jobs`` of them at a time."""
    if jobs > 1:
        yield from side_by_side(calls, jobs, logs)
        return
    call: Callable[..., Summary] = spoken(command)
    for name, words in calls.items():
        yield name, call(*words)


def _trained(summary: Summary) -> dict[str, Any]:
    """What the study keeps of a training run: its last weights, none chosen by validation."""
    last = summary["last"]
    heads = {name.removeprefix("top1_"): last[name] for name in last if name.startswith("top1_")}
    kept = ("student", "epochs", "updates", "seconds", "images_per_second", "out")
    return {"top1": last["top1"], "per_head": heads, **{name: summary[name] for name in kept}}


def _dumped(summary: Summary) -> dict[str, Any]:
    kept = ("cache", "views", "samples", "bytes", "bytes_per_view", "teacher_top1", "seconds")
    return {name: summary[name] for name in kept}
