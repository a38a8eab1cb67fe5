"""Shards, the two stages, and what is made of a student: figures, and files for others."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cskd_pipeline.cli import options
from cskd_pipeline.cli.parameters import RecipeLoader
from cskd_pipeline.cli.root import app
from cskd_pipeline.config.sections import DumpRecipe, TrainRecipe
from cskd_pipeline.errors import ImageError, UsageError
from cskd_pipeline.runtime.console import Terminal


@dataclass(frozen=True)
class NamedData:
    """Say what a manifest calls the data set."""

    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the data set; default: from the shards.")
    ] = None
    num_classes: Annotated[
        int | None, options.count("Default: from the class names.", most=65535)
    ] = None
    split: options.Split = None


@dataclass(frozen=True)
class Evaluation:
    """Hold the flags of ``evaluate``."""

    split: options.Split = None
    batch_size: options.BatchSize = None
    workers: Annotated[int | None, options.flag("--workers")] = None
    device: options.Device = None
    crop_pct: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=1.0,
            help="The central crop's side in units of the resized image's shorter side; the "
            "training run's unless given.",
        ),
    ] = None
    accept_classes: options.AcceptClasses = False


@app.command(
    epilog="Example: cskd-pipeline make-shards imagenet/train shards/train --shard-size 1252"
)
def make_shards(
    image_folder: Annotated[
        Path, typer.Argument(metavar="IMAGE_FOLDER", help="A tree with one folder per class.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="An empty or new folder.")],
    shard_size: Annotated[int, options.count("Samples in a shard.")] = 1000,
    seed: Annotated[int, options.count("Of the shuffle.", least=0)] = 0,
    split: Annotated[
        str, typer.Option(metavar="NAME", help="What the shards and _info.json call this part.")
    ] = "train",
) -> options.Outcome:
    """Pack an ImageFolder tree into webdataset shards, image bytes untouched."""
    from cskd_pipeline.tools import make_shards as make

    return make.make_shards(image_folder, out, shard_size=shard_size, seed=seed, split=split)


@app.command(epilog="Example: cskd-pipeline index 'shards/train-*.tar' --out manifest.json")
def index(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help=options.SHARDS_HELP)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The manifest to write.")],
    named: NamedData,
    terminal: Terminal,
    check_images: Annotated[
        bool,
        typer.Option(
            "--check-images",
            help="Decode every image first; list all that cannot be, and write nothing then.",
        ),
    ] = False,
    workers: Annotated[
        int | None,
        options.flag(
            "--workers", help="Processes for --check-images; -1: one for each core but one."
        ),
    ] = None,
) -> options.Outcome:
    """Read shards once and write their manifest: counts, order of keys, SHA-256, class names.

    Of shards at a URL only headers are read; SHA-256 where the store states it.
    """
    options.require_companion("--check-images", check_images or None, {"--workers": workers})
    from cskd_pipeline.data.describe import index_shards
    from cskd_pipeline.runtime.device import worker_count

    decoders = worker_count(-1 if workers is None else workers) if check_images else None
    try:
        dataset = index_shards(shards, **vars(named), decoders=decoders)
    except ImageError as error:
        report: Any = error.report or {}
        rows = [tuple(row.values()) for row in report.get("corrupt", ())]
        if rows:
            terminal.table("images that cannot be decoded", ("shard", "key", "found"), rows)
        raise
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
    flags="--shards --teacher --cache --weights --mean --std --encoding --views --split "
    "--batch-size --workers --device",
    epilog="Example: cskd-pipeline dump-teacher --recipe paper_regnety_160 "
    "--shards 'imagenet1k-train-{0000..1023}.tar' --cache cache",
)
def dump_teacher(
    load: RecipeLoader[DumpRecipe],
    shard_range: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO",
            help="Only the shards FROM up to, not including, TO, counted from 0: for caches of "
            "parts, which cache merge joins. Machines that share a cache's folder need none.",
        ),
    ] = None,
    view_range: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO", help="Only these of all the --views, in the same way: whole blocks."
        ),
    ] = None,
    accept_versions: options.AcceptVersions = False,
    accept_classes: options.AcceptClasses = False,
) -> options.Outcome:
    """Run the teacher over augmented views and store its logits in a cache: stage one.

    Run the same command again after an interruption: finished units are kept. Run it several times
    at once, on machines that share the cache's folder, to share the work.

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
    recipe = load()
    load.require(recipe, "--shards --teacher --cache")
    shards = options.parse_range(shard_range, "--shard-range")
    views = options.parse_range(view_range, "--view-range")
    options.require_encodings(recipe.cache.encodings)
    from cskd_pipeline.pipeline import dump
    from cskd_pipeline.runtime.distributed import ranks_from_env

    summary = dump.dump_teacher(
        recipe,
        shard_range=shards,
        view_range=views,
        accept_versions=accept_versions,
        accept_classes=accept_classes,
    )
    return summary if ranks_from_env().first else None


