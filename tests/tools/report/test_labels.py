"""Labels at every location and ratio, and their statistics, compared with plain numpy."""

from __future__ import annotations

from base64 import b64decode
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cskd_pipeline.cache.convert import Conversion, convert
from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.data.assemble import assemble
from cskd_pipeline.data.batches import render_batch
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.data.join import Join, join
from cskd_pipeline.distill.encodings import ENCODINGS
from cskd_pipeline.distill.targets import SampledTargets
from cskd_pipeline.tools.report import labels as labels_module
from cskd_pipeline.tools.report.gallery import (
    choose_views,
    class_names,
    ground_truth,
    replay_views,
    words_of,
)
from cskd_pipeline.tools.report.labels import (
    APPROXIMATED,
    Labels,
    draw_rows,
    planes_of,
    read_labels,
)
from tests import own
from tests.cache.factories import make
from tests.pipeline import world
from tests.pipeline.conftest import World

ROWS = np.array([(0, 0, 1), (0, 0, 4), (1, 0, 0), (3, 1, 2), (2, 2, 3)])


def fused(cache: Cache, rows: np.ndarray, r: float) -> np.ndarray:
    """Return the argmax over classes of r * d + (1 - r) * g, in float64: (n, h, w)."""
    logits = cache.gather("dense", rows)
    d = logits["dense/spatial"].astype(np.float64)
    g = logits["dense/global"].astype(np.float64)[:, :, None, None]
    return (r * d + (1 - r) * g).argmax(axis=1)


def test_labels_of_dense_logits_are_the_argmax_of_the_fused_response(tmp_path: Path) -> None:
    make(tmp_path / "c", encodings=("dense",))
    cache = open_cache(tmp_path / "c")
    labels = read_labels(cache, ROWS)
    assert (labels.encoding, labels.exact) == ("dense", True)
    for r in np.linspace(0, 1, 23):
        assert np.array_equal(labels.at(float(r)), fused(cache, ROWS, float(r)))
    fine = np.stack([fused(cache, ROWS, r) for r in np.linspace(0, 1, 1_001)])
    changes = (fine[1:] != fine[:-1]).sum(axis=0)
    assert (labels.lines() >= changes + 1).all()
    assert (labels.lines() - changes - 1).sum() <= 3  # a line may be on top between two ratios


@pytest.mark.parametrize("encoding", ["envelope", "dense-q8", "topk"])
def test_labels_of_other_encodings_match_the_logits(
    small: World, tmp_path: Path, encoding: str
) -> None:
    world.cli("cache", "convert", small.cache, tmp_path / "c", "--encoding", encoding, "-q")
    rows = np.array([(v, 0, o) for v in range(2) for o in range(30)])
    labels = read_labels(open_cache(tmp_path / "c"), rows)
    dense = open_cache(small.cache)
    assert labels.encoding == encoding
    assert labels.exact == (encoding == "envelope")
    for r in (0.0, 0.35, 1.0):
        equal = (labels.at(r) == fused(dense, rows, r)).mean()
        assert equal == 1 if labels.exact else equal > 0.85, (r, equal)


@pytest.mark.parametrize(
    ("kinds", "exact"), [(("hard", "soft"), True), (("hard",), False), (("soft",), False)]
)
def test_labels_of_a_registered_encoding_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...], exact: bool
) -> None:
    encoding = own.Negated()
    encoding.serves, encoding.exact = kinds, exact
    monkeypatch.setitem(ENCODINGS, encoding.name, encoding)
    make(tmp_path / "c", encodings=("dense",))
    convert(tmp_path / "c", tmp_path / "own", Conversion([encoding.name]))
    labels = read_labels(open_cache(tmp_path / "own"), ROWS)
    assert (labels.encoding, labels.exact) == (encoding.name, exact)
    dense = open_cache(tmp_path / "c")
    for r in APPROXIMATED:
        assert np.array_equal(labels.at(float(r)), fused(dense, ROWS, float(r)))


def test_labels_of_a_sampled_cache_are_its_first_draw(tmp_path: Path) -> None:
    make(tmp_path / "dense", encodings=("dense",))
    conversion = Conversion(["sampled"], sampled_draws=2, sampled_temperature=3.0)
    convert(tmp_path / "dense", tmp_path / "c", conversion)
    cache = open_cache(tmp_path / "c")
    labels = read_labels(cache, ROWS)
    assert (labels.encoding, labels.exact) == ("sampled", False)
    arrays = {n: torch.from_numpy(a) for n, a in cache.gather("sampled", ROWS).items()}
    targets = cache.encodings["sampled"].targets(arrays)
    assert isinstance(targets, SampledTargets)
    for r in (0.0, 0.35, 1.0):
        assert np.array_equal(labels.at(r), targets.drawn_spatial(r, 3.0)[:, 0].numpy())


