"""HTML pages about a cache or training runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from cskd_pipeline.cli import options
from cskd_pipeline.cli.root import app
from cskd_pipeline.errors import UsageError

Targets = Annotated[
    list[str],
    typer.Argument(
        metavar="TARGET...",
        help="A cache (a folder or a URL), or folders of one or more training runs.",
    ),
]
Out = Annotated[
    Path, typer.Option(metavar="DIR", help="Folder for index.html, which is replaced if it exists.")
]


@dataclass(frozen=True)
class ShowFlags:
    """Flags of a page: the fields of :class:`~cskd_pipeline.tools.report.page.PageOptions`."""

    shards: options.ShardsOption = None
    split: options.Split = None
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URL",
            help="For runs with --shards: the cache that they were trained from; default: the "
            "folder in the first recipe.",
        ),
    ] = None
    images: Annotated[
        int | None, options.count("Views to show; default: 12 (8 for runs).", most=200)
    ] = None
    samples: Annotated[
        int | None, options.count("Views whose labels are counted; default: 2048 (256 for runs).")
    ] = None
    epochs: Annotated[
        int | None,
        options.count(
            "For a cache: number of epochs on the CKF schedules' slider; default: 300.",
            most=10_000,
        ),
    ] = None
    export: Annotated[
        Literal["png", "svg"] | None,
        typer.Option(help="Also write every plot to a file in this format."),
    ] = None
    accept_classes: options.AcceptClasses = False


@app.command(example="show runs/cskd runs/deit --out page --export png")
def show(target: Targets, flags: ShowFlags, out: Out = Path("show")) -> options.Outcome:
    """Write an HTML page about a cache or training runs; it needs no network.

    For a cache, with --shards: the teacher's labels over real views, from local to global.

    For runs: which won, by how much, at what cost; with --shards also the students' labels.
    """
    are_runs = _are_runs(target)
    if not are_runs:
        _refuse("runs", cache=flags.cache)
        options.require({"--shards SHARDS": flags.shards})
    else:
        _refuse("a cache", epochs=flags.epochs)
        if flags.shards is None:
            _refuse("runs with --shards", **{**vars(flags), "export": None})
    from cskd_pipeline.tools.report.page import PageOptions

    page = PageOptions(**vars(flags))
    if are_runs:
        from cskd_pipeline.tools.report.run_page import show_runs

        return show_runs([Path(one) for one in target], out, page)
    from cskd_pipeline.tools.report.cache_page import show_cache

    return show_cache(target[0], out, page)


def _are_runs(targets: list[str]) -> bool:
    """Return whether the targets are training runs; refuse one that is not a cache either."""
    from cskd_pipeline.tools.report.records import is_run

    if any(is_run(Path(one)) for one in targets) or len(targets) > 1:
        return True  # show_runs refuses targets that are not runs
    folder = options.local_folder(targets[0])
    if folder is not None and not (folder / "zarr.json").exists():
        raise UsageError(
            "neither a cache nor a training run",
            where=targets[0],
            expected="a folder with zarr.json, from dump-teacher, or recipe.toml, from train",
        )
    return False


def _refuse(target: str, **values: object) -> None:
    """Refuse flags that have no effect for other targets than ``target``."""
    for flag in options.given_flags(**values):
        raise UsageError(f"{flag} has an effect only for {target}", action=f"remove {flag}")
