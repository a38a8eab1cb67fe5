"""``bench`` and ``plan``: costs and speeds, measured or forecast."""

from pathlib import Path
from typing import Annotated

import typer

from cskd_pipeline.cli import options
from cskd_pipeline.cli.parameters import RecipeLoader
from cskd_pipeline.cli.reports import print_report
from cskd_pipeline.cli.root import bench_app, plan_app
from cskd_pipeline.config.sections import DumpRecipe, TrainRecipe
from cskd_pipeline.errors import UsageError
from cskd_pipeline.runtime.console import Terminal

Size = Annotated[int, options.flag("--size")]
Rounds = Annotated[int, options.count("Rounds; each measures all sides in turn.", least=3)]


@bench_app.command(
    flags="--shards --weights --split --workers --device",
    example="bench encodings cache --plot encodings.svg",
)
def encodings(
    terminal: Terminal,
    source: Annotated[
        str,
        typer.Argument(
            metavar="CACHE_OR_TEACHER",
            help="A cache (a folder or a URL) with the encoding dense, or a CNN's timm name, which "
            "needs --shards.",
        ),
    ],
    load: RecipeLoader[DumpRecipe],
    views: Annotated[int, options.count("Views to measure on.")] = 256,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.svg|FILE.png", help="File for a plot of distortion against bytes."
        ),
    ] = None,
    encoding: Annotated[
        list[str] | None,
        options.flag("--encoding", help="Encoding to measure; repeatable; default: all."),
    ] = None,
) -> options.Outcome:
    """Measure bytes, times and distortion of every encoding on a teacher's logits."""
    options.require_encodings(encoding or ())
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise UsageError(
            "unsupported plot format",
            found=str(plot),
            expected="a name that ends in .svg or .png",
        )
    folder = options.local_folder(source)
    is_cache = folder is None or folder.is_dir()
    recipe = load({} if is_cache else {"teacher.name": source})
    if not is_cache:
        options.require({"--shards SHARDS (or a cache's folder)": recipe.data.shards})
    from cskd_pipeline.runtime.device import pick_device
    from cskd_pipeline.tools.bench import bench_encodings as bench
    from cskd_pipeline.tools.bench.responses import from_cache, from_teacher

    responses = from_cache(source, views) if is_cache else from_teacher(recipe, views)
    device = pick_device(recipe.dump.device)
    report = bench.bench_encodings(responses, device=device, names=encoding or ())
    outcome = print_report(terminal, report, bench.printed(report))
    if plot is not None:
        bench.encodings_plot(report).write(plot)
        terminal.line(f"plot: {plot}")
    return outcome


@bench_app.command(example="bench loader --shards 'train-*.tar'")
def loader(
    terminal: Terminal,
    shards: options.RequiredShards,
    size: Size = 224,
    batch_size: options.BatchSize = None,
    rounds: Rounds = 9,
    split: options.Split = None,
) -> options.Outcome:
    """Compare images per second on one core with timm's loader, on the same tars and policy."""
    from cskd_pipeline.data.index import load_dataset
    from cskd_pipeline.tools.bench import bench_loader as bench

    dataset = load_dataset(shards, split=split)
    report = bench.bench_loader(dataset, size=size, batch_size=batch_size or 64, rounds=rounds)
    return print_report(terminal, report, bench.printed(report))


@bench_app.command(
    flags="--shards --cache --split --batch-size",
    example="bench join --shards 'train-*.tar' --cache cache --simulate",
)
def join(
    terminal: Terminal,
    load: RecipeLoader[TrainRecipe],
    rounds: Rounds = 9,
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate",
            help="Also open caches of ImageNet's shape and plan an epoch; without "
            "--shards, do only that.",
        ),
    ] = False,
) -> options.Outcome:
    """Compare the loader with and without the join to a cache, and time the join at scale."""
    recipe = load()
    if not simulate or recipe.data.shards or recipe.data.cache:
        load.require(recipe, "--shards --cache")
    from cskd_pipeline.tools.bench import bench_join as bench

    report = bench.bench_join(recipe, rounds=rounds) if recipe.data.shards else {}
    if simulate:
        report["simulation"] = bench.simulate()
    return print_report(terminal, report, bench.printed(report))


