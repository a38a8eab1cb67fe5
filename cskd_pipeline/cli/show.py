"""Pages to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cskd_pipeline.cli.options import (
    AcceptClasses,
    Json,
    Outcome,
    Quiet,
    ShardsOption,
    Split,
    require,
)
from cskd_pipeline.cli.root import app
from cskd_pipeline.errors import UsageError
from cskd_pipeline.runtime.console import Terminal


@app.command(epilog="Example: cskd-pipeline show runs/cskd runs/deit --out page --export png")
def show(
    target: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...",
            help="A cache, a folder or a URL; or one or more training runs' folders.",
        ),
    ],
    shards: ShardsOption = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where index.html goes; one there is replaced.")
    ] = Path("show"),
    images: Annotated[
        int | None,
        typer.Option(
            min=1, max=200, metavar="N", help="Views to show; 12 unless given, of runs 8."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Views whose labels are counted; 2048 unless given, of runs 256.",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10_000,
            metavar="N",
            help="Of a cache: how long the run is that the schedules' slider follows; 300 unless "
            "given.",
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URL",
            help="Of runs, with --shards: what they were trained from; the folder that the first "
            "recipe names unless given.",
        ),
    ] = None,
    export: Annotated[
        Literal["png", "svg"] | None,
        typer.Option(help="Every plot as a file beside the page too."),
    ] = None,
    split: Split = None,
    accept_classes: AcceptClasses = False,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """One HTML page, which needs no network.

    Of a cache, with --shards: the teacher's labels over real views, and figures.

    Of runs: curves side by side; with --shards what their students say of every place, too.
    """
    Terminal.listening(quiet=quiet, json=json)
    if _are_runs(target):
        _refuse("a cache", {"--epochs": epochs})
        if shards is None:
            views = {"--images": images, "--samples": samples, "--split": split}
            views["--accept-classes"] = accept_classes or None
            _refuse("runs with --shards", {"--cache": cache, **views})
        from cskd_pipeline.tools.report import run_page

        return run_page.show_runs(
            [Path(one) for one in target],
            out,
            shards=shards,
            cache=cache,
            split=split,
            images=images or run_page.IMAGES,
            samples=samples or run_page.SAMPLES,
            export=export,
            accept_classes=accept_classes,
        )
    _refuse("runs", {"--cache": cache})
    require({"--shards SHARDS": shards or ""})
    from cskd_pipeline.tools.report import cache_page

    return cache_page.show_cache(
        target[0],
        shards or "",
        out,
        split=split,
        images=images or cache_page.IMAGES,
        samples=samples or cache_page.SAMPLES,
        epochs=epochs or cache_page.EPOCHS,
        export=export,
        accept_classes=accept_classes,
    )


def _are_runs(targets: list[str]) -> bool:
    """Whether the targets are runs' folders; a single one that is not is a cache, or refused."""
    from cskd_pipeline.cache.digests import split_pin
    from cskd_pipeline.cache.remote import is_remote
    from cskd_pipeline.tools.report.records import is_run

    if any(is_run(Path(one)) for one in targets) or len(targets) > 1:
        return True  # where another is none, its reader says so
    location, _ = split_pin(targets[0])
    if not is_remote(location) and not (Path(location) / "zarr.json").exists():
        raise UsageError(
            "neither a cache nor a training run is here",
            where=targets[0],
            expected="zarr.json, as dump-teacher leaves it, or recipe.toml, as train does",
        )
    return False


def _refuse(serves: str, flags: dict[str, object]) -> None:
    """Refuse flags that would do nothing."""
    for flag, value in flags.items():
        if value is not None:
            raise UsageError(f"{flag} is for {serves}", action=f"leave {flag} out")
