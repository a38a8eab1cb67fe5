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


@cache_app.command(example="cache info cache --json")
def info(terminal: Terminal, cache: options.CacheArgument) -> options.Outcome:
    """Describe a cache: data, teacher, policy, views, finished units and bytes."""
    from cskd_pipeline.cache.info import describe
    from cskd_pipeline.cache.reader import open_cache
    from cskd_pipeline.cache.summary import summarise

    found = describe(open_cache(cache))
    return found if terminal.json else summarise(found)


@dataclass(frozen=True)
class VerifyFlags:
    """Flags for comparing a cache with shards and a teacher."""

    shards: options.ShardsOption = None
    split: options.Split = None
    samples: Annotated[
        int | None,
        options.count("Views to replay from --shards and pass to --teacher; default: 512."),
    ] = None
    accept_classes: options.AcceptClasses = False
    teacher: Annotated[str | None, options.flag("--teacher")] = None
    weights: options.Weights = None
    mean: Annotated[str | None, options.flag("--mean")] = None
    std: Annotated[str | None, options.flag("--std")] = None
    batch_size: options.BatchSize = None
    device: options.Device = None

    def choose(self) -> UserImages | None:
        """Return the images and teacher, or None without --shards; refuse flags without effect."""
        given = dict(vars(self))
        names = ("weights", "mean", "std", "batch_size", "device")
        of_teacher = {name: given.pop(name) for name in names}
        options.require_companion("--teacher NAME", self.teacher, **of_teacher)
        del given["shards"]
        options.require_companion("--shards SHARDS", self.shards, **given)
        if self.shards is None:
            return None
        from cskd_pipeline.tools.verify_cache import SAMPLES, TeacherChoice, UserImages

        teacher = None
        if self.teacher is not None:
            for name in ("mean", "std"):
                of_teacher[name] = options.parse_channels(of_teacher[name], f"--{name}")
            teacher = TeacherChoice(self.teacher, **options.without_none(**of_teacher))
        samples = self.samples or SAMPLES
        return UserImages(self.shards, self.split, samples, self.accept_classes, teacher)


@cache_app.command(example="cache verify cache --shards 'train-*.tar'")
def verify(
    terminal: Terminal,
    cache: options.CacheArgument,
    flags: VerifyFlags,
    depth: Annotated[
        Literal["structure", "bytes"],
        typer.Option(help="Check only that every file exists, or also that everything decodes."),
    ] = "bytes",
    partial: Annotated[bool, typer.Option("--partial", help="Accept unfinished units.")] = False,
) -> options.Outcome:
    """Verify a cache: files and bytes; with --shards its views; with --teacher their logits.

    Each replayed view is reported as bit-exact, differing by rounding, or of another image.
    """
    images = flags.choose()
    from cskd_pipeline.tools import verify_cache as verifying

    report = verifying.verify_cache(cache, depth=depth, partial=partial, images=images)
    outcome = print_report(terminal, report, verifying.printed(report))
    verifying.require_ok(report)
    return outcome


@dataclass(frozen=True)
class PublishFlags:
    """Flags of ``cache publish``."""

    location: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Public URL of the cache, for its card, such as hf://datasets/LAB/NAME.",
        ),
    ] = None
    license: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="License of the cached logits; default: the manifest's."),
    ] = None
    samples: Annotated[int, options.count("Views in the preview.", most=10_000)] = 300
    seed: Annotated[int, options.count("Random seed that selects the views.", least=0)] = 0
    thumbnails: Annotated[
        bool,
        typer.Option(
            "--thumbnails",
            help="Show the views, replayed from --shards, in the preview. Only for images that may "
            "be shared.",
        ),
    ] = False
    shards: options.ShardsOption = None
    split: options.Split = None


@cache_app.command(example="cache publish cache --location hf://datasets/LAB/NAME")
def publish(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="The cache to publish.")],
    flags: PublishFlags,
) -> options.Outcome:
    """Prepare a cache for a hub: write its card, Croissant metadata, preview and SHA-256 digests.

    Prints the upload command, but uploads nothing.
    """
    if flags.thumbnails:
        options.require({"--shards SHARDS": flags.shards})
    images = {"shards": flags.shards, "split": flags.split}
    options.require_companion("--thumbnails", flags.thumbnails, **images)
    from cskd_pipeline.tools.publish.publish_cache import PublishOptions
    from cskd_pipeline.tools.publish.publish_cache import publish as write

    return write(cache, PublishOptions(**vars(flags)))


