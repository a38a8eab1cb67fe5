"""``demo``: the whole pipeline through its own commands, on small images, in minutes.

Images, shards, a CNN trained as the teacher, its cache, and one ViT trained from it in three ways.
Every number in the table is measured by the run that prints it.
"""

import logging
import time
from pathlib import Path
from typing import Any

from cskd_pipeline.runtime.atomic import require_empty, write_json
from cskd_pipeline.tools.commands import Command, with_logging
from cskd_pipeline.tools.tables import Printed, Table

log = logging.getLogger(__name__)

TRAIN_IMAGES = 2400
VALIDATION_IMAGES = 800
METHODS = ("none", "deit", "cskd")


def run_demo(out: Path, command: Command, seed: int = 0) -> dict[str, Any]:
    """Run every stage in subfolders of ``out``.

    Args:
        command: runs ``cskd-pipeline`` with the given arguments and returns its summary.
        seed: random seed for images, views, weights and order.

    Returns:
        The report, also written to ``out/demo.json``.
    """
    from cskd_pipeline.tools.demo_images import write_digit_folders

    started = time.perf_counter()
    require_empty(out, action="choose another folder: cskd-pipeline demo --out DIR")
    images, shards = out / "images", out / "shards"
    log.info(f"writing {TRAIN_IMAGES + VALIDATION_IMAGES} images of handwritten digits")
    write_digit_folders(images, train=TRAIN_IMAGES, validation=VALIDATION_IMAGES, seed=seed)

    call = with_logging(command)
    train, validation = shards / "train", shards / "validation"
    for folder in (train, validation):
        call("make-shards", images / folder.name, folder, "--shard-size", "400")
    data = ("--shards", train, "--val-shards", validation, "--set", f"run.seed={seed}")

    def train_and_evaluate(name: str, run: Path, *source: str | Path) -> dict[str, Any]:
        summary = call("train", "--recipe", f"demo_{name}", *data, *source, "--out", run)
        measured = call("evaluate", run / "best.safetensors", "--shards", validation)
        return {
            "name": name,
            "model": measured["model"],
            "top1": measured["top1"],
            "seconds": summary["seconds"],
            "out": summary["out"],
        }

    rows, cache = [train_and_evaluate("teacher", out / "teacher")], out / "cache"
    dump = call(
        *("dump-teacher", "--recipe", "demo", "--shards", train, "--cache", cache),
        *("--weights", out / "teacher/best.safetensors", "--set", f"cache.root_seed={seed}"),
    )
    runs = {method: out / f"student_{method}" for method in METHODS}
    for method, run in runs.items():
        source = () if method == "none" else ("--cache", cache)
        rows.append(train_and_evaluate(method, run, *source))
    page = call("show", *runs.values(), "--shards", train, "--cache", cache, "--out", out / "page")
    report = {
        "out": str(out),
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "models": rows,
        "cache_bytes_per_view": dump["bytes_per_view"],
        "cache": str(cache),
        "page": page["page"],
    }
    write_json(out / "demo.json", report)
    return report


def printed(report: dict[str, Any]) -> Printed:
    """Yield a table of the models, and the paths of the results."""
    yield Table(
        "Measured in this run",
        ("model", "trained with", "top-1 %", "seconds", "folder"),
        [
            (
                row["model"],
                "labels (the teacher)" if row["name"] == "teacher" else row["name"],
                f"{row['top1']:.1f}",
                round(row["seconds"]),
                row["out"],
            )
            for row in report["models"]
        ],
    )
    for encoding, size in report["cache_bytes_per_view"].items():
        yield f"cache, {encoding}: {size:.0f} bytes per view"
    yield f"cache: {report['cache']}"
    yield f"curves and labels at every location: {report['page']}"
    yield f"took {report['seconds']:.0f} s; results in {report['out']}"
