"""``bench loader``: what a loader process of ours makes a second, against one of timm's.

Both read the same tars, draw DeiT's augmentation and give uint8 batches that only the device's part
is missing from (normalising and erasing; ours mixes there too), in turn, in this process: on one
core. timm's side is what its training script sets up: ``create_dataset("wds/...")``,
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
"""Ratios to timm's, by the number of views that share a decoded image in an epoch."""

BATCHES = 2
"""That every side makes in a round."""

Step = Callable[[int], int]
"""Makes the batch of a number and returns how many images it has."""


def bench_loader(dataset: Dataset, *, size: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Make batches of ``dataset`` with each number of repeats in ``GOALS``, and with timm.

    Args:
        size: of the views, in pixels.

    Returns:
        Images per second and core, and ratios to timm's: medians with spread.
    """
    policy, dataset = ViewPolicy(size=size), _with_classes(dataset)
    steps = {f"repeats_{n}": _ours(dataset, policy, n, batch_size) for n in GOALS}
    made = dict.fromkeys([*steps, "timm"], 0)

    def work(name: str, number: int) -> None:
        for batch in range(number * BATCHES, (number + 1) * BATCHES):
            made[name] += steps[name](batch)

    with tempfile.TemporaryDirectory() as folder, timing.one_thread():
        steps["timm"] = _timms(dataset, Path(folder), policy, batch_size)
        seconds = timing.time_turns(steps, work, rounds, "making batches")
    images = BATCHES * batch_size
    assert set(made.values()) == {(rounds + 1) * images}, made
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
        images: about how many are made; the first quarter, while processes start, is not counted.
    """
    views = TrainingViews.of_dataset(_with_classes(dataset), ViewPolicy(size=size), 0)
    loader = CachedLoader(views, batch_size, repeats=repeats, workers=workers)
    batches = max(2, -(-images // batch_size))
    return timing.SteadyRate.of(map(len, loader.batches(batches)), batches * batch_size).rate


def _with_classes(dataset: Dataset) -> Dataset:
    """Count the classes of shards that do not state them: labels are mixed, or one-hot."""
    if dataset.num_classes is not None:
        return dataset
    return dataset.with_classes(1 + max(int(shard.index.label.max()) for shard in dataset.shards))


def _ours(dataset: Dataset, policy: ViewPolicy, repeats: int, batch_size: int) -> Step:
    views = TrainingViews.of_dataset(dataset, policy, 0)
    loader = CachedLoader(views, batch_size, repeats=repeats)
    return lambda number: len(views[loader.rows(number)])


def _timms(dataset: Dataset, folder: Path, policy: ViewPolicy, batch_size: int) -> Step:
    """Return timm's loader, as a recipe of DeiT's would set it up; one epoch after the other."""
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
    stream = _endless(loader.loader)  # what its processes make, before the device's part
    return lambda _: len(next(stream)[0])


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        made = 0
        for batch in loader:
            made += 1
            yield batch
        if not made:
            raise DataError(
                "timm's loader reads nothing from these shards",
                expected="images as jpg, jpeg, png or webp, and labels as cls or in json",
            )


def _describe(dataset: Dataset, folder: Path) -> None:
    """Fill a folder for timm's webdataset reader: links to the tars, and ``_info.json``."""
    lengths = {}
    for number, shard in enumerate(dataset.shards):
        if isinstance(shard.path, RemoteTar):
            raise UsageError(
                "timm's loader is compared on shards on this machine",
                where=shard.path,
                action="copy some of them, and name the copies",
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
        f"images a second on one core ({report['policy']}, {report['size']} px, {report['rounds']} "
        f"rounds of {report['images_per_round']} images)",
        timing.comparison_columns("median", "ratio to timm"),
        rows,
    )


def figures(report: dict[str, Any]) -> Iterator[timing.Figure]:
    """Yield the loader against timm's on one core, and its rate on ``all_cores``."""
    for name, found in report["ratio"].items():
        views = name.removeprefix("repeats_")
        rate = report["images_per_second_per_core"][name]["median"]
        what = f"loader / timm's, one core, {views} views a decoded image, {report['size']} px"
        figure = timing.Figure.of_ratio(what, found, at_least=report["goal"][name])
        yield figure._replace(found=f"{figure.found}; {rate:,.0f} images/s")
    for name, rate in report["all_cores"].items():
        views = name.removeprefix("repeats_")
        what = f"loader, {report['cores']} cores, {views} views a decoded image: images a second"
        yield timing.Figure(what, f"{rate:,.0f}")
