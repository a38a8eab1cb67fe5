"""A registered encoding fulfils the contract, or is refused before any write."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.check import check_bytes
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.units import UnitData, encode_batch
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.distill.encodings import ENCODINGS, ArraySpec, ResponseShape, register_encoding
from cskd_pipeline.errors import CacheError, UsageError
from cskd_pipeline.views import policy as policies
from cskd_pipeline.views.policy import ViewPolicy, register_policy
from tests import own
from tests.cache.factories import CLASSES, HEIGHT, WIDTH, manifest, unit_data

NAME = own.Negated.name
SPATIAL, GLOBAL = f"{NAME}/spatial", f"{NAME}/global"
Change = Callable[[tuple[ArraySpec, ...]], tuple[ArraySpec, ...]]


@pytest.fixture
def encoding() -> Iterator[own.Negated]:
    encoding = own.Negated()
    register_encoding(encoding)
    yield encoding
    ENCODINGS.pop(NAME, None)


def negated(data: UnitData) -> UnitData:
    """Return the unit with the logits of ``dense`` in this encoding."""
    spatial, global_ = (data.arrays[name] for name in ("dense/spatial", "dense/global"))
    return replace(data, arrays={SPATIAL: -spatial, GLOBAL: -global_})


def fill(writer: CacheWriter) -> None:
    for unit in writer.todo():
        writer.write_unit(unit, negated(unit_data(unit, manifest())))


@pytest.mark.parametrize("name", [*layout.stored_arrays(manifest(encodings=("dense",))), "auto"])
def test_an_encoding_cannot_be_named_like_an_array(name: str) -> None:
    encoding = own.Negated()
    encoding.name = name
    with pytest.raises(UsageError, match="cannot be registered"):
        register_encoding(encoding)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (), "no arrays"),
        (lambda a: (a[0], a[0]), "two arrays have the same name"),
        (lambda a: (a[0], replace(a[1], rows=None)), "some arrays have rows and some do not"),
        (lambda a: (replace(a[0], axes=("class",)),), "axes"),
        (lambda a: (replace(a[0], axes=(), tail=(), ragged=True),), "axes"),
        (lambda a: (replace(a[0], tail_chunk=(1, HEIGHT, WIDTH)),), "chunks"),
        (lambda a: (replace(a[0], tail_chunk=(1, HEIGHT, WIDTH), ragged=True),), "chunks"),
        (lambda a: (replace(a[0], rows=None, tail_chunk=(1, HEIGHT, WIDTH)),), "chunks"),
        (
            lambda a: (replace(a[0], rows=None, tail_chunk=(CLASSES, 1, WIDTH), ragged=True),),
            "chunks",
        ),
    ],
)
def test_invalid_array_specs_are_refused(
    encoding: own.Negated, monkeypatch: pytest.MonkeyPatch, change: Change, message: str
) -> None:
    arrays = encoding.arrays(ResponseShape(CLASSES, HEIGHT, WIDTH))
    layout.specs(manifest(encodings=(NAME,)))
    monkeypatch.setattr(encoding, "arrays", lambda _shape: change(arrays))
    with pytest.raises(CacheError, match=f"encoding {NAME} are invalid[^$]*{message}"):
        layout.specs(manifest(encodings=(NAME,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {**r, "dense/spatial": r[SPATIAL]}, "dense/spatial: not an array"),
        (lambda r: {SPATIAL: r[SPATIAL]}, f"{GLOBAL}: missing"),
        (lambda r: {**r, GLOBAL: r[SPATIAL]}, f"{GLOBAL}: found float16"),
        (lambda r: {**r, GLOBAL: r[GLOBAL] > 0}, f"{GLOBAL}: found bool"),
    ],
)
def test_rows_that_do_not_match_the_array_specs_are_refused(
    encoding: own.Negated,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    message: str,
) -> None:
    """Both encoded and packed rows; the unit then stays unfinished."""
    writer = CacheWriter.create(tmp_path / "cache", manifest(encodings=(NAME,)))
    unit = writer.todo()[0]
    data = negated(unit_data(unit, manifest()))
    spatial, global_ = torch.zeros(2, CLASSES, HEIGHT, WIDTH).half(), torch.zeros(2, CLASSES).half()
    seeds = np.zeros(2, np.uint64)
    assert set(encode_batch(encoding, spatial, global_, seeds)) == {SPATIAL, GLOBAL}
    monkeypatch.setattr(encoding, "encode", lambda s, g, seeds: change({SPATIAL: s, GLOBAL: g}))
    monkeypatch.setattr(encoding, "pack", change)
    with pytest.raises(CacheError, match=message):
        encode_batch(encoding, spatial, global_, seeds)
    with pytest.raises(CacheError, match=message):
        writer.write_unit(unit, data)
    with pytest.raises(CacheError, match=message):
        writer.write_unit(unit, replace(data, arrays=change(dict(data.arrays))))
    assert not writer.done().any()


def test_an_encoding_from_another_process_does_not_replace_a_registered_one(
    encoding: own.Negated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CacheWriter.create(tmp_path / "cache", manifest(encodings=(NAME,)))
    fill(writer)
    reader = open_cache(tmp_path / "cache")
    monkeypatch.setitem(policies.REGISTERED, own.VERSION, policies.PolicyCode(own.draw, own.render))
    policy = ViewPolicy(version=own.VERSION)
    sent = pickle.dumps((reader, policy))
    other = own.Negated()
    register_encoding(other)
    register_policy(own.VERSION, own.draw, np.flip)
    assert check_bytes(reader, list(zip(*np.nonzero(reader.done()), strict=True))) == []
    again, _ = pickle.loads(sent)
    assert ENCODINGS[NAME] is again.encodings[NAME] is other
    assert policies.REGISTERED[own.VERSION].render is np.flip
