"""Write a cache of your own network's logits: python own_teacher.py SHARDS CACHE

Run it again to resume it; with more ``views`` it extends the cache.
"""

import sys

import torch
from torch import Tensor, nn

import cskd_pipeline as cskd
from cskd_pipeline.models.weights import state_digest

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class TinyCNN(nn.Module):
    """A CNN with a 4 x 4 grid of features at 48 px, and a linear head for grid and mean."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        steps = (nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 32, 3, 3), nn.ReLU())
        self.features = nn.Sequential(*steps)
        self.head = nn.Conv2d(32, classes, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return spatial (B, K, 4, 4) and global (B, K) logits of (B, 3, 48, 48) in [0, 1]."""
        spatial = self.head(self.features((images - MEAN[0]) / STD[0]))
        return spatial, spatial.mean((2, 3))


def main(shards: str, path: str) -> None:
    """Write the logits of two views of every image; load your own network instead of this one."""
    torch.manual_seed(0)
    cnn = TinyCNN(10).eval()
    weights = state_digest(cnn.state_dict())
    shape = {"num_classes": 10, "size": 48, "grid": (4, 4)}
    teacher = cskd.TeacherInfo("tiny-cnn", "random", weights, mean=MEAN, std=STD, **shape)
    settings = cskd.CacheSection(path, encodings=("dense", "envelope"), views=2)
    policy = cskd.ViewPolicy(size=48)
    with torch.inference_mode(), cskd.write_cache(settings, shards, teacher, policy) as writer:
        for batch in writer.views():
            writer.put(batch, *cnn(batch.images))


if __name__ == "__main__":
    main(*sys.argv[1:])
