"""Commands on caches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cskd_pipeline.cli.options import (
    ENCODING_NAMES,
    AcceptClasses,
    AcceptVersions,
    BatchSize,
    CacheArgument,
    Device,
    Json,
    Mean,
    Outcome,
    Quiet,
    ShardsOption,
    Split,
    Std,
    TeacherName,
    Weights,
    complete_encoding,
    parse_channels,
    parse_range,
    require_companion,
    require_encodings,
)
from cskd_pipeline.cli.root import cache_app
from cskd_pipeline.runtime.console import Terminal


@cache_app.command(epilog="Example: cskd-pipeline cache info cache --json")
def info(
    cache: CacheArgument,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Say what a cache holds: data, teacher, policy, views, what is finished, and bytes."""
    from cskd_pipeline.cache.info import describe
    from cskd_pipeline.cache.summary import summarise

    Terminal.listening(quiet=quiet, json=json)
    found = describe(cache)
    return found if json else summarise(found)


@cache_app.command(epilog="Example: cskd-pipeline cache verify cache --shards 'train-*.tar'")
def verify(
    cache: CacheArgument,
    depth: Annotated[
        Literal["structure", "bytes"],
        typer.Option(help="Only that every file is there, or also that everything decodes."),
    ] = "bytes",
    shards: ShardsOption = None,
    teacher: TeacherName = None,
    weights: Weights = None,
    mean: Mean = None,
    std: Std = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Views to make again from the shards, and to ask about; 512 unless given.",
        ),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Units that are not made yet are no problem.")
    ] = False,
    split: Split = None,
    batch_size: BatchSize = None,
    device: Device = None,
    accept_classes: AcceptClasses = False,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Check a cache: its files and bytes; with --shards that it fits them; with --teacher answers.

    Views that are made again are told apart as bit-exact, differing by rounding, or of another
    image.
    """
    terminal = Terminal.listening(quiet=quiet, json=json)
    of_teacher = {
        **{"--weights": weights, "--mean": mean, "--std": std},
        **{"--batch-size": batch_size, "--device": device},
    }
    of_shards = {"--teacher": teacher, "--samples": samples, "--split": split}
    of_shards["--accept-classes"] = accept_classes or None
    require_companion("--teacher NAME", teacher, of_teacher)
    require_companion("--shards SHARDS", shards, of_shards)
    from cskd_pipeline.tools.verify.verify_cache import SAMPLES
    from cskd_pipeline.tools.verify.verify_cache import verify as check
    from cskd_pipeline.tools.verify.verify_responses import TeacherChoice

    choice = None
    if teacher is not None:
        choice = TeacherChoice(
            teacher,
            weights or "hub",
            parse_channels(mean, "--mean"),
            parse_channels(std, "--std"),
            batch_size or 32,
            device or "auto",
        )
    report = check(
        cache,
        terminal,
        depth=depth,
        shards=shards,
        split=split,
        teacher=choice,
        samples=samples or SAMPLES,
        partial=partial,
        accept_classes=accept_classes,
    )
    return report if json else None


@cache_app.command(
    epilog="Example: cskd-pipeline cache card cache --location hf://datasets/LAB/NAME"
)
def card(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="What dump-teacher made.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: README.md in the cache.")
    ] = None,
    location: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Where others will read it, for the commands in the card: hf://datasets/LAB/NAME.",
        ),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Write the dataset card of a cache that is to be published: provenance, sizes, how to use."""
    from cskd_pipeline.tools.cache_card import write_card

    Terminal.listening(quiet=quiet, json=json)
    return write_card(cache, out, location)


@cache_app.command(epilog="Example: cskd-pipeline cache convert cache small --encoding envelope")
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A cache: a folder, or its URL.")],
    target: Annotated[
        Path,
        typer.Argument(metavar="DST", help="The cache to make from it, or to go on with."),
    ],
    encoding: Annotated[
        list[str] | None,
        typer.Option(
            metavar=ENCODING_NAMES,
            autocompletion=complete_encoding,
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
    Terminal.listening(quiet=quiet, json=json)
    require_encodings(encoding or ())
    chosen = None if shards is None else parse_range(shards, "--shards")
    from cskd_pipeline.cache.convert import convert as make
    from cskd_pipeline.runtime.device import pick_device
    from cskd_pipeline.runtime.signals import stop_requests

    with stop_requests() as stop:
        return make(
            source,
            target,
            encodings=encoding or (),
            views=views,
            shards=chosen,
            device=pick_device(device or "auto"),
            stopped=lambda: stop.requested,
        )


@cache_app.command(epilog="Example: cskd-pipeline cache upgrade cache")
def upgrade(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="A cache of format version 1.")],
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Make a cache of format version 1 one of version 2, in place: it gets digests of its files.

    Run the same command again after an interruption.
    """
    Terminal.listening(quiet=quiet, json=json)
    from cskd_pipeline.cache.upgrade import upgrade as make
    from cskd_pipeline.runtime.signals import stop_requests

    with stop_requests() as stop:
        return make(cache, stopped=lambda: stop.requested)


@cache_app.command(epilog="Example: cskd-pipeline cache merge part-0 part-1 --out cache")
def merge(
    caches: Annotated[
        list[Path],
        typer.Argument(
            metavar="CACHE...",
            help="Parts made by several machines or labs: of the same data, teacher and policy.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The cache to make from them, or to go on with.")
    ],
    accept_versions: AcceptVersions = False,
    accept_classes: AcceptClasses = False,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Join the finished parts of several caches; where they overlap, they must be equal.

    Run the same command again after an interruption: finished units are kept, and compared.
    """
    Terminal.listening(quiet=quiet, json=json)
    from cskd_pipeline.cache.merge import merge as join
    from cskd_pipeline.runtime.classes import ClassGuard
    from cskd_pipeline.runtime.signals import stop_requests

    guard = ClassGuard(accept=accept_classes)
    with stop_requests() as stop:
        merged = join(
            caches,
            out,
            accept_versions=accept_versions,
            guard=guard,
            stopped=lambda: stop.requested,
        )
    guard.report()
    return merged
