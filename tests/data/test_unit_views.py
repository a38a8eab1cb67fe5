"""Views for the dump: every view of a unit once, in the same batches for any worker count."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from cskd_pipeline.data import batches as batches_module
from cskd_pipeline.data import unit_views as unit_views_module
from cskd_pipeline.data.batches import Batch, Renderer, render_batch
from cskd_pipeline.data.images import ImageSource
from cskd_pipeline.data.index import Dataset, load_dataset
from cskd_pipeline.data.plan import SampleSet
from cskd_pipeline.data.unit_views import Loading, items_of, unit_batches
from cskd_pipeline.errors import ImageError
from cskd_pipeline.views.policy import ViewPolicy
from tests.conftest import COUNTS
from tests.data.factories import POLICY, ROOT_SEED, same
from tests.images import sample, write_shard

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

UNITS = [(0, range(4)), (2, range(4)), (0, range(4, 8)), (3, range(4)), (1, range(2))]


def batches(dataset: Dataset, units: Any = UNITS, **options: Any) -> list[Batch]:
    return list(
        unit_batches(dataset, units, POLICY, ROOT_SEED, Loading(**{"batch_size": 10, **options}))
    )


def units_of(found: list[Batch]) -> list[tuple[int, int]]:
    """Return (shard, block of four views) of each batch."""
    return [(int(b.index[0, 1]), int(b.index[0, 0]) // 4) for b in found]


def test_every_view_is_yielded_once_and_units_in_order(dataset: Dataset) -> None:
    for workers in (0, 3):
        found = batches(dataset, workers=workers)
        rows = Counter(tuple(row) for batch in found for row in batch.index.tolist())
        assert set(rows.values()) == {1}
        assert set(rows) == {
            (view, shard, offset)
            for shard, views in UNITS
            for view in views
            for offset in range(COUNTS[shard])
        }
        assert list(dict.fromkeys(units_of(found))) == [(0, 0), (2, 0), (0, 1), (3, 0), (1, 0)]
        assert units_of(found) == sorted(
            units_of(found), key=[(0, 0), (2, 0), (0, 1), (3, 0), (1, 0)].index
        )
        assert max(map(len, found)) <= 10


def test_the_batches_do_not_depend_on_the_workers(dataset: Dataset) -> None:
    alone = {batch.index.numpy().tobytes(): batch for batch in batches(dataset)}
    for workers in (1, 2, 3):
        found = batches(dataset, workers=workers)
        assert len(found) == len(alone)
        for batch in found:
            assert same(batch, alone[batch.index.numpy().tobytes()])


def test_a_resumed_dump_has_the_batches_of_an_uninterrupted_one(dataset: Dataset) -> None:
    rest = batches(dataset, UNITS[2:])
    whole = batches(dataset)[-len(rest) :]
    assert all(same(a, b) for a, b in zip(rest, whole, strict=True))


def test_the_views_equal_those_rendered_in_training(dataset: Dataset) -> None:
    renderer = Renderer(SampleSet.of(dataset), ImageSource(dataset.shards), POLICY, ROOT_SEED)
    for batch in batches(dataset, [(0, range(2, 4))]):
        assert same(batch, render_batch(renderer, batch.index.numpy()))


def test_an_image_is_decoded_once_for_the_whole_block(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: Counter[str] = Counter()
    decode = batches_module.decode

    def counting(data: bytes, where: str) -> Any:
        decoded[where] += 1
        return decode(data, where)

    monkeypatch.setattr(batches_module, "decode", counting)
    batches(dataset, [(0, range(4)), (2, range(4))], batch_size=7)
    assert len(decoded) == COUNTS[0] + COUNTS[2]
    assert set(decoded.values()) == {1}


def test_no_batch_carries_views_that_it_does_not_need(dataset: Dataset) -> None:
    for batch in batches(dataset, batch_size=5):
        needed = torch.cat([batch.own, batch.partner]).unique()
        assert torch.equal(needed, torch.arange(len(batch.pixels)))
        assert len(batch.seed) == len(batch.view_digest) == len(batch.pixels)


@pytest.mark.parametrize("batch_size", [1, 64, 100, 128, 1024])
@pytest.mark.parametrize(("views", "count"), [(1, 1251), (3, 1251), (10, 1252), (10, 20), (1, 1)])
def test_items_cover_a_unit_and_stay_small(batch_size: int, views: int, count: int) -> None:
    policy = ViewPolicy()
    items = items_of((5, range(20, 20 + views)), count, policy, batch_size)
    covered = Counter(tuple(row) for item in items for row in item.tolist())
    assert set(covered) == {(20 + v, 5, o) for v in range(views) for o in range(count)}
    assert set(covered.values()) == {1}
    for item in items:
        assert len(item) * policy.size**2 * 3 <= unit_views_module.ITEM_BYTES
        first, last = item[0, 2], item[-1, 2]
        assert first % policy.window == 0  # partners share a window
        assert last + 1 == count or (last + 1) % policy.window == 0
        assert len(item) == len(set(item[:, 0].tolist())) * (last + 1 - first)
    full = -(-len(items[0]) // batch_size) * batch_size
    assert full < 2 * len(items[0]) or batch_size > count


def test_windows_too_large_for_memory_are_split_by_view() -> None:
    policy = ViewPolicy(size=384, window=512)
    items = items_of((0, range(10)), 1000, policy, 128)
    for view, item in enumerate(items[:10]):
        assert item.tolist() == [[view, 0, offset] for offset in range(512)]
    policy = ViewPolicy(size=384)
    found = items_of((0, range(10)), 64, policy, 128)
    assert [np.unique(item[:, 0]).tolist() for item in found] == [[*range(5)], [*range(5, 10)]]


def test_a_corrupt_image_is_refused_with_its_name(tmp_path: Any) -> None:
    content = [sample(i) for i in range(6)]
    key, fields = content[4]
    content[4] = (key, {**fields, "jpg": b"\xff\xd8 no image"})
    path = write_shard(tmp_path / "broken.tar", content)
    dataset = load_dataset(path, num_classes=5)
    for workers in (0, 2):
        with pytest.raises(ImageError, match="cannot be decoded") as caught:
            batches(dataset, [(0, range(2))], workers=workers)
        assert caught.value.where == f"{path}: {key}"
