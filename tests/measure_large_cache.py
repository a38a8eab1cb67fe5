"""Measure caches with as many units as 300 views of ImageNet, in blocks of 10 views and of 50.

``python -m tests.measure_large_cache`` writes 1,024 tar shards of two small images and two caches
of 300 views of them (187,403 files, 2 GB on disk although the rows are tiny; 39,947 files, 0.4 GB).
It prints the cost of opening, describing, verifying and training from either, each in a separate
process, alternating over ``--rounds`` (medians); of repacking; and of reading a slab of 1,251 rows
in blocks of each size. ``--url`` also opens both from a web server on loopback.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.check import check_bytes, check_structure
from cskd_pipeline.cache.chunks import StoredArray, encode_file
from cskd_pipeline.cache.convert import Conversion, convert
from cskd_pipeline.cache.digests import Record
from cskd_pipeline.cache.info import describe
from cskd_pipeline.cache.manifest import CacheManifest, TeacherInfo, library_versions, utc_now
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.units import UnitData, count_files
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.data.cached_loader import CachedLoader
from cskd_pipeline.data.describe import describe as describe_data
from cskd_pipeline.data.index import Dataset, load_dataset
from cskd_pipeline.data.training_views import open_views
from cskd_pipeline.data.unit_views import Loading, unit_batches
from cskd_pipeline.distill.encodings import ENCODINGS
from cskd_pipeline.views.bits import view_seed
from cskd_pipeline.views.policy import ViewPolicy
from tests.cache.factories import dataset as synthetic_dataset
from tests.cache.factories import keys as synthetic_keys
from tests.cache.factories import padded
from tests.data.factories import gather_small
from tests.images import write_shards
from tests.serving import serving

POLICY = ViewPolicy(size=32, window=8)
ENVELOPE = ENCODINGS["envelope"]
BLOCKS = (10, 50)
BATCH = 32
SHOWN_VIEWS = 3  # views of the first epoch; only these have true digests
LONGEST, DRAWN_CLASSES, CLASSES, GRID = 1251, 40, 1000, (7, 7)


@contextmanager
def without_fsync() -> Iterator[None]:
    original, os.fsync = os.fsync, lambda _: None
    try:
        yield
    finally:
        os.fsync = original


def manifest_of(
    data: Any, views: int, block: int, classes: int, grid: tuple[int, int]
) -> CacheManifest:
    teacher = TeacherInfo(
        name="simulated", source="random", weights_sha256="0" * 64, num_classes=classes,
        size=POLICY.size, mean=(0.5,) * 3, std=(0.25,) * 3, grid=grid,
    )  # fmt: skip
    return CacheManifest(
        dataset=data, teacher=teacher, policy=POLICY, root_seed=7, views=views, view_block=block,
        encodings=(ENVELOPE.name,), versions=library_versions(), created=utc_now(),
    )  # fmt: skip


def responses(
    shape: tuple[int, ...], classes: int, grid: tuple[int, int], seed: int
) -> dict[str, np.ndarray]:
    """Return envelope rows of random logits: array name -> (*shape, ...)."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    spatial, global_ = (
        torch.from_numpy(rng.normal(size=(count, classes, *tail)).astype(np.float16))
        for tail in (grid, ())
    )
    rows = ENVELOPE.encode(spatial, global_, np.zeros(count, np.uint64))
    return {name: v.numpy().reshape(*shape, *v.shape[1:]) for name, v in rows.items()}


