"""Checkpoints: tensors from the files of common training scripts, without running their code."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cskd_pipeline.errors import WeightsError
from cskd_pipeline.models.weights import load_into, load_state, state_digest

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "distill.json").read_text())


def state(offset: float = 0.0) -> dict[str, torch.Tensor]:
    return {
        "fc.weight": torch.arange(6.0).view(2, 3) + offset,
        "fc.bias": torch.tensor([0.5, -0.5]),
        "steps": torch.tensor(7),
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    "wrapped",
    [
        state(),
        {"state_dict": state(), "epoch": 3, "arch": "net"},
        {"model": state(), "optimizer": {"lr": 0.1}},
        {"model": state(1.0), "model_ema": state()},
        {"state_dict": state(1.0), "state_dict_ema": state()},
        {"model": {"state_dict": state()}},
        {"net": state(), "acc": 95.1, "epoch": 199},
        {f"module.{name}": tensor for name, tensor in state().items()},
        {f"module._orig_mod.{name}": tensor for name, tensor in state().items()},
        {"state_dict": state(), "args": argparse.Namespace(lr=0.1, model="net")},
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_wrappers_of_training_scripts_are_removed(
    tmp_path: Path, wrapped: dict[str, Any], suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(wrapped, path)
    assert same(load_state(path), state())


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "weights.safetensors")
    assert same(load_state(tmp_path / "weights.safetensors"), state())


class OwnRecord(dict[str, int]):
    """A class of a training script."""


class Payload:
    """An object that runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.marker}'",))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_a_hostile_checkpoint_is_refused_and_never_run(
    tmp_path: Path, zipped: bool, suffix: str
) -> None:
    marker, path = tmp_path / "run", tmp_path / f"weights{suffix}"
    torch.save({**state(), "extra": Payload(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="does not load as plain tensors") as caught:
        load_state(path)
    assert not marker.exists()
    assert "no code in it was run" in str(caught.value)
    copy = path.rename(tmp_path / "copy.pth")
    torch.load(copy, weights_only=False)  # proves that the payload works
    assert marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float64(0.95), f"{np.float64(0).__reduce__()[0].__module__}.scalar"),
        (OwnRecord(a=1), "tests.models.test_weights.OwnRecord"),
        (os.system, "posix.system"),
    ],
)
def test_other_objects_are_named_by_their_full_type(
    tmp_path: Path, value: object, kind: str, zipped: bool
) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": state(), "best": value}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="does not load as plain tensors") as caught:
        load_state(path)
    message = str(caught.value)
    assert f"an object of {kind}, which is neither a tensor nor a plain value\n" in message
    assert "x1b" not in message
    assert "torch.save(model.state_dict(), FILE)" in message


def test_the_format_is_detected_by_content_not_by_name(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "w.safetensors")
    save_file(state(), tmp_path / "w.pth")
    assert same(load_state(tmp_path / "w.safetensors"), state())
    assert same(load_state(tmp_path / "w.pth"), state())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.pth", b""),
        ("weights.pth", b"<html>404</html>"),
        ("weights.pth", b"PK\x03\x04 cut short"),
        ("weights.safetensors", b""),
        ("weights.safetensors", b"\xff" * 64),
        ("weights.safetensors", b"\x10\0\0\0\0\0\0\0{}"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        load_state(tmp_path / name)
    assert caught.value.where == tmp_path / name


@pytest.mark.parametrize(
    "content", [{}, {"epoch": 3}, [torch.zeros(2)], {"a": torch.ones(1), "b": 2}]
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="no state dict"):
        load_state(tmp_path / "weights.pth")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such weights file"):
        load_state(tmp_path / "weights.pth")


def test_mismatches_are_counted_with_examples() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4), nn.Linear(4, 4))
    weights = {"0.weight": torch.zeros(5, 3), "0.bias": torch.zeros(2), "other": torch.zeros(1)}
    before = state_digest(model.state_dict())
    with pytest.raises(WeightsError, match="do not fit the model") as caught:
        load_into(model, weights, "a file")
    found = str(caught.value.found)
    assert "4 missing (1.weight, 1.bias, 2.weight, …)" in found
    assert "1 unexpected (other)" in found
    assert "1 of another shape (0.weight (5, 3) for (2, 3))" in found
    assert state_digest(model.state_dict()) == before, "nothing was loaded"


def test_a_dtype_that_does_not_convert_is_refused() -> None:
    packed = torch.zeros(2, 3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(WeightsError, match=r"dtype[\s\S]*a file[\s\S]*weight"):
        load_into(nn.Linear(3, 2, bias=False), {"weight": packed}, "a file")


def test_weights_that_fit_are_loaded_with_or_without_batch_norm_counters() -> None:
    source, target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.normal_(source.weight)
    weights = source.state_dict()
    del weights["num_batches_tracked"]
    load_into(target, weights, "a file")
    assert torch.equal(source.weight, target.weight)


def test_digests_are_equal_only_for_equal_states() -> None:
    digest = state_digest(state())
    assert digest == state_digest(dict(reversed(state().items()))) == GOLDEN["state_digest"]
    others = [
        state(1.0),
        {**state(), "more": torch.zeros(1)},
        {**state(), "fc.bias": torch.tensor([0.5, -0.5]).double()},
        {**state(), "fc.weight": torch.arange(6.0).view(3, 2)},
        {("b" if k == "steps" else k): v for k, v in state().items()},
    ]
    assert len({digest, *map(state_digest, others)}) == len(others) + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.uint8])
def test_every_dtype_has_a_digest(dtype: torch.dtype) -> None:
    assert len(state_digest({"a": torch.ones(3, 2, dtype=dtype).T})) == 64
