"""``bench all``: everything that a machine must show, in order of worth, within a time.

Each result is in ``results.json`` as soon as it is there, and a run that goes on begins with the
first that is missing; what failed is tried once more. The study is last, a process of its own with
its own folder and ledger.
"""

import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cskd_pipeline.cache.manifest import library_versions
from cskd_pipeline.config.reading import load_recipe
from cskd_pipeline.config.sections import DumpRecipe, TrainRecipe
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.errors import CskdError, OutputError
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.atomic import require_empty, write_json, write_text
from cskd_pipeline.runtime.device import cores, device_name, pick_device
from cskd_pipeline.tools.bench import bench_dump, bench_loader, bench_step, gpu_checks
from cskd_pipeline.tools.bench.bench_step import LIVE_GOALS, PRECISION
from cskd_pipeline.tools.bench.timing import Figure
from cskd_pipeline.tools.commands import side_by_side
from cskd_pipeline.tools.tables import Printed, Table, markdown_table

log = logging.getLogger(__name__)

RESULTS, TABLE, STUDY = "results.json", "table.md", "study"
COLUMNS = ("measured", "found", "goal", "reached")
GRACE = 5.0
"""Seconds in which the study may save; an update can take longer, and a training ends with one."""
Report = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """Say how large the measurements are.

    Args:
        teacher: a CNN's timm name; its weights are random, which no figure here depends on.
        amps: the students' precisions, as ``run.amp`` takes them; the teacher's follow.
        size: of the views, in pixels.
        images: sampled of the shards in a round of the dump, and for the checks.
    """

    teacher: str
    students: tuple[str, ...]
    amps: tuple[str, ...]
    size: int
    batch_size: int
    images: int
    rounds: int


SCALES = {
    "cuda": Scale("regnety_160", tuple(LIVE_GOALS), ("bf16", "fp16"), 224, 128, 128, 5),
    "cpu": Scale("resnet18", tuple(LIVE_GOALS)[:1], ("off",), 64, 8, 16, 3),
}
"""By the kind of device: on a CPU small, to see that all of it runs."""


@dataclass(frozen=True)
class AllConfig:
    """Say what is measured, where, and for how long.

    Args:
        shards: ImageNet's, or some of them.
        out: a new folder, or one of a run to continue.
        cifar10: a folder with CIFAR-10's training and validation shards; None: without the study.
        seconds: after which the measurements are cut off; None: never.
    """

    shards: str
    out: Path
    cifar10: Path | None = None
    seconds: float | None = None
    device: str | None = None


class Measurement(NamedTuple):
    """Name a function that measures, and one that makes figures of its report."""

    run: Callable[[], Report]
    figures: Callable[[Report], Iterator[Figure]]


def bench_all(config: AllConfig) -> dict[str, Any]:
    """Measure what is not measured yet, for ``seconds``, and report on all that is there.

    Returns:
        ``results`` by name, ``errors`` by name, ``missing`` names, ``title`` and ``figures``.
    """
    device = pick_device(config.device or "auto")
    scale = SCALES["cuda" if device.type == "cuda" else "cpu"]
    known = _open(config.out, {"machine": _machine(device), "shards": config.shards})
    todo = _measurements(config, scale)
    known["errors"] = {}
    try:
        with _deadline(config.seconds):
            for name, measurement in todo.items():
                if name not in known["results"]:
                    _measure(name, measurement, known)
                    write_json(config.out / RESULTS, known)
                    _write_table(config, known, todo)
            if config.cifar10 is not None:
                _run_study(config, known)
    except _TimeOver:
        log.info(f"the {config.seconds:g} seconds are over; the same command goes on")
    write_json(config.out / RESULTS, known)
    missing = [name for name in todo if name not in known["results"]]
    return known | {"missing": missing} | _write_table(config, known, todo)


def _measure(name: str, measurement: Measurement, known: dict[str, Any]) -> None:
    log.info(f"{name} ...")
    try:
        known["results"][name] = report = measurement.run()
    except (CskdError, RuntimeError) as error:  # CUDA's own, out of memory among them
        _failed(name, error, known)
        return
    for figure in measurement.figures(report):
        log.info(f"{figure.what}: {figure.found}")


def _measurements(config: AllConfig, scale: Scale) -> dict[str, Measurement]:
    """Return what is measured by name, in order of worth."""
    size = f"views.size={scale.size}"

    def dump_recipe(precision: str) -> DumpRecipe:
        flags = {
            "data.shards": config.shards,
            "teacher.name": scale.teacher,
            "teacher.weights": "random",
            "dump.batch_size": scale.batch_size,
            "dump.device": config.device,
        }
        return load_recipe(DumpRecipe, None, [size, f"teacher.precision={precision}"], flags)

    def steps(amp: str) -> dict[str, Measurement]:
        flags = {"batch.batch_size": scale.batch_size, "run.device": config.device}
        recipe = load_recipe(TrainRecipe, None, [size, f"run.amp={amp}"], flags)
        run = partial(bench_step.bench_step, recipe, teacher=scale.teacher, rounds=scale.rounds)
        return {
            f"step {student} {amp}": Measurement(
                partial(run, students=[student]), bench_step.figures
            )
            for student in scale.students
        }

    found: dict[str, Measurement] = {}
    for precision in dict.fromkeys(["float32", *(PRECISION[amp] for amp in scale.amps)]):
        run = partial(gpu_checks.check_teacher, dump_recipe(precision), scale.images)
        found[f"teacher {precision}"] = Measurement(run, gpu_checks.figures)
    first, *others = scale.amps
    found |= steps(first)
    dump = partial(
        bench_dump.bench_dump,
        dump_recipe("float32"),
        images=scale.images,
        rounds=scale.rounds,
        with_variants=False,
    )
    found["dump"] = Measurement(dump, bench_dump.figures)
    for amp in others:
        found |= steps(amp)
    found["loader"] = Measurement(partial(_loader, config.shards, scale), bench_loader.figures)
    return found


