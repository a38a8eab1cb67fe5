"""Flags shared by several commands, and their checks before anything is loaded."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cskd_pipeline.config.sections import DumpRecipe, TrainRecipe, key_info
from cskd_pipeline.errors import RecipeError, UsageError

Outcome = dict[str, Any] | None
"""The result of a command, which :func:`cskd_pipeline.cli.root.main` prints."""

FLAGS: dict[type, dict[str, str]] = {
    DumpRecipe: {
        "--shards SHARDS": "data.shards",
        "--split NAME": "data.split",
        "--teacher NAME": "teacher.name",
        "--weights hub|FILE|random": "teacher.weights",
        "--mean R,G,B": "teacher.mean",
        "--std R,G,B": "teacher.std",
        "--cache DIR": "cache.path",
        "--encoding dense|dense-q8|topk|envelope|sampled": "cache.encodings",
        "--views N": "cache.views",
        "--size N": "views.size",
        "--batch-size N": "dump.batch_size",
        "--workers N": "dump.workers",
        "--device NAME": "dump.device",
    },
    TrainRecipe: {
        "--shards SHARDS": "data.shards",
        "--val-shards SHARDS": "data.val_shards",
        "--cache DIR|URL": "data.cache",
        "--split NAME": "data.split",
        "--val-split NAME": "data.val_split",
        "--student NAME": "student.name",
        "--init-from CHECKPOINT": "student.init_from",
        "--fork-from STATE": "run.fork_from",
        "--size N": "views.size",
        "--method": "distill.method",
        "--epochs N": "schedule.epochs",
        "--batch-size N": "batch.batch_size",
        "--out DIR": "run.out",
        "--wandb PROJECT": "run.wandb",
        "--workers N": "run.workers",
        "--device NAME": "run.device",
    },
}
"""Usage -> key, for each kind of recipe."""
# Options of keys that have no description.
_VIEW_OPTIONS = {"views.size": {"help": "Height and width of the views in pixels.", "min": 8}}


def one_of(*known: str) -> Callable[[str], list[str]]:
    """Return a completion that offers ``known``; the shell offers files if none matches."""
    return lambda incomplete: [word for word in known if word.startswith(incomplete)]


def usage_of(kind: type, name: str) -> tuple[str, str]:
    """Return usage and key of a flag: ``("--epochs N", "schedule.epochs")`` for ``--epochs``."""
    for usage, key in FLAGS[kind].items():
        if usage.partition(" ")[0] == name:
            return usage, key
    raise KeyError(f"a {kind.__name__} has no flag {name}")


def flag(name: str, kind: type = DumpRecipe, **options: Any) -> Any:
    """Return typer's option for a flag, derived from its key; ``options`` override it."""
    usage, key = usage_of(kind, name)
    info = key_info(kind, key)
    derived: dict[str, Any] = {"metavar": usage.partition(" ")[2] or None, "help": info.description}
    for limit in info.metadata:
        for ours, typers in (("ge", "min"), ("le", "max")):
            if hasattr(limit, ours):
                derived[typers] = getattr(limit, ours)
    if info.examples:
        derived["autocompletion"] = one_of(*info.examples)
    return typer.Option(name, **(derived | _VIEW_OPTIONS.get(key, {}) | options))


def count(help: str, *, least: int = 1, most: int | None = None) -> Any:
    """Return typer's option for an integer ``N`` within limits."""
    return typer.Option(metavar="N", min=least, max=most, help=help)


Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else, to stdout.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show only warnings and results, no progress.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override one key of the recipe; repeatable.",
    ),
]
SHARDS_HELP = key_info(DumpRecipe, "data.shards").description
ShardsOption = Annotated[str | None, flag("--shards")]
RequiredShards = Annotated[str, flag("--shards")]
Split = Annotated[str | None, flag("--split")]
BatchSize = Annotated[int | None, flag("--batch-size")]
Device = Annotated[str | None, flag("--device")]
Weights = Annotated[str | None, flag("--weights")]
CacheArgument = Annotated[
    str,
    typer.Argument(
        metavar="CACHE",
        help="A cache written by dump-teacher: a folder or a URL (https, s3, gs, hf).",
    ),
]
AcceptVersions = Annotated[
    bool,
    typer.Option(
        "--accept-versions",
        help="Continue although versions of libraries that affect pixels or logits differ; the "
        "cache then lists both.",
    ),
]
AcceptClasses = Annotated[
    bool,
    typer.Option(
        "--accept-classes",
        help="Match classes by number although names, order or labels differ.",
    ),
]


def without_none(**values: Any) -> dict[str, Any]:
    """Return the values that were given, by name, for a function with its own defaults."""
    return {name: value for name, value in values.items() if value is not None}


def require(needed: Mapping[str, Any]) -> None:
    """Refuse a command line without these values: usage -> value."""
    missing = [usage for usage, value in needed.items() if not value]
    if missing:
        raise UsageError(
            "a required value is missing",
            expected=", ".join(missing),
            action="pass the flag, or a recipe that sets it",
        )


def given_flags(**values: object) -> list[str]:
    """Return the flags of the parameters that were given, which are neither None nor False."""
    given = [name for name, value in values.items() if value is not None and value is not False]
    return [f"--{name.replace('_', '-')}" for name in given]


def require_companion(usage: str, value: object, **others: object) -> None:
    """Refuse other parameters that have no effect without the flag of ``usage``."""
    if not value and (given := given_flags(**others)):
        flag = usage.split()[0]
        raise UsageError(f"{given[0]} has no effect without {flag}", action=f"add {usage}")


def local_folder(location: str) -> Path | None:
    """Return the folder of a cache's location, without its pinned digest; None for a URL."""
    from cskd_pipeline.cache.digests import split_pin
    from cskd_pipeline.cache.remote_files import is_remote

    location, _ = split_pin(location)
    return None if is_remote(location) else Path(location)


def require_encodings(names: Sequence[str]) -> None:
    """Refuse unknown encodings before anything is loaded."""
    from cskd_pipeline.distill.encodings import ENCODINGS

    unknown = [name for name in names if name not in ENCODINGS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], ENCODINGS, 1)
        raise RecipeError(
            "unknown encoding",
            where="cache.encodings",
            found=", ".join(unknown),
            expected=", ".join(ENCODINGS),
            action=f"--encoding {near[0]}" if near else None,
        )


def parse_channels(text: str | None, name: str) -> list[float] | None:
    """Parse ``R,G,B``; refuse anything else, and numbers up to 0 for ``--std``."""
    if text is None:
        return None
    try:
        red, green, blue = map(float, text.split(","))
        if not all(map(math.isfinite, (red, green, blue))):
            raise ValueError("not finite")
        if name == "--std" and min(red, green, blue) <= 0:
            raise ValueError("not above 0")
    except ValueError as error:
        above = ", each above 0" if name == "--std" else ""
        expected = f"three numbers{above}, as in 0.485,0.456,0.406"
        raise UsageError(f"{name} takes R,G,B", found=text, expected=expected) from error
    return [red, green, blue]


def parse_range(text: str | None, name: str) -> tuple[int, int] | None:
    """Parse ``FROM:TO``; refuse an invalid range."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UsageError(f"{name} takes FROM:TO", found=text, expected="as in 0:128")
    return int(first), int(last)
