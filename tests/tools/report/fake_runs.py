"""Fake run folders: a recipe and a log, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cskd_pipeline.config.reading import load_recipe
from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.config.writing import to_toml

HEADS = ("cls", "dist", "dense")


def rows(epochs: int, *, method: str = "cskd", shift: float = 0.0) -> list[dict[str, Any]]:
    """Return log rows as ``train`` writes them, distinct in every column, epoch and ``shift``."""
    table = []
    for epoch in range(1, epochs + 1):
        row: dict[str, Any] = {
            "epoch": epoch,
            "loss": 6.5 - 0.1 * epoch + shift,
            "base": 2.25 - 0.01 * epoch + shift,
            "global": 0.0 if method == "none" else 2.125 - 0.02 * epoch + shift,
            "spatial": 2.0625 - 0.03 * epoch + shift if method == "cskd" else 0.0,
            "ckf_ratio": 1 - (epoch - 1) / epochs,
            "lr": 0.001 / epoch + shift / 1000,
            "seconds": 10.0 + epoch + shift,
            "images_per_second": 500.5 + epoch + 10 * shift,
            "data_wait": 0.03125 + 0.001 * epoch + 0.01 * shift,
            "top1": 30.5 + epoch + shift,
            "top5": 70.5 + epoch + shift,
        }
        for number, head in enumerate(HEADS if method == "cskd" else HEADS[:2], 1):
            row[f"top1_{head}"] = 30.5 + epoch + shift - number
        row |= {"ema_top1": 31.25 + epoch + shift, "ema_top5": 71.25 + epoch + shift}
        table.append(row)
    return table


def log_text(logged: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in logged for name in row))
    lines = [",".join(columns)]
    lines += [",".join(str(row.get(name, "")) for name in columns) for row in logged]
    return "\n".join(lines) + "\n"


def make_run(
    folder: Path,
    *,
    method: str = "cskd",
    epochs: int = 4,
    logged: int | None = None,
    shift: float = 0.0,
    sets: tuple[str, ...] = (),
) -> Path:
    """Write a run of ``epochs``, of which ``logged`` (None: all) are finished."""
    folder.mkdir(parents=True)
    flags: dict[str, Any] = {
        "distill.method": method,
        "schedule.epochs": epochs,
        "schedule.warmup_epochs": 1,
        "data.shards": "shards",
        "data.cache": None if method == "none" else "cache",
        "run.out": str(folder),
    }
    recipe = load_recipe(TrainRecipe, None, sets, flags)
    (folder / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
    finished = epochs if logged is None else logged
    if finished:
        text = log_text(rows(epochs, method=method, shift=shift)[:finished])
        (folder / "summary.csv").write_text(text, encoding="utf-8")
    return folder
