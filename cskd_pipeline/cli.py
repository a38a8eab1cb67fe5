"""The command line: typer commands that read flags into a recipe and call one entry point each.

Nothing heavy is imported before a command runs, so help is instant. Exit codes: 0 done, 1 refused
or failed with a message, 2 wrong usage, 130 interrupted where the work can be taken up again.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import typer

from cskd_pipeline import __version__
from cskd_pipeline.errors import CskdError, Interrupted, OutputError, RecipeError, UsageError
from cskd_pipeline.files import FULL
from cskd_pipeline.recipe import DumpRecipe, TrainRecipe, load_recipe
from cskd_pipeline.terminal import Terminal

PROGRAM = "cskd-pipeline"
Outcome = dict[str, Any] | None  # what a command found; main prints it

# The parser's own error, which typer does not export: click's, or typer's copy of it.
_ParserError: Any = typer.BadParameter.__mro__[1]
_FILE_ERRORS = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
)

app = typer.Typer(
    name=PROGRAM,
    help="Distill a CNN into a ViT in two stages that meet at a cache (CSKD, arXiv 2307.08500): "
    "dump-teacher runs the CNN once over augmented images and stores what it says of every place, "
    "train reads that and never loads the CNN.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(help="Look at teacher caches.")
app.add_typer(cache_app, name="cache")
plan_app = typer.Typer(help="Know the cost before paying it: a small part is done for real.")
app.add_typer(plan_app, name="plan")
bench_app = typer.Typer(help="Measure, on this machine and your data.")
app.add_typer(bench_app, name="bench")

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no news: warnings and results only.")
]
RecipeFile = Annotated[
    str | None,
    typer.Option(
        "--recipe", metavar="FILE|NAME", help="A TOML recipe, or the name of one in stages/."
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override one value of the recipe; may be given more than once.",
    ),
]
SHARDS_HELP = (
    "Webdataset shards: a folder, a pattern such as 'train-{0000..1023}.tar' or 'train-*.tar', "
    "a comma list, an _info.json, or a manifest.json made by index."
)
ShardsOption = Annotated[
    str | None, typer.Option("--shards", metavar="SHARDS", help=SHARDS_HELP, show_default=False)
]
ENCODING_NAMES = "dense|dense-q8|topk|envelope"
TeacherName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A CNN's timm name, or package.module:factory."),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="hub|FILE|random", help="The teacher's weights; random is for trials only."
    ),
]
CacheOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="What dump-teacher made; not for method none.")
]
StudentName = Annotated[str | None, typer.Option(metavar="NAME", help="A ViT's timm name.")]
Method = Annotated[
    Literal["none", "deit", "cskd"] | None,
    typer.Option(
        help="Labels only, with the teacher's global answer, or with its answer at every place."
    ),
]
Epochs = Annotated[int | None, typer.Option(min=1, metavar="N", help="How long to train.")]
UpdateSize = Annotated[
    int | None, typer.Option(min=2, metavar="N", help="Images in an optimizer update.")
]
Split = Annotated[
    str | None, typer.Option(metavar="NAME", help="Which split of an _info.json that has several.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, metavar="N", help="Images in a batch.")]
Workers = Annotated[
    int | None,
    typer.Option(min=-1, metavar="N", help="Loader processes; -1: one for each core but one."),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="auto (a GPU where there is one), cpu, cuda, cuda:1."),
]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """What holds for the program as a whole."""


@app.command(
    epilog="Example: cskd-pipeline make-shards imagenet/train shards/train --shard-size 1252"
)
def make_shards(
    image_folder: Annotated[
        Path, typer.Argument(metavar="IMAGE_FOLDER", help="A tree with one folder per class.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="An empty or new folder.")],
    shard_size: Annotated[int, typer.Option(min=1, metavar="N", help="Samples in a shard.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the shuffle.")] = 0,
    split: Annotated[
        str, typer.Option(metavar="NAME", help="What the shards and _info.json call this part.")
    ] = "train",
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Pack an ImageFolder tree into webdataset shards, image bytes untouched."""
    terminal = Terminal(quiet=quiet, json=json)
    from cskd_pipeline.loading import make

    return make.make_shards(
        image_folder,
        out,
        shard_size=shard_size,
        seed=seed,
        split=split,
        progress=terminal.progress,
    )


