"""Train from remote shards and a remote cache, and check that memory and descriptors do not grow.

``python -m tests.soak --steps 10000`` trains a tiny student from the command line: its shards in a
bucket, its cache behind a web server, both on loopback, a transfer broken every five seconds, and
space for copies of half of them, so that tars and units are fetched, evicted and fetched again.
Every epoch is evaluated, in separate loader processes. It prints a JSON document: for each quarter
of the time after the first epoch, median memory in MB (``rss``: resident, of the trainer and of its
largest loader process; ``own``: not backed by files, of all processes, shared pages counted once),
the peak number of open descriptors, and steps per second. It exits with code 1 if memory grew by
more than 5 % from the first quarter to the last, or descriptors by more than four.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from cskd_pipeline.pipeline.dump import dump_teacher
from cskd_pipeline.tools.make_shards import make_shards
from tests.pipeline import world
from tests.serving import BUCKET, bucket_settings, serving

Item = TypeVar("Item")

BATCH = 4
STUDENT = "{img_size=32, patch_size=4, embed_dim=16, depth=1, num_heads=1}"


def serve(root: Path, ends: Connection) -> None:
    """Run a store and a web server until the other end of the connection closes."""
    with serving(root, "s3") as store, serving(root) as web:
        ends.send((store.url, web.url))
        while not ends.poll(5):
            store.faults, web.faults = [(".tar", "truncate")], [("/0", "reset")]


@contextmanager
def served(root: Path) -> Iterator[tuple[str, str]]:
    """Run a store and a web server in a separate process; yield their endpoints."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(root, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def prepare(root: Path, per_class: int) -> None:
    """Write shards, validation shards and a cache."""
    world.draw_images(root / "images", per_class=per_class, seed=0)
    world.draw_images(root / "more", per_class=8, seed=1)
    make_shards(root / "images", root / "served/train", shard_size=16)
    make_shards(root / "more", root / "served/validation", shard_size=16, split="validation")
    dump_teacher(world.dump_recipe(root / "served/train", root / "served/cache"))


def command(root: Path, urls: tuple[str, str], epochs: int) -> list[str]:
    """Return the command line of the training run."""
    shards = ("--shards", f"s3://{BUCKET}/train", "--val-shards", f"s3://{BUCKET}/validation")
    words = [
        *("train", *shards, "--cache", f"{urls[1]}/cache", "--out", root / "run"),
        *("--student", world.STUDENT, "--method", "cskd", "--epochs", epochs),
        *("--batch-size", BATCH, "--workers", 2, "--device", "cpu"),
        *world.as_flags(world.train_sets(STUDENT)),
        *("--set", "batch.shuffle_shards=2", "--set", "run.threads=1", "--set", "run.log_every=50"),
    ]
    return [sys.executable, "-m", "cskd_pipeline", *map(str, words)]


def environment(root: Path, store: str) -> dict[str, str]:
    """Return the environment: credentials of the store, and space for copies of half the files."""
    size = sum(path.stat().st_size for path in (root / "served").rglob("*") if path.is_file())
    return os.environ | {
        **bucket_settings(store),
        **{"CSKD_CACHE_DIR": str(root / "copies"), "CSKD_CACHE_GB": str(size / 2e9)},
    }


def sample(root: int) -> dict[str, float]:
    """Return memory (MB) and descriptors of a process and its descendants."""
    parents = {}
    for entry in os.listdir("/proc"):
        with suppress(OSError):
            if entry.isdecimal():
                stat = Path(f"/proc/{entry}/stat").read_text()
                parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    tree = [root]
    for process in tree:
        tree += [child for child, parent in parents.items() if parent == process]
    usage = dict[int, tuple[float, float, int]]()  # resident, own, descriptors
    for process in tree:
        with suppress(OSError):  # the process has just ended
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
            memory = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
            files = len(os.listdir(f"/proc/{process}/fd"))
            usage[process] = memory["Rss"], memory["Pss_Anon"] + memory["Pss_Shmem"], files
    if root not in usage:
        return {}
    others = [one for process, one in usage.items() if process != root]
    return {
        "trainer_rss": usage[root][0],
        "worker_rss": max((rss for rss, _, _ in others), default=0.0),
        "all_own": sum(own for _, own, _ in usage.values()),
        "trainer_descriptors": usage[root][2],
        "worker_descriptors": max((files for *_, files in others), default=0),
    }


def quarters(values: list[Item]) -> list[list[Item]]:
    """Split ``values`` into four consecutive parts."""
    ends = [len(values) * number // 4 for number in range(5)]
    return [values[start:end] for start, end in pairwise(ends)]


def summarise(samples: list[dict[str, float]]) -> dict[str, float]:
    """Return median memory and peak descriptors."""
    return {
        name: round((max if "descriptors" in name else statistics.median)(s[name] for s in samples))
        for name in samples[0]
    }


def run(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train, sample the processes, and return the report."""
    prepare(root, options.per_class)
    steps = 4 * options.per_class // BATCH  # per epoch
    samples = []
    started = time.perf_counter()
    with served(root / "served") as urls, open(root / "log", "w") as log:
        process = subprocess.Popen(
            command(root, urls, -(-options.steps // steps)),
            env=environment(root, urls[0]),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                first_epoch_over = (root / "run/summary.csv").exists()
                if first_epoch_over and (usage := sample(process.pid)):
                    samples.append(usage)
                time.sleep(options.every)
        finally:
            process.kill()
    if process.returncode:
        raise SystemExit((root / "log").read_text())
    with open(root / "run/summary.csv") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    copies = [path for path in (root / "copies").rglob("*") if path.is_file()]
    return {
        "steps": steps * len(seconds),
        "seconds": round(time.perf_counter() - started),
        "samples": len(samples),
        "copies_mb": sum(path.stat().st_size for path in copies) / 1e6,
        "served_mb": 2e3 * float(environment(root, "")["CSKD_CACHE_GB"]),
        "quarters": [
            summarise(part) | {"steps_per_second": round(steps * len(epochs) / sum(epochs), 1)}
            for part, epochs in zip(quarters(samples), quarters(seconds), strict=True)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--per-class", type=int, default=64, help="images per class, of 4")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between samples")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(Path(folder), options)
    print(json.dumps(report, indent=2))
    first, *_, last = report["quarters"]
    grown = [
        name
        for name in first
        if ("descriptors" in name and last[name] > first[name] + 4)
        or (name.endswith(("rss", "own")) and last[name] > 1.05 * first[name])
    ]
    if grown:
        raise SystemExit(f"grew: {', '.join(grown)}")


if __name__ == "__main__":
    main()