def write_large_cache(path: Path, tars: Dataset, views: int, block: int) -> None:
    """Write every unit without ``CacheWriter``'s safety: a fifth of the system calls.

    Seeds are true, and so are the digests of the first ``SHOWN_VIEWS`` views.
    """
    data = describe_data(tars)
    grid = (2, 2)
    store = CacheWriter.create(path, manifest_of(data, views, block, data.num_classes, grid)).store

    def put(array: StoredArray, key: str, values: np.ndarray) -> bytes:
        content = encode_file(array, values)
        os.makedirs(f"{path}/{key}".rpartition("/")[0], exist_ok=True)
        with open(f"{path}/{key}", "wb", buffering=0) as file:
            file.write(content)
        return hashlib.sha256(content).digest()

    for number, shard in enumerate(tars.shards):
        count, keys = len(shard), shard.keys
        shown = range(SHOWN_VIEWS)
        batches = unit_batches(tars, [(number, shown)], POLICY, 7, Loading(2 * count))
        drawn = gather_small(batches, shown, count)
        digests = np.zeros((views, count), np.uint32)
        digests[:SHOWN_VIEWS] = drawn["view_digest"]
        values = {
            "key": layout.key_matrix(keys, store.arrays["key"])[None],
            "label": shard.index.label.astype(np.int32)[None],
            "image_crc32": drawn["image_crc32"][:1],
            "seed": np.array([[view_seed(7, k, v) for k in keys] for v in range(views)], np.uint64),
            "view_digest": digests,
            "top1": np.full((views, 2), count, np.uint32),
            **ENVELOPE.pack(responses((views, count), data.num_classes, grid, number)),
        }
        for index in range(views // block):
            own, digest_of = slice(index * block, (index + 1) * block), {}
            for name, key in store.recorded_files(index, number):
                per_view = values[name][own, None]
                part = values[name] if name in layout.PER_SHARD else per_view
                digest_of[key] = put(store.arrays[name], key, part)
            record = Record.of(store.lineage, list(digest_of), list(digest_of.values())).row()
            put(store.arrays[layout.RECORD], store.record_key(index, number), record[None])


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


# --- the operations measured, each in a separate process ------------------------------------------


def open_complete(cache: str, tars: str) -> None:
    open_cache(cache).require_done()


def open_pinned(cache: str, tars: str) -> None:
    open_cache(f"{cache}@sha256:{(Path(cache).parent / f'{Path(cache).name}.sha256').read_text()}")


def info(cache: str, tars: str) -> None:
    describe(open_cache(cache))


def verify_structure(cache: str, tars: str) -> None:
    reader = open_cache(cache)
    units = [tuple(unit) for unit in np.argwhere(reader.done()).tolist()]
    assert not check_structure(reader.store, units)


def verify_bytes(cache: str, tars: str) -> None:
    """Verify every view of 16 tar shards."""
    reader = open_cache(cache)
    units = [(block, shard) for block, shard in np.argwhere(reader.done()).tolist() if shard < 16]
    assert not check_bytes(reader, units)


def first_batch(cache: str, tars: str) -> None:
    loader = CachedLoader(open_views(tars, cache), BATCH, workers=2)
    for batch in loader:
        assert batch.targets is not None
        return


def epoch(cache: str, tars: str) -> None:
    """Load a third of the images, in three views each."""
    for batch in CachedLoader(open_views(tars, cache), BATCH, workers=2):
        assert batch.targets is not None


OPERATIONS: dict[str, Callable[[str, str], None]] = {
    "open": open_complete,
    "open with a pinned digest": open_pinned,
    "`cache info`": info,
    "`cache verify --depth structure`": verify_structure,
    "verify every byte of 16 tar shards": verify_bytes,
    "train, until the first batch, two loader processes": first_batch,
    "train, an epoch of batches": epoch,
}


def run(name: str, cache: str, tars: str, end: Connection) -> None:
    torch.set_num_threads(1)  # torch would wait for its threads, which a fork does not copy
    before, started, cpu = resident(), time.perf_counter(), sum(os.times()[:4])
    OPERATIONS[name](cache, tars)
    cores = sum(os.times()[:4]) - cpu
    end.send((time.perf_counter() - started, cores, resident() - before))


def run_in_process(name: str, cache: Path | str, tars: Path) -> tuple[float, float, int]:
    """Return seconds, CPU seconds (with loader processes), and growth of the process in bytes."""
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=run, args=(name, str(cache), str(tars), theirs))
    process.start()
    theirs.close()
    cost: tuple[float, float, int] = ours.recv()
    process.join()
    return cost


def open_by_url(root: Path, name: str) -> float:
    """Return the seconds to open the cache from a web server, without local copies."""
    with serving(root) as served, tempfile.TemporaryDirectory() as copies:
        os.environ["CSKD_CACHE_DIR"] = copies
        return run_in_process("open", f"{served.url}/{name}", root)[0]


# --- slabs of ImageNet's size ---------------------------------------------------------------------


