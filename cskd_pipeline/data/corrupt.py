"""Images that cannot be decoded, found before planning, then listed or left out.

They are left out of the data set itself, so that a dump or a run is the same as with shards that do
not contain them. The result depends only on the files, not on ranks or loader processes.
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

CHUNK = 64  # images that a loader process decodes at a time


class CorruptImage(NamedTuple):
    """An image that cannot be decoded, and the decoder's error."""

    shard: int
    offset: int
    reason: str


class _DecodedChunks(TorchDataset[tuple[int, list[CorruptImage]]]):
    """Data set from samples, (n, 2) shard and offset, to their count and the corrupt images."""

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
    """Decode every image once; return the images that fail, in the order of ``samples``.

    Images with the CRC-32 in the cache are skipped: the dump has decoded them.

    Args:
        images: source of the images, with the cache, if there is one.
        samples: (n, 2) shard and offset.
        workers: number of loader processes; 0: decode in this process.
        part, parts: decode every ``parts``-th chunk, starting with number ``part``.
    """
    starts = range(0, len(samples), CHUNK)[part::parts]
    chunks = [samples[start : start + CHUNK] for start in starts]
    found: list[CorruptImage] = []
    with progress(sum(map(len, chunks)), "images", "decoding every image once") as meter:
        for count, corrupt in Loader(_DecodedChunks(images), chunks, workers=workers):
            found += corrupt
            meter.advance(count)
    return found


def without_corrupt(
    dataset: Dataset, left_out: LeftOuts, *, workers: int = 0, doing: str = "training"
) -> Dataset:
    """Return the data set without images that cannot be decoded, as if its tars lacked them.

    Args:
        left_out: list that the images are added to; its record is used if there is one.
        doing: the activity that continues without them, for the warning.
    """
    images, samples = ImageSource(dataset.shards), SampleSet.of(dataset).all_samples()
    search = partial(find_corrupt, images, samples, workers=workers)
    identity = {"shards": tars_sha256(dataset.shards)}
    found = left_out.find("corrupt", identity, dataset.counts, search)
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
    """Raise an ImageError that lists all images that cannot be decoded, if there are any."""
    images = ImageSource(dataset.shards)
    found = find_corrupt(images, SampleSet.of(dataset).all_samples(), workers=workers)
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
        expected="complete JPEG, PNG or WebP files",
        action="write the shards again with intact files, or dump and train without these: "
        "--set data.corrupt=skip",
        report={"corrupt": report},
    )
