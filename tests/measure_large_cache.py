"""Measures a cache with the units of 300 views of ImageNet, in blocks of 10 views and of 50.

``python -m tests.measure_large_cache`` makes 1,024 tar shards of two small images and two caches of
300 views of them (187,403 files, 2 GB of blocks and folders on disk although the rows are tiny;
39,947 files, 0.4 GB), and prints tables: what it takes to open, describe, verify and train from
either, each in a process of its own, in turn over ``--rounds`` (medians); what repacking takes; and
what a slab of 1,251 rows takes in blocks of each size. ``--url`` opens both from a web server on
loopback too.
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
from tests.cache.making import dataset as made_up_dataset
from tests.cache.making import keys as made_up_keys
from tests.cache.making import padded
from tests.data.making import gather_small
from tests.pictures import write_shards
from tests.serving import serving

POLICY = ViewPolicy(size=32, window=8)
ENVELOPE = ENCODINGS["envelope"]
BLOCKS = (10, 50)
BATCH = 32
SHOWN_VIEWS = 3  # of the first epoch; only these have the digests of rendered views
LONGEST, DRAWN_CLASSES, CLASSES, GRID = 1251, 40, 1000, (7, 7)


@contextmanager
def without_fsync() -> Iterator[None]:
    kept, os.fsync = os.fsync, lambda _: None
    try:
        yield
    finally:
        os.fsync = kept


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
    """Rows of the envelope of logits that are noise: array name -> (*shape, ...)."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    spatial, global_ = (
        torch.from_numpy(rng.normal(size=(count, classes, *tail)).astype(np.float16))
        for tail in (grid, ())
    )
    rows = ENVELOPE.encode(spatial, global_, np.zeros(count, np.uint64))
    return {name: v.numpy().reshape(*shape, *v.shape[1:]) for name, v in rows.items()}


def make_large(path: Path, tars: Dataset, views: int, block: int) -> None:
    """Write every unit, as ``CacheWriter`` does but for its care: a fifth of the system calls.

    Seeds are true, and so are the digests of the views that are shown.
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
        for at in range(views // block):
            own, written = slice(at * block, (at + 1) * block), {}
            for name, key in store.recorded_files(at, number):
                per_view = values[name][own, None]
                part = values[name] if name in layout.PER_SHARD else per_view
                written[key] = put(store.arrays[name], key, part)
            record = Record.of(store.lineage, list(written), list(written.values())).row()
            put(store.arrays[layout.RECORD], store.record_key(at, number), record[None])


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


# --- what is measured, each in a process of its own -----------------------------------------------


def opening(cache: str, tars: str) -> None:
    open_cache(cache).require_done()


def opening_by_digest(cache: str, tars: str) -> None:
    open_cache(f"{cache}@sha256:{(Path(cache).parent / f'{Path(cache).name}.sha256').read_text()}")


def info(cache: str, tars: str) -> None:
    describe(open_cache(cache))


def structure(cache: str, tars: str) -> None:
    reader = open_cache(cache)
    units = [tuple(unit) for unit in np.argwhere(reader.done()).tolist()]
    assert not check_structure(reader.store, units)


def bytes_of_a_sample(cache: str, tars: str) -> None:
    """Every view of 16 tar shards."""
    reader = open_cache(cache)
    units = [(block, shard) for block, shard in np.argwhere(reader.done()).tolist() if shard < 16]
    assert not check_bytes(reader, units)


def first_batch(cache: str, tars: str) -> None:
    loader = CachedLoader(open_views(tars, cache), BATCH, workers=2)
    for batch in loader:
        assert batch.targets is not None
        return


def an_epoch(cache: str, tars: str) -> None:
    """A third of the images, in three views each."""
    for batch in CachedLoader(open_views(tars, cache), BATCH, workers=2):
        assert batch.targets is not None


WORK: dict[str, Callable[[str, str], None]] = {
    "open": opening,
    "open with its digest stated": opening_by_digest,
    "`cache info`": info,
    "`cache verify --depth structure`": structure,
    "verify every byte of 16 tar shards": bytes_of_a_sample,
    "train: until the first batch (2 workers)": first_batch,
    "train: an epoch of batches": an_epoch,
}


def one(name: str, cache: str, tars: str, end: Connection) -> None:
    torch.set_num_threads(1)  # threads that torch had before the fork are not here: it would wait
    before, began, worked = resident(), time.perf_counter(), sum(os.times()[:4])
    WORK[name](cache, tars)
    cores = sum(os.times()[:4]) - worked
    end.send((time.perf_counter() - began, cores, resident() - before))


def measured(name: str, cache: Path | str, tars: Path) -> tuple[float, float, int]:
    """Seconds, of them at work (with loader processes), and bytes by which a new process grew."""
    context = get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=one, args=(name, str(cache), str(tars), there))
    process.start()
    there.close()
    found: tuple[float, float, int] = here.recv()
    process.join()
    return found


def by_url(root: Path, name: str) -> float:
    """Seconds to open the cache on a web server, without copies."""
    with serving(root) as served, tempfile.TemporaryDirectory() as copies:
        os.environ["CSKD_CACHE_DIR"] = copies
        return measured("open", f"{served.url}/{name}", root)[0]


# --- slabs of ImageNet's size ---------------------------------------------------------------------


def make_slabs(path: Path, block: int) -> None:
    """One unit of ``block`` views of a tar shard as long as ImageNet's."""
    data = replace(made_up_dataset((LONGEST,)), num_classes=CLASSES, class_names=None)
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
            made_up_keys(0, LONGEST), np.zeros(LONGEST, np.int32), np.zeros(LONGEST, np.uint32),
            rng.integers(0, 2**64, shape, np.uint64), rng.integers(0, 2**32, shape, np.uint32),
            arrays, np.ones((block, 2), np.uint32),
        ),
    )  # fmt: skip


