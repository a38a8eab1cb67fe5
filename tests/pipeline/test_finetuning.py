"""Fine-tuning: weights that are kept, new, resized or refused."""

from __future__ import annotations

import colorsys
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf
from timm.models.vision_transformer import checkpoint_filter_fn
from torch.nn import functional

from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.errors import CskdError, OutputError, WeightsError
from cskd_pipeline.models.checkpoint import read_header, save_student
from cskd_pipeline.models.train_state import load_state
from cskd_pipeline.models.weights import state_digest
from cskd_pipeline.pipeline import train as stage_two
from cskd_pipeline.pipeline.finetune import read_source
from cskd_pipeline.pipeline.train import train
from cskd_pipeline.pipeline.train_job import TrainJob
from cskd_pipeline.pipeline.trainer import Trainer
from cskd_pipeline.pipeline.training_data import open_training_data
from cskd_pipeline.runtime.console import Terminal
from cskd_pipeline.tools.make_shards import make_shards
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.pipeline.test_training import DiedError, assert_equal, final_state

CPU = torch.device("cpu")
KWARGS = "{patch_size=8, embed_dim=32, depth=2, num_heads=2}"
HEADS = {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def draw_colours(folder: Path, classes: int, per_class: int, seed: int) -> None:
    """Write ``folder/<class>/<n>.png``: noise in the class's hue."""
    rng = np.random.default_rng(seed)
    for number in range(classes):
        (folder / f"hue{number:02d}").mkdir(parents=True)
        ink = np.array(colorsys.hsv_to_rgb(number / classes, 0.9, 0.8)) * 255
        for image in range(per_class):
            pixels = np.clip(ink + rng.normal(0, 25, (40, 44, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"hue{number:02d}" / f"{image}.png")


def job_of(recipe: TrainRecipe) -> TrainJob:
    """Return a run on the CPU before its first update."""
    data = open_training_data(recipe)
    return TrainJob(recipe, data, Trainer(recipe, data.views, CPU))


@dataclass(frozen=True)
class Transfer:
    """``run``: a student pretrained on ten hues at 32 px; ``shards``: seven other hues."""

    run: Path
    shards: Path

    def recipe(
        self, out: Path, init: Path | str = "", sets: tuple[str, ...] = (), **options: Any
    ) -> TrainRecipe:
        """Return a recipe for fine-tuning at 48 px."""
        source = str(init) or str(self.run)
        every = [*world.VIEWS, "views.size=48", f"student.init_from={source}", *sets]
        return world.train_recipe(
            self.shards, None, out, "none", every, **({"kwargs": KWARGS} | options)
        )

    def start(self, tmp_path: Path, init: Path | str = "", **options: Any) -> TrainJob:
        """Return a run with its initial weights, before any update."""
        recipe = self.recipe(tmp_path / "out", init, **options)
        job = job_of(recipe)
        job.start_from(recipe.student.init_from)
        return job


@pytest.fixture(scope="session")
def transfer(tmp_path_factory: pytest.TempPathFactory) -> Transfer:
    root = tmp_path_factory.mktemp("transfer")
    draw_colours(root / "ten", 10, 8, seed=0)
    draw_colours(root / "seven", 7, 8, seed=1)
    make_shards(root / "ten", root / "shards", shard_size=80)
    make_shards(root / "seven", root / "other", shard_size=30)
    sets = [*world.VIEWS, f'data.val_shards="{root / "shards"}"']
    recipe = world.train_recipe(
        root / "shards", None, root / "run", "none", sets, epochs=2, kwargs=KWARGS
    )
    train(recipe)
    return Transfer(root / "run", root / "other")


# Transferred weights


def test_only_heads_and_positions_differ_from_the_source_at_update_0(
    transfer: Transfer, tmp_path: Path
) -> None:
    source = load_file(transfer.run / "best.safetensors")
    job = transfer.start(tmp_path)
    state = job.trainer.student.model.state_dict()
    assert job.trainer.update == 0
    assert state.keys() == source.keys()
    for name in state.keys() - HEADS - {"pos_embed"}:
        assert torch.equal(state[name], source[name]), name
    assert job.trainer.ema is not None
    assert_equal(dict(job.trainer.ema.module.state_dict()), dict(state))


def test_positions_are_resampled_as_timm_does(transfer: Transfer, tmp_path: Path) -> None:
    source = load_file(transfer.run / "best.safetensors")
    job = transfer.start(tmp_path)
    model: Any = job.trainer.student.model
    positions = model.state_dict()["pos_embed"]
    assert source["pos_embed"].shape == (1, 2 + 4 * 4, 32)
    assert positions.shape == (1, 2 + 6 * 6, 32)
    assert torch.equal(positions, checkpoint_filter_fn(dict(source), model)["pos_embed"])
    assert torch.equal(positions[:, :2], source["pos_embed"][:, :2])  # class and distillation


def test_new_heads_equal_those_of_a_fresh_run(transfer: Transfer, tmp_path: Path) -> None:
    job = transfer.start(tmp_path)
    fresh = job_of(job.recipe).trainer.student.model.state_dict()
    for name in HEADS:
        assert torch.equal(job.trainer.student.model.state_dict()[name], fresh[name]), name
    assert len(fresh["head.weight"]) == 7


def test_the_run_logs_how_it_started(
    transfer: Transfer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Terminal().attach()
    train(transfer.recipe(tmp_path / "out", epochs=1))
    digest = state_digest(load_file(transfer.run / "best.safetensors"))
    output = capsys.readouterr().err.replace("\n", " ")
    assert f"starting from {transfer.run}: 31 tensors, SHA-256 {digest[:12]}" in output
    assert "new head and head_dist (10 classes before, 7 now)" in output
    assert "pos_embed resized from 4x4 to 6x6" in output
    assert read_header(tmp_path / "out/last.safetensors").init_sha256 == digest
    assert load_state(tmp_path / "out/state.pt")["init"] == {
        "from": str(transfer.run),
        "sha256": digest,
    }


def test_a_fine_tuned_student_learns(transfer: Transfer, tmp_path: Path) -> None:
    mild = ("views.mix=0.0", "views.erase=0.0", "views.randaugment_ops=0")
    sets = (f'data.val_shards="{transfer.shards}"', *mild)
    summary = train(transfer.recipe(tmp_path / "out", sets=sets, epochs=16))
    losses = [row["loss"] for row in load_state(tmp_path / "out/state.pt")["rows"]]
    assert losses[-1] < 0.8 * losses[0], losses
    assert summary["last"]["top1"] > 2 * 100 / 7


@pytest.mark.parametrize("method", ["deit", "cskd"])
def test_with_a_cache_the_same_classes_keep_their_heads(
    small: World, tmp_path: Path, method: str
) -> None:
    shards = small.shards
    plain = world.train_recipe(shards, None, tmp_path / "plain", "none", world.VIEWS, epochs=1)
    train(plain)
    init = [f"student.init_from={tmp_path / 'plain'}"]
    recipe = world.train_recipe(shards, small.cache, tmp_path / "out", method, init, epochs=1)
    job = job_of(recipe)
    loaded = job.start_from(recipe.student.init_from)
    assert (loaded.new, loaded.resized) == ((), None)
    source = load_file(tmp_path / "plain/last.safetensors")
    assert_equal(dict(job.trainer.student.model.state_dict()), source)
    summary = train(recipe)
    assert summary["last"]["global"] > 0


def test_the_same_number_of_other_classes_gets_new_heads(
    transfer: Transfer, tmp_path: Path
) -> None:
    """Only if one side has no names does an equal count mean the same classes."""
    card = read_header(transfer.run / "best.safetensors")
    state = load_file(transfer.run / "best.safetensors")
    state = {k: v[:7] if k in HEADS else v for k, v in state.items()}
    own = tuple(f"hue{n:02d}" for n in range(7))
    for names, new_heads in ((own, False), (("tone", *own[1:]), True), (None, False)):
        changed = {**vars(card), "num_classes": 7, "class_names": names}
        save_student(tmp_path / "seven.safetensors", state, type(card)(**changed))
        job = transfer.start(tmp_path, tmp_path / "seven.safetensors")
        kept = torch.equal(job.trainer.student.model.state_dict()["head.bias"], state["head.bias"])
        assert kept != new_heads, names


def test_a_run_starts_from_a_model_in_timms_format(transfer: Transfer, tmp_path: Path) -> None:
    arguments = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model(world.STUDENT, num_classes=5, img_size=32, **arguments)
    folder = tmp_path / "timm"
    save_for_hf(
        model, str(folder), model_args={**arguments, "img_size": 32}, safe_serialization=True
    )
    job = transfer.start(tmp_path, folder)
    assert job.init == {"from": str(folder), "sha256": state_digest(model.state_dict())}
    loaded = job.trainer.student.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert name in HEADS | {"pos_embed"} or torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_run_starts_from_a_pth_of_the_same_model(
    transfer: Transfer, tmp_path: Path, wrapped: bool
) -> None:
    """As published by DeiT's authors, and as written by timm's training script."""
    source = load_file(transfer.run / "best.safetensors")
    torch.save({"model": source, "epoch": 3} if wrapped else source, tmp_path / "w.pth")
    job = transfer.start(tmp_path, tmp_path / "w.pth")
    expected = transfer.start(tmp_path).trainer.student.model.state_dict()
    assert_equal(dict(job.trainer.student.model.state_dict()), dict(expected))
    assert job.init == {"from": str(tmp_path / "w.pth"), "sha256": state_digest(source)}


def test_a_pth_that_describes_no_model_is_logged(
    transfer: Transfer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(transfer.run / "best.safetensors")
    torch.save(state, tmp_path / "w.pth")
    Terminal().attach()
    train(transfer.recipe(tmp_path / "out", tmp_path / "w.pth", epochs=1))
    output = capsys.readouterr().err.replace("\n", " ")
    assert "new head and head_dist (10 classes before, 7 now)" in output
    assert "the file describes no model" in output
    torch.save({"blocks.0.norm1.weight": torch.ones(32)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="do not fit") as caught:
        transfer.start(tmp_path, tmp_path / "w.pth")
    assert "missing (cls_token" in str(caught.value)


def test_a_pth_as_a_student_is_refused_with_what_is_expected(
    transfer: Transfer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(load_file(transfer.run / "best.safetensors"), tmp_path / "w.pth")
    assert world.cli("evaluate", tmp_path / "w.pth", "--shards", transfer.shards) == 1
    output = capsys.readouterr().err
    assert "no safetensors header" in output
    assert "to train --init-from, which reads its tensors" in output


@pytest.mark.parametrize(
    ("student", "extra", "prefix"),
    [
        ("deit_tiny_patch16_224", "", 1),
        ("deit_tiny_patch16_224", ", no_embed_class=true", 0),
        ("deit_tiny_patch16_224", ", reg_tokens=4", 5),
    ],
)
def test_positions_of_prefix_tokens_are_kept_unchanged(
    transfer: Transfer, tmp_path: Path, student: str, extra: str, prefix: int
) -> None:
    kwargs = KWARGS.replace("}", extra + "}")
    recipe = transfer.recipe(tmp_path / "b", student=student, kwargs=kwargs)
    fresh: Any = job_of(recipe).trainer.student.model
    grid = torch.randn(1, 4 * 4, 32)
    before = torch.cat([torch.full((1, prefix, 32), 7.0), grid], dim=1)
    torch.save({**fresh.state_dict(), "pos_embed": before}, tmp_path / "w.pth")
    job = transfer.start(tmp_path, tmp_path / "w.pth", student=student, kwargs=kwargs)
    positions = job.trainer.student.model.state_dict()["pos_embed"]
    assert positions.shape == (1, prefix + 6 * 6, 32)
    assert torch.equal(positions[:, :prefix], before[:, :prefix])
    square = grid.reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    larger = functional.interpolate(square, size=(6, 6), mode="bicubic", antialias=True)
    expected = larger.permute(0, 2, 3, 1).reshape(1, 36, 32)
    torch.testing.assert_close(positions[:, prefix:], expected)


def test_resolution_does_not_distinguish_architectures(transfer: Transfer, tmp_path: Path) -> None:
    """``…_patch16_384`` in timm is ``…_patch16_224`` for larger images."""
    larger = "deit_base_distilled_patch16_384"
    smaller = "deit_base_distilled_patch16_224"
    kwargs = "{patch_size=8, embed_dim=16, depth=1, num_heads=2}"
    recipe = transfer.recipe(tmp_path / "a", student=smaller, kwargs=kwargs, epochs=1)
    recipe = world.load_recipe(
        TrainRecipe, None, ["student.init_from="], {k: v for k, v in flat(recipe).items() if v}
    )
    train(recipe)
    job = transfer.start(tmp_path, tmp_path / "a", student=larger, kwargs=kwargs)
    source = load_file(tmp_path / "a/last.safetensors")
    assert_equal(dict(job.trainer.student.model.state_dict()), source)


def flat(recipe: TrainRecipe) -> dict[str, Any]:
    sections = {name: vars(section) for name, section in vars(recipe).items()}
    values = {f"{s}.{k}": v for s, section in sections.items() for k, v in section.items()}
    del values["student.init_from"]
    return values


# Resuming


def die_at(monkeypatch: pytest.MonkeyPatch, update: int) -> Callable[[], None]:
    step = stage_two.Trainer.step

    def fatal_step(trainer: Any, batches: Any) -> torch.Tensor:
        if trainer.update == update:
            raise DiedError
        return step(trainer, batches)

    monkeypatch.setattr(stage_two.Trainer, "step", fatal_step)
    return lambda: monkeypatch.setattr(stage_two.Trainer, "step", step)


@pytest.mark.parametrize("source_deleted", [False, True])
def test_a_killed_run_resumes_exactly_without_its_source(
    transfer: Transfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source_deleted: bool
) -> None:
    init = Path(shutil.copytree(transfer.run, tmp_path / "source"))
    sets = ("run.checkpoint_every=1",)
    train(transfer.recipe(tmp_path / "full", init, sets, epochs=2))
    recipe = transfer.recipe(tmp_path / "resumed", init, sets, epochs=2)
    restore = die_at(monkeypatch, 4)
    with pytest.raises(DiedError):
        train(recipe)
    restore()
    if source_deleted:
        shutil.rmtree(init)
    train(recipe, resume=True)
    assert_equal(final_state(tmp_path / "full"), final_state(tmp_path / "resumed"))
    one, other = (tmp_path / name / "last.safetensors" for name in ("full", "resumed"))
    assert one.read_bytes() == other.read_bytes()


def test_a_run_killed_before_its_first_state_starts_from_the_weights_again(
    transfer: Transfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = transfer.recipe(tmp_path / "resumed", epochs=1)
    restore = die_at(monkeypatch, 1)
    with pytest.raises(DiedError):
        train(recipe)
    restore()
    train(recipe, resume=True)
    train(transfer.recipe(tmp_path / "full", epochs=1))
    assert_equal(final_state(tmp_path / "full"), final_state(tmp_path / "resumed"))


def test_a_run_resumes_only_with_its_own_initial_weights(
    transfer: Transfer, tmp_path: Path
) -> None:
    train(transfer.recipe(tmp_path / "out", epochs=1))
    copy = shutil.copyfile(transfer.run / "best.safetensors", tmp_path / "copy.safetensors")
    train(transfer.recipe(tmp_path / "out", copy, epochs=1), resume=True)

    other = load_file(copy)
    other["norm.bias"] += 1
    save_student(tmp_path / "other.safetensors", other, read_header(copy))
    refusals = {
        tmp_path / "other.safetensors": (OutputError, "started from other weights"),
        tmp_path / "nothing": (WeightsError, "weights to start from do not exist"),
    }
    for init, (kind, message) in refusals.items():
        with pytest.raises(kind, match=message):
            train(transfer.recipe(tmp_path / "out", init, epochs=1), resume=True)
    fresh = world.load_recipe(
        TrainRecipe, None, [], flat(transfer.recipe(tmp_path / "out", epochs=1))
    )
    with pytest.raises(OutputError, match="started from other weights"):
        train(fresh, resume=True)


def test_a_run_from_random_weights_does_not_resume_with_others(
    transfer: Transfer, tmp_path: Path
) -> None:
    recipe = transfer.recipe(tmp_path / "out", epochs=1)
    train(world.load_recipe(TrainRecipe, None, [], flat(recipe)))
    with pytest.raises(OutputError, match="started from other weights"):
        train(recipe, resume=True)


# Refusals


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"student": "deit_tiny_patch16_224"}, ["another architecture", world.STUDENT]),
        ({"student": "resnet10t", "kwargs": "{}"}, ["another architecture", "resnet10t"]),
        (
            {"kwargs": KWARGS.replace("num_heads=2", "num_heads=4")},
            ["blocks.1.attn.num_heads: found 2, expected 4"],
        ),
        (
            {"kwargs": KWARGS.replace(", depth=2", "")},
            ["blocks.11: found none, expected Block", "'depth': 2"],
        ),
    ],
)
def test_another_model_is_refused_with_found_and_expected(
    transfer: Transfer, tmp_path: Path, options: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(WeightsError) as caught:
        train(transfer.recipe(tmp_path / "out", **options))
    for part in [*parts, str(transfer.run)]:
        assert part in str(caught.value)


def test_weights_with_another_normalisation_are_refused(transfer: Transfer, tmp_path: Path) -> None:
    """Some of timm's ViTs have means of 0.5, others ImageNet's."""
    arguments = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model(world.STUDENT, num_classes=5, img_size=32, **arguments)
    save_for_hf(
        model,
        str(tmp_path / "timm"),
        model_args={**arguments, "img_size": 32},
        model_config={"pretrained_cfg": {"mean": (0.5, 0.5, 0.5)}},
        safe_serialization=True,
    )
    with pytest.raises(WeightsError, match="a model with other settings") as caught:
        transfer.start(tmp_path, tmp_path / "timm")
    assert "mean: found (0.5, 0.5, 0.5), expected (0.485, 0.456, 0.406)" in str(caught.value)


def test_tensors_that_do_not_fit_are_named(transfer: Transfer, tmp_path: Path) -> None:
    card = read_header(transfer.run / "best.safetensors")
    full = load_file(transfer.run / "best.safetensors")
    cases = {
        "pos_embed (1, 17, 32) for (1, 38, 32)": full | {"pos_embed": torch.zeros(1, 17, 32)},
        "pos_embed (18,) for (1, 38, 32)": full | {"pos_embed": torch.zeros(18)},
        "pos_embed (1, 18, 8) for (1, 38, 32)": full | {"pos_embed": torch.zeros(1, 18, 8)},
        "1 missing (norm.bias)": {k: v for k, v in full.items() if k != "norm.bias"},
        "1 unexpected (extra)": full | {"extra": torch.zeros(1)},
    }
    for message, state in cases.items():
        save_student(tmp_path / "odd.safetensors", state, card)
        with pytest.raises(WeightsError) as caught:
            transfer.start(tmp_path, tmp_path / "odd.safetensors")
        assert message in str(caught.value)


def test_paths_without_a_student_are_refused(transfer: Transfer, tmp_path: Path) -> None:
    empty, odd, oblong, text = (tmp_path / name for name in ("empty", "odd", "oblong", "text"))
    for folder in (empty, odd, oblong):
        folder.mkdir()
    (odd / "config.json").write_text('{"architecture": 5}')
    (oblong / "config.json").write_text(
        '{"architecture": "x", "num_classes": 2, "pretrained_cfg": '
        '{"input_size": [3, 32, 64], "mean": [0, 0, 0], "std": [1, 1, 1]}}'
    )
    text.write_text("no weights")
    messages = {
        tmp_path / "nothing": "weights to start from do not exist",
        empty: "contains no student",
        odd: "does not describe a usable classifier",
        oblong: "an input of 32x64 pixels",
        text: "does not load as plain tensors",
    }
    for path, part in messages.items():
        with pytest.raises(CskdError) as caught:
            read_source(path)
        assert part in str(caught.value)
        assert str(path) in str(caught.value)
