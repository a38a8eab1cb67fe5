"""Encodings store logits or hard labels exactly, or soft targets within bounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cskd_pipeline.cache.layout import stored_arrays
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.distill.encodings import ENCODINGS, Encoding, ResponseShape, Rows
from cskd_pipeline.distill.targets import LogitTargets, SampledTargets
from cskd_pipeline.errors import CacheError
from tests.cache.factories import (
    CLASSES,
    HEIGHT,
    WIDTH,
    dataset,
    lines,
    manifest,
    padded,
    teacher,
    unit_data,
)

RATIOS = [0.0, 1e-6, 0.1, 1 / 3, 0.5, 0.75, 0.999, 1.0]

SEEDS = np.arange(8, dtype=np.uint64)


def logits(
    seed: int, samples: int, classes: int, height: int = HEIGHT, width: int = WIDTH
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, K, h, w) and (B, K) float16 on a coarse grid, so that ties are common."""
    rng = np.random.default_rng(seed)
    spatial = np.round(rng.normal(size=(samples, classes, height, width)) * 8) / 8
    return (
        torch.from_numpy(spatial.astype(np.float16)),
        torch.from_numpy(spatial.mean(axis=(2, 3)).astype(np.float16)),
    )


@pytest.mark.parametrize("classes", [1, 2, 20, 40])
def test_a_response_survives_the_round_trip_through_a_cache(tmp_path: Path, classes: int) -> None:
    made = manifest(
        dataset=replace(dataset(), num_classes=classes, class_names=None),
        teacher=teacher(num_classes=classes),
        encodings=tuple(ENCODINGS),
    )
    writer = CacheWriter.create(tmp_path / "c", made)
    responses = {}
    for unit in writer.todo(shards=[0]):
        data = unit_data(unit, manifest(encodings=()))
        arrays: dict[str, list[np.ndarray]] = {}
        for view in unit.views:
            responses[view] = logits(view, 5, classes)
            for encoding in ENCODINGS.values():
                for name, rows in encoding.encode(*responses[view], SEEDS[:5]).items():
                    arrays.setdefault(name, []).append(rows.numpy())
        data.arrays = {name: stacked(parts) for name, parts in arrays.items()}
        writer.write_unit(unit, data)
    reader = open_cache(tmp_path / "c")
    index = np.array([(view, 0, offset) for view in (2, 0) for offset in (4, 0, 2)])
    expected = LogitTargets(
        torch.stack([responses[v][0][o] for v, _, o in index.tolist()]),
        torch.stack([responses[v][1][o] for v, _, o in index.tolist()]),
    )
    for name, encoding in ENCODINGS.items():
        rows = {key: torch.from_numpy(v) for key, v in reader.gather(name, index).items()}
        targets = encoding.targets(rows)
        if isinstance(targets, SampledTargets):
            live = encoding.targets(
                encoding.encode(expected.spatial, expected.global_, SEEDS[[4, 0, 2] * 2])
            )
            assert isinstance(live, SampledTargets)
            assert torch.equal(targets.drawn_global(1.0), live.drawn_global(1.0))
            for r in RATIOS:
                assert torch.equal(targets.drawn_spatial(r, 1.0), live.drawn_spatial(r, 1.0))
            continue
        if "hard" in encoding.serves:
            assert torch.equal(targets.hard_global(), expected.hard_global())
            for r in RATIOS:
                assert torch.equal(targets.hard_spatial(r), expected.hard_spatial(r)), (name, r)
        if "soft" not in encoding.serves:
            with pytest.raises(CacheError, match="soft"):
                targets.global_log_probabilities(1.0)
            continue
        for tau in (1.0, 4.0):
            mine, theirs = (t.global_log_probabilities(tau) for t in (targets, expected))
            assert divergence(mine, theirs, encoding) <= WORST[name]
            for r in RATIOS:
                mine, theirs = (t.spatial_log_probabilities(r, tau) for t in (targets, expected))
                assert divergence(mine, theirs, encoding) <= WORST[name], (name, r, tau)


# In nats, for these responses: 40 classes of normal logits, independent between locations.
WORST = {"dense": 0.0, "dense-q8": 2e-3, "topk": 0.25}


def divergence(found: torch.Tensor, exact: torch.Tensor, encoding: Encoding) -> float:
    """Return the largest KL of any location, in nats; inf if an exact encoding is not exact."""
    if encoding.exact and not torch.equal(found, exact):
        return float("inf")
    return float((exact.exp() * (exact - found)).sum(1).max())


def stacked(parts: list[np.ndarray]) -> np.ndarray:
    return padded(parts) if parts[0].dtype == np.uint16 and parts[0].ndim == 5 else np.stack(parts)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, CLASSES))