def _loader(shards: str, scale: Scale) -> Report:
    dataset = load_dataset(shards)
    views = {"size": scale.size, "batch_size": min(scale.batch_size, 64)}
    report = bench_loader.bench_loader(dataset, rounds=scale.rounds, **views)
    on_all = partial(bench_loader.loader_rate, dataset, workers=cores(), **views)
    images = scale.images * cores() * 4
    everywhere = {f"repeats_{n}": on_all(images=images, repeats=n) for n in bench_loader.GOALS}
    return report | {"cores": cores(), "all_cores": everywhere}


def _run_study(config: AllConfig, known: dict[str, Any]) -> None:
    folder, device = config.cifar10, () if config.device is None else ("--device", config.device)
    words = [
        *("study", "--out", config.out / STUDY, "--shards", f"{folder}/*train-*.tar"),
        *("--val-shards", f"{folder}/*validation-*.tar", *device),
    ]
    log.info(f"its news: {config.out}/logs/{STUDY}.log")
    try:
        with closing(side_by_side({STUDY: words}, 1, config.out / "logs", grace=GRACE)) as ended:
            next(ended)
    except CskdError as error:
        _failed(STUDY, error, known)


def _failed(name: str, error: Exception, known: dict[str, Any]) -> None:
    known["errors"][name] = " ".join(f"{type(error).__name__}: {error}".split())
    log.warning(f"{name} failed: {known['errors'][name]}")


def _machine(device: torch.device) -> dict[str, Any]:
    return {"device": device_name(device), "cores": cores(), "versions": library_versions()}


def _open(out: Path, of: dict[str, Any]) -> dict[str, Any]:
    """Return what is known already; nothing in a new folder."""
    path = out / RESULTS
    if not path.exists():
        require_empty(out, action="choose another folder: cskd-pipeline bench all --out DIR")
        out.mkdir(parents=True, exist_ok=True)
        return of | {"results": {}, "errors": {}}
    known = schemas.read(path)
    if not isinstance(known, dict) or not isinstance(known.get("results"), dict):
        raise OutputError(
            "the file of results is damaged",
            where=path,
            action="remove it, and run the same command again",
        )
    found = {name: known.get(name) for name in of}
    if found != of:
        raise OutputError(
            "the results in this folder are another machine's, or of other shards",
            where=path,
            found=found,
            expected=of,
            action="choose another folder: cskd-pipeline bench all --out DIR",
        )
    return known


def _write_table(
    config: AllConfig, known: Mapping[str, Any], todo: Mapping[str, Measurement]
) -> dict[str, Any]:
    """Write ``table.md``: the figures, and what the study has found so far; return the figures."""
    machine = known["machine"]
    versions = ", ".join(f"{n} {machine['versions'].get(n)}" for n in ("python", "torch", "timm"))
    title = f"{machine['device']}, {machine['cores']} CPU cores, {versions}"
    results = {name: known["results"][name] for name in todo if name in known["results"]}
    figures = [figure for name, found in results.items() for figure in todo[name].figures(found)]
    figures += [Figure(name, f"failed: {error}") for name, error in known["errors"].items()]
    cells = [figure.cells for figure in figures]
    text = f"**{title}**\n\n{markdown_table(COLUMNS, cells)}"
    study = config.out / STUDY / TABLE
    if study.exists():
        text += f"\nThe study on CIFAR-10:\n\n{study.read_text(encoding='utf-8')}"
    write_text(config.out / TABLE, text)
    return {"title": title, "figures": cells, "markdown": str(config.out / TABLE)}


def printed(report: Mapping[str, Any]) -> Printed:
    """Yield the figures, where they are as Markdown, and what is not measured yet."""
    yield Table(report["title"], COLUMNS, report["figures"])
    if report["missing"]:
        yield f"not measured yet: {', '.join(report['missing'])}"
    yield f"as Markdown: {report['markdown']}"


def require_ok(report: Mapping[str, Any]) -> None:
    """Refuse a report with failures."""
    if report["errors"]:
        raise CskdError(
            "measurements failed",
            where=report["markdown"],
            action="the same command tries them again",
            problems=[f"{name}: {error}" for name, error in report["errors"].items()],
            report=report,
        )


class _TimeOver(KeyboardInterrupt):
    """Interrupts as Ctrl-C does."""


@contextmanager
def _deadline(seconds: float | None) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise _TimeOver

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
