"""``own_teacher.py`` on images of digits: the cache contains the network's logits."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import cskd_pipeline as cskd
from cskd_pipeline.data.assemble import assemble
from cskd_pipeline.data.batches import Renderer, render_batch
from cskd_pipeline.data.images import ImageSource
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.data.plan import SampleSet
from cskd_pipeline.tools.demo_images import write_digit_folders
from cskd_pipeline.tools.make_shards import make_shards
from tests.examples.conftest import EXAMPLES
from tests.examples.test_examples import code_lines
from tests.processes import server

EXAMPLE = EXAMPLES / "own_teacher.py"
LINES = 30


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 48 images of digits, 48x48 pixels, as three tars."""
    folder = tmp_path_factory.mktemp("digits")
    write_digit_folders(folder, train=48, validation=1, seed=0)
    make_shards(folder / "train", folder / "shards", shard_size=20, seed=0)
    return folder / "shards"


def test_the_cache_has_the_networks_logits_for_every_view(digits: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    ended = server().run(digits, path, log=tmp_path / "log", code=EXAMPLE)
    assert ended.code == 0, ended.output
    cache, dataset = cskd.open_cache(path), load_dataset(digits)
    assert cache.done().all()
    assert (cache.views, cache.counts) == (2, dataset.counts)
    torch.manual_seed(0)
    cnn = runpy.run_path(str(EXAMPLE))["TinyCNN"](10)
    policy, images = cache.manifest.policy, ImageSource(dataset.shards)
    renderer = Renderer(SampleSet.of(dataset), images, policy, cache.manifest.root_seed)
    for shard, count in enumerate(cache.counts):
        for view in range(cache.views):
            rows = np.array([(view, shard, offset) for offset in range(count)])
            with torch.inference_mode():
                expected = cnn(assemble(render_batch(renderer, rows), policy))
            stored_rows = cache.rows("dense", view, shard, np.arange(count))
            for logits, stored in zip(expected, stored_rows.values(), strict=True):
                # Another batch size may change the last bits of float32, and so of float16.
                np.testing.assert_allclose(stored, logits.half().numpy(), rtol=2**-9, atol=1e-5)
                assert np.ptp(stored) > 0.1


def test_the_example_has_at_most_thirty_lines_of_code() -> None:
    assert code_lines(EXAMPLE) <= LINES
