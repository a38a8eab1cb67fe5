"""Pages to look at: of a cache, or of training runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from cskd_pipeline.cli.options import AcceptClasses, Outcome, ShardsOption, Split, count, require
from cskd_pipeline.cli.root import app
from cskd_pipeline.errors import UsageError

Targets = Annotated[
    list[str],
    typer.Argument(
        metavar="TARGET...",
        help="A cache, a folder or a URL; or one or more training runs' folders.",
    ),
]
Out = Annotated[
    Path, typer.Option(metavar="DIR", help="Where index.html goes; one there is replaced.")
]


@dataclass(frozen=True)
class Shown:
    """Hold a page's flags, the fields of :class:`~cskd_pipeline.tools.report.page.PageOptions`."""

    shards: ShardsOption = None
    split: Split = None
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URL",
            help="Of runs, with --shards: the cache that they were trained from; the folder that "
            "the first recipe names unless given.",
        ),
    ] = None
    images: Annotated[int | None, count("Views to show; 12 unless given, of runs 8.", most=200)] = (
        None
    )
    samples: Annotated[
        int | None, count("Views whose labels are counted; 2048 unless given, of runs 256.")
    ] = None
    epochs: Annotated[
        int | None,
        count(
            "Of a cache: the length of the run that the schedules' slider follows; 300 unless "
            "given.",
            most=10_000,
        ),
    ] = None
    export: Annotated[
        Literal["png", "svg"] | None,
        typer.Option(help="Write every plot as a file beside the page, too."),
    ] = None
    accept_classes: AcceptClasses = False


@app.command(epilog="Example: cskd-pipeline show runs/cskd runs/deit --out page --export png")
def show(target: Targets, shown: Shown, out: Out = Path("show")) -> Outcome:
    """Write one HTML page, which needs no network.

    Of a cache, with --shards: the teacher's labels over real views, from local to global.

    Of runs: which won, by how much, at what cost; with --shards their students' labels, too.
    """
    are_runs = _are_runs(target)
    if not are_runs:
        _refuse("runs", {"--cache": shown.cache})
        require({"--shards SHARDS": shown.shards})
    else:
        _refuse("a cache", {"--epochs": shown.epochs})
    if are_runs and shown.shards is None:
        views = {"--images": shown.images, "--samples": shown.samples, "--split": shown.split}
        views["--accept-classes"] = shown.accept_classes or None
        _refuse("runs with --shards", {"--cache": shown.cache, **views})
    from cskd_pipeline.tools.report.page import PageOptions

    options = PageOptions(**vars(shown))
    if are_runs:
        from cskd_pipeline.tools.report.run_page import show_runs

        return show_runs([Path(one) for one in target], out, options)
    from cskd_pipeline.tools.report.cache_page import show_cache

    return show_cache(target[0], out, options)


def _are_runs(targets: list[str]) -> bool:
    """Return whether the targets are folders of runs; refuse one that is no cache either."""
    from cskd_pipeline.cache.digests import split_pin
    from cskd_pipeline.cache.remote_files import is_remote
    from cskd_pipeline.tools.report.records import is_run

    if any(is_run(Path(one)) for one in targets) or len(targets) > 1:
        return True  # the reader of runs refuses one that is none
    location, _ = split_pin(targets[0])
    if not is_remote(location) and not (Path(location) / "zarr.json").exists():
        raise UsageError(
            "neither a cache nor a training run is here",
            where=targets[0],
            expected="zarr.json, as dump-teacher leaves it, or recipe.toml, as train does",
        )
    return False


def _refuse(serves: str, flags: dict[str, object]) -> None:
    """Refuse flags that would have no effect."""
    for flag, value in flags.items():
        if value is not None:
            raise UsageError(f"{flag} is for {serves}", action=f"leave {flag} out")
