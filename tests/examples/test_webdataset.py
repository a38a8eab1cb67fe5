"""The webdataset example reads the teacher's views and targets by key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from webdataset import WebLoader

from cskd_pipeline import Cache, CskdError, open_cache, replay_view
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.distill.targets import LogitTargets
from tests.examples.conftest import EXAMPLES, make_digits
from tests.pipeline.live import teacher_of
from tests.processes import server


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write shards of handwritten digits and a cache of unmixed views, some of them erased."""
    root = tmp_path_factory.mktemp("unmixed")
    sets = ("views.mix=0.0", "views.erase=0.5", "cache.views=2", 'cache.encodings=["dense"]')
    make_digits(root, *sets)
    return root


def test_every_sample_comes_with_its_view_and_targets(
    root: Path, example: Callable[[str], ModuleType]
) -> None:
    """Two loader processes yield the same samples as the cache in its own order."""
    cache = open_cache(root / "cache")
    data = example("webdataset_map").batches(f"{root}/shards/*.tar", cache, 1, batch_size=16)
    batches = list(WebLoader(data, batch_size=None, num_workers=2))
    assert sum(len(labels) for _, labels, _ in batches) == 96
    labels = {
        (*targets.hard_spatial(0.5)[i].flatten().tolist(), int(labels[i]))
        for _, labels, targets in batches
        for i in range(len(labels))
    }
    expected = set()
    for shard, count in enumerate(cache.counts):
        keys = cache.keys(shard)
        spatial = cache.targets([(1, key) for key in keys]).hard_spatial(0.5)
        for i, label in enumerate(cache.labels(shard).tolist()):
            expected.add((*spatial[i].flatten().tolist(), label))
        assert count == len(keys)
    assert labels == expected
    images = torch.cat([images for images, _, _ in batches])
    assert images.shape[1] == 3
    inside = (images >= 0) & (images <= 1)
    assert 0.5 < float(inside.float().mean()) < 1  # the rest is noise in erased boxes


def images(root: Path) -> dict[str, bytes]:
    return {
        shard.key(i): next(shard.read_images([i]))
        for shard in load_dataset(str(root / "shards")).shards
        for i in range(len(shard))
    }


def test_a_replayed_view_yields_the_cached_logits(root: Path) -> None:
    cache = open_cache(root / "cache")
    teacher = teacher_of(cache.manifest)
    pairs = [(1, key) for key in cache.keys(1)[:8]]
    views = np.stack([replay_view(cache, view, key, images(root)[key]) for view, key in pairs])
    pixels = (views - np.array(teacher.mean)) / np.array(teacher.std)
    with torch.inference_mode():
        response = teacher.respond(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))
    targets = cache.targets(pairs)
    assert isinstance(targets, LogitTargets)
    torch.testing.assert_close(targets.global_, response.global_, atol=2e-3, rtol=0)
    torch.testing.assert_close(targets.spatial, response.spatial, atol=2e-3, rtol=0)
    assert float(targets.spatial.std()) > 0.01  # far more than the tolerance


def test_another_image_and_other_pixels_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(root / "cache")
    one, other = list(images(root).items())[:2]
    with pytest.raises(CskdError, match="not the one the cache was made from"):
        replay_view(cache, 0, one[0], other[1])
    with pytest.raises(CskdError, match="missing from the cache"):
        replay_view(cache, 0, "missing", one[1])
    with pytest.raises(CskdError, match="too few views"):
        replay_view(cache, 2, *one)
    monkeypatch.setattr("cskd_pipeline.views.apply.digest", lambda pixels: 0)
    with pytest.raises(CskdError, match=r"1 views are not those the teacher saw"):
        replay_view(cache, 0, *one)


def test_mixed_views_need_the_loader(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache: Cache = open_cache(root / "cache")
    monkeypatch.setattr(type(cache.manifest.policy), "mixes", True)
    with pytest.raises(CskdError, match=r"mixed from two images[^$]*CachedLoader"):
        replay_view(cache, 0, "any", b"")


def test_the_example_runs_as_a_script(root: Path, tmp_path: Path) -> None:
    words = (f"{root}/shards/*.tar", root / "cache")
    ended = server().run(*words, log=tmp_path / "log", code=EXAMPLES / "webdataset_map.py")
    assert ended.code == 0, ended.output
    assert "2 views of 96 samples" in ended.output
    assert ended.output.count("of the locations have the image's class") == 2