@app.command(epilog="Example: cskd-pipeline index 'shards/train-*.tar' --out manifest.json")
def index(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help=SHARDS_HELP)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The manifest to write.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the data set; default: from the shards.")
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(min=1, max=65535, metavar="N", help="Default: from the class names."),
    ] = None,
    split: Split = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Read shards once and write their manifest: counts, order of keys, SHA-256, class names."""
    terminal = Terminal(quiet=quiet, json=json)
    from cskd_pipeline.loading import index as indexing

    dataset = indexing.index_shards(
        shards, name=name, num_classes=num_classes, split=split, progress=terminal.progress
    )
    dataset.save(out)
    return {
        "manifest": out,
        "name": dataset.name,
        "shards": len(dataset.shards),
        "samples": dataset.samples,
        "classes": dataset.num_classes,
        "bytes": sum(shard.bytes for shard in dataset.shards),
    }


@app.command(
    epilog="Example: cskd-pipeline dump-teacher --recipe paper_regnety_160 "
    "--shards 'imagenet1k-train-{0000..1023}.tar' --cache cache"
)
def dump_teacher(
    shards: ShardsOption = None,
    teacher: TeacherName = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The cache to make, to go on with, or to extend by more views."
        ),
    ] = None,
    weights: Weights = None,
    encoding: Annotated[
        list[str] | None,
        typer.Option(
            metavar=ENCODING_NAMES,
            help="What to store: dense serves every loss; envelope hard ones, exactly, in 1/400 of "
            "the bytes; dense-q8 and topk soft ones, nearly. May be given more than once.",
        ),
    ] = None,
    views: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Augmented views of every image.")
    ] = None,
    split: Split = None,
    shard_range: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO",
            help="Only the shards FROM up to, not including, TO, counted from 0: several machines "
            "can fill one cache.",
        ),
    ] = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    device: Device = None,
    recipe: RecipeFile = None,
    set_: Sets = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Stage one: run the teacher over augmented views and store its answers in a cache.

    Run the same command again after an interruption: finished units are kept.
    """
    terminal = Terminal(quiet=quiet, json=json)
    flags = {
        "data.shards": shards,
        "data.split": split,
        "teacher.name": teacher,
        "teacher.weights": weights,
        "cache.path": _text(cache),
        "cache.encodings": tuple(encoding) if encoding else None,
        "cache.views": views,
        "dump.batch_size": batch_size,
        "dump.workers": workers,
        "dump.device": device,
    }
    asked = load_recipe(DumpRecipe, recipe, set_ or (), flags)
    _require(
        {
            "--shards SHARDS": asked.data.shards,
            "--teacher NAME": asked.teacher.name,
            "--cache DIR": asked.cache.path,
        }
    )
    chosen = None if shard_range is None else _parse_range(shard_range, "--shard-range")
    _require_encodings(asked.cache.encodings)
    from cskd_pipeline import dump
    from cskd_pipeline.ranks import launched

    summary = dump.dump_teacher(asked, terminal, shard_range=chosen)
    return summary if launched().first else None