def slabs(root: Path, blocks: tuple[int, ...], rounds: int) -> dict[int, tuple[float, float]]:
    """Milliseconds of a core to read seeds, digests, rows of one view, at first use and later."""
    for block in blocks:
        make_slabs(root / f"{block}", block)
    every = np.arange(LONGEST)
    spent: dict[int, list[tuple[float, float]]] = {block: [] for block in blocks}
    for number in range(rounds):
        for block in blocks:
            reader, took = open_cache(root / f"{block}", memory=0), []
            for view in (number % block, (number + block // 2) % block):
                began = time.process_time()
                reader.seeds(view, 0)
                reader.view_digests(view, 0)
                reader.rows("envelope", view, 0, every)
                took.append(1e3 * (time.process_time() - began))
            spent[block].append((took[0], took[1]))
    return {
        block: (statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs))
        for block, pairs in spent.items()
    }


def table(title: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
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
            make_large(path, tars, options.views, block)
        print("made", flush=True)
        measure(root, caches, options)
        small, large = BLOCKS
        few = min(16, options.shards)
        with without_fsync():
            began = time.process_time()
            wanted = Conversion(shards=(0, few), view_block=large)
            convert(caches[small], root / "converted", wanted)
            took = time.process_time() - began
        units = few * options.views // large
        print(
            f"\nrepacking: {1e3 * took / units:.0f} ms of a core for a unit of {large} views",
            flush=True,
        )
        (root / "slabs").mkdir()
        found = slabs(root / "slabs", (10, 50, 100), 21)
        table(
            f"milliseconds of a core to read a view's seeds, digests and rows of {LONGEST} samples",
            ("views in a unit", "at first use, SHA-256 compared", "later"),
            [(block, *(f"{ms:.2f}" for ms in pair)) for block, pair in found.items()],
        )


def cell(runs: list[tuple[float, float, int]]) -> str:
    """Medians."""
    wall, cores, grown = (statistics.median(column) for column in zip(*runs, strict=True))
    return f"{wall:.3g} s, {cores:.3g} s, {grown / 1e6:.0f} MB"


def measure(root: Path, caches: dict[int, Path], options: argparse.Namespace) -> None:
    """Print a table of what every work takes with either cache."""
    for path in caches.values():
        Path(f"{path}.sha256").write_text(str(open_cache(path).digest()))
    counts = [count_files(open_cache(path).manifest) for path in caches.values()]
    rows: list[tuple[Any, ...]] = [
        ("files", *(f"{count.files:,}" for count in counts)),
        ("entries of the largest folder", *(f"{count.largest_folder:,}" for count in counts)),
    ]
    for name in WORK:
        runs: dict[int, list[tuple[float, float, int]]] = {block: [] for block in caches}
        for _ in range(options.rounds):
            for block, path in caches.items():
                runs[block].append(measured(name, path, root / "tars"))
        cells = map(cell, runs.values())
        rows.append((name, *cells))
        print(rows[-1], flush=True)
    if options.url:
        times = [f"{by_url(root, path.name):.3g} s" for path in caches.values()]
        rows.append(("open by URL, nothing copied yet", *times))
    what = "seconds, seconds of a core, growth of the process"
    title = f"{options.views} views of {options.shards} tar shards: {what}"
    table(title, ("", *(f"blocks of {block}" for block in caches)), rows)


if __name__ == "__main__":
    main()
