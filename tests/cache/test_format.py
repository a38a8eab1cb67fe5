"""The specification is correct and sufficient: its reader runs with only zarr and numpy."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.distill.ckf import envelope_labels
from cskd_pipeline.distill.encodings import ENCODINGS, Sampled
from cskd_pipeline.runtime import resources
from tests.cache.factories import CLASSES, COUNTS, VIEWS, dataset, manifest, teacher

PAGE = (resources.manifests() / "cache-format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page_reader() -> Any:
    """The reader in the specification, as a module."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) == {
        "math", "fractions", "numpy", "zarr",
    }  # fmt: skip
    assert len(code.splitlines()) <= 60
    module = ModuleType("page_reader")
    exec(compile(code, "cache-format.md", "exec"), module.__dict__)
    return module


def test_the_page_reader_recovers_hard_labels(finished: Path, page_reader: Any) -> None:
    reader = open_cache(finished)
    crossing = 0.25  # a multiple of 1/65535 or half of one is the hard case
    ratios = [0.0, 1.0, 1e-9, crossing, 0.5, 0.123456, 32767.5 / 65535, 32768 / 65535]
    for view in range(VIEWS):
        for shard, count in enumerate(COUNTS):
            lines = reader.rows("envelope", view, shard, range(count))["envelope/lines"]
            planes = torch.from_numpy(lines).flatten(1, 2)[:, :-1]
            q = planes[:, 1::2].flatten().tolist()
            for r in [*ratios, *((x + 0.5) / 65535 for x in q[:5] if x != 65535)]:
                expected = envelope_labels(planes, r).numpy()
                assert np.array_equal(
                    page_reader.hard_labels(finished, view, shard, r), expected
                ), r


def test_the_page_reader_reads_keys_and_refuses_unfinished_units(
    finished: Path, page_reader: Any, tmp_path: Path
) -> None:
    reader = open_cache(finished)
    for shard in range(len(COUNTS)):
        assert page_reader.keys(finished, shard) == reader.keys(shard)
    CacheWriter.create(tmp_path / "c", manifest())
    with pytest.raises(ValueError, match="not finished"):
        page_reader.hard_labels(tmp_path / "c", 0, 0, 1.0)


def test_the_specification_suffices_to_read_topk(tmp_path: Path) -> None:
    """Decode in numpy by the page alone and compare with the targets of the losses."""
    encoding = ENCODINGS["topk"]
    generator = torch.Generator().manual_seed(0)
    d = (torch.randn(2, 60, 2, 3, generator=generator) * 3).half()
    rows = encoding.encode(d, d.mean((2, 3)).half(), np.zeros(2, np.uint64))
    targets = encoding.targets(rows)
    row = {name.split("/")[1]: v[1].double().numpy() for name, v in rows.items()}
    classes = row["classes"].astype(int)
    rest = np.setdiff1d(np.arange(60), classes)
    for r, tau in ((0.0, 1.0), (0.3, 1.0), (1.0, 2.0), (0.7, 4.0)):
        a, b = r / tau, (1 - r) / tau
        c = 1 - a - b
        kept = np.exp(-(a * row["spatial"] + b * row["global"][:, None, None]) / 8)
        slope, at_a, half_a, halves = row["tail"]
        at_b, half_b = row["tail_global"]
        mass = c * (2 * c - 1) * np.log(60 - 24) + a * (2 * a - 1) * at_a + b * (2 * b - 1) * at_b
        mass = np.exp(mass + 4 * a * c * half_a + 4 * b * c * half_b + 4 * a * b * halves)
        share = np.exp(-(a * slope + b) * row["coarse"][rest][:, None, None] / 2)
        expected = np.empty((60, 2, 3))
        expected[classes], expected[rest] = kept, mass * share / share.sum(0)
        expected /= expected.sum(0)
        found = targets.spatial_log_probabilities(r, tau)[1].exp().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_tables_list_every_array_with_its_type_and_shape() -> None:
    arrays = layout.stored_arrays(
        manifest(
            encodings=tuple(ENCODINGS),
            sampled=Sampled(2),
            dataset=replace(dataset(), num_classes=40, class_names=None),
            teacher=teacher(num_classes=40),
        )
    )
    lengths = {
        "B": 2,
        "S": 3,
        "N": 5,
        "V": 4,
        "K": 40,
        "h": 2,
        "w": 3,
        "V / B": 2,
        "k": 24,
        "nh": 4,
    }
    # At most N = 5 rows in a chunk.
    lengths |= {"L": arrays["key"].shape[2], "c": 8, "2048": 5}
    files = 3 + 3 + (2 + 1) + (2 + 1 + 1) + 6 + 2 + 1  # per tar shard, per unit, per encoding
    lengths |= {"R": 32 * (2 + files), "S · R": 3 * 32 * (2 + files)}
    lengths |= {"a": 5, "b": 5, "2a": 5, "2b": 5}

    def numbers(cell: str) -> tuple[int, ...]:
        parts = (part.strip() for part in cell.strip("() ").split(","))
        return tuple(lengths[part] if part in lengths else int(part) for part in parts)

    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in PAGE.splitlines()
        if line.startswith("| `")
    ]
    assert {row[0] for row in rows} == set(arrays)
    for name, dtype, shape, file_shape, *rest in rows:
        array = arrays[name]
        assert (array.dtype, array.shape) == (dtype, numbers(shape)), name
        rounding = layout.round_up if array.chunk_shape else max
        chunk = array.chunk_shape or array.file_shape
        assert array.file_shape == tuple(map(rounding, numbers(file_shape), chunk)), name
        if "/" in name:
            assert rest[0] == "the file" or array.chunk_shape == numbers(rest.pop(0)), name
        assert rest[-1 if "/" in name else 0] == str(array.fill).replace("nan", "NaN"), name


def test_the_example_file_name_is_correct(finished: Path) -> None:
    example = layout.stored_arrays(manifest(views=6))["seed"].key(2 * 2, 5)
    assert example == "seed/c/2/5/0"
    assert f"`{example}`" in PAGE


def test_the_numbers_in_the_specification_match_the_code() -> None:
    cache_manifest = manifest(encodings=("envelope", "sampled"))
    for name in ("envelope/lines", "sampled/lines"):
        order = "(0, 1, 4, 3, 2, 5, 6)"
        assert str(layout.stored_arrays(cache_manifest)[name].order) == order
        assert order in " ".join(PAGE.split())
    spatial = layout.specs(manifest())["dense/spatial"]
    assert spatial.rows == 16384 // (2 * CLASSES * 2 * 3)
    cache_manifest = layout.specs(manifest(encodings=tuple(ENCODINGS)))
    assert cache_manifest["dense-q8/spatial"].rows == 16384 // (CLASSES * 2 * 3)
    assert cache_manifest["dense-q8/global"].rows == 16384 // CLASSES
    assert cache_manifest["dense-q8/step"].rows == 2048
    assert cache_manifest["topk/classes"].tail == (min(CLASSES, 24),)
    assert "topk/tail" not in cache_manifest
