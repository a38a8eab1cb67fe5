"""A custom webdataset pipeline: replay a cached view and attach the teacher's targets by key.

python webdataset_map.py 'shards/train-*.tar' CACHE

It needs a cache of unmixed views (dumped with ``--set views.mix=0``). A mixed view needs a pair of
images, which ``cskd_pipeline.CachedLoader`` brings together.
"""

import glob
import sys

import numpy as np
import torch
import webdataset

from cskd_pipeline import open_cache, replay_view


def batches(shards, cache, view, batch_size=64):
    """Yield images (B, 3, S, S) in [0, 1], labels (B,), and targets for the loss at any r."""

    def replayed(sample):
        key = sample["__key__"]
        image = next(sample[ext] for ext in ("jpg", "jpeg", "png", "webp") if ext in sample)
        return key, replay_view(cache, view, key, image), int(sample["cls"])

    def with_targets(batch):
        keys, pixels, labels = zip(*batch, strict=True)
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        return images, torch.tensor(labels), cache.targets([(view, key) for key in keys])

    data = webdataset.WebDataset(sorted(glob.glob(shards)), shardshuffle=False)
    data = data.map(replayed, handler=webdataset.reraise_exception)
    return data.batched(batch_size, collation_fn=list).map(with_targets)


if __name__ == "__main__":
    cache = open_cache(sys.argv[2])
    print(cache)
    for images, labels, targets in batches(sys.argv[1], cache, view=0):
        teacher = targets.hard_spatial(r=0.7)
        agree = (teacher == labels[:, None, None]).float().mean()
        print(f"{tuple(images.shape)}: {agree:.0%} of the locations have the image's class")
