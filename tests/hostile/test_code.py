"""Untrusted files run no code: checkpoints, recipes, caches, shard lists."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.config.reading import load_recipe
from cskd_pipeline.config.sections import DumpRecipe
from cskd_pipeline.errors import CacheError, CskdError
from cskd_pipeline.models.train_state import load_state
from cskd_pipeline.pipeline.train import train
from tests.cache.factories import make
from tests.faults.commands import Stages
from tests.hostile.conftest import Payload
from tests.pipeline import world
from tests.pipeline.conftest import World

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def finished(small: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a short run and return its folder."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(world.train_recipe(small.shards, small.cache, out, epochs=1))
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the run to corrupt."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# Checkpoints


@pytest.mark.parametrize("zipped", [True, False])
def test_resume_does_not_run_a_payload_in_a_training_state(
    stages: Stages, run: Path, refused: Refused, payload: Payload, zipped: bool
) -> None:
    state = {**load_state(run / "state.pt"), "extra": payload}
    torch.save(state, run / "state.pt", _use_new_zipfile_serialization=zipped)
    assert "the training state cannot be read" in refused(*stages.train(run, workers=0))


@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
def test_a_payload_in_teacher_weights_is_not_run(
    stages: Stages, tmp_path: Path, refused: Refused, payload: Payload, suffix: str
) -> None:
    torch.save({"fc.weight": torch.zeros(2), "extra": payload}, tmp_path / f"evil.{suffix}")
    words = stages.dump(tmp_path / "cache", workers=0)
    words[words.index("random")] = tmp_path / f"evil.{suffix}"
    assert "no code in it was run" in refused(*words)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {"format": 1},
        lambda state: {**state, "recipe": 5},
        lambda state: {**state, "data": ["x" * 10**6]},
        lambda state: {**state, "update": -1},
        lambda state: {**state, "update": 10**30},
        lambda state: {**state, "update": True},
        lambda state: {**state, "rows": "text"},
        lambda state: {**state, "best": 3},
        lambda state: {**state, "init": "x"},
        lambda state: {**state, "init": {"from": "x", "sha256": 5}},
        lambda state: {**state, "sums": torch.zeros(7)},
        lambda state: {**state, "student": {"a": 1}},
        lambda state: {**state, "student": {k: v[:1] for k, v in state["student"].items()}},
        lambda state: {**state, "optimizer": {"state": {}, "param_groups": [{}]}},
        lambda state: {**state, "optimizer": 3},
        lambda state: {**state, "ema": None},
        lambda state: {k: v for k, v in state.items() if k != "scaler"},
    ],
)
def test_a_training_state_with_invalid_values_is_refused_before_a_step(
    small: World, run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    torch.save(change(load_state(run / "state.pt")), run / "state.pt")
    recipe = world.train_recipe(small.shards, small.cache, run, epochs=1)
    with pytest.raises(CskdError) as caught:
        train(recipe, resume=True)
    assert str(run / "state.pt") in str(caught.value)


def edit_header(run: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the student header in place and return the file's path."""
    path = run / "last.safetensors"
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["cskd"])
    changed = change(header)
    text = changed if isinstance(changed, str) else json.dumps(changed)
    save_file(load_file(path), path, metadata={"cskd": text})
    return path


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "hub": (lambda c: {**c, "model": "hf-hub:stranger/model"}, "no hub is contacted"),
    "folder": (lambda c: {**c, "model": "local-dir:/tmp"}, "no hub is contacted"),
    "factory": (lambda c: {**c, "model": "os:system"}, "no model of this name"),
    "no name": (lambda c: {**c, "model": 5}, "no valid student header"),
    "method": (lambda c: {**c, "method": "none", "grid": None}, "names heads"),
    "heads": (lambda c: {**c, "heads": ["__class__"]}, "no valid student header"),
    "no heads": (lambda c: {**c, "heads": []}, "no valid student header"),
    "classes": (lambda c: {**c, "num_classes": 10**12}, "no valid student header"),
    "size": (lambda c: {**c, "size": -1}, "no valid student header"),
    "grid": (lambda c: {**c, "grid": [4, 10**9]}, "no valid student header"),
    "crop": (lambda c: {**c, "crop_pct": 1e-9}, "no valid student header"),
    "filter": (lambda c: {**c, "interpolation": "random"}, "no valid student header"),
    "field": (lambda c: {**c, "__reduce__": 1}, "no valid student header"),
    "deep": (lambda c: "[" * 10**5, "no valid student header"),
    "number": (lambda c: "9" * 10**6, "no valid student header"),
    "twice": (lambda c: json.dumps(c)[:-1] + ', "model": "resnet18"}', "no valid student header"),
    "list": (lambda c: [], "no valid student header"),
    "arguments": (lambda c: {**c, "kwargs": {"depth": "2; rm -rf"}}, "cannot be created"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_is_refused(small: World, run: Path, refused: Refused, kind: str) -> None:
    change, message = HEADERS[kind]
    path = edit_header(run, change)
    words = ("evaluate", path, "--shards", small.validation, "--workers", 0, "--device", "cpu")
    assert message in refused(*words)
    assert message in refused("export", path, "--out", run / "exported")
    assert not (run / "exported").exists()


LOADING = [*("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained"), "device"]


@pytest.mark.parametrize("argument", LOADING)
def test_model_arguments_in_a_header_or_recipe_cannot_name_files_to_open(
    stages: Stages, run: Path, tmp_path: Path, refused: Refused, payload: Payload, argument: str
) -> None:
    torch.save({"extra": payload}, tmp_path / "evil.pth")
    path = edit_header(run, lambda c: {**c, "kwargs": {argument: str(tmp_path / "evil.pth")}})
    words = ("evaluate", path, "--shards", stages.shards, "--workers", 0, "--device", "cpu")
    assert "may not load files or place tensors" in refused(*words)
    for section, command in (
        ("student", stages.train(tmp_path / "new", workers=0)),
        ("teacher", stages.dump(tmp_path / "cache", workers=0)),
    ):
        at = next(n for n, word in enumerate(command) if f"{section}.kwargs=" in str(word))
        recipe = tmp_path / f"{section}.toml"
        recipe.write_text(f'[{section}.kwargs]\n{argument} = "{tmp_path}/evil.pth"\n')
        words = (*command[: at - 1], *command[at + 1 :], "--recipe", recipe)
        assert "may not load files or place tensors" in refused(*words)


# Recipes


def test_a_recipe_file_alone_cannot_call_a_factory(
    stages: Stages, tmp_path: Path, refused: Refused, payload: Payload
) -> None:
    """``subprocess:call`` is always importable, and the recipe chooses its kwargs."""
    recipe = tmp_path / "evil.toml"
    recipe.write_text(
        '[teacher]\nname = "subprocess:call"\nweights = "random"\n'
        f"[teacher.kwargs]\nargs = ['touch', '{payload.marker}']\n"
    )
    words = ("dump-teacher", "--recipe", recipe, "--shards", stages.shards / "nothing.tar")
    message = refused(*words, "--cache", tmp_path / "cache")
    assert "would run code of that module" in message
    assert "--teacher 'subprocess:call'" in message
    words = ("plan", "dump", "--recipe", recipe, "--shards", stages.shards)
    assert "would run code of that module" in refused(*words)


def test_a_factory_also_named_on_the_command_line_is_accepted(tmp_path: Path) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text('[teacher]\nname = "my.models:teacher"\n')
    for sets, flags in (
        ((), {"teacher.name": "my.models:teacher"}),
        (("teacher.name=my.models:teacher",), {}),
    ):
        assert load_recipe(DumpRecipe, recipe, sets, flags).teacher.name == "my.models:teacher"
    for name in ("hf-hub:timm/resnet18.a1_in1k", "torchvision:resnet50"):  # these run no code
        recipe.write_text(f'[teacher]\nname = "{name}"\n')
        assert load_recipe(DumpRecipe, recipe).teacher.name == name


# Shard lists


def pipes(tmp_path: Path, payload: Payload) -> dict[str, Path | str]:
    """Return shard specifications that name a program's output."""
    pipe = f"pipe:touch '{payload.marker}'"
    info = tmp_path / "info"
    info.mkdir()
    (info / "_info.json").write_text(json.dumps({"splits": {"train": {"filenames": [pipe]}}}))
    shard = {"name": pipe, "count": 1, "bytes": 1, "sha256": "0" * 64, "keys_sha256": "0" * 64}
    manifest = {"format": "cskd-dataset", "format_version": 1, "name": "x", "num_classes": 4}
    manifest |= {"class_names": None, "shards": [{**shard, "key_bytes": 1}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return {
        "direct": pipe,
        "listed": f"a.tar,{pipe}",
        "braces": f"{pipe}{{0..3}}",
        "info": info,
        "manifest": tmp_path / "manifest.json",
    }


@pytest.mark.parametrize("source", ["direct", "listed", "braces", "info", "manifest"])
def test_a_shard_specification_runs_no_program(
    stages: Stages, tmp_path: Path, refused: Refused, payload: Payload, source: str
) -> None:
    spec = pipes(tmp_path, payload)[source]
    refused("index", spec, "--out", tmp_path / "out.json", "--num-classes", 4)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"[data]\nshards = {json.dumps(str(spec))}\n")
    words = [w for w in stages.train(tmp_path / "run") if w not in ("--shards", stages.shards)]
    refused(*words, "--recipe", recipe)
    words = stages.train(tmp_path / "run")
    refused(*words, "--val-shards", spec)
    assert not (tmp_path / "run").exists()


# Caches


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("label", {"data_type": "object"}),
        ("label", {"data_type": {"name": "numpy.object", "configuration": {}}}),
        ("label", {"data_type": "|O"}),
        ("seed", {"codecs": [{"name": "pickle"}]}),
        ("seed", {"codecs": [{"name": "numcodecs.pickle", "configuration": {"protocol": 5}}]}),
        ("seed", {"codecs": [{"name": "vlen-utf8"}]}),
        ("dense/spatial", {"codecs": [{"name": "bytes"}, {"name": "os:system"}]}),
        ("dense/global", {"storage_transformers": [{"name": "pickle"}]}),
        ("digest", {"chunk_key_encoding": {"name": "../../c"}}),
        ("digest", {"fill_value": "gASVAAAA"}),
    ],
)
def test_object_arrays_and_unknown_codecs_are_refused(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    make(tmp_path)
    document = tmp_path / name / "zarr.json"
    document.write_text(json.dumps(json.loads(document.read_text()) | changes))
    with pytest.raises(CacheError, match="does not match its manifest") as caught:
        open_cache(tmp_path)
    assert f"{name}/zarr.json: {next(iter(changes))}" in str(caught.value)


def test_a_pickle_as_a_chunk_is_damage(tmp_path: Path, payload: Payload) -> None:
    make(tmp_path)
    for name in ("key/c/0/0/0", "seed/c/0/0/0", "dense/spatial/c/0/0/0/0/0/0"):
        (tmp_path / name).write_bytes(pickle.dumps(payload) * 50)
    reader = open_cache(tmp_path)
    for read in (
        lambda: reader.keys(0),
        lambda: reader.seeds(0, 0),
        lambda: reader.rows("dense", 0, 0, [0]),
    ):
        with pytest.raises(CacheError, match="the cache is damaged"):
            read()