def write_slabs(path: Path, block: int) -> None:
    """Write one unit of ``block`` views of a tar shard as long as ImageNet's."""
    data = replace(synthetic_dataset((LONGEST,)), num_classes=CLASSES, class_names=None)
    writer = CacheWriter.create(path, manifest_of(data, block, block, CLASSES, GRID))
    parts = [responses((LONGEST,), DRAWN_CLASSES, GRID, seed) for seed in range(3)]
    rng, (unit,) = np.random.default_rng(0), writer.todo()
    chosen = [parts[view % len(parts)] for view in unit.views]
    arrays = {
        "envelope/lines": padded([part["envelope/lines"] for part in chosen]),
        "envelope/global_label": np.stack([part["envelope/global_label"] for part in chosen]),
    }
    shape = (block, LONGEST)
    writer.write_unit(
        unit,
        UnitData(
            synthetic_keys(0, LONGEST), np.zeros(LONGEST, np.int32), np.zeros(LONGEST, np.uint32),
            rng.integers(0, 2**64, shape, np.uint64), rng.integers(0, 2**32, shape, np.uint32),
            arrays, np.ones((block, 2), np.uint32),
        ),
    )  # fmt: skip


def time_slabs(root: Path, blocks: tuple[int, ...], rounds: int) -> dict[int, tuple[float, float]]:
    """Return CPU ms to read seeds, digests and rows of one view: on first use, and later."""
    for block in blocks:
        write_slabs(root / f"{block}", block)
    every = np.arange(LONGEST)
    spent: dict[int, list[tuple[float, float]]] = {block: [] for block in blocks}
    for number in range(rounds):
        for block in blocks:
            reader, times = open_cache(root / f"{block}", memory=0), []
            for view in (number % block, (number + block // 2) % block):
                started = time.process_time()
                reader.seeds(view, 0)
                reader.view_digests(view, 0)
                reader.rows("envelope", view, 0, every)
                times.append(1e3 * (time.process_time() - started))
            spent[block].append((times[0], times[1]))
    return {
        block: (statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs))
        for block, pairs in spent.items()
    }


def print_table(title: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    print(f"\n{title}\n")
    for row in (head, ("---",) * len(head), *rows):
        print("| " + " | ".join(map(str, row)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1024)
    parser.add_argument("--views", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--url", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_shards(root / "tars", (2,) * options.shards)
        tars = load_dataset(root / "tars")
        caches = {block: root / f"{block}" for block in BLOCKS}
        for block, path in caches.items():
            write_large_cache(path, tars, options.views, block)
        print("caches written", flush=True)
        measure(root, caches, options)
        small, large = BLOCKS
        few = min(16, options.shards)
        with without_fsync():
            started = time.process_time()
            conversion = Conversion(shards=(0, few), view_block=large)
            convert(caches[small], root / "converted", conversion)
            seconds = time.process_time() - started
        milliseconds = 1e3 * seconds / (few * options.views // large)
        print(f"\nrepacking: {milliseconds:.0f} ms of CPU per unit of {large} views", flush=True)
        (root / "slabs").mkdir()
        times = time_slabs(root / "slabs", (10, 50, 100), 21)
        print_table(
            f"CPU milliseconds to read a view's seeds, digests and rows of {LONGEST} samples",
            ("views per unit", "on first use, SHA-256 compared", "later"),
            [(block, *(f"{ms:.2f}" for ms in pair)) for block, pair in times.items()],
        )


def cell(runs: list[tuple[float, float, int]]) -> str:
    """Return the medians as text."""
    wall, cores, grown = (statistics.median(column) for column in zip(*runs, strict=True))
    return f"{wall:.3g} s, {cores:.3g} s, {grown / 1e6:.0f} MB"


def measure(root: Path, caches: dict[int, Path], options: argparse.Namespace) -> None:
    """Print a table of the cost of every operation on either cache."""
    for path in caches.values():
        Path(f"{path}.sha256").write_text(str(open_cache(path).digest()))
    counts = [count_files(open_cache(path).manifest) for path in caches.values()]
    rows: list[tuple[Any, ...]] = [
        ("files", *(f"{count.files:,}" for count in counts)),
        ("entries of the largest folder", *(f"{count.largest_folder:,}" for count in counts)),
    ]
    for name in OPERATIONS:
        runs: dict[int, list[tuple[float, float, int]]] = {block: [] for block in caches}
        for _ in range(options.rounds):
            for block, path in caches.items():
                runs[block].append(run_in_process(name, path, root / "tars"))
        cells = map(cell, runs.values())
        rows.append((name, *cells))
        print(rows[-1], flush=True)
    if options.url:
        times = [f"{open_by_url(root, path.name):.3g} s" for path in caches.values()]
        rows.append(("open by URL, without local copies", *times))
    columns = "seconds, CPU seconds, growth of the process"
    title = f"{options.views} views of {options.shards} tar shards: {columns}"
    print_table(title, ("", *(f"blocks of {block}" for block in caches)), rows)


if __name__ == "__main__":
    main()