@bench_app.command(
    flags="--size --batch-size --device",
    example="bench step --student deit_tiny_distilled_patch16_224 --teacher regnety_160",
)
def step(
    terminal: Terminal,
    load: RecipeLoader[TrainRecipe],
    student: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A ViT's timm name; repeatable; default: the recipe's, else DeiT's three on a GPU "
            "and its smallest on a CPU.",
        ),
    ] = None,
    teacher: Annotated[
        str,
        typer.Option(metavar="NAME", help="Timm name of the live teacher; none: skip it."),
    ] = "regnety_160",
    rounds: Rounds = 9,
) -> options.Outcome:
    """Compare a training step from a cache with a plain step and one with a live teacher."""
    recipe = load()
    for name in student or ():
        load({"student.name": name})  # refuses a contradicting --set
    if not student and load.gives("student.name"):
        student = [recipe.student.name]
    from cskd_pipeline.runtime.device import pick_device
    from cskd_pipeline.tools.bench import bench_step as bench

    known = list(bench.LIVE_GOALS)
    gpu = pick_device(recipe.run.device).type == "cuda"
    report = bench.bench_step(
        recipe,
        students=student or (known if gpu else known[:1]),
        teacher=None if teacher == "none" else teacher,
        rounds=rounds,
    )
    return print_report(terminal, report, bench.printed(report))


@bench_app.command(
    flags="--shards --teacher --weights --size --split --batch-size --workers --device",
    example="bench dump --shards 'train-*.tar' --recipe paper_regnety_160",
)
def dump(
    terminal: Terminal,
    load: RecipeLoader[DumpRecipe],
    images: Annotated[int, options.count("Images to dump in each round.")] = 128,
    rounds: Rounds = 5,
    variants: Annotated[
        bool,
        typer.Option(
            "--variants",
            help="Also measure the teacher in channels_last and lower precision, and the labels "
            "that these change.",
        ),
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="With --variants, also measure torch.compile.")
    ] = False,
) -> options.Outcome:
    """Compare the dump with the bare teacher, blocks with single views; find the bottleneck."""
    recipe = load()
    load.require(recipe, "--shards --teacher")
    options.require_companion("--variants", variants, compile=compile)
    from cskd_pipeline.tools.bench import bench_dump as bench

    report = bench.bench_dump(
        recipe, images=images, rounds=rounds, with_variants=variants, compile=compile
    )
    return print_report(terminal, report, bench.printed(report))


@plan_app.command(
    name="dump",
    flags="--shards --teacher --weights --encoding --split --batch-size --workers --device",
    example="plan dump --recipe paper_regnety_160 --shards train.json "
    "--views 30 --views 300 --devices 8",
)
def plan_dump(
    terminal: Terminal,
    load: RecipeLoader[DumpRecipe],
    views: Annotated[
        list[int] | None, options.count("Number of views to forecast for; repeatable.")
    ] = None,
    devices: Annotated[
        list[int] | None, options.count("Also forecast for N such devices; repeatable.")
    ] = None,
    images: Annotated[int, options.count("Approximate number of images in the trial.")] = 256,
) -> options.Outcome:
    """Forecast bytes and time of a dump for every encoding, from a few hundred images."""
    recipe = load({"cache.views": max(views)} if views else {})
    load.require(recipe, "--shards --teacher")
    options.require_encodings(recipe.cache.encodings)
    from cskd_pipeline.tools import estimate_dump

    report = estimate_dump.plan_dump(
        recipe, views=views or (), devices=devices or (), images=images
    )
    return print_report(terminal, report, estimate_dump.printed(report))


@plan_app.command(
    name="train",
    flags="--shards --cache --student --method --epochs --split --batch-size --workers --device",
    example="plan train --recipe paper_tiny_cskd --shards train.json --cache cache",
)
def plan_train(
    terminal: Terminal,
    load: RecipeLoader[TrainRecipe],
    updates: Annotated[int, options.count("Optimizer updates in each trial.", least=2)] = 20,
) -> options.Outcome:
    """Forecast the time of a training run, and whether loader or device limits it."""
    recipe = load()
    load.require(recipe, "--shards")
    from cskd_pipeline.tools import estimate_train

    report = estimate_train.plan_train(recipe, updates=updates)
    return print_report(terminal, report, estimate_train.printed(report))