def test_planes_from_labels_at_some_ratios_reproduce_them() -> None:
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, 3, (4, len(APPROXIMATED), 2, 3))
    planes = planes_of(chosen)
    labels = Labels("topk", False, planes)
    for i, r in enumerate(APPROXIMATED):
        assert np.array_equal(labels.at(float(r)), chosen[:, i])


@pytest.fixture(scope="module")
def joined(small: World) -> Join:
    return join(load_dataset(str(small.shards)), open_cache(small.cache))


def test_statistics_count_every_location(joined: Join) -> None:
    cache = joined.cache
    rows = draw_rows(cache, 10_000)
    assert len(rows) == cache.views * joined.samples.total  # below the limit of slabs
    counted = read_labels(cache, rows)
    pairing = joined.renderer.pair(rows)
    own = np.array([cache.labels(s)[o] for _, s, o in rows.tolist()])
    partner = np.array([cache.labels(s)[o] for _, s, o in pairing.partner.tolist()])
    lam = np.array([mix.lam for mix in pairing.mixes])
    larger = np.where(lam >= 0.5, own, partner)
    agreement = counted.agreement(larger[:, None, None])
    both = counted.agreement(own[:, None, None], partner[:, None, None])
    for index in (0, 50, 100):
        labels = fused(cache, rows, index / 100)
        right = labels == larger[:, None, None]
        assert agreement[index] == pytest.approx(right.mean(), abs=1e-3)
        either = (labels == own[:, None, None]) | (labels == partner[:, None, None])
        assert both[index] == pytest.approx(either.mean(), abs=1e-3)


def test_views_are_sampled_from_few_slabs(joined: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_module, "SLABS", 5)
    rows = draw_rows(joined.cache, 50)
    assert len(np.unique(rows, axis=0)) == 50
    assert len(np.unique(rows[:, :2], axis=0)) == 5


def test_views_dominated_by_one_image_come_first(joined: Join) -> None:
    own = ground_truth(joined.cache, choose_views(joined, 12)).share
    shares = np.maximum(own, 1 - own)
    assert shares.tolist() == sorted(shares.tolist(), reverse=True)
    assert shares[0] > shares[-1]


def test_imagenet_classes_are_named_in_words(tmp_path: Path) -> None:
    assert words_of(["n01443537", "n02012849", "n03126707", "n99999999", "disc"]) == [
        "goldfish", "crane (n02012849)", "crane (n03126707)", "n99999999", "disc",
    ]  # fmt: skip
    make(tmp_path / "c", encodings=("dense",))
    assert class_names(open_cache(tmp_path / "c"))[:2] == ["class 0", "class 1"]


def test_imagenet_keys_name_classes_when_shards_have_no_names() -> None:
    cache: Any = SimpleNamespace(
        manifest=SimpleNamespace(dataset=SimpleNamespace(class_names=None, num_classes=1000)),
        done=lambda: np.array([[False, True]]),
        keys=lambda shard: {1: ["n01443537_7"]}[shard],
        labels=lambda shard: np.array([1]),
    )
    assert class_names(cache)[:2] == ["tench", "goldfish"]
    cache.labels = lambda shard: np.array([2])
    assert class_names(cache)[:2] == ["class 0", "class 1"]


def test_replayed_views_are_those_the_network_saw(joined: Join) -> None:
    rows = choose_views(joined, 6)
    views = replay_views(joined, rows)
    assert all(view.same and view.exact for view in views)
    numbers = [(view.number, *joined.cache.find([view.key])[0]) for view in views]
    assert numbers == [tuple(row) for row in rows.tolist()]
    batch = render_batch(joined.renderer, rows)
    seen = assemble(batch, joined.cache.manifest.policy).permute(0, 2, 3, 1)
    expected = torch.round(seen.clamp(0, 1) * 255).byte().numpy()
    assert np.array_equal(np.stack([view.pixels for view in views]), expected)
    kind, _, data = views[0].image.partition(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(BytesIO(b64decode(data)))), expected[0])
