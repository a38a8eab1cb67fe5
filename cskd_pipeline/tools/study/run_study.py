"""The study's commands in their order: ``run_study`` is all of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cskd_pipeline.cache.manifest import library_versions
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.runtime.atomic import NO_LOCKS, sole_writer, write_json
from cskd_pipeline.runtime.device import cores, pick_device
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.tools.commands import Command, Summary, announced, side_by_side
from cskd_pipeline.tools.study.arms import StudyRun, all_runs
from cskd_pipeline.tools.study.ledger import Ledger, Recipes, data_digest, load_recipes
from cskd_pipeline.tools.study.report import make_report, write_files

log = logging.getLogger(__name__)

TEACHER, DUMP = "teacher", "dump"


@dataclass(frozen=True)
class StudyConfig:
    """Say what is studied, where, and how.

    Args:
        size: ``cpu`` or ``gpu``; None: what ``device`` is.
        recipes: a folder of recipes instead of the size's.
        seeds: the students' seeds are 1 to this; the teacher's is its recipe's.
        jobs: students at a time, each a process of its own where they are more than one; None: one
            on a GPU, else as many as have ``run.threads`` cores each.
    """

    shards: str
    val_shards: str
    out: Path
    size: str | None = None
    recipes: Path | None = None
    seeds: int = 3
    jobs: int | None = None
    device: str | None = None


def run_study(study: StudyConfig, command: Command) -> dict[str, Any]:
    """Run what is not finished yet, and report on all of it.

    Args:
        command: runs ``cskd-pipeline`` in this process and returns its summary.

    Returns:
        The report, which is also in ``out/study.json``.

    Raises:
        CskdError: a recipe, the data or a command's refusal; ``out`` holds something else.
        KeyboardInterrupt, Requeue: stopped; the same call goes on.
    """
    with sole_writer(study.out) as held:
        if not held:
            log.warning(NO_LOCKS.format(study.out))
        report = _run_all(study, command)
    write_json(study.out / "study.json", report)
    write_files(report, study.out)
    return report


def _run_all(study: StudyConfig, command: Command) -> dict[str, Any]:
    started = time.perf_counter()
    gpu = pick_device(study.device or "auto").type == "cuda"
    recipes = load_recipes(study.size or ("gpu" if gpu else "cpu"), study.recipes)
    threads = recipes.students["cskd"].run.threads or cores()
    jobs = study.jobs or (1 if gpu else max(1, cores() // threads))
    train = load_dataset(study.shards)
    validation = load_dataset(study.val_shards, prefer=("validation",))
    digests = {f"{role} recipe": digest for role, digest in recipes.digests.items()}
    digests["training images"] = data_digest(train.shard_ids)
    digests["validation images"] = data_digest(validation.shard_ids)
    ledger = Ledger(study.out, digests)
    stages = Stages(study, recipes)
    call = announced(command)
    teacher = _kept(ledger, TEACHER, lambda: _trained(call(*stages.teacher())))
    cache = _kept(ledger, DUMP, lambda: _dumped(call(*stages.dump())))
    runs = all_runs(range(1, study.seeds + 1))
    students = _train_students(runs, ledger, stages, jobs, call)
    return make_report(runs, students) | {
        "teacher": teacher,
        "cache": cache,
        "recipes": dict(recipes.sources),
        "images": {"training": train.samples, "validation": validation.samples},
        "jobs": jobs,
        "device": "cuda" if gpu else f"cpu, {cores()} cores",
        "versions": library_versions(),
        "seconds": time.perf_counter() - started,
        "out": str(study.out),
    }


def _kept(ledger: Ledger, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what the part ``name`` found, which is run where it is not finished."""
    found = ledger.find(name, "seconds")
    if found is None:
        found = run()
        ledger.add(name, found)
    return found


def _train_students(
    runs: Sequence[StudyRun],
    ledger: Ledger,
    stages: Stages,
    jobs: int,
    call: Callable[..., Summary],
) -> dict[str, dict[str, Any]]:
    """Return what every run found by name, ``jobs`` of those that are left at a time."""
    results = {run.name: ledger.find(run.name, "top1", "seconds") for run in runs}
    done = {name: found for name, found in results.items() if found is not None}
    todo = {run.name: stages.student(run) for run in runs if run.name not in done}
    ended = ((name, call(*words)) for name, words in todo.items())
    if jobs > 1:
        ended = side_by_side(todo, jobs, stages.study.out / "logs")
    with progress(len(runs), "students", "study", done=len(done)) as meter, closing(ended):
        for name, summary in ended:
            done[name] = _trained(summary)
            ledger.add(name, done[name])
            meter.advance()
            log.info(f"{name}: top-1 {done[name]['top1']:.2f} %")
    return done


@dataclass(frozen=True)
class Stages:
    """Make the words of every command of the study."""

    study: StudyConfig
    recipes: Recipes

    def teacher(self) -> list[str | Path]:
        """Return the command that trains the teacher."""
        return self._train(TEACHER, self.study.out / TEACHER)

    def dump(self) -> list[str | Path]:
        """Return the dump of the teacher's last weights; validation images chose its best."""
        out = self.study.out
        return [
            *("dump-teacher", "--recipe", self.recipes.sources[DUMP], *self._device),
            *("--shards", self.study.shards, "--cache", out / "cache"),
            *("--weights", out / TEACHER / "last.safetensors"),
        ]

    def student(self, run: StudyRun) -> list[str | Path]:
        """Return the command that trains a student."""
        out = self.study.out
        cache = () if run.arm.method == "none" else ("--cache", out / "cache")
        sets = (f"run.seed={run.seed}", *run.arm.sets)
        flags = [word for one in sets for word in ("--set", one)]
        return self._train(run.arm.method, out / "runs" / run.name, *cache, *flags)

    def _train(self, role: str, out: Path, *more: str | Path) -> list[str | Path]:
        """Return a training that begins, or goes on where it was interrupted."""
        return [
            *("train", "--recipe", self.recipes.sources[role], "--shards", self.study.shards),
            *("--val-shards", self.study.val_shards, "--out", out, *more, *self._device),
            "--resume",
        ]

    @property
    def _device(self) -> tuple[str, ...]:
        return () if self.study.device is None else ("--device", self.study.device)


def _trained(summary: Summary) -> dict[str, Any]:
    """Return what the study keeps of a run: its last weights, which no validation chose."""
    last = summary["last"]
    heads = {name.removeprefix("top1_"): last[name] for name in last if name.startswith("top1_")}
    kept = ("student", "epochs", "updates", "seconds", "images_per_second", "out")
    return {"top1": last["top1"], "per_head": heads, **{name: summary[name] for name in kept}}


def _dumped(summary: Summary) -> dict[str, Any]:
    kept = ("cache", "views", "samples", "bytes", "bytes_per_view", "teacher_top1", "seconds")
    return {name: summary[name] for name in kept}
