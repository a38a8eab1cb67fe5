"""Compare a loader on shards in a bucket on loopback with one on the same shards on disk.

``python -m tests.measure_shards_by_url --images 4000 --workers 2`` prints a JSON document. For
``disk``, ``cold`` (no copies yet), ``warm`` (all copies local) and ``small`` (space for half of
them), alternating over ``--rounds``: seconds to the first batch, images per second after it, the
longest wait for a batch, and ``cpu_ms``: CPU time of this process per image (with ``--workers 0``,
all of it), which hardly depends on other load. ``--step`` is a pause after every batch in seconds,
as in a training loop; ``--rate`` limits each connection to the store, in MB/s.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cskd_pipeline.data.cached_loader import CachedLoader
from cskd_pipeline.data.describe import index_shards
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.data.training_views import TrainingViews
from cskd_pipeline.tools.make_shards import make_shards
from cskd_pipeline.views.policy import ViewPolicy
from tests.serving import BUCKET, bucket_settings, serving


def write_images(folder: Path, images: int) -> None:
    """Write JPEGs of about 100 kB, in two classes."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (64, 80, 100, 3), np.uint8)
    for number in range(images):
        image = Image.fromarray(coarse[number % 64]).resize((500, 400))
        grain = random.integers(0, 30, (400, 500, 3), np.uint8)
        data = io.BytesIO()
        Image.fromarray(np.asarray(image) // 2 + grain).save(data, "JPEG", quality=88)
        path = folder / "ab"[number % 2] / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.getvalue())


def serve(root: Path, rate: float, ends: Connection) -> None:
    """Run a store until the other end of the connection closes."""
    with serving(root, "s3") as served:
        served.rate = rate * 1e6 or None
        ends.send(served.url)
        ends.poll(None)


def run(spec: str | Path, options: argparse.Namespace) -> dict[str, float]:
    """Load one epoch and return its figures."""
    started = time.perf_counter()
    dataset = load_dataset(spec)
    views = TrainingViews.of_dataset(dataset, ViewPolicy(), seed=0)
    loader = CachedLoader(
        views, 128, repeats=1, workers=options.workers, shuffle_shards=options.shuffle_shards
    )
    waits, before, cpu = [], started, time.process_time()
    for _ in loader.batches(len(loader)):
        waits.append(time.perf_counter() - before)
        time.sleep(options.step)
        before = time.perf_counter()
    seconds = before - started - waits[0]
    return {
        "first_batch_s": waits[0],
        "images_per_s": 128 * (len(waits) - 1) / seconds,
        "longest_wait_s": max(waits[1:]),
        "waiting": sum(waits[1:]) / seconds,
        "cpu_ms": 1000 * (time.process_time() - cpu) / (128 * len(waits)),
    }


def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run all kinds in turn, ``rounds`` times; return medians."""
    tars = root / "served/set"
    write_images(root / "images", options.images)
    make_shards(root / "images", tars, shard_size=options.shard_size)
    total = sum(path.stat().st_size for path in tars.glob("*.tar"))
    url = f"s3://{BUCKET}/set/*.tar"
    copies = root / "copies"
    os.environ |= {"CSKD_CACHE_DIR": str(copies), "CSKD_CACHE_GB": "50"}
    started = time.perf_counter()
    index_shards(url).save(root / "train.json")
    runs: dict[str, list[dict[str, float]]] = {}
    indexing = time.perf_counter() - started
    for _ in range(options.rounds):
        for kind in options.kinds.split(","):
            if kind in ("cold", "small"):
                shutil.rmtree(copies, ignore_errors=True)
            os.environ["CSKD_CACHE_GB"] = str(total / 2e9) if kind == "small" else "50"
            spec = tars if kind == "disk" else root / "train.json"
            runs.setdefault(kind, []).append(run(spec, options))
    return {
        "bytes": total,
        "index_s": indexing,
        **{
            kind: {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
            for kind, rounds in runs.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--shard-size", type=int, default=200)
    parser.add_argument("--shuffle-shards", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--step", type=float, default=0.0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--kinds", default="disk,cold,warm,small")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "served").mkdir()
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=serve, args=(root / "served", options.rate, theirs), daemon=True
        )
        process.start()
        os.environ |= bucket_settings(ours.recv())
        try:
            print(json.dumps(measure(root, options), indent=2))
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