def test_unpacking_undoes_packing(seed: int, count: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    shape = ResponseShape(CLASSES, HEIGHT, WIDTH)
    rows: Rows = {
        "envelope/lines": lines(rng, count, most),
        "envelope/global_label": rng.integers(0, CLASSES, count).astype(np.uint16),
    }
    before = {name: values.copy() for name, values in rows.items()}
    encoding = ENCODINGS["envelope"]
    packed = encoding.pack(rows)
    back = encoding.unpack(packed, shape)
    for name, values in before.items():
        assert np.array_equal(back[name], values)
        assert np.array_equal(rows[name], values), "packing changed its input"
    classes, crossings = np.moveaxis(packed["envelope/lines"], 2, 0)
    assert np.array_equal(classes, rows["envelope/lines"][:, :, 0])
    used = crossings.reshape(*crossings.shape[:2], -1) != 65535
    assert (np.diff(used.astype(int), axis=2) <= 0).all()


def test_the_largest_crossing_survives_packing() -> None:
    """65534 is a crossing, 65535 is fill."""
    planes = np.full((1, 2, 2, HEIGHT, WIDTH), 65535, np.uint16)
    planes[0, :, 0] = np.array([3, 5])[:, None, None]
    planes[0, 0, 1] = 65534
    rows = {"envelope/lines": planes, "envelope/global_label": np.array([3], np.uint16)}
    encoding = ENCODINGS["envelope"]
    back = encoding.unpack(encoding.pack(rows), ResponseShape(CLASSES, HEIGHT, WIDTH))
    assert np.array_equal(back["envelope/lines"], planes)


def test_an_envelope_has_fill_after_its_last_line_and_the_global_label() -> None:
    spatial, _ = logits(0, 4, 20)
    _, global_ = logits(1, 4, 20)  # not the mean over the locations
    rows = {
        name: v.numpy() for name, v in ENCODINGS["envelope"].encode(spatial, global_, SEEDS).items()
    }
    classes, crossings = np.moveaxis(rows["envelope/lines"], 2, 0)
    after = np.roll(classes, -1, axis=1)
    after[:, -1] = 65535  # no line follows the last
    assert np.array_equal(crossings == 65535, after == 65535)
    assert rows["envelope/global_label"].tolist() == global_.argmax(1).tolist()
    assert rows["envelope/global_label"].tolist() != spatial.float().mean((2, 3)).argmax(1).tolist()


@pytest.mark.parametrize("name", ["dense", "dense-q8"])
def test_a_chunk_contains_at_least_one_sample_or_many_small_ones(name: str) -> None:
    large = ENCODINGS[name].arrays(ResponseShape(20_000, 7, 7))
    small = ENCODINGS[name].arrays(ResponseShape(20, 2, 2))
    assert {spec.rows for spec in large[:2]} == {1}
    assert all(spec.rows is not None and spec.rows > 16 for spec in small)


def test_packing_follows_the_format() -> None:
    lines = np.full((1, 3, 2, 1, 4), 65535, np.uint16)
    lines[0, 0, 0, 0] = [7, 8, 9, 7]
    lines[0, 1, 0, 0] = [1, 65535, 2, 65535]
    lines[0, 2, 0, 0] = [65535, 65535, 3, 65535]
    lines[0, 0, 1, 0] = [100, 65535, 200, 65535]
    lines[0, 1, 1, 0] = [65535, 65535, 300, 65535]
    label = np.zeros(1, np.uint16)
    packed = ENCODINGS["envelope"].pack({"envelope/lines": lines, "envelope/global_label": label})
    found = packed["envelope/lines"][0, :, 1, 0].tolist()
    assert found == [[100, 200, 65535, 65535], [300, 65535, 65535, 65535], [65535] * 4]


@pytest.mark.parametrize("name", ["envelope", "topk"])
def test_too_many_classes_for_sixteen_bits_are_refused(name: str) -> None:
    assert ENCODINGS[name].arrays(ResponseShape(65535, 7, 7))
    with pytest.raises(CacheError, match="65536 classes") as caught:
        ENCODINGS[name].arrays(ResponseShape(65536, 7, 7))
    assert "dense" in str(caught.value)
    assert ENCODINGS["dense"].arrays(ResponseShape(65536, 7, 7))
    assert ENCODINGS["dense-q8"].arrays(ResponseShape(65536, 7, 7))


@pytest.mark.parametrize("classes", [1, 24, 25, 1000])
@pytest.mark.parametrize("flat", [False, True])
def test_rows_match_their_array_specs(classes: int, flat: bool) -> None:
    """Flat responses, with all logits 0, included."""
    response = logits(0, 3, classes)
    if flat:
        response = (torch.zeros_like(response[0]), torch.zeros_like(response[1]))
    for encoding in ENCODINGS.values():
        specs = encoding.arrays(ResponseShape(classes, HEIGHT, WIDTH))
        rows = encoding.encode(*response, SEEDS[:3])
        assert {spec.name for spec in specs} == rows.keys()
        for spec in specs:
            found = rows[spec.name].numpy()
            assert found.dtype == np.dtype(spec.dtype), spec.name
            assert len(found) == 3
            assert found.shape[1 + spec.ragged :] == spec.tail[spec.ragged :], spec.name
            for row in found:
                assert not (row == spec.fill).all(), "a written row equals fill"


def test_a_teacher_of_few_classes_has_no_tail_to_store() -> None:
    def names(classes: int) -> set[str]:
        return {spec.name for spec in ENCODINGS["topk"].arrays(ResponseShape(classes, 7, 7))}

    assert names(24) == {"topk/classes", "topk/spatial", "topk/global"}
    assert names(25) - names(24) == {"topk/coarse", "topk/tail", "topk/tail_global"}


@pytest.mark.parametrize(
    ("name", "array", "value", "message"),
    [
        ("topk", "topk/classes", 40, "class 40 of 40"),
        ("topk", "topk/tail", np.nan, "topk/tail contains NaN"),
        ("topk", "topk/tail_global", np.inf, "topk/tail_global contains NaN or infinite"),
        ("dense-q8", "dense-q8/step", 0.0, "not positive and finite"),
        ("dense-q8", "dense-q8/step", np.nan, "not positive and finite"),
    ],
)
def test_values_that_no_response_has_are_refused(
    name: str, array: str, value: float, message: str
) -> None:
    encoding, shape = ENCODINGS[name], ResponseShape(40, HEIGHT, WIDTH)
    rows = {key: v.numpy() for key, v in encoding.encode(*logits(0, 2, 40), SEEDS[:2]).items()}
    for key, values in encoding.unpack(encoding.pack(rows), shape).items():
        assert np.array_equal(values, rows[key])
    rows[array] = rows[array].copy()
    rows[array].flat[-1] = value
    with pytest.raises(ValueError, match=message):
        encoding.unpack(rows, shape)


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_class_that_the_teacher_lacks_is_refused_on_every_line(line: int) -> None:
    encoding, shape = ENCODINGS["envelope"], ResponseShape(CLASSES, HEIGHT, WIDTH)
    planes = lines(np.random.default_rng(0), 3, most=4)
    rows = {"envelope/lines": planes, "envelope/global_label": np.zeros(3, np.uint16)}
    encoding.unpack(encoding.pack(rows), shape)
    used = np.argwhere(planes[:, line, 0] != 65535)
    sample, row, column = used[-1]
    planes[sample, line, 0, row, column] = CLASSES
    with pytest.raises(ValueError, match=f"class {CLASSES} of {CLASSES}"):
        encoding.unpack(encoding.pack(rows), shape)


@pytest.mark.parametrize("classes", [1, 7, 8, 10, 1000, 21841, 65535])
def test_the_index_of_an_envelope_file_stays_small(classes: int) -> None:
    spec = ENCODINGS["envelope"].arrays(ResponseShape(classes, 7, 7))[0]
    assert spec.tail_chunk is not None
    chunks = -(-classes // spec.tail_chunk[0])
    assert chunks <= 256
    assert spec.tail_chunk[0] == min(classes, max(8, -(-classes // 256)))


def test_encodings_are_registered_by_name_and_prefix_their_arrays_with_it() -> None:
    shape = ResponseShape(10, 2, 2)
    for name, encoding in ENCODINGS.items():
        assert encoding.name == name
        assert set(encoding.serves) <= {"hard", "soft"}
        assert encoding.exact or encoding.serves == ("soft",), "hard labels are never approximate"
        specs = encoding.arrays(shape)
        assert all(spec.name.startswith(f"{name}/") for spec in specs)
        assert len({spec.rows is None for spec in specs}) == 1
    made = manifest(encodings=tuple(ENCODINGS))
    assert {a.level for a in stored_arrays(made).values()} == {1, 3, 8}


def test_rows_are_encoded_on_the_device_of_the_logits() -> None:
    meta = cast(torch.Tensor, torch.empty(2, 5, 2, 2, dtype=torch.float16, device="meta"))
    rows = ENCODINGS["dense"].encode(meta, meta[:, :, 0, 0], SEEDS[:2])
    assert {tensor.device.type for tensor in rows.values()} == {"meta"}
    found = ENCODINGS["envelope"].encode(*logits(0, 2, 5), SEEDS[:2])
    assert {tensor.dtype for tensor in found.values()} == {torch.uint16}
    assert found["envelope/lines"].shape[2:] == (2, HEIGHT, WIDTH)
