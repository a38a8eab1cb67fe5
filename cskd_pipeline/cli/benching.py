"""``bench``: what things cost and how fast they are, measured here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cskd_pipeline.cli.options import (
    ENCODING_NAMES,
    BatchSize,
    CacheOption,
    Device,
    Json,
    Outcome,
    Quiet,
    RecipeFile,
    Sets,
    ShardsOption,
    Split,
    TeacherName,
    UpdateSize,
    Weights,
    Workers,
    complete_encoding,
    require,
    require_encodings,
)
from cskd_pipeline.cli.root import bench_app
from cskd_pipeline.config import DumpRecipe, TrainRecipe, load_recipe
from cskd_pipeline.errors import UsageError
from cskd_pipeline.runtime.console import Terminal


@bench_app.command(epilog="Example: cskd-pipeline bench encodings cache --plot encodings.svg")
def encodings(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CACHE_OR_TEACHER",
            help="A cache (a folder, or its URL) with the encoding dense, or a CNN's timm name "
            "(then with --shards).",
        ),
    ],
    shards: ShardsOption = None,
    weights: Weights = None,
    views: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many views to measure on.")
    ] = 256,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg|FILE.png", help="Draw distortion against bytes."),
    ] = None,
    encoding: Annotated[
        list[str] | None,
        typer.Option(
            metavar=ENCODING_NAMES,
            autocompletion=complete_encoding,
            help="Only these; more than once for several.",
        ),
    ] = None,
    split: Split = None,
    workers: Workers = None,
    device: Device = None,
    recipe: RecipeFile = None,
    set_: Sets = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Bytes, times and distortion of every encoding, on real answers of a teacher."""
    terminal = Terminal.listening(quiet=quiet, json=json)
    flags = {
        "data.shards": shards,
        "data.split": split,
        "teacher.weights": weights,
        "dump.workers": workers,
        "dump.device": device,
    }
    require_encodings(encoding or ())
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise UsageError(
            "the plot is an SVG or a PNG",
            found=str(plot),
            expected="a name that ends in .svg or .png",
        )
    is_cache = "://" in source or Path(source).is_dir()
    asked = load_recipe(
        DumpRecipe, recipe, set_ or (), flags | ({} if is_cache else {"teacher.name": source})
    )
    if not is_cache:
        require({"--shards SHARDS (or a cache's folder)": asked.data.shards})
    from cskd_pipeline.runtime.device import pick_device
    from cskd_pipeline.tools.bench.bench_encodings import bench_encodings, show
    from cskd_pipeline.tools.bench.responses import from_cache, from_teacher

    answers = from_cache(source, views) if is_cache else from_teacher(asked, views)
    report = bench_encodings(answers, device=pick_device(asked.dump.device), names=encoding or ())
    show(report, terminal)
    if plot is not None:
        from cskd_pipeline.tools.bench.plot import scatter, title
        from cskd_pipeline.tools.report.plot_files import write_plot

        write_plot(scatter(report), plot, title(report))
        terminal.line(f"plot: {plot}")
    return report if json else None


@bench_app.command(epilog="Example: cskd-pipeline bench loader --shards 'train-*.tar'")
def loader(
    shards: ShardsOption = None,
    size: Annotated[int, typer.Option(min=8, metavar="N", help="Of the views, in pixels.")] = 224,
    batch_size: BatchSize = None,
    rounds: Annotated[
        int, typer.Option(min=3, metavar="N", help="How often each side takes its turn.")
    ] = 9,
    split: Split = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """This loader against timm's, on the same tars and policy: images a second on one core."""
    terminal = Terminal.listening(quiet=quiet, json=json)
    require({"--shards SHARDS": shards or ""})
    assert shards is not None
    from cskd_pipeline.data.index import load_dataset
    from cskd_pipeline.tools.bench import bench_loader as bench

    dataset = load_dataset(shards, split=split)
    report = bench.bench_loader(dataset, size=size, batch_size=batch_size or 64, rounds=rounds)
    bench.show(report, terminal)
    return report if json else None


@bench_app.command(
    epilog="Example: cskd-pipeline bench join --shards 'train-*.tar' --cache cache --simulate"
)
def join(
    shards: ShardsOption = None,
    cache: CacheOption = None,
    rounds: Annotated[
        int, typer.Option(min=3, metavar="N", help="How often both sides take their turn.")
    ] = 9,
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate", help="Also, or only, open caches of ImageNet's shape, and plan an epoch."
        ),
    ] = False,
    batch_size: UpdateSize = None,
    split: Split = None,
    recipe: RecipeFile = None,
    set_: Sets = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """The loader with the join from a cache against the loader without any; and at scale."""
    terminal = Terminal.listening(quiet=quiet, json=json)
    flags = {
        "data.shards": shards,
        "data.cache": cache,
        "data.split": split,
        "batch.batch_size": batch_size,
    }
    asked = load_recipe(TrainRecipe, recipe, set_ or (), flags)
    if not simulate or asked.data.shards or asked.data.cache:
        require({"--shards SHARDS": asked.data.shards, "--cache DIR": asked.data.cache})
    from cskd_pipeline.tools.bench import bench_join as bench

    report = bench.bench_join(asked, rounds=rounds) if asked.data.shards else {}
    if simulate:
        report["simulation"] = bench.simulate()
    bench.show(report, terminal)
    return report if json else None


