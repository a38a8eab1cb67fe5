"""Commands on caches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cskd_pipeline.cli import options
from cskd_pipeline.cli.reports import print_report
from cskd_pipeline.cli.root import cache_app
from cskd_pipeline.errors import UsageError
from cskd_pipeline.runtime.console import Terminal

if TYPE_CHECKING:
    from cskd_pipeline.cache.convert import Conversion
    from cskd_pipeline.tools.verify_cache import UserImages


@cache_app.command(epilog="Example: cskd-pipeline cache info cache --json")
def info(terminal: Terminal, cache: options.CacheArgument) -> options.Outcome:
    """Say what a cache holds: data, teacher, policy, views, what is finished, and bytes."""
    from cskd_pipeline.cache.info import describe
    from cskd_pipeline.cache.reader import open_cache
    from cskd_pipeline.cache.summary import summarise

    found = describe(open_cache(cache))
    return found if terminal.json else summarise(found)


@dataclass(frozen=True)
class Compared:
    """Name the shards that a cache is compared with, and the teacher whose logits are, too."""

    shards: options.ShardsOption = None
    split: options.Split = None
    samples: Annotated[
        int | None,
        options.count(
            "Views to replay from the shards, and to run the teacher on; 512 unless given."
        ),
    ] = None
    accept_classes: options.AcceptClasses = False
    teacher: Annotated[str | None, options.flag("--teacher")] = None
    weights: options.Weights = None
    mean: Annotated[str | None, options.flag("--mean")] = None
    std: Annotated[str | None, options.flag("--std")] = None
    batch_size: options.BatchSize = None
    device: options.Device = None

    def choose(self) -> UserImages | None:
        """Return both; None without --shards. Flags that would do nothing are refused."""
        flags: dict[str, object] = {"--weights": self.weights, "--mean": self.mean}
        flags |= {"--std": self.std, "--batch-size": self.batch_size, "--device": self.device}
        options.require_companion("--teacher NAME", self.teacher, flags)
        flags = {"--samples": self.samples, "--split": self.split, "--teacher": self.teacher}
        flags |= {"--accept-classes": self.accept_classes or None}
        options.require_companion("--shards SHARDS", self.shards, flags)
        if self.shards is None:
            return None
        from cskd_pipeline.tools.verify_cache import SAMPLES, TeacherChoice, UserImages

        teacher = None
        if self.teacher is not None:
            given = options.without_none(
                weights=self.weights,
                mean=options.parse_channels(self.mean, "--mean"),
                std=options.parse_channels(self.std, "--std"),
                batch_size=self.batch_size,
                device=self.device,
            )
            teacher = TeacherChoice(self.teacher, **given)
        samples = self.samples or SAMPLES
        return UserImages(self.shards, self.split, samples, self.accept_classes, teacher)


@cache_app.command(epilog="Example: cskd-pipeline cache verify cache --shards 'train-*.tar'")
def verify(
    terminal: Terminal,
    cache: options.CacheArgument,
    compared: Compared,
    depth: Annotated[
        Literal["structure", "bytes"],
        typer.Option(help="Only that every file is there, or also that everything decodes."),
    ] = "bytes",
    partial: Annotated[
        bool, typer.Option("--partial", help="Units that are not made yet are no problem.")
    ] = False,
) -> options.Outcome:
    """Check a cache: its files and bytes; with --shards its views; with --teacher their logits.

    Replayed views are bit-exact, differ by rounding, or are of another image.
    """
    chosen = compared.choose()
    from cskd_pipeline.tools import verify_cache as verifying

    report = verifying.verify_cache(cache, depth=depth, partial=partial, images=chosen)
    outcome = print_report(terminal, report, verifying.printed(report))
    verifying.require_ok(report)
    return outcome


@dataclass(frozen=True)
class Published:
    """Hold the flags of ``cache publish``."""

    location: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Where others will read it, for the commands in the card: hf://datasets/LAB/NAME.",
        ),
    ] = None
    license: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the cached logits; the manifest's unless given."),
    ] = None
    samples: Annotated[int, options.count("Views in the preview.", most=10_000)] = 300
    seed: Annotated[int, options.count("Draws other views.", least=0)] = 0
    thumbnails: Annotated[
        bool,
        typer.Option(
            "--thumbnails",
            help="Show the views in the preview, replayed from --shards. Do so only if their "
            "images may be shared.",
        ),
    ] = False
    shards: options.ShardsOption = None
    split: options.Split = None


@cache_app.command(
    epilog="Example: cskd-pipeline cache publish cache --location hf://datasets/LAB/NAME"
)
def publish(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="What dump-teacher made.")],
    published: Published,
) -> options.Outcome:
    """Write beside a cache what hubs show of it: card, Croissant, preview, and files' SHA-256.

    Prints the command that uploads it; nothing is uploaded.
    """
    if published.thumbnails:
        options.require({"--shards SHARDS": published.shards})
    images = {"--shards": published.shards, "--split": published.split}
    options.require_companion("--thumbnails", published.thumbnails or None, images)
    from cskd_pipeline.tools.publish.publish_cache import PublishOptions
    from cskd_pipeline.tools.publish.publish_cache import publish as write

    return write(cache, PublishOptions(**vars(published)))


@dataclass(frozen=True)
class Converted:
    """Say what the new cache has of the old one."""

    encoding: Annotated[
        list[str] | None,
        options.flag(
            "--encoding",
            help="What the new cache stores; more than once for several. Without, what the old one "
            "does. What it does not have is made from dense.",
        ),
    ] = None
    sampled_draws: Annotated[
        int | None,
        options.count(
            "Draws of the encoding sampled. Without, what the old one has, or 1.", most=8
        ),
    ] = None
    sampled_temperature: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1000.0,
            metavar="TAU",
            help="That it draws at. Without, what the old one has, or 1.",
        ),
    ] = None
    views: Annotated[int | None, options.count("Only the first N views.")] = None
    shards: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO", help="Only the tar shards FROM up to, not including, TO, from 0."
        ),
    ] = None
    view_block: Annotated[
        int | None,
        options.count(
            "Views per unit, which is held in memory: more make fewer files. 0: as many as "
            "keep a large cache below 40,000 files. Without, what the old cache has.",
            least=0,
            most=1000,
        ),
    ] = None

    def choose(self) -> Conversion:
        """Return it; refuse unknown encodings, draws without ``sampled``, and what is no range."""
        encodings = self.encoding or ()
        options.require_encodings(encodings)
        shards = options.parse_range(self.shards, "--shards")
        draws = (self.sampled_draws, self.sampled_temperature)
        if draws != (None, None) and "sampled" not in encodings:
            raise UsageError(
                "--sampled-draws and --sampled-temperature do nothing without the encoding sampled",
                action="give --encoding sampled too",
            )
        from cskd_pipeline.cache.convert import Conversion

        return Conversion(encodings, self.views, shards, self.view_block, *draws)


@cache_app.command(epilog="Example: cskd-pipeline cache convert cache small --encoding envelope")
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A cache: a folder, or its URL.")],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="The cache to make from it, or to resume.")
    ],
    converted: Converted,
    device: options.Device = None,
) -> options.Outcome:
    """Make a cache from another: other encodings, fewer views, a part of the shards, fewer files.

    Run the same command again after an interruption: finished units are kept.
    """
    wanted = converted.choose()
    from cskd_pipeline.cache.convert import convert as make
    from cskd_pipeline.runtime.device import pick_device
    from cskd_pipeline.runtime.signals import stop_requests

    on = pick_device(device or "auto")
    with stop_requests() as stop:
        return make(source, target, wanted, device=on, stopped=lambda: stop.requested)


@cache_app.command(epilog="Example: cskd-pipeline cache upgrade cache")
def upgrade(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="A cache of format version 1.")],
) -> options.Outcome:
    """Make a cache of format version 1 one of version 2, in place: it gets digests of its files.

    Run the same command again after an interruption.
    """
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
        Path, typer.Option(metavar="DIR", help="The cache to make from them, or to resume.")
    ],
    accept_versions: options.AcceptVersions = False,
    accept_classes: options.AcceptClasses = False,
) -> options.Outcome:
    """Join the finished parts of several caches; where they overlap, they must be equal.

    Run the same command again after an interruption: finished units are kept, and compared.
    """
    from cskd_pipeline.cache.merge import merge as join
    from cskd_pipeline.runtime.classes import COMMAND_SWITCH, ClassGuard
    from cskd_pipeline.runtime.signals import stop_requests

    guard = ClassGuard(COMMAND_SWITCH, accept=accept_classes)
    with stop_requests() as stop:
        merged = join(
            caches,
            out,
            accept_versions=accept_versions,
            guard=guard,
            stopped=lambda: stop.requested,
        )
    guard.report_new()
    return merged
