"""The study's commands in their order: ``run_study`` is all of it."""

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
from cskd_pipeline.runtime.atomic import NO_LOCKS, sole_writer, write_json
from cskd_pipeline.runtime.device import cores, device_name, pick_device
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.tools.commands import Command, Summary, announced, side_by_side
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
from cskd_pipeline.tools.study.ledger import Ledger, Recipes, data_digest, load_recipes
from cskd_pipeline.tools.study.report import make_report, write_files

log = logging.getLogger(__name__)

TEACHER, DUMP, LOCAL, IMAGES = "teacher", "dump", "local", "images"
DIGITS = {"train": 2400, "validation": 1000}
"""Images of the study on digits."""
GPU_JOBS = 4
"""Students at a time on a GPU, which one small ViT would leave idle."""
LAST = "last.safetensors"


@dataclass(frozen=True)
class StudyConfig:
    """Say what is studied, where, and how.

    Args:
        shards, val_shards: CIFAR-10's; None: pages of digits, which the study makes.
        recipes: a folder of recipes instead of the data set's.
        seeds: the students' seeds are 1 to this; the teacher's is its recipe's.
        jobs: students at a time, each a process of its own where they are more than one; None:
            ``GPU_JOBS`` on a GPU, else as many as have ``run.threads`` cores each.
    """

    out: Path
    shards: str | None = None
    val_shards: str | None = None
    recipes: Path | None = None
    seeds: int = 3
    jobs: int | None = None
    device: str | None = None


def run_study(study: StudyConfig, command: Command) -> dict[str, Any]:
    """Run what is not finished yet, and report on all of it.

    Args:
        command: runs ``cskd-pipeline`` in this process and returns its summary.

    Returns:
        The report, which is also in ``out/study.json``. It is written after every seed.

    Raises:
        CskdError: a recipe, the data or a command's refusal; ``out`` holds something else.
        KeyboardInterrupt, Requeue: stopped; the same call goes on.
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
    call = announced(command)
    stages, ledger = _open(study, recipes, call)
    train, validation = stages.datasets
    teacher = _kept(ledger, TEACHER, lambda: _trained(call(*stages.teacher())))
    cache = _kept(ledger, DUMP, lambda: _dumped(call(*stages.dump())))
    local = _kept(ledger, LOCAL, lambda: _local(study.out / TEACHER / LAST, validation, device))
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
    """Return the study's commands and its ledger, and make the digits where it has none."""
    digests = {f"{role} recipe": digest for role, digest in recipes.digests.items()}
    if study.shards is not None and study.val_shards is not None:
        stages = Stages(study, recipes, study.shards, study.val_shards)
        for split, found in zip(("training", "validation"), stages.datasets, strict=True):
            digests[f"{split} images"] = data_digest(found.shard_ids)
        return stages, Ledger(study.out, digests)
    ledger = Ledger(study.out, digests | {"images": f"digits {DIGITS} {CLUTTERED}"})
    folders = {split: study.out / "shards" / split for split in DIGITS}
    _kept(ledger, IMAGES, lambda: _make_digits(study.out / "images", folders, call))
    return Stages(study, recipes, *map(str, folders.values())), ledger


def _make_digits(
    images: Path, folders: dict[str, Path], call: Callable[..., Summary]
) -> dict[str, Any]:
    log.info(f"making {sum(DIGITS.values())} images of handwritten digits")
    started = time.perf_counter()
    write_digit_folders(images, seed=0, page=CLUTTERED, **DIGITS)
    for split, folder in folders.items():
        shutil.rmtree(folder, ignore_errors=True)  # of a study that was killed here
        call("make-shards", images / split, folder, "--shard-size", "400")
    return {"seconds": time.perf_counter() - started}


