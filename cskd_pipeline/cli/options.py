"""What several commands ask for, and how their flags are checked."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cskd_pipeline.errors import RecipeError, UsageError


def one_of(*known: str) -> Callable[[str], list[str]]:
    """What a shell's completion may offer; where nothing fits it offers files."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return complete


def _recipe_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The recipes in ``stages/`` for the stage that a command is about."""
    from cskd_pipeline.config import DumpRecipe, TrainRecipe, recipe_names

    kind = DumpRecipe if "dump" in (ctx.info_name or "") else TrainRecipe
    return one_of(*recipe_names(kind))(incomplete)


Outcome = dict[str, Any] | None
"""What a command found; :func:`cskd_pipeline.cli.running.main` prints it."""

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no news: warnings and results only.")
]
RecipeFile = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE|NAME",
        help="A TOML recipe, or the name of one in stages/.",
        autocompletion=_recipe_names,
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
complete_encoding = one_of(*ENCODING_NAMES.split("|"))
TeacherName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A CNN's timm name, torchvision:NAME, or package.module:factory of your own.",
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B",
        help="Of the images that the teacher was trained on, in [0, 1] units; default: what the "
        "network states.",
    ),
]
Std = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="Their standard deviation, in the same way.")
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="hub|FILE|random",
        help="The teacher's weights; random is for trials only.",
        autocompletion=one_of("hub", "random"),
    ),
]
CacheOption = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|URL",
        help="What dump-teacher made: a folder, or where it is published (https, s3, gs, hf); not "
        "for method none.",
    ),
]
CacheArgument = Annotated[
    str,
    typer.Argument(
        metavar="CACHE",
        help="What dump-teacher made: a folder, or a URL of one (https, s3, gs, hf).",
    ),
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
    typer.Option(
        metavar="NAME",
        help="auto (a GPU where there is one), cpu, cuda, cuda:1.",
        autocompletion=one_of("auto", "cpu", "cuda"),
    ),
]
AcceptVersions = Annotated[
    bool,
    typer.Option(
        "--accept-versions",
        help="Go on though library versions that decide pixels or answers differ; the cache then "
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


def path_text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def require(needed: Mapping[str, str]) -> None:
    """Refuse a recipe in which something without a default is empty."""
    missing = [flag for flag, value in needed.items() if not value]
    if missing:
        raise UsageError(
            "something is missing",
            expected=", ".join(missing),
            action="give the flag, or a recipe that says it",
        )


def require_companion(flag: str, value: object, others: Mapping[str, object]) -> None:
    """Refuse flags that would do nothing without ``flag``."""
    given = [name for name, other in others.items() if other is not None]
    if given and value is None:
        raise UsageError(
            f"{given[0]} does nothing alone", expected=flag, action=f"give {flag.split()[0]} too"
        )


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


def parse_channels(text: str | None, flag: str) -> list[float] | None:
    """``R,G,B``."""
    if text is None:
        return None
    try:
        red, green, blue = map(float, text.split(","))
    except ValueError as error:
        raise UsageError(
            f"{flag} takes R,G,B", found=text, expected="as in 0.485,0.456,0.406"
        ) from error
    return [red, green, blue]


def parse_range(text: str, flag: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UsageError(f"{flag} takes FROM:TO", found=text, expected="as in 0:128")
    return int(first), int(last)