@app.command(
    epilog="Example: cskd-pipeline train --recipe paper_tiny_cskd "
    "--shards 'imagenet1k-train-{0000..1023}.tar' --cache cache --out runs/tiny"
)
def train(
    shards: ShardsOption = None,
    cache: CacheOption = None,
    student: StudentName = None,
    method: Method = None,
    epochs: Epochs = None,
    val_shards: Annotated[
        str | None,
        typer.Option(metavar="SHARDS", help="Shards to evaluate on; without, none is done."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run's folder: checkpoints, summary.csv, its recipe."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, mid-epoch if need be.")
    ] = False,
    split: Split = None,
    val_split: Split = None,
    batch_size: UpdateSize = None,
    workers: Workers = None,
    device: Device = None,
    recipe: RecipeFile = None,
    set_: Sets = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Stage two: train a ViT from shards joined to a cache. No teacher is loaded."""
    terminal = Terminal(quiet=quiet, json=json)
    flags = {
        "data.shards": shards,
        "data.val_shards": val_shards,
        "data.cache": _text(cache),
        "data.split": split,
        "data.val_split": val_split,
        "student.name": student,
        "distill.method": method,
        "schedule.epochs": epochs,
        "batch.batch_size": batch_size,
        "run.out": _text(out),
        "run.workers": workers,
        "run.device": device,
    }
    asked = load_recipe(TrainRecipe, recipe, set_ or (), flags)
    needed = {"--shards SHARDS": asked.data.shards, "--out DIR": asked.run.out}
    if asked.distill.method != "none":
        needed["--cache DIR"] = asked.data.cache
    _require(needed)
    from cskd_pipeline import train as stage_two
    from cskd_pipeline.ranks import launched

    summary = stage_two.train(asked, terminal, resume=resume)
    return summary if launched().first else None


@app.command(epilog="Example: cskd-pipeline evaluate runs/tiny --shards 'shards/validation-*.tar'")
def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A student's .safetensors file, or a run's folder."
        ),
    ],
    shards: Annotated[str, typer.Option("--shards", metavar="SHARDS", help=SHARDS_HELP)],
    split: Split = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    device: Device = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Measure a student on shards: top-1 and top-5 of each head and of their mean."""
    terminal = Terminal(quiet=quiet, json=json)
    from cskd_pipeline import evaluate as measuring

    return measuring.evaluate(
        checkpoint,
        shards,
        terminal,
        split=split or "",
        batch_size=batch_size or 256,
        workers=-1 if workers is None else workers,
        device=device or "auto",
    )


@cache_app.command(epilog="Example: cskd-pipeline cache info cache --json")
def info(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="What dump-teacher made.")],
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Say what a cache holds: data, teacher, policy, views, what is finished, and bytes."""
    from cskd_pipeline.cache.info import describe
    from cskd_pipeline.cache.summary import summarise

    found = describe(cache)
    return found if json else summarise(found)


@cache_app.command(epilog="Example: cskd-pipeline cache convert cache small --encoding envelope")
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A cache.")],
    target: Annotated[
        Path,
        typer.Argument(metavar="DST", help="The cache to make from it, or to go on with."),
    ],
    encoding: Annotated[
        list[str] | None,
        typer.Option(
            metavar=ENCODING_NAMES,
            help="What the new cache stores; more than once for several. Without, what the old one "
            "does. What it does not have is made from dense.",
        ),
    ] = None,
    views: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N views.")
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO", help="Only the tar shards FROM up to, not including, TO, from 0."
        ),
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Make a smaller cache from another: in other encodings, fewer views, or a part of the shards.

    Run the same command again after an interruption: finished units are kept.
    """
    terminal = Terminal(quiet=quiet, json=json)
    _require_encodings(encoding or ())
    chosen = None if shards is None else _parse_range(shards, "--shards")
    from cskd_pipeline.cache.convert import convert as make
    from cskd_pipeline.interrupt import stop_requests
    from cskd_pipeline.machine import pick_device

    with stop_requests() as stop:
        return make(
            source,
            target,
            encodings=encoding or (),
            views=views,
            shards=chosen,
            device=pick_device(device or "auto"),
            progress=terminal.progress,
            stopped=lambda: stop.asked,
        )


@bench_app.command(epilog="Example: cskd-pipeline bench encodings cache --plot encodings.svg")
def encodings(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CACHE_OR_TEACHER",
            help="A cache with the encoding dense, or a CNN's timm name (then with --shards).",
        ),
    ],
    shards: ShardsOption = None,
    weights: Weights = None,
    views: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many views to measure on.")
    ] = 256,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw distortion against bytes.")
    ] = None,
    encoding: Annotated[
        list[str] | None,
        typer.Option(metavar=ENCODING_NAMES, help="Only these; more than once for several."),
    ] = None,
    split: Split = None,
    workers: Workers = None,
    device: Device = None,
    recipe: RecipeFile = None,
    set_: Sets = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Bytes, times and distortion of every encoding, on real answers of a teacher."""
    terminal = Terminal(quiet=quiet, json=json)
    flags = {
        "data.shards": shards,
        "data.split": split,
        "teacher.weights": weights,
        "dump.workers": workers,
        "dump.device": device,
    }
    _require_encodings(encoding or ())
    if plot is not None and plot.suffix != ".svg":
        raise UsageError("the plot is an SVG", found=str(plot), expected="a name that ends in .svg")
    is_cache = Path(source).is_dir()
    asked = load_recipe(
        DumpRecipe, recipe, set_ or (), flags | ({} if is_cache else {"teacher.name": source})
    )
    if not is_cache:
        _require({"--shards SHARDS (or a cache's folder)": asked.data.shards})
    from cskd_pipeline.bench.answers import from_cache, from_teacher
    from cskd_pipeline.bench.encodings import bench_encodings, show
    from cskd_pipeline.bench.plot import scatter
    from cskd_pipeline.files import write_text
    from cskd_pipeline.machine import pick_device

    answers = from_cache(Path(source), views) if is_cache else from_teacher(asked, terminal, views)
    report = bench_encodings(
        answers, terminal, device=pick_device(asked.dump.device), names=encoding or ()
    )
    show(report, terminal)
    if plot is not None:
        write_text(plot, scatter(report))
        terminal.line(f"plot: {plot}")
    return report if json else None


@plan_app.command(
    name="dump",
    epilog="Example: cskd-pipeline plan dump --recipe paper_regnety_160 --shards train.json "
    "--views 30 --views 300 --devices 8",
)
def plan_dump(
    shards: ShardsOption = None,
    teacher: TeacherName = None,
    weights: Weights = None,
    encoding: Annotated[
        list[str] | None,
        typer.Option(metavar=ENCODING_NAMES, help="What the tried dump stores."),
    ] = None,
    views: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Views to forecast; more than once for several."),
    ] = None,
    devices: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Forecast N such devices too; more than once."),
    ] = None,
    images: Annotated[
        int, typer.Option(min=1, metavar="N", help="About how many images to try it on.")
    ] = 256,
    split: Split = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    device: Device = None,
    recipe: RecipeFile = None,
    set_: Sets = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Bytes and time of a dump, for every encoding, from a few hundred images done for real."""
    terminal = Terminal(quiet=quiet, json=json)
    flags = {
        "data.shards": shards,
        "data.split": split,
        "teacher.name": teacher,
        "teacher.weights": weights,
        "cache.encodings": tuple(encoding) if encoding else None,
        "cache.views": max(views) if views else None,
        "dump.batch_size": batch_size,
        "dump.workers": workers,
        "dump.device": device,
    }
    asked = load_recipe(DumpRecipe, recipe, set_ or (), flags)
    _require({"--shards SHARDS": asked.data.shards, "--teacher NAME": asked.teacher.name})
    _require_encodings(asked.cache.encodings)
    from cskd_pipeline.planning import dumping

    report = dumping.plan_dump(
        asked, terminal, views=views or (), devices=devices or (), images=images
    )
    dumping.show(report, terminal)
    return report if json else None


