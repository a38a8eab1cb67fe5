"""Run the study's commands in order."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cskd_pipeline.cache.manifest import library_versions
from cskd_pipeline.data.index import Dataset, load_dataset
from cskd_pipeline.pipeline.train import KEPT_STATE
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.atomic import NO_LOCKS, sole_writer, write_json
from cskd_pipeline.runtime.device import cores, device_name, pick_device
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.tools.commands import Command, Summary, side_by_side, with_logging
from cskd_pipeline.tools.demo_images import CLUTTERED, write_digit_folders
from cskd_pipeline.tools.report.records import read_log
from cskd_pipeline.tools.study.analysis import attention_distances, local_accuracy
from cskd_pipeline.tools.study.arms import (
    TRUNK,
    ForkPoint,
    StudyRun,
    fork_point,
    kept_every,
    runs_of,
)
from cskd_pipeline.tools.study.ledger import Ledger, Recipes, load_recipes
from cskd_pipeline.tools.study.report import make_report, write_files

log = logging.getLogger(__name__)

TEACHER, DUMP, LOCAL, IMAGES = "teacher", "dump", "local", "images"
DIGITS = {"train": 2400, "validation": 1000}
"""Number of images in the study on digits."""
GPU_JOBS = 4
"""Students trained at a time on a GPU, which one small ViT does not fill."""
LAST = "last.safetensors"


@dataclass(frozen=True)
class StudyConfig:
    """Options for :func:`run_study`.

    Args:
        shards, val_shards: CIFAR-10's shards; None: the study writes pages of digits.
        recipes: a folder of recipes to use instead of the data set's.
        seeds: number of the students' seeds, counted from 1; the teacher's is in its recipe.
        jobs: number of students trained at a time, in separate processes if more than one; None:
            ``GPU_JOBS`` on a GPU, otherwise as many as get ``run.threads`` cores each.
    """

    out: Path
    shards: str | None = None
    val_shards: str | None = None
    recipes: Path | None = None
    seeds: int = 3
    jobs: int | None = None
    device: str | None = None


def run_study(study: StudyConfig, command: Command) -> dict[str, Any]:
    """Run the unfinished parts of the study, and report on all of it.

    Args:
        command: runs ``cskd-pipeline`` in this process and returns its summary.

    Returns:
        The report, also written to ``out/study.json`` after every seed.

    Raises:
        CskdError: an invalid recipe or data set, a failed command, or other files in ``out``.
        KeyboardInterrupt, Requeue: stopped; call again to continue.
    """
    with sole_writer(study.out) as held:
        if not held:
            log.warning(NO_LOCKS.format(study.out))
        return _run_all(study, command)


def _run_all(study: StudyConfig, command: Command) -> dict[str, Any]:
    started = time.perf_counter()
    device = pick_device(study.device or "auto")
    gpu = device.type == "cuda"
    recipes = load_recipes(study.recipes or ("cifar10" if study.shards else "digits"))
    call = with_logging(command)
    stages, ledger = _open(study, recipes, call)
    train, validation = stages.datasets
    teacher = _run_once(ledger, TEACHER, lambda: _run_result(call(*stages.teacher())))
    cache = _run_once(ledger, DUMP, lambda: _dump_result(call(*stages.dump())))
    weights = study.out / TEACHER / LAST
    local = _run_once(ledger, LOCAL, lambda: _local_result(weights, validation, device))
    students = Students(stages, ledger, call, validation, device, local["top1"])
    report: dict[str, Any] = {}
    for seed in range(1, study.seeds + 1):
        students.train(seed)
        report = make_report(students.results, students.forks) | {
            "teacher": teacher | {"local": local["top1"]},
            "cache": cache,
            "recipes": dict(recipes.sources),
            "images": {"training": train.samples, "validation": validation.samples},
            "jobs": students.jobs,
            "device": device_name(device) + ("" if gpu else f", {cores()} cores"),
            "versions": library_versions(),
            "seconds": time.perf_counter() - started,
            "out": str(study.out),
        }
        write_json(study.out / "study.json", report)
        write_files(report, study.out)
    return report


def _open(
    study: StudyConfig, recipes: Recipes, call: Callable[..., Summary]
) -> tuple[Stages, Ledger]:
    """Return the study's commands and ledger; write the images of digits if it uses them."""
    digests = {f"{role} recipe": digest for role, digest in recipes.digests.items()}
    if study.shards is not None and study.val_shards is not None:
        stages = Stages(study, recipes, study.shards, study.val_shards)
        for split, dataset in zip(("training", "validation"), stages.datasets, strict=True):
            digests[f"{split} images"] = schemas.sha256(list(dataset.shard_ids))
        return stages, Ledger(study.out, digests)
    ledger = Ledger(study.out, digests | {"images": f"digits {DIGITS} {CLUTTERED}"})
    folders = {split: study.out / "shards" / split for split in DIGITS}
    _run_once(ledger, IMAGES, lambda: _write_digits(study.out / "images", folders, call))
    return Stages(study, recipes, *map(str, folders.values())), ledger


