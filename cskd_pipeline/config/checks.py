"""Which values make sense: closed choices, ranges, and fields that contradict each other."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from cskd_pipeline.config.sections import DumpRecipe, TrainRecipe
from cskd_pipeline.config.values import shown
from cskd_pipeline.errors import RecipeError

# Encodings, models, devices and optimizers are open sets: whoever owns them checks their names.
CHOICES = {
    "teacher.precision": ("float32", "bfloat16", "float16"),
    "data.missing": ("error", "skip"),
    "data.drift": ("error", "warn", "skip"),
    "data.classes": ("error", "accept"),
    "data.corrupt": ("error", "skip"),
    "distill.method": ("none", "deit", "cskd"),
    "distill.global_kind": ("hard", "soft"),
    "distill.spatial_kind": ("hard", "soft"),
    "distill.scaling": ("reference", "mean"),
    "distill.schedule": ("linear", "x2", "cos", "spatial", "global"),
    "distill.step": ("epoch", "update"),
    "eval.interpolation": ("auto", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
    "run.amp": ("off", "bf16", "fp16"),
}

# Intervals as mathematicians write them; every number of a recipe has one. Seeds are 64-bit keys.
RANGES = {
    "data.num_classes": "[0, 65535]",
    "data.check": "[0, inf)",
    "teacher.mean": "[0, 1]",
    "teacher.std": "(0, 1]",
    "teacher.seed": "[0, 2**63)",
    "cache.views": "[1, 1000000]",
    "cache.view_block": "[0, 1000]",
    "cache.root_seed": "[0, 2**63)",
    "dump.batch_size": "[1, inf)",
    "dump.workers": "[-1, 1024]",
    "dump.threads": "[0, 1024]",
    "dump.rank_timeout": "[1, 604800]",
    "student.drop_path": "[0, 1)",
    "distill.alpha": "[0, 1]",
    "distill.spatial_weight": "[0, inf)",
    "distill.temperature": "(0, inf)",
    "optim.lr": "(0, inf)",
    "optim.weight_decay": "[0, inf)",
    "optim.betas": "[0, 1)",
    "optim.clip_grad": "[0, inf)",
    "optim.smoothing": "[0, 1)",
    "schedule.epochs": "[1, 1000000]",
    "schedule.warmup_epochs": "[0, 1000000]",
    "schedule.warmup_lr": "[0, inf)",
    "schedule.min_lr": "[0, inf)",
    "batch.batch_size": "[2, inf)",
    "batch.accumulation": "[1, inf)",
    "batch.repeats": "[1, 1000]",
    "batch.shuffle_shards": "[1, inf)",
    "eval.crop_pct": "[0, 1]",
    "run.seed": "[0, 2**63)",
    "run.ema": "[0, 1)",
    "run.workers": "[-1, 1024]",
    "run.threads": "[0, 1024]",
    "run.rank_timeout": "[1, 604800]",
    "run.eval_batch_size": "[1, inf)",
    "run.eval_every": "[1, inf)",
    "run.log_every": "[1, inf)",
    "run.checkpoint_every": "[0, inf)",
}


def validate(recipe: DumpRecipe | TrainRecipe) -> None:
    """Check every choice and range of a recipe, however it was made.

    Raises:
        RecipeError: with a line for each problem.
    """
    problems = [f"{path}: {text}" for path, text in check(recipe)]
    if problems:
        raise RecipeError("the recipe is not usable", problems=problems)


def check(recipe: DumpRecipe | TrainRecipe) -> Iterator[tuple[str, str]]:
    """The dotted name and the problem of every value that makes no sense."""
    for section in fields(recipe):
        values = getattr(recipe, section.name)
        for field in fields(values) if section.name != "views" else ():  # the policy checks itself
            path = f"{section.name}.{field.name}"
            yield from _check_value(path, getattr(values, field.name))
    yield from _check_dump(recipe) if isinstance(recipe, DumpRecipe) else _check_train(recipe)


def _check_value(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if path in CHOICES and value not in CHOICES[path]:
        near = difflib.get_close_matches(value, CHOICES[path], 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        yield path, f"found {shown(value)}, expected one of {', '.join(CHOICES[path])}{hint}"
    if path in RANGES:
        for number in value if isinstance(value, tuple) else (value,):
            if not _inside(number, RANGES[path]):
                yield path, f"found {shown(number)}, expected a value in {RANGES[path]}"


def _inside(number: float, interval: str) -> bool:
    low, high = map(_bound, interval[1:-1].split(", "))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)


def _bound(text: str) -> float:
    return 2**63 if text == "2**63" else float(text)


def _check_dump(recipe: DumpRecipe) -> Iterator[tuple[str, str]]:
    encodings = recipe.cache.encodings
    if not encodings or len(set(encodings)) < len(encodings):
        yield "cache.encodings", f"found {shown(encodings)}, expected one or more, each once"
    for name in ("mean", "std"):
        if len(getattr(recipe.teacher, name)) not in (0, 3):
            yield f"teacher.{name}", "expected a number for each of three channels, or none at all"
    block = recipe.cache.view_block
    if block and recipe.cache.views % block:
        yield "cache.view_block", f"found {block}, expected a divisor of cache.views"


def _check_train(recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
    if not recipe.optim.betas:
        yield "optim.betas", "found an empty array, expected at least one number"
    if 0.0 < recipe.eval.crop_pct < 0.1:  # the whole image would be resized to ten times the view
        yield "eval.crop_pct", f"found {recipe.eval.crop_pct}, expected 0, or 0.1 to 1"
    parts = recipe.batch.accumulation
    if parts > 0 and recipe.batch.batch_size % parts:
        yield "batch.accumulation", f"found {parts}, expected a divisor of batch.batch_size"