@plan_app.command(
    name="train",
    epilog="Example: cskd-pipeline plan train --recipe paper_tiny_cskd --shards train.json "
    "--cache cache",
)
def plan_train(
    shards: ShardsOption = None,
    cache: CacheOption = None,
    student: StudentName = None,
    method: Method = None,
    epochs: Epochs = None,
    updates: Annotated[
        int, typer.Option(min=2, metavar="N", help="How many updates to try it on, each way.")
    ] = 20,
    split: Split = None,
    batch_size: UpdateSize = None,
    workers: Workers = None,
    device: Device = None,
    recipe: RecipeFile = None,
    set_: Sets = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Time of a training run, and whether the loader or the device is its limit."""
    terminal = Terminal(quiet=quiet, json=json)
    flags = {
        "data.shards": shards,
        "data.cache": _text(cache),
        "data.split": split,
        "student.name": student,
        "distill.method": method,
        "schedule.epochs": epochs,
        "batch.batch_size": batch_size,
        "run.workers": workers,
        "run.device": device,
    }
    asked = load_recipe(TrainRecipe, recipe, set_ or (), flags)
    _require({"--shards SHARDS": asked.data.shards})
    from cskd_pipeline.planning import training

    report = training.plan_train(asked, terminal, updates=updates)
    training.show(report, terminal)
    return report if json else None


@app.command(epilog="Example: cskd-pipeline demo --out demo-out")
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="An empty or new folder.")] = Path(
        "demo-out"
    ),
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Run the whole pipeline on small real images: shards, teacher, cache, students, a table."""
    terminal = Terminal(quiet=quiet, json=json)
    from cskd_pipeline.demo import run_demo

    inherited = [flag for flag, given in (("--quiet", quiet), ("--json", json)) if given]

    def command(arguments: list[str]) -> dict[str, Any]:
        outcome = _parse_and_run([*arguments, *inherited])
        if not isinstance(outcome, dict):  # typer's way with KeyboardInterrupt is an exit code
            raise KeyboardInterrupt
        return outcome

    found = run_demo(out, terminal, command)
    return found if json else None  # without --json the demo has drawn its own table


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _require(needed: Mapping[str, str]) -> None:
    """Refuse a recipe in which something without a default is empty."""
    missing = [flag for flag, value in needed.items() if not value]
    if missing:
        raise UsageError(
            "something is missing",
            expected=", ".join(missing),
            action="give the flag, or a recipe that says it",
        )


def _require_encodings(names: Sequence[str]) -> None:
    """Refuse unknown encodings before anything is loaded."""
    from cskd_pipeline.cache.encodings import ENCODINGS

    unknown = [name for name in names if name not in ENCODINGS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], ENCODINGS, 1)
        raise RecipeError(
            "no encoding of that name",
            where="cache.encodings",
            found=", ".join(unknown),
            expected=", ".join(ENCODINGS),
            action=f"--encoding {near[0]}" if near else None,
        )


