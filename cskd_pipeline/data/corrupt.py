"""Images that cannot be decoded, found before anything is planned: listed, or left out.

Leaving them out of the data set itself keeps everything behind it as it is: a dump or a run is the
one of shards that do not hold them. Which they are depends on the files alone, not on ranks or
loader processes.
"""

import logging
from functools import partial
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from cskd_pipeline.cache.omitted import LeftOut
from cskd_pipeline.data.images import ImageSource
from cskd_pipeline.data.index import Dataset
from cskd_pipeline.data.left_out import LeftOuts, tars_sha256
from cskd_pipeline.data.plan import SampleSet
from cskd_pipeline.data.workers import Loader
from cskd_pipeline.errors import ImageError
from cskd_pipeline.runtime.progress import progress
from cskd_pipeline.views.decode import decode

log = logging.getLogger(__name__)

PIECE = 64  # images that a loader process decodes at a time


class CorruptImage(NamedTuple):
    """An image that cannot be decoded, and the decoder's reason."""

    shard: int
    offset: int
    reason: str


class _Decoding(TorchDataset[tuple[int, list[CorruptImage]]]):
    """Samples, (n, 2) shard and offset -> their number, and those of them that are corrupt."""

    def __init__(self, images: ImageSource) -> None:
        self.images = images.lenient()

    def __getitem__(self, samples: np.ndarray) -> tuple[int, list[CorruptImage]]:
        cache, found = self.images.cache, []
        for i, data, crc in self.images.read(samples):
            shard, offset = samples[i].tolist()
            if cache is None or crc != cache.image_crc32(shard)[offset]:
                try:
                    decode(data, self.images.where(shard, offset))
                except ImageError as error:
                    found.append(CorruptImage(shard, offset, str(error.found)))
        return len(samples), sorted(found)


def find_corrupt(
    images: ImageSource, samples: np.ndarray, *, workers: int = 0, part: int = 0, parts: int = 1
) -> list[CorruptImage]:
    """Decode every image once; return those that cannot be, in the order of ``samples``.

    Images that are a cache's, by their CRC-32, are not decoded: its dump has done so.

    Args:
        images: reads them, and knows the cache, if there is one.
        samples: (n, 2) shard and offset.
        workers: loader processes; they change nothing but the time.
        part, parts: every ``parts``-th piece, from number ``part`` on.
    """
    starts = range(0, len(samples), PIECE)[part::parts]
    pieces = [samples[start : start + PIECE] for start in starts]
    found: list[CorruptImage] = []
    with progress(sum(map(len, pieces)), "images", "decoding every image once") as meter:
        for count, corrupt in Loader(_Decoding(images), pieces, workers=workers):
            found += corrupt
            meter.advance(count)
    return found


def without_corrupt(
    dataset: Dataset, left_out: LeftOuts, *, workers: int = 0, doing: str = "training"
) -> Dataset:
    """Leave the images that cannot be decoded out of a data set, as if its tars lacked them.

    Args:
        left_out: has them in its record, or gets them.
        doing: what continues without them, for the warning.
    """
    images, samples = ImageSource(dataset.shards), SampleSet.of(dataset).every()
    look = partial(find_corrupt, images, samples, workers=workers)
    identity = {"shards": tars_sha256(dataset.shards)}
    found = left_out.find("corrupt", identity, dataset.counts, look)
    left_out.add(
        LeftOut("corrupt", shard, offset, dataset.shards[shard].key(offset))
        for shard, offsets in found.items()
        for offset in offsets
    )
    if found:
        log.warning(
            f"{doing} without {len(left_out)} of {dataset.samples} images, which cannot be decoded"
            f"{left_out.listed}"
        )
    return dataset.without(found)


def require_images(dataset: Dataset, *, workers: int = 0) -> None:
    """Refuse a data set with images that cannot be decoded, and list all of them."""
    images = ImageSource(dataset.shards)
    found = find_corrupt(images, SampleSet.of(dataset).every(), workers=workers)
    if not found:
        return
    shards = dataset.shards
    report = [
        {"shard": str(shards[shard].path), "key": shards[shard].key(offset), "found": reason}
        for shard, offset, reason in found
    ]
    raise ImageError(
        f"{len(found)} of {dataset.samples} images cannot be decoded",
        where=dataset.name,
        expected="whole JPEG, PNG or WebP files",
        action="make the shards again with whole files, or dump and train without these: "
        "--set data.corrupt=skip",
        report={"corrupt": report},
    )
