"""Shards, the two stages, and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cskd_pipeline.cli.options import (
    ENCODING_NAMES,
    SHARDS_HELP,
    AcceptClasses,
    AcceptVersions,
    BatchSize,
    CacheOption,
    Device,
    Epochs,
    Json,
    Mean,
    Method,
    Outcome,
    Quiet,
    RecipeFile,
    Sets,
    ShardsOption,
    Split,
    Std,
    StudentName,
    TeacherName,
    UpdateSize,
    Weights,
    Workers,
    complete_encoding,
    parse_channels,
    parse_range,
    path_text,
    require,
    require_companion,
    require_encodings,
)
from cskd_pipeline.cli.root import app
from cskd_pipeline.config import DumpRecipe, TrainRecipe, load_recipe
from cskd_pipeline.runtime.console import Terminal


@app.command(
    epilog="Example: cskd-pipeline make-shards imagenet/train shards/train --shard-size 1252"
)
def make_shards(
    image_folder: Annotated[
        Path, typer.Argument(metavar="IMAGE_FOLDER", help="A tree with one folder per class.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="An empty or new folder.")],
    shard_size: Annotated[int, typer.Option(min=1, metavar="N", help="Samples in a shard.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the shuffle.")] = 0,
    split: Annotated[
        str, typer.Option(metavar="NAME", help="What the shards and _info.json call this part.")
    ] = "train",
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Pack an ImageFolder tree into webdataset shards, image bytes untouched."""
    Terminal.listening(quiet=quiet, json=json)
    from cskd_pipeline.tools import make_shards as make

    return make.make_shards(
        image_folder,
        out,
        shard_size=shard_size,
        seed=seed,
        split=split,
    )


