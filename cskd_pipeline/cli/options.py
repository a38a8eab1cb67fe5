"""Flags that several commands have, and what is checked of them before anything is loaded."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from cskd_pipeline.config.sections import DumpRecipe, TrainRecipe, key_info
from cskd_pipeline.errors import RecipeError, UsageError

Outcome = dict[str, Any] | None
"""What a command found; :func:`cskd_pipeline.cli.root.main` prints it."""

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
_OF_VIEWS = {
    "views.size": {"help": "Of the views, in pixels.", "min": 8}
}  # whose keys have no description


def one_of(*known: str) -> Callable[[str], list[str]]:
    """Return what offers ``known`` to a shell's completion; where none fits it offers files."""
    return lambda incomplete: [word for word in known if word.startswith(incomplete)]


def usage_of(kind: type, name: str) -> tuple[str, str]:
    """Return usage and key of a flag, ``("--epochs N", "schedule.epochs")`` of ``--epochs``."""
    for usage, key in FLAGS[kind].items():
        if usage.partition(" ")[0] == name:
            return usage, key
    raise KeyError(f"a {kind.__name__} has no flag {name}")


def flag(name: str, kind: type = DumpRecipe, **options: Any) -> Any:
    """Return typer's option for a flag, from its key; ``options`` are typer's, instead of those."""
    usage, key = usage_of(kind, name)
    info = key_info(kind, key)
    made: dict[str, Any] = {"metavar": usage.partition(" ")[2] or None, "help": info.description}
    for limit in info.metadata:
        for ours, typers in (("ge", "min"), ("le", "max")):
            if hasattr(limit, ours):
                made[typers] = getattr(limit, ours)
    if info.examples:
        made["autocompletion"] = one_of(*info.examples)
    return typer.Option(name, **(made | _OF_VIEWS.get(key, {}) | options))


def count(help: str, *, least: int = 1, most: int | None = None) -> Any:
    """Return typer's option for a whole number ``N``, within limits."""
    return typer.Option(metavar="N", min=least, max=most, help=help)


Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no news: warnings and results only.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override one value of the recipe; may be given more than once.",
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
        help="What dump-teacher made: a folder, or a URL of one (https, s3, gs, hf).",
    ),
]
AcceptVersions = Annotated[
    bool,
    typer.Option(
        "--accept-versions",
        help="Go on though library versions that decide pixels or logits differ; the cache then "
        "lists both.",
    ),
]
AcceptClasses = Annotated[
    bool,
    typer.Option(
        "--accept-classes",
        help="Take class k of one side for class k of the other, though their names, order or "
        "labels differ.",
    ),
]


def without_none(**values: Any) -> dict[str, Any]:
    """Return the values that were given, by name: for a function that has defaults of its own."""
    return {name: value for name, value in values.items() if value is not None}


def require(needed: Mapping[str, Any]) -> None:
    """Refuse a command line in which something without a default is empty: usage -> value."""
    missing = [usage for usage, value in needed.items() if not value]
    if missing:
        raise UsageError(
            "something is missing",
            expected=", ".join(missing),
            action="give the flag, or a recipe that has it",
        )


def require_companion(usage: str, value: object, others: Mapping[str, object]) -> None:
    """Refuse flags that would do nothing without the one of ``usage``."""
    given = [name for name, other in others.items() if other is not None]
    if given and value is None:
        action = f"give {usage.split()[0]} too"
        raise UsageError(f"{given[0]} does nothing alone", expected=usage, action=action)


def require_encodings(names: Sequence[str]) -> None:
    """Refuse unknown encodings before anything is loaded."""
    from cskd_pipeline.distill.encodings import ENCODINGS

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


def parse_channels(text: str | None, name: str) -> list[float] | None:
    """Return the three numbers of ``R,G,B``, of ``--std`` above 0, or refuse them; None of None."""
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
    """Return the two numbers of ``FROM:TO``, or refuse what is no range; None of None."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UsageError(f"{name} takes FROM:TO", found=text, expected="as in 0:128")
    return int(first), int(last)