@dataclass(frozen=True)
class ConvertFlags:
    """Flags for what the new cache takes from the old one."""

    encoding: Annotated[
        list[str] | None,
        options.flag(
            "--encoding",
            help="Encoding of the new cache; repeatable; default: the old cache's. Encodings that "
            "the old cache lacks are computed from dense.",
        ),
    ] = None
    sampled_draws: Annotated[
        int | None,
        options.count("Draws of the encoding sampled; default: the old cache's, or 1.", most=8),
    ] = None
    sampled_temperature: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1000.0,
            metavar="TAU",
            help="Temperature of these draws; default: the old cache's, or 1.",
        ),
    ] = None
    views: Annotated[int | None, options.count("Keep only the first N views.")] = None
    shards: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO", help="Keep only tar shards FROM to TO - 1, counted from 0."
        ),
    ] = None
    view_block: Annotated[
        int | None,
        options.count(
            "Views per unit: more views make fewer files and need more memory. 0: as many as keep "
            "a large cache below 40,000 files. Default: the old cache's.",
            least=0,
            most=1000,
        ),
    ] = None

    def choose(self) -> Conversion:
        """Return the conversion; refuse unknown encodings, draws of others, and bad ranges."""
        encodings = self.encoding or ()
        options.require_encodings(encodings)
        shards = options.parse_range(self.shards, "--shards")
        draws = (self.sampled_draws, self.sampled_temperature)
        if draws != (None, None) and "sampled" not in encodings:
            raise UsageError(
                "--sampled-draws and --sampled-temperature need the encoding sampled",
                action="add --encoding sampled",
            )
        from cskd_pipeline.cache.convert import Conversion

        return Conversion(encodings, self.views, shards, self.view_block, *draws)


@cache_app.command(example="cache convert cache small --encoding envelope")
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Source cache: a folder or a URL.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The cache to create or resume.")],
    flags: ConvertFlags,
    device: options.Device = None,
) -> options.Outcome:
    """Convert a cache: other encodings, fewer views, a part of the shards, or fewer files.

    After an interruption, run the same command again: finished units are kept.
    """
    conversion = flags.choose()
    from cskd_pipeline.cache.convert import convert as run
    from cskd_pipeline.runtime.device import pick_device
    from cskd_pipeline.runtime.signals import stop_requests

    chosen = pick_device(device or "auto")
    with stop_requests() as stop:
        return run(source, target, conversion, device=chosen, stopped=lambda: stop.requested)


@cache_app.command(example="cache upgrade cache")
def upgrade(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="A cache of format version 1.")],
) -> options.Outcome:
    """Upgrade a cache from format version 1 to 2, in place, adding digests of its files.

    After an interruption, run the same command again.
    """
    from cskd_pipeline.cache.upgrade import upgrade as run
    from cskd_pipeline.runtime.signals import stop_requests

    with stop_requests() as stop:
        return run(cache, stopped=lambda: stop.requested)


@cache_app.command(example="cache merge part-0 part-1 --out cache")
def merge(
    caches: Annotated[
        list[Path],
        typer.Argument(
            metavar="CACHE...",
            help="Caches of the same data, teacher and policy, such as parts of a dump.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The cache to create or resume.")],
    accept_versions: options.AcceptVersions = False,
    accept_classes: options.AcceptClasses = False,
) -> options.Outcome:
    """Merge the finished units of several caches; units in more than one must be equal.

    After an interruption, run the same command again: finished units are kept and compared.
    """
    from cskd_pipeline.cache.merge import merge as run
    from cskd_pipeline.runtime.classes import COMMAND_SWITCH, ClassGuard
    from cskd_pipeline.runtime.signals import stop_requests

    guard = ClassGuard(COMMAND_SWITCH, accept=accept_classes)
    with stop_requests() as stop:
        merged = run(
            caches,
            out,
            accept_versions=accept_versions,
            guard=guard,
            stopped=lambda: stop.requested,
        )
    guard.report_new()
    return merged
