"""The recipes in stages/: complete, documented, and faithful to the paper."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cskd_pipeline.config.reading import load_recipe, recipe_names
from cskd_pipeline.config.sections import DistillSection, DumpRecipe, EvalSection, TrainRecipe
from cskd_pipeline.pipeline.trainer import Trainer
from cskd_pipeline.runtime import resources
from cskd_pipeline.tools.bench.bench_step import synthetic_views
from cskd_pipeline.views.policy import ViewPolicy

STUDY = {
    f"{data}_{role}": DumpRecipe if role == "dump" else TrainRecipe
    for data in ("cifar10", "digits")
    for role in ("teacher", "dump", "none", "deit", "cskd")
}
FILES = sorted(resources.stages().glob("*/*.toml"))
PAPER = {
    "paper_tiny": "deit_tiny_distilled_patch16_224",
    "paper_small": "deit_small_distilled_patch16_224",
    "paper_base": "deit_base_distilled_patch16_224",
}
AUTHORS = {"paper_tiny": (1024, 1e-3), "paper_small": (512, 5e-4), "paper_base": (256, 2.5e-4)}
"""Global batch and peak learning rate in the authors' configurations."""


def test_the_stages_folder_has_the_promised_recipes() -> None:
    dumps = [name for name, kind in STUDY.items() if kind is DumpRecipe]
    assert recipe_names(DumpRecipe) == sorted(["demo", "paper_regnety_160", *dumps])
    assert recipe_names(TrainRecipe) == sorted(
        ["finetune_cifar100", *(name for name in STUDY if name not in dumps)]
        + [f"demo_{kind}" for kind in ("none", "deit", "cskd", "teacher")]
        + [f"{size}_{method}" for size in PAPER for method in ("cskd", "deit", "none")]
    )
    assert len(FILES) == 16 + len(STUDY)  # and every one is checked below


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_is_valid_complete_and_documented(path: Path) -> None:
    kinds = {"dump_teacher": DumpRecipe, "train": TrainRecipe}
    kind = kinds.get(path.parent.name) or STUDY[path.stem]
    recipe = load_recipe(kind, path)
    text = path.read_text(encoding="utf-8")
    document = tomllib.loads(text)
    assert set(document) == {section.name for section in fields(kind)}
    for section in fields(kind):
        expected = {field.name for field in fields(getattr(recipe, section.name))}
        assert set(document[section.name]) == expected, section.name
    comment = text.partition("\n\n[")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    command = "dump-teacher" if kind is DumpRecipe else "train"
    assert f"# Command  cskd-pipeline {command} --recipe {path.stem}" in comment
    assert "# Cost " in comment
    assert "# Result " in comment


def flat(recipe: TrainRecipe, *sections: str) -> dict[str, Any]:
    return {
        f"{name}.{field.name}": getattr(getattr(recipe, name), field.name)
        for name in sections
        for field in fields(getattr(recipe, name))
    }


