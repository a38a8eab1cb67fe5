"""``bench loader``: images per second of one of our loader processes, against one of timm's.

Both read the same tars, draw DeiT's augmentation and return uint8 batches, up to the work left to
the device (normalising and erasing; ours also mixes there). They take turns in this process, on one
core. timm's side is set up as in its training script: ``create_dataset("wds/...")``,
``create_loader`` and ``FastCollateMixup``.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from timm.data.mixup import FastCollateMixup

from cskd_pipeline.data.cached_loader import CachedLoader
from cskd_pipeline.data.index import Dataset
from cskd_pipeline.data.remote_tar import RemoteTar
from cskd_pipeline.data.training_views import TrainingViews
from cskd_pipeline.errors import DataError, UsageError
from cskd_pipeline.tools.bench import timing
from cskd_pipeline.tools.make_shards import write_info
from cskd_pipeline.tools.tables import Printed, Table
from cskd_pipeline.views.policy import ViewPolicy

GOALS = {1: 1.5, 3: 2.0}
"""Speed relative to timm's, by the number of views per decoded image in an epoch."""

BATCHES = 2
"""Batches per side and round."""

Step = Callable[[int], int]
"""Loads the batch with the given number and returns its number of images."""


def bench_loader(dataset: Dataset, *, size: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Load batches of ``dataset`` with each number of repeats in ``GOALS``, and with timm.

    Args:
        size: view size in pixels.

    Returns:
        Images per second and core, and ratios to timm's: medians with spread.
    """
    policy, dataset = ViewPolicy(size=size), _with_classes(dataset)
    steps = {f"repeats_{n}": _ours(dataset, policy, n, batch_size) for n in GOALS}
    loaded = dict.fromkeys([*steps, "timm"], 0)

    def work(name: str, number: int) -> None:
        for batch in range(number * BATCHES, (number + 1) * BATCHES):
            loaded[name] += steps[name](batch)

    with tempfile.TemporaryDirectory() as folder, timing.one_thread():
        steps["timm"] = _timms(dataset, Path(folder), policy, batch_size)
        seconds = timing.time_turns(steps, work, rounds, "loading batches")
    images = BATCHES * batch_size
    assert set(loaded.values()) == {(rounds + 1) * images}, loaded
    return {
        "policy": policy.version,
        "size": size,
        "rounds": rounds,
        "images_per_round": images,
        "images_per_second_per_core": {
            name: timing.rates(s, images) for name, s in seconds.items()
        },
        "ratio": {n: timing.ratio(seconds[n], seconds["timm"]) for n in seconds if n != "timm"},
        "goal": {f"repeats_{n}": goal for n, goal in GOALS.items()},
    }


def loader_rate(
    dataset: Dataset, *, size: int, batch_size: int, workers: int, images: int, repeats: int = 1
) -> float:
    """Return the images per second of a training loader with ``workers`` processes.

    Args:
        images: approximate number to load; the first quarter, while processes start, is discarded.
    """
    views = TrainingViews.of_dataset(_with_classes(dataset), ViewPolicy(size=size), 0)
    loader = CachedLoader(views, batch_size, repeats=repeats, workers=workers)
    batches = max(2, -(-images // batch_size))
    return timing.SteadyRate.of(map(len, loader.batches(batches)), batches * batch_size).rate


def _with_classes(dataset: Dataset) -> Dataset:
    """Count the classes if the shards do not state them: mixed labels need their number."""
    if dataset.num_classes is not None:
        return dataset
    return dataset.with_classes(1 + max(int(shard.index.label.max()) for shard in dataset.shards))


def _ours(dataset: Dataset, policy: ViewPolicy, repeats: int, batch_size: int) -> Step:
    views = TrainingViews.of_dataset(dataset, policy, 0)
    loader = CachedLoader(views, batch_size, repeats=repeats)
    return lambda number: len(views[loader.rows(number)])


def _timms(dataset: Dataset, folder: Path, policy: ViewPolicy, batch_size: int) -> Step:
    """Return timm's loader, set up as for training DeiT, repeating epochs endlessly."""
    _describe(dataset, folder)
    found = create_dataset(
        "wds/bench",
        root=str(folder),
        split="train",
        is_training=True,
        batch_size=batch_size,
        input_key="jpg;jpeg;png;webp",
    )
    loader = create_loader(
        found,
        input_size=(3, policy.size, policy.size),
        batch_size=batch_size,
        is_training=True,
        scale=policy.crop_area,
        ratio=policy.crop_ratio,
        hflip=policy.flip,
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=policy.erase,
        re_mode="pixel",
        interpolation="bicubic",
        mean=policy.mean,
        std=policy.std,
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
        collate_fn=FastCollateMixup(
            mixup_alpha=policy.mixup_alpha,
            cutmix_alpha=policy.cutmix_alpha,
            prob=policy.mix,
            switch_prob=policy.cutmix_switch,
            num_classes=dataset.num_classes,
        ),
    )
    stream = _endless(loader.loader)  # its batches before the work on the device
    return lambda _: len(next(stream)[0])


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise DataError(
                "timm's loader finds no samples in these shards",
                expected="images as jpg, jpeg, png or webp; labels as cls or json",
            )


def _describe(dataset: Dataset, folder: Path) -> None:
    """Fill a folder for timm's webdataset reader: links to the tars, and ``_info.json``."""
    lengths = {}
    for number, shard in enumerate(dataset.shards):
        if isinstance(shard.path, RemoteTar):
            raise UsageError(
                "the comparison with timm's loader needs local shards",
                where=shard.path,
                action="copy some of the shards to this machine and pass the copies to --shards",
            )
        name = f"bench-train-{number:06d}.tar"
        (folder / name).symlink_to(shard.path.resolve())
        lengths[name] = len(shard)
    write_info(folder, "train", lengths)


def printed(report: dict[str, Any]) -> Printed:
    """Yield the report as a table."""
    rows = []
    for name, found in report["images_per_second_per_core"].items():
        times = report["ratio"].get(name, {"median": 1.0, "low": None, "high": None})
        rows.append(
            timing.comparison_row(name.replace("_", " "), found, times, report["goal"].get(name))
        )
    yield Table(
        f"images/s on one core ({report['policy']}, {report['size']} px, {report['rounds']} "
        f"rounds of {report['images_per_round']} images)",
        timing.comparison_columns("median", "ratio to timm"),
        rows,
    )


def figures(report: dict[str, Any]) -> Iterator[timing.Figure]:
    """Yield the loader against timm's on one core, and its rate on ``all_cores``."""
    for name, found in report["ratio"].items():
        views = name.removeprefix("repeats_")
        rate = report["images_per_second_per_core"][name]["median"]
        label = f"loader / timm's, one core, {views} views per decoded image, {report['size']} px"
        figure = timing.Figure.of_ratio(label, found, at_least=report["goal"][name])
        yield figure._replace(result=f"{figure.result}; {rate:,.0f} images/s")
    for name, rate in report["all_cores"].items():
        views = name.removeprefix("repeats_")
        label = f"loader, {report['cores']} cores, {views} views per decoded image: images/s"
        yield timing.Figure(label, f"{rate:,.0f}")