def _parse_range(text: str, flag: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UsageError(f"{flag} takes FROM:TO", found=text, expected="as in 0:128")
    return int(first), int(last)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    Wrong usage, full disks and this package's errors are told in a message, bugs in a traceback.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):  # a character that a terminal lacks is no reason to die
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    terminal = Terminal(json="--json" in arguments)
    try:
        with _explained_os_errors():
            outcome = _run(arguments or ["--help"], terminal)
            if isinstance(outcome, int):
                return outcome
            if outcome is not None:
                terminal.result(outcome)
    except CskdError as error:
        terminal.error(error)
        return error.exit_code
    return 0


def _run(arguments: list[str], terminal: Terminal) -> Outcome | int:
    """What the command returned; wrong usage and interruptions become a :class:`CskdError`."""
    # With --json, what libraries print must not reach the one object on stdout.
    away = contextlib.redirect_stdout(sys.stderr) if terminal.json else contextlib.nullcontext()
    try:
        with _sigterm_interrupts(), away:
            outcome = _parse_and_run(arguments)
    except (KeyboardInterrupt, typer.Abort):
        outcome = Interrupted.exit_code
    except _ParserError as error:
        context = getattr(error, "ctx", None)
        path = PROGRAM if context is None else context.command_path
        raise UsageError(error.format_message(), action=f"see {path} --help") from error
    if outcome == Interrupted.exit_code:  # typer has its own way with KeyboardInterrupt
        raise Interrupted("interrupted", action=_how_to_go_on(arguments))
    return outcome


def _parse_and_run(arguments: list[str]) -> Outcome | int:
    """What the command returned, or an exit code, with which typer answers --version, say."""
    outcome: Outcome | int = app(args=arguments, prog_name=PROGRAM, standalone_mode=False)
    return outcome


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM, which schedulers send, stop a command as Ctrl-C does."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _how_to_go_on(arguments: list[str]) -> str:
    command = next((word for word in arguments if not word.startswith("-")), "")
    line = shlex.join([PROGRAM, *arguments])
    if command == "dump-teacher":
        return f"finished units are kept, go on with: {line}"
    if arguments[:2] == ["cache", "convert"]:
        return f"finished units are kept, go on with: {line}"
    if command == "train":
        resume = "" if "--resume" in arguments else " --resume"
        return f"the last checkpoint is kept, go on with: {line}{resume}"
    return f"start again with: {line}"


@contextlib.contextmanager
def _explained_os_errors() -> Iterator[None]:
    """Tell of a full disk, or of a file that is not there or not ours; other OS errors are bugs."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise OutputError(
                "no space left on the device",
                where=error.filename,
                found=error.strerror,
                action="free some space and run the same command again: finished parts are kept",
            ) from error
        if error.filename is not None and error.errno in _FILE_ERRORS:
            raise CskdError(
                "a file cannot be used", where=error.filename, found=error.strerror
            ) from error
        raise