@bench_app.command(
    epilog="Example: cskd-pipeline bench step --student deit_tiny_distilled_patch16_224 "
    "--teacher regnety_160"
)
def step(
    student: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A ViT's timm name; more than once for several. Default: DeiT's three on a GPU, "
            "its smallest elsewhere.",
        ),
    ] = None,
    teacher: Annotated[
        str,
        typer.Option(metavar="NAME", help="The live teacher's timm name; none: without that side."),
    ] = "regnety_160",
    size: Annotated[int, typer.Option(min=8, metavar="N", help="Of the views, in pixels.")] = 224,
    rounds: Annotated[
        int, typer.Option(min=3, metavar="N", help="How often each side takes its turn.")
    ] = 9,
    batch_size: UpdateSize = None,
    device: Device = None,
    recipe: RecipeFile = None,
    set_: Sets = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """A training step from a cache against a plain one, and against one with a live teacher."""
    terminal = Terminal.listening(quiet=quiet, json=json)
    flags = {"batch.batch_size": batch_size, "run.device": device}
    asked = load_recipe(TrainRecipe, recipe, set_ or (), flags)
    from dataclasses import replace

    from cskd_pipeline.runtime.device import pick_device
    from cskd_pipeline.tools.bench import bench_step as bench
    from cskd_pipeline.views.policy import ViewPolicy

    asked = replace(asked, views=replace(asked.views or ViewPolicy(), size=size))
    known = list(bench.LIVE_GOALS)
    gpu = pick_device(asked.run.device).type == "cuda"
    report = bench.bench_step(
        asked,
        students=student or (known if gpu else known[:1]),
        teacher=None if teacher == "none" else teacher,
        rounds=rounds,
    )
    bench.show(report, terminal)
    return report if json else None


@bench_app.command(
    epilog="Example: cskd-pipeline bench dump --shards 'train-*.tar' --recipe paper_regnety_160"
)
def dump(
    shards: ShardsOption = None,
    teacher: TeacherName = None,
    weights: Weights = None,
    size: Annotated[
        int | None, typer.Option(min=8, metavar="N", help="Of the views, in pixels.")
    ] = None,
    images: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many images to dump in each round.")
    ] = 128,
    rounds: Annotated[
        int, typer.Option(min=3, metavar="N", help="How often each side takes its turn.")
    ] = 5,
    variants: Annotated[
        bool,
        typer.Option(
            "--variants",
            help="Also the teacher in channels_last and lower precision, with the labels that "
            "they change.",
        ),
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="With --variants: torch.compile too.")
    ] = False,
    split: Split = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    device: Device = None,
    recipe: RecipeFile = None,
    set_: Sets = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """The dump against the bare teacher, blocks of views against single ones, and the limit."""
    terminal = Terminal.listening(quiet=quiet, json=json)
    flags = {
        "data.shards": shards,
        "data.split": split,
        "teacher.name": teacher,
        "teacher.weights": weights,
        "views.size": size,
        "dump.batch_size": batch_size,
        "dump.workers": workers,
        "dump.device": device,
    }
    asked = load_recipe(DumpRecipe, recipe, set_ or (), flags)
    require({"--shards SHARDS": asked.data.shards, "--teacher NAME": asked.teacher.name})
    if compile and not variants:
        raise UsageError("--compile does nothing alone", action="give --variants too")
    from cskd_pipeline.tools.bench import bench_dump as bench

    report = bench.bench_dump(
        asked,
        images=images,
        rounds=rounds,
        with_variants=variants,
        compile=compile,
    )
    bench.show(report, terminal)
    return report if json else None
