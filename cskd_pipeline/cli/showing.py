"""Pages to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cskd_pipeline.cli.options import (
    CacheArgument,
    Json,
    Outcome,
    Quiet,
    ShardsOption,
    Split,
    require,
)
from cskd_pipeline.cli.root import app
from cskd_pipeline.terminal import Terminal


@app.command(epilog="Example: cskd-pipeline show cache --shards 'shards/train-*.tar' --out page")
def show(
    cache: CacheArgument,
    shards: ShardsOption = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where index.html goes; one there is replaced.")
    ] = Path("show"),
    images: Annotated[
        int, typer.Option(min=1, max=200, metavar="N", help="Views in the gallery.")
    ] = 12,
    samples: Annotated[
        int, typer.Option(min=1, metavar="N", help="Views whose labels are counted.")
    ] = 2048,
    epochs: Annotated[
        int,
        typer.Option(
            min=1, max=10_000, metavar="N", help="Of the run that the schedules' slider follows."
        ),
    ] = 300,
    export: Annotated[
        Literal["png", "svg"] | None,
        typer.Option(help="Every plot as a file beside the page too."),
    ] = None,
    split: Split = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """One HTML page, which needs no network: the teacher's labels over real views, and figures."""
    terminal = Terminal(quiet=quiet, json=json)
    require({"--shards SHARDS": shards or ""})
    from cskd_pipeline.showing.caches import show_cache

    return show_cache(
        cache,
        shards or "",
        out,
        terminal,
        split=split,
        images=images,
        samples=samples,
        epochs=epochs,
        export=export,
    )
