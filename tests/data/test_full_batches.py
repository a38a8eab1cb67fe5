"""Pieces of any size become full batches, in order, and every field keeps its view."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cskd_pipeline.data.assemble import assemble
from cskd_pipeline.data.full_batches import TeacherViews, full_batches
from cskd_pipeline.data.index import Dataset
from cskd_pipeline.data.unit_views import Loading, unit_batches
from tests.data.factories import POLICY, ROOT_SEED

UNITS = [(0, range(3)), (2, range(2))]


def numbered(first: int, count: int) -> TeacherViews:
    """Return views in which every field is the view's number."""
    number = np.arange(first, first + count)
    images = torch.from_numpy(number).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return TeacherViews(
        images=images.contiguous(memory_format=torch.channels_last),
        label=torch.from_numpy(number),
        index=np.stack([number] * 3, axis=1).astype(np.int32),
        seed=number.astype(np.uint64),
        image_crc32=number.astype(np.uint32),
        view_digest=number.astype(np.uint32),
    )


def pieces(sizes: list[int]) -> list[TeacherViews]:
    starts = np.cumsum([0, *sizes]).tolist()
    return [numbered(start, size) for start, size in zip(starts, sizes, strict=False)]


@pytest.mark.parametrize("size", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("sizes", [[], [1], [4, 4], [3, 3, 3], [9, 1, 2, 14], [1] * 8])
def test_only_the_last_batch_is_short_and_every_field_keeps_its_view(
    sizes: list[int], size: int
) -> None:
    total = sum(sizes)
    found = list(full_batches(iter(pieces(sizes)), size))
    assert [len(views) for views in found] == [
        *([size] * (total // size)),
        *([total % size] if total % size else []),
    ]
    start = 0
    for views in found:
        expected = numbered(start, len(views))
        assert torch.equal(views.images, expected.images)
        assert views.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(views.label, expected.label)
        for name in ("index", "seed", "image_crc32", "view_digest"):
            assert np.array_equal(getattr(views, name), getattr(expected, name))
        start += len(views)


def test_a_full_batch_is_yielded_at_once_and_not_copied() -> None:
    taken = []

    def stream() -> object:
        for piece in pieces([4, 4, 4]):
            taken.append(piece)
            yield piece

    for number, views in enumerate(full_batches(stream(), 4), 1):  # type: ignore[arg-type]
        assert len(taken) == number
        assert views.images.data_ptr() == taken[-1].images.data_ptr()


def test_views_of_a_batch_have_their_own_seeds_and_the_larger_images_label(
    dataset: Dataset,
) -> None:
    mixed = 0
    for batch in unit_batches(dataset, UNITS, POLICY, ROOT_SEED, Loading(8)):
        views = TeacherViews.of(batch, POLICY, torch.device("cpu"))
        assert torch.equal(views.images, assemble(batch, POLICY))
        for row in range(len(batch)):
            own, larger = int(batch.own[row]), float(batch.lam[row]) >= 0.5
            mixed += not larger
            assert views.label[row] == (batch.label if larger else batch.partner_label)[row]
            for name in ("seed", "image_crc32", "view_digest"):
                assert int(getattr(views, name)[row]) == int(getattr(batch, name).numpy()[own])
    assert mixed > 0