@app.command(epilog="Example: cskd-pipeline index 'shards/train-*.tar' --out manifest.json")
def index(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help=SHARDS_HELP)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The manifest to write.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the data set; default: from the shards.")
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(min=1, max=65535, metavar="N", help="Default: from the class names."),
    ] = None,
    split: Split = None,
    check_images: Annotated[
        bool,
        typer.Option(
            "--check-images",
            help="Decode every image first; list all that cannot be, and write nothing then.",
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=-1, metavar="N", help="Processes for --check-images; -1: one a core but one."
        ),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Read shards once and write their manifest: counts, order of keys, SHA-256, class names."""
    Terminal.listening(quiet=quiet, json=json)
    require_companion("--check-images", check_images or None, {"--workers": workers})
    from cskd_pipeline.data import index as indexing

    def check(dataset: indexing.Dataset) -> None:
        from cskd_pipeline.data.corrupt import require_images
        from cskd_pipeline.runtime.device import worker_count

        count = worker_count(-1 if workers is None else workers)
        require_images(dataset, workers=count)

    dataset = indexing.index_shards(
        shards,
        name=name,
        num_classes=num_classes,
        split=split,
        check=check if check_images else None,
    )
    dataset.save(out)
    return {
        "manifest": out,
        "name": dataset.name,
        "shards": len(dataset.shards),
        "samples": dataset.samples,
        "classes": dataset.num_classes,
        "bytes": sum(shard.bytes for shard in dataset.shards),
    }


@app.command(
    epilog="Example: cskd-pipeline dump-teacher --recipe paper_regnety_160 "
    "--shards 'imagenet1k-train-{0000..1023}.tar' --cache cache"
)
def dump_teacher(
    shards: ShardsOption = None,
    teacher: TeacherName = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The cache to make, to go on with, or to extend by more views."
        ),
    ] = None,
    weights: Weights = None,
    mean: Mean = None,
    std: Std = None,
    encoding: Annotated[
        list[str] | None,
        typer.Option(
            metavar=ENCODING_NAMES,
            autocompletion=complete_encoding,
            help="What to store: dense serves every loss; envelope hard ones, exactly, in 1/400 of "
            "the bytes; dense-q8 and topk soft ones, nearly. May be given more than once.",
        ),
    ] = None,
    views: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Augmented views of every image.")
    ] = None,
    split: Split = None,
    shard_range: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO",
            help="Only the shards FROM up to, not including, TO, counted from 0: several machines "
            "can fill one cache, or caches of their own for cache merge.",
        ),
    ] = None,
    view_range: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO", help="Only these of all the --views, in the same way: whole blocks."
        ),
    ] = None,
    accept_versions: AcceptVersions = False,
    accept_classes: AcceptClasses = False,
    batch_size: BatchSize = None,
    workers: Workers = None,
    device: Device = None,
    recipe: RecipeFile = None,
    set_: Sets = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Stage one: run the teacher over augmented views and store its answers in a cache.

    Run the same command again after an interruption: finished units are kept.

    A teacher of your own is --teacher package.module:factory. The factory takes num_classes or
    nothing (and --set teacher.kwargs={...}) and returns a torch module whose forward ends in global
    average pooling and a linear layer, or which has forward_features, giving (B, C, h, w), and
    forward_head, which averages that before anything else. The mean and std of its images are
    --mean and --std, or in a dict pretrained_cfg on the module. With ResNet18 in my_resnet.py:

    \b
    PYTHONPATH=. cskd-pipeline dump-teacher --teacher my_resnet:ResNet18
        --weights cifar10.pth --mean 0.491,0.482,0.447 --std 0.247,0.244,0.262
        --set views.size=32 --shards 'train-*.tar' --cache cache
    """
    Terminal.listening(quiet=quiet, json=json)
    flags = {
        "data.shards": shards,
        "data.split": split,
        "teacher.name": teacher,
        "teacher.weights": weights,
        "teacher.mean": parse_channels(mean, "--mean"),
        "teacher.std": parse_channels(std, "--std"),
        "cache.path": path_text(cache),
        "cache.encodings": tuple(encoding) if encoding else None,
        "cache.views": views,
        "dump.batch_size": batch_size,
        "dump.workers": workers,
        "dump.device": device,
    }
    asked = load_recipe(DumpRecipe, recipe, set_ or (), flags)
    require(
        {
            "--shards SHARDS": asked.data.shards,
            "--teacher NAME": asked.teacher.name,
            "--cache DIR": asked.cache.path,
        }
    )
    shard_numbers = None if shard_range is None else parse_range(shard_range, "--shard-range")
    view_numbers = None if view_range is None else parse_range(view_range, "--view-range")
    require_encodings(asked.cache.encodings)
    from cskd_pipeline.pipeline import dump
    from cskd_pipeline.runtime.distributed import launched

    summary = dump.dump_teacher(
        asked,
        shard_range=shard_numbers,
        view_range=view_numbers,
        accept_versions=accept_versions,
        accept_classes=accept_classes,
    )
    return summary if launched().first else None


@app.command(
    epilog="Example: cskd-pipeline train --recipe paper_tiny_cskd "
    "--shards 'imagenet1k-train-{0000..1023}.tar' --cache cache --out runs/tiny"
)
def train(
    shards: ShardsOption = None,
    cache: CacheOption = None,
    student: StudentName = None,
    method: Method = None,
    epochs: Epochs = None,
    val_shards: Annotated[
        str | None,
        typer.Option(metavar="SHARDS", help="Shards to evaluate on; without, none is done."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run's folder: checkpoints, summary.csv, its recipe."),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Fine-tune a student: its .safetensors file, a run's folder, or an exported one; "
            "or a .pth file of the same timm model.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, mid-epoch if need be.")
    ] = False,
    wandb: Annotated[
        str | None,
        typer.Option(metavar="PROJECT", help="Curves on Weights & Biases too (extra: wandb)."),
    ] = None,
    split: Split = None,
    val_split: Split = None,
    batch_size: UpdateSize = None,
    workers: Workers = None,
    device: Device = None,
    recipe: RecipeFile = None,
    set_: Sets = None,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Stage two: train a ViT from shards joined to a cache. No teacher is loaded."""
    Terminal.listening(quiet=quiet, json=json)
    flags = {
        "data.shards": shards,
        "data.val_shards": val_shards,
        "data.cache": cache,
        "data.split": split,
        "data.val_split": val_split,
        "student.name": student,
        "student.init_from": path_text(init_from),
        "distill.method": method,
        "schedule.epochs": epochs,
        "batch.batch_size": batch_size,
        "run.out": path_text(out),
        "run.wandb": wandb,
        "run.workers": workers,
        "run.device": device,
    }
    asked = load_recipe(TrainRecipe, recipe, set_ or (), flags)
    needed = {"--shards SHARDS": asked.data.shards, "--out DIR": asked.run.out}
    if asked.distill.method != "none":
        needed["--cache DIR"] = asked.data.cache
    require(needed)
    from cskd_pipeline.pipeline import train as stage_two
    from cskd_pipeline.runtime.distributed import launched

    summary = stage_two.train(asked, resume=resume)
    return summary if launched().first else None


@app.command(epilog="Example: cskd-pipeline evaluate runs/tiny --shards 'shards/validation-*.tar'")
def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A student's .safetensors file, a run's folder, or an exported one.",
        ),
    ],
    shards: Annotated[str, typer.Option("--shards", metavar="SHARDS", help=SHARDS_HELP)],
    split: Split = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=1.0,
            help="The central crop's side in units of the resized image's shorter side; the "
            "training run's unless given.",
        ),
    ] = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    device: Device = None,
    accept_classes: AcceptClasses = False,
    quiet: Quiet = False,
    json: Json = False,
) -> Outcome:
    """Measure a student on shards: top-1 and top-5 of each head and of their mean."""
    Terminal.listening(quiet=quiet, json=json)
    from cskd_pipeline.pipeline import evaluate as measuring

    return measuring.evaluate(
        checkpoint,
        shards,
        split=split or "",
        crop_pct=crop_pct,
        batch_size=batch_size or 256,
        workers=-1 if workers is None else workers,
        device=device or "auto",
        accept_classes=accept_classes,
    )
