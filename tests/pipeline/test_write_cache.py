"""Writing a cache from any network: logits accepted, logits refused, and resuming."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cskd_pipeline import CacheSection, Loading, TeacherInfo, WriteOptions, open_cache, write_cache
from cskd_pipeline.cache.claims import FOLDER
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.data.index import Dataset
from cskd_pipeline.errors import CacheError, OutputError, TeacherError, UsageError
from cskd_pipeline.pipeline.unit_writer import UnitWriter
from tests.data.factories import POLICY
from tests.pipeline.world import cache_files

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GRID = (2, 3)
TEACHER = TeacherInfo("mine", "file", "0" * 64, 5, POLICY.size, (0.5,) * 3, (0.25,) * 3, GRID)


def network(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits that differ between views, independent of the rest of the batch."""
    cells = torch.nn.functional.adaptive_max_pool2d(images, GRID)
    spatial = torch.stack([cells[:, 0] * (k + 1) - cells[:, 1] * k for k in range(5)], dim=1)
    return spatial, spatial.amax((2, 3))


def cache_of(path: Path, views: int = 4) -> CacheSection:
    return CacheSection(str(path), encodings=("dense", "envelope"), views=views, view_block=2)


def writer(
    path: Path,
    dataset: Dataset,
    views: int = 4,
    options: WriteOptions = WriteOptions(),  # noqa: B008
) -> UnitWriter:
    loading = Loading(batch_size=16)
    return write_cache(
        cache_of(path, views), dataset, TEACHER, POLICY, loading=loading, options=options
    )


def fill(
    out: UnitWriter,
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda *logits: logits,
    stop: Callable[[int], bool] = lambda complete: False,
) -> UnitWriter:
    """Put the network's logits through ``change`` until ``stop(complete units)`` is true."""
    complete = 0
    with out:
        for batch in out.views():
            complete += out.put(batch, *change(*network(batch.images)))
            if stop(complete):
                break
    return out


def write_all(path: Path, dataset: Dataset, views: int = 4) -> UnitWriter:
    return fill(writer(path, dataset, views))


@pytest.fixture
def complete_files(dataset: Dataset, tmp_path: Path) -> dict[str, bytes]:
    """Every file except the manifest of a cache written without interruption."""
    out = write_all(tmp_path / "full", dataset)
    assert out.views_written == out.views_total == 4 * dataset.samples
    assert open_cache(tmp_path / "full").done().all()
    return cache_files(tmp_path / "full")


def test_a_writer_resumes_after_an_error_with_the_remaining_units(
    dataset: Dataset, complete_files: dict[str, bytes], tmp_path: Path
) -> None:
    path, rounds = tmp_path / "cache", 0
    while (out := writer(path, dataset)).units:
        done = open_cache(path).done()
        assert len(out.units) == (~done).sum()
        counted = []

        def stop(complete: int, counted: list[int] = counted) -> bool:
            counted.append(complete)
            if complete:
                raise ZeroDivisionError
            return False

        with pytest.raises(ZeroDivisionError):
            fill(out, stop=stop)
        assert open_cache(path).done().sum() == done.sum() + counted[-1]
        rounds += 1
    assert rounds > 3
    assert cache_files(path) == complete_files


def test_leaving_the_loop_writes_the_complete_units(dataset: Dataset, tmp_path: Path) -> None:
    out = fill(writer(tmp_path / "cache", dataset), stop=bool)
    assert 0 < out.views_written < out.views_total
    assert open_cache(tmp_path / "cache").done().sum() == 1


def test_putting_logits_renews_the_claims(dataset: Dataset, tmp_path: Path) -> None:
    loading, options = Loading(batch_size=1), WriteOptions(patience=0.0)
    cache = cache_of(tmp_path / "cache")
    out = write_cache(cache, dataset, TEACHER, POLICY, loading=loading, options=options)
    with out:
        batch = next(out.views())
        claims = [*(tmp_path / "cache" / FOLDER).iterdir()]
        for claim in claims:
            os.utime(claim, (0, 0))
        assert not out.put(batch, *network(batch.images))
        assert claims
        assert all(claim.stat().st_mtime > 0 for claim in claims)


