"""Batches: their contents, no repeated work, and the same result with any number of processes."""

from __future__ import annotations

import itertools
import random
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cskd_pipeline.cache.reader import Cache
from cskd_pipeline.data import batches as batches_module
from cskd_pipeline.data.batches import Batch, Renderer, render_batch
from cskd_pipeline.data.cached_loader import CachedLoader
from cskd_pipeline.data.images import ImageSource
from cskd_pipeline.data.index import Dataset, load_dataset
from cskd_pipeline.data.join import join
from cskd_pipeline.data.plan import SampleSet
from cskd_pipeline.data.training_views import TrainingViews
from cskd_pipeline.data.workers import Loader
from cskd_pipeline.errors import UsageError, ViewDriftError
from cskd_pipeline.views import apply
from cskd_pipeline.views.bits import view_seed
from cskd_pipeline.views.decode import decode
from cskd_pipeline.views.draw import draw
from cskd_pipeline.views.mixing import draw_mix, matching
from tests.data.factories import POLICY, ROOT_SEED, VIEWS, make_cache, same

REPEATS, BATCH = 2, 16


def loader_of(views: TrainingViews, **changes: Any) -> CachedLoader:
    return CachedLoader(views, BATCH, repeats=REPEATS, seed=1, **changes)


def uncached(dataset: Dataset, **changes: Any) -> CachedLoader:
    views = TrainingViews.of_dataset(dataset, POLICY, ROOT_SEED)
    return loader_of(replace(views, views=VIEWS), **changes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Cache:
    return make_cache(tmp_path_factory.mktemp("cache") / "cache", load_dataset(shards))


def cached(dataset: Dataset, cache: Cache, drift: str = "error", **changes: Any) -> CachedLoader:
    return loader_of(TrainingViews.of_join(join(dataset, cache, drift=drift), "dense"), **changes)


def batch_at(loader: CachedLoader, epoch: int, step: int = 0, micro: int = 0) -> Batch:
    number = epoch * len(loader) + step * loader.accumulation + micro
    return loader.views[loader.rows(number)]


def test_a_row_has_the_view_and_partner_that_its_seeds_determine(dataset: Dataset) -> None:
    batch = batch_at(uncached(dataset), 1, 1, 0)
    assert batch.pixels.shape[1:] == (POLICY.size, POLICY.size, 3)
    assert batch.pixels.dtype == torch.uint8
    kinds: Counter[str] = Counter()
    for i, (view, shard, offset) in enumerate(batch.index.tolist()):
        tar = dataset.shards[shard]
        other = int(matching(ROOT_SEED, tar.keys_sha256, len(tar), view, POLICY)[offset])
        seeds = [view_seed(ROOT_SEED, tar.key(o), view) for o in (offset, other)]
        mix = draw_mix(*seeds, POLICY)
        partner = offset if mix.lam == 1.0 else other
        for number, o in ((batch.own[i], offset), (batch.partner[i], partner)):
            image = decode(next(tar.read_images([o])), "")
            height, width, _ = image.shape
            params = draw(view_seed(ROOT_SEED, tar.key(o), view), POLICY, width, height)
            assert np.array_equal(batch.pixels[number], apply.render(image, params, POLICY))
            assert batch.seed.numpy()[number] == view_seed(ROOT_SEED, tar.key(o), view)
            assert batch.image_crc32.numpy()[number] == zlib.crc32(next(tar.read_images([o])))
            assert batch.view_digest.numpy()[number] == apply.digest(batch.pixels[number].numpy())
            boxes, noise = erased(batch, int(number))
            assert boxes == [list(box) for box in params.erase]
            assert np.array_equal(noise, apply.erase_noise(params))
            kinds["erased"] += len(boxes)
        assert batch.lam[i] == np.float32(mix.lam)
        assert batch.cutmix_box[i].tolist() == list(mix.box if mix.cutmix else (0, 0, 0, 0))
        assert batch.label[i] == tar.label(offset)
        assert batch.partner_label[i] == tar.label(partner)
        kinds["alone" if mix.lam == 1.0 else "cutmix" if mix.cutmix else "mixup"] += 1
    assert min(kinds[kind] for kind in ("cutmix", "mixup", "erased")) > 0


def erased(batch: Batch, number: int) -> tuple[list[list[int]], np.ndarray]:
    """Return the erased boxes of a rendered view, and their noise."""
    area = (3 * batch.erase_box[:, 3] * batch.erase_box[:, 4]).numpy()
    noise = np.split(batch.erase_noise.numpy(), np.cumsum(area))
    mine = np.flatnonzero(batch.erase_box[:, 0].numpy() == number)
    boxes = batch.erase_box[mine, 1:].tolist()
    return boxes, np.concatenate([np.empty(0, np.int16), *(noise[i] for i in mine)])


def test_a_sample_without_partner_is_its_own(dataset: Dataset) -> None:
    renderer = uncached(dataset).views.renderer
    batch = render_batch(renderer, np.array([[0, 3, 0], [1, 3, 0]], np.int32))  # a tar of one
    assert torch.equal(batch.own, batch.partner)
    assert batch.lam.tolist() == [1.0, 1.0]
    assert torch.equal(batch.label, batch.partner_label)


def test_each_image_is_decoded_once_and_each_view_rendered_once(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, rendered = Counter(), Counter()

    def counting_decode(data: bytes, where: str) -> Any:
        decoded[where] += 1
        return decode(data, where)

    def counting_draw(seed: int, *rest: Any) -> Any:
        rendered[seed] += 1
        return draw(seed, *rest)

    monkeypatch.setattr(batches_module, "decode", counting_decode)
    monkeypatch.setattr(batches_module, "draw", counting_draw)
    batch = batch_at(uncached(dataset), 0, 0, 0)
    assert set(decoded.values()) == set(rendered.values()) == {1}
    assert len(rendered) == len(batch.pixels)
    # Neighbours share almost everything, but a pair may be cut at both ends of the batch.
    assert len(batch.pixels) <= BATCH + 2 * REPEATS
    assert len(decoded) <= BATCH // REPEATS + 4


def test_batches_are_the_same_for_any_number_of_workers_and_from_any_start(
    dataset: Dataset, cache: Cache
) -> None:
    source = cached(dataset, cache, accumulation=2)
    count = 3 * len(source)
    alone = [source.views[source.rows(number)] for number in range(count)]
    assert [len(batch) for batch in alone] == [BATCH // 2] * count
    for workers, start in ((0, 0), (1, 0), (2, 0), (2, 5)):
        loader = cached(dataset, cache, accumulation=2, workers=workers)
        loader.start_at(*divmod(start, len(loader)))
        loaded = list(loader.batches(count - start))
        assert len(loaded) == count - start
        for one, other in zip(loaded, alone[start:], strict=True):
            assert same(one, other)


def test_batches_are_the_same_in_a_process_that_shares_nothing(
    dataset: Dataset, cache: Cache
) -> None:
    source = cached(dataset, cache)
    orders = [source.rows(0), source.rows(2 * len(source) + 1)]
    loader = Loader(source.views, orders, workers=1, start_method="spawn")
    for one, rows in zip(loader, orders, strict=True):
        assert same(one, source.views[rows])


def test_ranks_and_micro_batches_are_the_parts_of_one_batch(dataset: Dataset) -> None:
    full = batch_at(uncached(dataset), 1, 0, 0)
    parts = [
        batch_at(uncached(dataset, rank=rank, world=2, accumulation=2), 1, 0, micro)
        for rank in range(2)
        for micro in range(2)
    ]
    assert torch.equal(torch.cat([part.index for part in parts]), full.index)
    for name in ("lam", "label", "partner_label", "cutmix_box"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(full, name))
    pixels = torch.cat([part.pixels[part.own] for part in parts])
    assert torch.equal(pixels, full.pixels[full.own])
    with pytest.raises(UsageError, match="equal parts"):
        uncached(dataset, world=3)


def test_a_cache_yields_its_recorded_views_and_targets(dataset: Dataset, cache: Cache) -> None:
    source, plain = cached(dataset, cache), uncached(dataset)
    for position in itertools.product(range(2), range(source.plan.steps)):
        batch, other = (batch_at(loader, *position) for loader in (source, plain))
        assert torch.equal(batch.pixels, other.pixels)
        assert torch.equal(batch.seed, other.seed)
        assert batch.drifted == 0
        for i, (view, shard, offset) in enumerate(batch.index.tolist()):
            rows = cache.rows("dense", view, shard, [offset])
            assert set(rows) == set(batch.targets)
            for name, row in rows.items():
                assert np.array_equal(batch.targets[name][i].numpy(), row[0])
        assert not other.targets


def test_seeds_come_from_the_cache_not_from_their_formula(
    tmp_path: Path, dataset: Dataset, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_at(cached(dataset, cache), 0, 0, 0)
    monkeypatch.setattr(batches_module, "view_seed", None)
    assert same(batch_at(cached(dataset, cache), 0, 0, 0), batch)


class Drifted(Cache):
    """A cache whose view digests differ from the pixels' for one view."""

    def view_digests(self, view: int, shard: int) -> np.ndarray:
        return super().view_digests(view, shard) ^ np.uint32(view == 1)


def test_a_view_that_does_not_replay_is_refused_and_named(dataset: Dataset, cache: Cache) -> None:
    source = cached(dataset, Drifted(cache.store, cache.done()))
    with pytest.raises(ViewDriftError, match="views are not those the teacher saw") as caught:
        _ = batch_at(source, 0, 0, 0)
    assert caught.value.found == "the same library versions"
    line = caught.value.problems[0]
    assert ", view 1: digest " in line
    assert any(key in line for key in dataset.shards[0].keys + dataset.shards[2].keys)


def test_drift_is_counted_if_accepted(dataset: Dataset, cache: Cache) -> None:
    batch = batch_at(cached(dataset, Drifted(cache.store, cache.done()), drift="warn"), 0, 0, 0)
    clean = batch_at(cached(dataset, cache), 0, 0, 0)
    assert 0 < batch.drifted < len(batch.pixels)
    assert torch.equal(batch.pixels, clean.pixels)


def test_the_error_names_the_versions_that_differ(
    dataset: Dataset, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {**cache.manifest.versions, "pillow": "1.0"}
    monkeypatch.setattr(batches_module, "library_versions", lambda: versions)
    with pytest.raises(ViewDriftError) as caught:
        _ = batch_at(cached(dataset, Drifted(cache.store, cache.done())), 0, 0, 0)
    assert f"pillow: {cache.manifest.versions['pillow']} and 1.0" in caught.value.found


def test_loading_leaves_every_global_generator_alone(dataset: Dataset) -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    for workers in (0, 1):
        list(uncached(dataset, workers=workers))
    assert states() == before


def test_a_batch_arrives_from_another_process_unchanged(dataset: Dataset, cache: Cache) -> None:
    source = cached(dataset, cache)
    batch = batch_at(source, 0, 0, 0)
    (arrived,) = cached(dataset, cache, workers=1).batches(1)
    assert same(arrived, batch)
    assert same(batch.to("cpu"), batch)
    assert len(batch) == BATCH


def test_a_pair_that_is_not_mixed_renders_no_partner(dataset: Dataset) -> None:
    policy = replace(POLICY, mix=0.5)
    renderer = Renderer(SampleSet.of(dataset), ImageSource(dataset.shards), policy, ROOT_SEED)
    partners = matching(ROOT_SEED, dataset.shard_ids[0], 21, 0, policy)
    kinds = Counter()
    for offset in np.flatnonzero(partners != np.arange(21)).tolist():
        batch = render_batch(renderer, np.array([[0, 0, offset]], np.int32))
        mixed = float(batch.lam) < 1.0
        assert len(batch.pixels) == 1 + mixed
        assert batch.partner_label == dataset.shards[0].label(partners[offset] if mixed else offset)
        kinds[mixed] += 1
    assert min(kinds[True], kinds[False]) > 3


def test_sort_keys_are_unique_and_ordered_for_any_size_of_data_set() -> None:
    edges = (0, 1, 2**19, 2**20 - 1)
    rows = [(v, s, o) for s in edges for o in (*edges, 2**24 - 1) for v in edges]
    keys = batches_module._sort_keys(np.array(rows, np.int32))
    assert (keys[1:] > keys[:-1]).all()


def test_no_mixing_means_no_partners(dataset: Dataset) -> None:
    policy = replace(POLICY, mix=0.0)
    renderer = Renderer(SampleSet.of(dataset), ImageSource(dataset.shards), policy, ROOT_SEED)
    rows = np.array([[v, 0, o] for o in range(4) for v in range(2)], np.int32)
    batch: Batch = render_batch(renderer, rows)
    assert torch.equal(batch.own, batch.partner)
    assert len(batch.pixels) == len(rows)
    assert (batch.lam == 1).all()