@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("method", ["cskd", "deit", "none"])
def test_the_paper_recipes_have_its_values(size: str, method: str) -> None:
    """The paper's training recipe, value by value."""
    recipe = load_recipe(TrainRecipe, f"{size}_{method}")
    assert recipe.student.name == PAPER[size]
    assert recipe.student.drop_path == 0.0
    assert recipe.views == ViewPolicy(
        version="deit-v1",
        size=224,
        crop_area=(0.08, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        flip=0.5,
        randaugment_ops=2,
        randaugment_prob=0.5,
        randaugment_magnitude=9.0,
        randaugment_std=0.5,
        erase=0.25,
        erase_area=(0.02, 1 / 3),
        erase_ratio=(0.3, 1 / 0.3),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        mix=1.0,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        cutmix_switch=0.5,
        window=64,
        repeats=3,
    )
    assert recipe.distill == DistillSection(
        method=method,
        global_kind="hard",
        spatial_kind="hard",
        alpha=0.5,
        spatial_weight=1.0,
        schedule="linear",
        step="epoch",
        scaling="reference",
        temperature=1.0,
        encoding="auto",
    )
    assert flat(recipe, "optim", "schedule", "batch") == {
        "optim.name": "adamw",
        "optim.lr": 1e-3,
        "optim.weight_decay": 0.05,
        "optim.betas": (0.9, 0.999),
        "optim.clip_grad": 0.0,
        "optim.smoothing": 0.1,
        "schedule.epochs": 300,
        "schedule.warmup_epochs": 5,
        "schedule.warmup_lr": 1e-6,
        "schedule.min_lr": 1e-5,
        "batch.batch_size": AUTHORS[size][0],
        "batch.accumulation": 1,
        "batch.repeats": 3,
        "batch.shuffle_shards": 16,
    }
    assert recipe.eval == EvalSection(crop_pct=0.875, interpolation="bicubic")
    assert recipe.run.ema == 0.99996
    assert recipe.data.num_classes == 1000


@pytest.mark.parametrize("size", PAPER)
def test_a_papers_run_has_the_authors_learning_rates_and_the_updates_its_recipe_states(
    size: str,
) -> None:
    """Warm-up and minimum are the recipe's own numbers: only the peak is scaled with the batch."""
    recipe = load_recipe(TrainRecipe, size, ["student.kwargs={embed_dim=24, depth=1, num_heads=2}"])
    policy = recipe.views
    assert policy is not None
    trainer = Trainer(recipe, synthetic_views(policy, (7, 7), 1_281_167), torch.device("cpu"))
    rates = []
    for epoch in range(301):
        trainer.lr_schedule.step_update(epoch * trainer.steps_per_epoch)
        rates.append(trainer.lr)
    batch, peak = AUTHORS[size]
    assert rates[0] == pytest.approx(1e-6)
    assert rates.index(max(rates)) == 5
    assert max(rates) == pytest.approx(peak, rel=1e-3)
    assert rates[-1] == pytest.approx(1e-5)
    for method in ("cskd", "deit", "none"):
        text = (resources.stages() / f"train/{size}_{method}.toml").read_text()
        assert f"{trainer.total_updates:,} updates of {batch:,}" in text
        stated = re.search(r"scaled linearly: (\S+) for this batch", text)
        assert stated is not None
        assert float(stated[1]) == peak


def test_fine_tuning_follows_deit_and_otherwise_the_paper() -> None:
    """SGD, 0.01 at a batch of 768, 1,000 epochs, no erasing: the authors' words (deit issue 45)."""
    tuned = load_recipe(TrainRecipe, "finetune_cifar100")
    paper = load_recipe(TrainRecipe, "paper_base_none")
    changed = {
        name: value
        for name, value in flat(tuned, "optim", "schedule", "batch", "student", "distill").items()
        if value != flat(paper, "optim", "schedule", "batch", "student", "distill")[name]
    }
    assert changed == {
        "optim.name": "sgd",
        "optim.lr": 0.013333333333333334,
        "optim.weight_decay": 1e-4,
        "schedule.epochs": 1000,
        "batch.batch_size": 768,
    }
    assert tuned.optim.lr * tuned.batch.batch_size / 1024 == pytest.approx(0.01)
    assert tuned.eval == paper.eval
    assert tuned.views == replace(paper.views, erase=0.0)
    assert tuned.data.num_classes == 100
    text = (resources.stages() / "train/finetune_cifar100.toml").read_text()
    assert "not run yet with this code" in text


def test_the_papers_cache_is_regnety_160_in_300_envelope_views() -> None:
    recipe = load_recipe(DumpRecipe, "paper_regnety_160")
    assert recipe.teacher.name == "regnety_160.deit_in1k"
    assert recipe.teacher.weights == "hub"
    assert recipe.cache.encodings == ("envelope",)
    assert recipe.cache.views == 300
    assert recipe.views == load_recipe(TrainRecipe, "paper_tiny").views
    text = (resources.stages() / "dump_teacher/paper_regnety_160.toml").read_text()
    assert "# Why encodings" in text


@pytest.mark.parametrize("family", [*PAPER, "demo"])
def test_baselines_differ_in_one_word(family: str) -> None:
    cskd = load_recipe(TrainRecipe, f"{family}_cskd")
    for method in ("deit", "none"):
        other = load_recipe(TrainRecipe, f"{family}_{method}")
        assert replace(other, distill=replace(other.distill, method="cskd")) == cskd


@pytest.mark.parametrize(("size", "cskd", "deit"), [
    ("tiny", "76.3", "74.5"), ("small", "82.3", "81.2"), ("base", "83.8", "83.4"),
])  # fmt: skip
def test_published_figures_are_attributed_to_the_paper(size: str, cskd: str, deit: str) -> None:
    folder = resources.stages() / "train"
    text = {m: (folder / f"paper_{size}_{m}.toml").read_text() for m in ("cskd", "deit", "none")}
    assert f"the paper reports {cskd} %" in text["cskd"]
    assert f"the paper reports {deit} %" in text["deit"]
    assert "top-1" not in text["none"]
    for method in ("cskd", "deit"):
        assert "not yet reproduced with this code" in text[method]


def test_the_demos_students_see_the_views_of_its_teachers_cache() -> None:
    dump = load_recipe(DumpRecipe, "demo")
    teacher = load_recipe(TrainRecipe, "demo_teacher")
    assert dump.cache.encodings == ("dense", "envelope")
    assert (dump.teacher.name, dump.teacher.kwargs) == (
        teacher.student.name,
        teacher.student.kwargs,
    )
    assert teacher.views is not None
    assert teacher.views.size == dump.views.size
    for name in ("none", "deit", "cskd"):
        recipe = load_recipe(TrainRecipe, f"demo_{name}")
        assert recipe.views == dump.views
        assert recipe.data.num_classes == dump.data.num_classes == 10


def test_timm_has_every_model_that_recipes_name() -> None:
    import timm

    assert "regnety_160.deit_in1k" in timm.list_pretrained("regnety_160*")
    known = set(timm.list_models())
    for name in recipe_names(TrainRecipe):
        assert load_recipe(TrainRecipe, name).student.name in known
    for name in recipe_names(DumpRecipe):
        assert load_recipe(DumpRecipe, name).teacher.name.partition(".")[0] in known