def test_a_cache_is_extended_by_more_views_and_split_by_ranges(
    dataset: Dataset, complete_files: dict[str, bytes], tmp_path: Path
) -> None:
    write_all(tmp_path / "extended", dataset, views=2)
    write_all(tmp_path / "extended", dataset, views=4)
    assert cache_files(tmp_path / "extended") == complete_files
    for part in (WriteOptions(view_range=(2, 4)), WriteOptions(shard_range=(1, 3))):
        out = fill(writer(tmp_path / "shared", dataset, options=part))
    assert {(unit.shard, unit.block) for unit in out.units} == {(1, 0), (2, 0)}
    write_all(tmp_path / "shared", dataset)
    assert cache_files(tmp_path / "shared") == complete_files


def test_logits_with_gradients_or_in_float16_are_accepted(
    dataset: Dataset, complete_files: dict[str, bytes], tmp_path: Path
) -> None:
    fill(writer(tmp_path / "a", dataset), lambda s, g: (s.requires_grad_(), g.requires_grad_()))
    fill(writer(tmp_path / "b", dataset), lambda s, g: (s.half(), g.half()))
    assert cache_files(tmp_path / "a") == cache_files(tmp_path / "b") == complete_files


@pytest.mark.parametrize(
    ("change", "shapes"),
    [
        (lambda s, g: (s.mT, g), r"spatial \(16, 5, 3, 2\), global \(16, 5\)"),
        (lambda s, g: (s, g[:8]), r"spatial \(16, 5, 2, 3\), global \(8, 5\)"),
        (lambda s, g: (s[:, :4], g[:, :4]), r"spatial \(16, 4, 2, 3\), global \(16, 4\)"),
    ],
)
def test_logits_of_another_shape_are_refused(
    dataset: Dataset, tmp_path: Path, change: Callable[..., tuple[Tensor, Tensor]], shapes: str
) -> None:
    with pytest.raises(UsageError, match=shapes):
        fill(writer(tmp_path / "cache", dataset), change)


def test_logits_beyond_float16_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="mine"):
        fill(writer(tmp_path / "cache", dataset), lambda s, g: (s, g * 1e5))
    assert not open_cache(tmp_path / "cache").done().any()


def test_views_out_of_order_repeated_or_outside_the_block_are_refused(
    dataset: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="inside the writer's with block"):
        next(writer(tmp_path / "cache", dataset).views())
    with writer(tmp_path / "cache", dataset) as out:
        one, two, three, *_ = out.views()
        out.put(one, *network(one.images))
        for other in (one, three):
            with pytest.raises(UsageError, match="not the next batch"):
                out.put(other, *network(other.images))
        out.put(two, *network(two.images))
    with pytest.raises(UsageError, match="inside the writer's with block"):
        out.put(three, *network(three.images))


@NEEDS_GPU
def test_logits_may_be_on_a_gpu_and_the_views_on_the_host(dataset: Dataset, tmp_path: Path) -> None:
    fill(writer(tmp_path / "cache", dataset), lambda s, g: (s.cuda(), g.cuda()))
    assert open_cache(tmp_path / "cache").done().all()


def test_a_failed_write_is_raised_by_the_block(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> bool:
        raise OutputError("no space left")

    monkeypatch.setattr(CacheWriter, "write_unit", full)
    with pytest.raises(OutputError, match="no space left"):
        write_all(tmp_path / "cache", dataset)


def test_another_teacher_or_an_unknown_encoding_is_refused(
    dataset: Dataset, tmp_path: Path
) -> None:
    write_all(tmp_path / "cache", dataset, views=2)
    settings, other = cache_of(tmp_path / "cache"), replace(TEACHER, weights_sha256="1" * 64)
    with pytest.raises(CacheError, match="weights_sha256"):
        write_cache(settings, dataset, other, POLICY)
    unknown = CacheSection(str(tmp_path / "c"), encodings=("dens",))
    with pytest.raises(CacheError, match="unknown encoding"):
        write_cache(unknown, dataset, TEACHER, POLICY)