def _write_digits(
    images: Path, folders: dict[str, Path], call: Callable[..., Summary]
) -> dict[str, Any]:
    log.info(f"writing {sum(DIGITS.values())} images of handwritten digits")
    started = time.perf_counter()
    write_digit_folders(images, seed=0, page=CLUTTERED, **DIGITS)
    for split, folder in folders.items():
        shutil.rmtree(folder, ignore_errors=True)  # left by a study that was killed
        call("make-shards", images / split, folder, "--shard-size", "400")
    return {"seconds": time.perf_counter() - started}


def _run_once(ledger: Ledger, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the results of the part ``name``, and run it unless it is finished."""
    results = ledger.find(name, "seconds")
    if results is None:
        results = run()
        ledger.add(name, results)
    return results


@dataclass(frozen=True)
class Students:
    """The students, trained seed by seed; ``results`` collects each run's results by name."""

    stages: Stages
    ledger: Ledger
    call: Callable[..., Summary]
    validation: Dataset
    device: torch.device
    local: float
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    forks: dict[int, ForkPoint] = field(default_factory=dict)

    @property
    def jobs(self) -> int:
        """Return the number of students trained at a time."""
        threads = self.stages.recipes.students["cskd"].run.threads or cores()
        default = GPU_JOBS if self.device.type == "cuda" else max(1, cores() // threads)
        return self.stages.study.jobs or default

    def train(self, seed: int) -> None:
        """Train a seed's full runs, then the forks of its trunk."""
        self._train(runs_of(seed, forks=False))
        trunk = self.results[StudyRun(TRUNK, seed).name]
        fork = fork_point([row.get("top1_dense") for row in trunk["rows"]], self.local)
        self.forks[seed] = fork
        forked = self.stages.forked(seed, fork)
        for state in forked.parent.glob("state-*.pt"):
            if state != forked:
                state.unlink()
        self._train(runs_of(seed, forks=True))
        forked.unlink(missing_ok=True)

    def _train(self, runs: Sequence[StudyRun]) -> None:
        """Train the unfinished ``runs``, ``jobs`` at a time."""
        todo = {}
        for run in runs:
            results = self.ledger.find(run.name, "top1", "seconds")
            if results is None:
                todo[run.name] = self.stages.student(run, self.forks.get(run.seed))
            else:
                self.results[run.name] = results
        if not todo:
            return
        ended = ((name, self.call(*words)) for name, words in todo.items())
        if self.jobs > 1:
            ended = side_by_side(todo, self.jobs, self.stages.study.out / "logs")
        with progress(len(todo), "students", "study") as meter, closing(ended):
            for name, summary in ended:
                out = Path(summary["out"])
                results = _run_result(summary) | {
                    "attention": attention_distances(out / LAST, self.validation, self.device),
                    "rows": _epoch_rows(out),
                }
                self.ledger.add(name, results)
                self.results[name] = results
                meter.advance()
                log.info(f"{name}: top-1 {results['top1']:.2f} %")


@dataclass(frozen=True)
class Stages:
    """The arguments of every command of the study."""

    study: StudyConfig
    recipes: Recipes
    shards: str
    val_shards: str

    @cached_property
    def datasets(self) -> tuple[Dataset, Dataset]:
        """Return the training and validation images."""
        return load_dataset(self.shards), load_dataset(self.val_shards, prefer=("validation",))

    def teacher(self) -> list[str | Path]:
        """Return the command that trains the teacher."""
        return self._train(TEACHER, self.study.out / TEACHER)

    def dump(self) -> list[str | Path]:
        """Return the dump command: the teacher's last weights, since validation chose its best."""
        out = self.study.out
        return [
            *("dump-teacher", "--recipe", self.recipes.sources[DUMP], *self._device),
            *("--shards", self.shards, "--cache", out / "cache"),
            *("--weights", out / TEACHER / LAST),
        ]

    def student(self, run: StudyRun, fork: ForkPoint | None) -> list[str | Path]:
        """Return the command that trains a student; ``fork`` is its trunk's fork point."""
        cache = () if run.arm.method == "none" else ("--cache", self.study.out / "cache")
        sets = [f"run.seed={run.seed}", *run.arm.sets]
        if run.arm == TRUNK:
            every = kept_every(self.recipes.students["cskd"].schedule.epochs)
            sets.append(f"run.keep_every={every}")
        flags = [word for setting in sets for word in ("--set", setting)]
        if run.arm.fork:
            assert fork is not None
            flags += ["--fork-from", str(self.forked(run.seed, fork))]
        return self._train(run.arm.method, self._folder(run), *cache, *flags)

    def forked(self, seed: int, fork: ForkPoint) -> Path:
        """Return the trunk's state that the forks of a seed continue from."""
        return self._folder(StudyRun(TRUNK, seed)) / KEPT_STATE.format(fork.epoch)

    def _folder(self, run: StudyRun) -> Path:
        return self.study.out / "runs" / run.name

    def _train(self, role: str, out: Path, *more: str | Path) -> list[str | Path]:
        """Return a command that starts a training or resumes it."""
        return [
            *("train", "--recipe", self.recipes.sources[role], "--shards", self.shards),
            *("--val-shards", self.val_shards, "--out", out, *more, *self._device),
            "--resume",
        ]

    @property
    def _device(self) -> tuple[str, ...]:
        return () if self.study.device is None else ("--device", self.study.device)


def _run_result(summary: Summary) -> dict[str, Any]:
    """Return a run's results with its last weights, which were not chosen by validation."""
    last = summary["last"]

    def heads(prefix: str) -> dict[str, float]:
        return {n.removeprefix(prefix): v for n, v in last.items() if n.startswith(prefix)}

    ema = heads("ema_top1_") | ({"mean": last["ema_top1"]} if "ema_top1" in last else {})
    kept = ("student", "epochs", "updates", "seconds", "images_per_second", "out")
    top1 = {"top1": last["top1"], "per_head": heads("top1_"), "ema": ema}
    return top1 | {name: summary[name] for name in kept}


def _epoch_rows(out: Path) -> list[dict[str, float | None]]:
    """Return r and every head's top-1 by epoch; a fork's rows start with its trunk's."""
    kept = ("epoch", "ckf_ratio", "top1", "ema_top1")
    return [
        {name: row[name] for name in row if name in kept or "top1_" in name}
        for row in read_log(out / "summary.csv")
    ]


def _local_result(teacher: Path, validation: Dataset, device: torch.device) -> dict[str, Any]:
    started = time.perf_counter()
    accuracy = local_accuracy(teacher, validation, device)
    return {"top1": accuracy, "seconds": time.perf_counter() - started}


def _dump_result(summary: Summary) -> dict[str, Any]:
    kept = ("cache", "views", "samples", "bytes", "bytes_per_view", "teacher_top1", "seconds")
    return {name: summary[name] for name in kept}