@app.command(
    flags="--shards --cache --student --method --epochs --val-shards --out --init-from --fork-from "
    "--wandb --split --val-split --batch-size --workers --device",
    epilog="Example: cskd-pipeline train --recipe paper_tiny_cskd "
    "--shards 'imagenet1k-train-{0000..1023}.tar' --cache cache --out runs/tiny",
)
def train(
    load: RecipeLoader[TrainRecipe],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out, mid-epoch if need be.")
    ] = False,
) -> options.Outcome:
    """Train a ViT from shards joined to a cache: stage two. No teacher is loaded."""
    recipe = load()
    cache = " --cache" if recipe.distill.method != "none" else ""
    load.require(recipe, "--shards --out" + cache)
    from cskd_pipeline.pipeline import train as stage_two
    from cskd_pipeline.runtime.distributed import ranks_from_env

    summary = stage_two.train(recipe, resume=resume)
    return summary if ranks_from_env().first else None


@app.command(epilog="Example: cskd-pipeline evaluate runs/tiny --shards 'shards/validation-*.tar'")
def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A student's .safetensors file, a run's folder, or an exported one.",
        ),
    ],
    shards: options.RequiredShards,
    flags: Evaluation,
) -> options.Outcome:
    """Measure a student on shards: top-1 and top-5 of each head and of their mean."""
    from cskd_pipeline.pipeline import evaluate as measuring

    given = options.without_none(**vars(flags))
    return measuring.evaluate(checkpoint, shards, measuring.EvalOptions(**given))


class ExportFormat(StrEnum):
    """Name what a student is exported as."""

    TIMM = "timm"
    ONNX = "onnx"


@app.command(
    epilog="Example: cskd-pipeline export runs/tiny --out tiny-for-all --format timm --format onnx"
)
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A student's .safetensors file, or a run's folder."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="An empty or new folder.")],
    format_: Annotated[
        list[ExportFormat] | None,
        typer.Option(
            "--format",
            help="timm: config.json and model.safetensors, which timm loads from the folder or the "
            "hub. onnx: model.onnx, the normalisation and the mean of the heads inside. May be "
            "given more than once; timm unless given.",
        ),
    ] = None,
    heads: Annotated[
        bool, typer.Option("--heads", help="The ONNX model also gives every head's own logits.")
    ] = False,
) -> options.Outcome:
    """Write a student for those without this package: for timm and the hub, or as ONNX.

    A README beside it says how it was trained and how to get its logits.
    """
    formats = tuple(dict.fromkeys(format_ or (ExportFormat.TIMM,)))
    if heads and ExportFormat.ONNX not in formats:
        raise UsageError("--heads does nothing alone", action="give --format onnx too")
    from cskd_pipeline.tools import export_student as exporting

    return exporting.export_student(checkpoint, out, formats=formats, each_head=heads)