def _kept(ledger: Ledger, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what the part ``name`` found, which is run where it is not finished."""
    found = ledger.find(name, "seconds")
    if found is None:
        found = run()
        ledger.add(name, found)
    return found


@dataclass(frozen=True)
class Students:
    """Train the students of a seed, and keep what each found in ``results``, by name."""

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
        """Return how many are trained at a time."""
        threads = self.stages.recipes.students["cskd"].run.threads or cores()
        alone = GPU_JOBS if self.device.type == "cuda" else max(1, cores() // threads)
        return self.stages.study.jobs or alone

    def train(self, seed: int) -> None:
        """Train the whole runs, then the forks of the trunk among them."""
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
        """Train those of ``runs`` that are left, ``jobs`` at a time."""
        todo = {}
        for run in runs:
            found = self.ledger.find(run.name, "top1", "seconds")
            if found is None:
                todo[run.name] = self.stages.student(run, self.forks.get(run.seed))
            else:
                self.results[run.name] = found
        if not todo:
            return
        ended = ((name, self.call(*words)) for name, words in todo.items())
        if self.jobs > 1:
            ended = side_by_side(todo, self.jobs, self.stages.study.out / "logs")
        with progress(len(todo), "students", "study") as meter, closing(ended):
            for name, summary in ended:
                out = Path(summary["out"])
                found = _trained(summary) | {
                    "attention": attention_distances(out / LAST, self.validation, self.device),
                    "rows": _curve(out),
                }
                self.ledger.add(name, found)
                self.results[name] = found
                meter.advance()
                log.info(f"{name}: top-1 {found['top1']:.2f} %")


@dataclass(frozen=True)
class Stages:
    """Make the words of every command of the study."""

    study: StudyConfig
    recipes: Recipes
    shards: str
    val_shards: str

    @cached_property
    def datasets(self) -> tuple[Dataset, Dataset]:
        """Return the training and the validation images."""
        return load_dataset(self.shards), load_dataset(self.val_shards, prefer=("validation",))

    def teacher(self) -> list[str | Path]:
        """Return the command that trains the teacher."""
        return self._train(TEACHER, self.study.out / TEACHER)

    def dump(self) -> list[str | Path]:
        """Return the dump of the teacher's last weights; validation images chose its best."""
        out = self.study.out
        return [
            *("dump-teacher", "--recipe", self.recipes.sources[DUMP], *self._device),
            *("--shards", self.shards, "--cache", out / "cache"),
            *("--weights", out / TEACHER / LAST),
        ]

    def student(self, run: StudyRun, fork: ForkPoint | None) -> list[str | Path]:
        """Return the command that trains a student; ``fork`` is where its trunk is forked."""
        cache = () if run.arm.method == "none" else ("--cache", self.study.out / "cache")
        sets = [f"run.seed={run.seed}", *run.arm.sets]
        if run.arm == TRUNK:
            every = kept_every(self.recipes.students["cskd"].schedule.epochs)
            sets.append(f"run.keep_every={every}")
        flags = [word for one in sets for word in ("--set", one)]
        if run.arm.fork:
            assert fork is not None
            flags += ["--fork-from", str(self.forked(run.seed, fork))]
        return self._train(run.arm.method, self._folder(run), *cache, *flags)

    def forked(self, seed: int, fork: ForkPoint) -> Path:
        """Return the state from which the forks of a seed go on."""
        return self._folder(StudyRun(TRUNK, seed)) / KEPT_STATE.format(fork.epoch)

    def _folder(self, run: StudyRun) -> Path:
        return self.study.out / "runs" / run.name

    def _train(self, role: str, out: Path, *more: str | Path) -> list[str | Path]:
        """Return a training that begins, or goes on where it was interrupted."""
        return [
            *("train", "--recipe", self.recipes.sources[role], "--shards", self.shards),
            *("--val-shards", self.val_shards, "--out", out, *more, *self._device),
            "--resume",
        ]

    @property
    def _device(self) -> tuple[str, ...]:
        return () if self.study.device is None else ("--device", self.study.device)


def _trained(summary: Summary) -> dict[str, Any]:
    """Return what the study keeps of a run: its last weights, which no validation chose."""
    last = summary["last"]

    def heads(prefix: str) -> dict[str, float]:
        return {n.removeprefix(prefix): v for n, v in last.items() if n.startswith(prefix)}

    ema = heads("ema_top1_") | ({"mean": last["ema_top1"]} if "ema_top1" in last else {})
    kept = ("student", "epochs", "updates", "seconds", "images_per_second", "out")
    found = {"top1": last["top1"], "per_head": heads("top1_"), "ema": ema}
    return found | {name: summary[name] for name in kept}


def _curve(out: Path) -> list[dict[str, float | None]]:
    """Return the epochs of a run, a fork's with its trunk's before it: r, top-1 of every head."""
    kept = ("epoch", "ckf_ratio", "top1", "ema_top1")
    return [
        {name: row[name] for name in row if name in kept or "top1_" in name}
        for row in read_log(out / "summary.csv")
    ]


def _local(teacher: Path, validation: Dataset, device: torch.device) -> dict[str, Any]:
    started = time.perf_counter()
    accuracy = local_accuracy(teacher, validation, device)
    return {"top1": accuracy, "seconds": time.perf_counter() - started}


def _dumped(summary: Summary) -> dict[str, Any]:
    kept = ("cache", "views", "samples", "bytes", "bytes_per_view", "teacher_top1", "seconds")
    return {name: summary[name] for name in kept}
