"""Commands on shards, the two stages, and evaluation and export of students."""

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
class IndexFlags:
    """Flags for the data set of a manifest."""

    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the data set; default: from the shards."),
    ] = None
    num_classes: Annotated[
        int | None,
        options.count("Number of classes; default: from the class names.", most=65535),
    ] = None
    split: options.Split = None


@dataclass(frozen=True)
class EvaluateFlags:
    """Flags of ``evaluate``."""

    split: options.Split = None
    batch_size: options.BatchSize = None
    workers: Annotated[int | None, options.flag("--workers")] = None
    device: options.Device = None
    crop_pct: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=1.0,
            help="Side of the central crop relative to the resized image's shorter side; default: "
            "the training run's.",
        ),
    ] = None
    accept_classes: options.AcceptClasses = False


@app.command(example="make-shards imagenet/train shards/train --shard-size 1252")
def make_shards(
    image_folder: Annotated[
        Path,
        typer.Argument(metavar="IMAGE_FOLDER", help="A folder with one subfolder per class."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty folder.")],
    shard_size: Annotated[int, options.count("Samples per shard.")] = 1000,
    seed: Annotated[int, options.count("Random seed of the shuffle.", least=0)] = 0,
    split: Annotated[
        str, typer.Option(metavar="NAME", help="Name of the split in file names and _info.json.")
    ] = "train",
) -> options.Outcome:
    """Pack an ImageFolder tree into webdataset shards, with unchanged image bytes."""
    from cskd_pipeline.tools import make_shards as packing

    return packing.make_shards(image_folder, out, shard_size=shard_size, seed=seed, split=split)


@app.command(example="index 'shards/train-*.tar' --out manifest.json")
def index(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help=options.SHARDS_HELP)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The manifest to write.")],
    flags: IndexFlags,
    terminal: Terminal,
    check_images: Annotated[
        bool,
        typer.Option(
            "--check-images",
            help="Decode every image first; if any is corrupt, list these and write nothing.",
        ),
    ] = False,
    workers: Annotated[
        int | None,
        options.flag("--workers", help="Processes for --check-images; -1: all cores but one."),
    ] = None,
) -> options.Outcome:
    """Write the manifest of shards: counts, order of keys, SHA-256, class names.

    Remote shards are not downloaded: only headers are read, and the SHA-256 is the store's, if any.
    """
    options.require_companion("--check-images", check_images, workers=workers)
    from cskd_pipeline.data.describe import index_shards
    from cskd_pipeline.runtime.device import worker_count

    decoders = worker_count(-1 if workers is None else workers) if check_images else None
    try:
        dataset = index_shards(shards, **vars(flags), decoders=decoders)
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
    example="dump-teacher --recipe paper_regnety_160 "
    "--shards 'imagenet1k-train-{0000..1023}.tar' --cache cache",
)
def dump_teacher(
    load: RecipeLoader[DumpRecipe],
    shard_range: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO",
            help="Dump only shards FROM to TO - 1, counted from 0, for cache merge. Machines that "
            "share the cache's folder do not need this.",
        ),
    ] = None,
    view_range: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO", help="Dump only views FROM to TO - 1 of --views: complete blocks."
        ),
    ] = None,
    accept_versions: options.AcceptVersions = False,
    accept_classes: options.AcceptClasses = False,
) -> options.Outcome:
    """Run the teacher over augmented views and cache its logits: stage one.

    After an interruption, run the same command again: finished units are kept. To share the work,
    run it at the same time on machines that share the cache's folder.

    For a teacher of your own, pass --teacher package.module:factory. The factory takes num_classes
    or nothing (and --set teacher.kwargs={...}). It returns a torch module whose forward ends in
    global average pooling and a linear layer, or which has forward_features, returning
    (B, C, h, w), and forward_head, which averages them before anything else. Set the mean and std
    of its images with --mean and --std, or in a dict pretrained_cfg on the module. With ResNet18 in
    my_resnet.py:

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
    example="train --recipe paper_tiny_cskd "
    "--shards 'imagenet1k-train-{0000..1023}.tar' --cache cache --out runs/tiny",
)
def train(
    load: RecipeLoader[TrainRecipe],
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume the run in --out, mid-epoch if necessary."),
    ] = False,
) -> options.Outcome:
    """Train a ViT on shards joined to a cache: stage two. No teacher is loaded."""
    recipe = load()
    cache = " --cache" if recipe.distill.method != "none" else ""
    load.require(recipe, "--shards --out" + cache)
    from cskd_pipeline.pipeline import train as stage_two
    from cskd_pipeline.runtime.distributed import ranks_from_env

    summary = stage_two.train(recipe, resume=resume)
    return summary if ranks_from_env().first else None


@app.command(example="evaluate runs/tiny --shards 'shards/validation-*.tar'")
def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A student's .safetensors file, or the folder of a run or an export.",
        ),
    ],
    shards: options.RequiredShards,
    flags: EvaluateFlags,
) -> options.Outcome:
    """Evaluate a student on shards: top-1 and top-5 of each head and of their mean."""
    from cskd_pipeline.pipeline import evaluate as evaluation

    given = options.without_none(**vars(flags))
    return evaluation.evaluate(checkpoint, shards, evaluation.EvalOptions(**given))


class ExportFormat(StrEnum):
    """The formats of an exported student."""

    TIMM = "timm"
    ONNX = "onnx"


@app.command(example="export runs/tiny --out tiny-for-all --format timm --format onnx")
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A student's .safetensors file, or the folder of a run."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new or empty folder.")],
    format_: Annotated[
        list[ExportFormat] | None,
        typer.Option(
            "--format",
            help="timm: config.json and model.safetensors, which timm loads from a folder or the "
            "hub. onnx: model.onnx, including normalisation and the mean of the heads. "
            "Repeatable; default: timm.",
        ),
    ] = None,
    heads: Annotated[
        bool, typer.Option("--heads", help="Also output each head's logits from the ONNX model.")
    ] = False,
) -> options.Outcome:
    """Export a student for use without this package: for timm and the hub, or as ONNX.

    The folder's README describes how it was trained and how to compute its logits.
    """
    formats = tuple(dict.fromkeys(format_ or (ExportFormat.TIMM,)))
    if heads and ExportFormat.ONNX not in formats:
        raise UsageError("--heads has no effect without ONNX", action="add --format onnx")
    from cskd_pipeline.tools import export_student as exporting

    return exporting.export_student(checkpoint, out, formats=formats, each_head=heads)
