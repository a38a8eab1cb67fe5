"""``bench all``: every measurement of a machine, most important first, within a time limit.

Each result is written to ``results.json`` at once; a resumed run starts with the first missing one
and retries failures. The study comes last, as a separate process with its own folder and ledger.
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
COLUMNS = ("measurement", "result", "goal", "met")
GRACE = 5.0
"""Seconds the study has to save its state; a training saves only after its current update."""
Report = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """Size of the measurements.

    Args:
        teacher: a CNN's timm name; its weights are random, which affects no figure.
        amps: the students' precisions, as in ``run.amp``; the teacher's follow from them.
        size: view size in pixels.
        images: number of images sampled for the checks and for each round of the dump.
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
"""Device type -> scale; small on a CPU, where it only shows that everything runs."""


@dataclass(frozen=True)
class AllConfig:
    """Options for :func:`bench_all`.

    Args:
        shards: shards of ImageNet, all or some.
        out: a new folder, or that of a run to resume.
        cifar10: a folder with CIFAR-10's training and validation shards; None: no study.
        seconds: time limit; None: no limit.
    """

    shards: str
    out: Path
    cifar10: Path | None = None
    seconds: float | None = None
    device: str | None = None


class Measurement(NamedTuple):
    """A function that measures, and one that turns its report into figures."""

    run: Callable[[], Report]
    figures: Callable[[Report], Iterator[Figure]]


def bench_all(config: AllConfig) -> dict[str, Any]:
    """Run the missing measurements within ``config.seconds``, and report on all results so far.

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
    except _TimeLimit:
        log.info(f"stopped after {config.seconds:g} s; run the same command to continue")
    write_json(config.out / RESULTS, known)
    missing = [name for name in todo if name not in known["results"]]
    return known | {"missing": missing} | _write_table(config, known, todo)


def _measure(name: str, measurement: Measurement, known: dict[str, Any]) -> None:
    log.info(f"{name} ...")
    try:
        known["results"][name] = report = measurement.run()
    except (CskdError, RuntimeError) as error:  # RuntimeError: CUDA, such as out of memory
        _record_failure(name, error, known)
        return
    for figure in measurement.figures(report):
        log.info(f"{figure.name}: {figure.result}")


def _measurements(config: AllConfig, scale: Scale) -> dict[str, Measurement]:
    """Return the measurements by name, most important first."""
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
    rate = partial(bench_loader.loader_rate, dataset, workers=cores(), **views)
    images = scale.images * cores() * 4
    all_cores = {f"repeats_{n}": rate(images=images, repeats=n) for n in bench_loader.GOALS}
    return report | {"cores": cores(), "all_cores": all_cores}


def _run_study(config: AllConfig, known: dict[str, Any]) -> None:
    folder, device = config.cifar10, () if config.device is None else ("--device", config.device)
    words = [
        *("study", "--out", config.out / STUDY, "--shards", f"{folder}/*train-*.tar"),
        *("--val-shards", f"{folder}/*validation-*.tar", *device),
    ]
    log.info(f"study: log in {config.out}/logs/{STUDY}.log")
    try:
        with closing(side_by_side({STUDY: words}, 1, config.out / "logs", grace=GRACE)) as runs:
            next(runs)
    except CskdError as error:
        _record_failure(STUDY, error, known)


def _record_failure(name: str, error: Exception, known: dict[str, Any]) -> None:
    known["errors"][name] = " ".join(f"{type(error).__name__}: {error}".split())
    log.warning(f"{name} failed: {known['errors'][name]}")


def _machine(device: torch.device) -> dict[str, Any]:
    return {"device": device_name(device), "cores": cores(), "versions": library_versions()}


def _open(out: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """Return the results so far, none in a new folder; refuse those of another ``origin``."""
    path = out / RESULTS
    if not path.exists():
        require_empty(out, action="choose another folder: cskd-pipeline bench all --out DIR")
        out.mkdir(parents=True, exist_ok=True)
        return origin | {"results": {}, "errors": {}}
    known = schemas.read(path)
    if not isinstance(known, dict) or not isinstance(known.get("results"), dict):
        raise OutputError(
            "the results file is damaged",
            where=path,
            action="delete it and run the same command again",
        )
    found = {name: known.get(name) for name in origin}
    if found != origin:
        raise OutputError(
            "the results in this folder are from another machine or other shards",
            where=path,
            found=found,
            expected=origin,
            action="choose another folder: cskd-pipeline bench all --out DIR",
        )
    return known


def _write_table(
    config: AllConfig, known: Mapping[str, Any], todo: Mapping[str, Measurement]
) -> dict[str, Any]:
    """Write the figures and the study's tables so far to ``table.md``, and return the figures."""
    machine = known["machine"]
    versions = ", ".join(f"{n} {machine['versions'].get(n)}" for n in ("python", "torch", "timm"))
    title = f"{machine['device']}, {machine['cores']} CPU cores, {versions}"
    results = {name: known["results"][name] for name in todo if name in known["results"]}
    figures = [figure for name, report in results.items() for figure in todo[name].figures(report)]
    figures += [Figure(name, f"failed: {error}") for name, error in known["errors"].items()]
    cells = [figure.cells for figure in figures]
    text = f"**{title}**\n\n{markdown_table(COLUMNS, cells)}"
    study = config.out / STUDY / TABLE
    if study.exists():
        text += f"\nThe study on CIFAR-10:\n\n{study.read_text(encoding='utf-8')}"
    write_text(config.out / TABLE, text)
    return {"title": title, "figures": cells, "markdown": str(config.out / TABLE)}


def printed(report: Mapping[str, Any]) -> Printed:
    """Yield the figures, the measurements still missing, and the path of the Markdown table."""
    yield Table(report["title"], COLUMNS, report["figures"])
    if report["missing"]:
        yield f"not yet measured: {', '.join(report['missing'])}"
    yield f"Markdown table: {report['markdown']}"


def require_ok(report: Mapping[str, Any]) -> None:
    """Raise if a measurement failed."""
    if report["errors"]:
        raise CskdError(
            "some measurements failed",
            where=report["markdown"],
            action="run the same command again to retry them",
            problems=[f"{name}: {error}" for name, error in report["errors"].items()],
            report=report,
        )


_AGAIN = 60.0
"""Seconds after which the time limit raises again, if a library has lost its exception."""


class _TimeLimit(KeyboardInterrupt):
    """Interrupts like Ctrl-C."""


@contextmanager
def _deadline(seconds: float | None) -> Iterator[None]:
    def interrupt(number: int, frame: object) -> None:
        raise _TimeLimit

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0, _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
