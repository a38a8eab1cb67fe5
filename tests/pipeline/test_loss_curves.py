"""Claim 2 of the design: training from a cache equals training with the live teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cskd_pipeline.data.assemble import assemble, normalise
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.distill.targets import LogitTargets, Targets
from cskd_pipeline.pipeline.trainer import Trainer
from cskd_pipeline.pipeline.training_data import open_training_data
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.pipeline.live import teacher_of

CPU = torch.device("cpu")


def loss_curve(
    small: World,
    out: Path,
    method: str,
    sets: list[str],
    targets: Callable[[Batch], Targets] | None = None,
) -> torch.Tensor:
    """Return (updates, 4) loss and terms of a full run; ``targets`` replace the cache's targets."""
    recipe = world.train_recipe(small.shards, small.cache, out, method, sets)
    trainer = Trainer(recipe, open_training_data(recipe).views, CPU, targets=targets)
    batches = trainer.micro_batches()
    return torch.stack([trainer.step(batches) for _ in range(trainer.total_updates)])


@pytest.mark.parametrize("method", ["deit", "cskd"])
@pytest.mark.parametrize("step", ["epoch", "update"])
def test_dense_cache_envelope_cache_and_live_teacher_give_the_same_loss_curve(
    small: World, tmp_path: Path, method: str, step: str
) -> None:
    sets = [f"distill.step={step}"]
    dense = loss_curve(small, tmp_path, method, [*sets, "distill.encoding=dense"])
    envelope = loss_curve(small, tmp_path, method, [*sets, "distill.encoding=envelope"])
    live = loss_curve(small, tmp_path, method, sets, _live_targets(small))
    assert torch.equal(dense, envelope)
    assert torch.equal(dense, live)
    assert len(dense) == 24
    assert dense[-1, 0] < dense[0, 0]


@pytest.mark.parametrize(
    "kinds", [world.SOFT, ["distill.spatial_kind=soft"], ["distill.global_kind=soft"]]
)
def test_soft_targets_of_dense_cache_and_live_teacher_give_the_same_loss_curve(
    small: World, tmp_path: Path, kinds: list[str]
) -> None:
    """Also if only one of the two terms is soft: only dense supports both kinds."""
    sets = [*kinds, "distill.temperature=2.0"]
    dense = loss_curve(small, tmp_path, "cskd", sets)
    live = loss_curve(small, tmp_path, "cskd", sets, _live_targets(small))
    assert torch.equal(dense, live)


def test_all_loss_settings_of_the_recipe_reach_the_loss(small: World, tmp_path: Path) -> None:
    settings = {
        "global_kind": "soft",
        "spatial_kind": "soft",
        "alpha": 0.3,
        "spatial_weight": 1.7,
        "temperature": 2.5,
        "scaling": "mean",
    }
    sets = [f"distill.{name}={value}" for name, value in settings.items()]
    recipe = world.train_recipe(small.shards, small.cache, tmp_path, "cskd", sets)
    trainer = Trainer(recipe, open_training_data(recipe).views, CPU)
    assert vars(trainer.loss) == {"method": "cskd", **settings}


def test_accumulation_changes_a_loss_curve_by_rounding_only(small: World, tmp_path: Path) -> None:
    single = loss_curve(small, tmp_path, "cskd", [])
    accumulated = loss_curve(small, tmp_path, "cskd", ["batch.accumulation=4"])
    torch.testing.assert_close(single, accumulated, rtol=1e-4, atol=1e-5)
    assert not torch.equal(single, accumulated)  # else accumulation had no effect


def _live_targets(small: World) -> Callable[[Batch], Targets]:
    from cskd_pipeline.cache.reader import open_cache

    manifest = open_cache(small.cache).manifest
    teacher = teacher_of(manifest)

    def respond(batch: Batch) -> Targets:
        images = normalise(assemble(batch, manifest.policy), teacher.mean, teacher.std)
        return LogitTargets(*teacher.respond(images))

    return respond
