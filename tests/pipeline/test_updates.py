"""One update, checked against arithmetic: seeds, CKF ratio, average, accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cskd_pipeline.data.batches import Batch
from cskd_pipeline.distill.losses import DistillationLoss
from cskd_pipeline.pipeline.trainer import Trainer
from cskd_pipeline.pipeline.training_data import open_training_data
from cskd_pipeline.runtime.distributed import ALONE, Ranks
from tests.pipeline import world
from tests.pipeline.conftest import World


def make_trainer(small: World, *sets: str, ranks: Ranks = ALONE) -> tuple[Trainer, Iterator[Batch]]:
    """Return a trainer of 12 updates, and its micro-batches."""
    recipe = world.train_recipe(small.shards, small.cache, Path(), sets=[*sets], epochs=2)
    views = open_training_data(recipe).views
    trainer = Trainer(recipe, views, torch.device("cpu"))
    trainer.ranks = ranks  # used only for seeding here
    return trainer, trainer.micro_batches()


def test_randomness_in_an_update_depends_only_on_seed_update_and_rank(small: World) -> None:
    def seeds(seed: int, ranks: Ranks) -> list[int]:
        trainer, batches = make_trainer(small, f"run.seed={seed}", "data.check=0", ranks=ranks)
        result = []
        for _ in range(3):
            torch.manual_seed(17)
            trainer.step(batches)
            result.append(torch.initial_seed())
        return result

    first, other = Ranks(0, 1), Ranks(1, 1)
    distinct = [*seeds(0, first), *seeds(0, other), *seeds(1, first)]
    assert len(set(distinct)) == 9
    assert seeds(0, first) == distinct[:3]


@pytest.mark.parametrize(
    ("step", "expected"),
    [("update", [1 - u / 12 for u in range(12)]), ("epoch", [1.0] * 6 + [0.5] * 6)],
)
def test_every_update_uses_the_schedules_ckf_ratio(
    small: World, monkeypatch: pytest.MonkeyPatch, step: str, expected: list[float]
) -> None:
    ratios = []
    loss = DistillationLoss.__call__

    def recorder(self: DistillationLoss, heads: Any, labels: Any, targets: Any, r: float, t: float):
        ratios.append(r)
        assert t == pytest.approx(1 - r)
        return loss(self, heads, labels, targets, r, t)

    monkeypatch.setattr(DistillationLoss, "__call__", recorder)
    trainer, batches = make_trainer(small, f"distill.step={step}", "data.check=0")
    for _ in range(12):
        trainer.step(batches)
    assert ratios == pytest.approx(expected)


def test_the_weight_average_covers_every_parameter(small: World) -> None:
    trainer, batches = make_trainer(small, "run.ema=0.75", "data.check=0")
    assert trainer.ema is not None
    before = {n: p.clone() for n, p in trainer.ema.module.named_parameters()}
    trainer.step(batches)
    now = dict(trainer.student.model.named_parameters())
    moved = {n for n in now if not torch.equal(now[n], before[n])}
    assert {now[n].ndim for n in moved} >= {1, 2}
    for name, average in trainer.ema.module.named_parameters():
        torch.testing.assert_close(average, 0.75 * before[name] + 0.25 * now[name])


def test_accumulation_changes_no_update(small: World) -> None:
    """With plain gradient descent: Adam would hide a scaled gradient."""

    def weights(accumulation: int) -> list[torch.Tensor]:
        sets = ["optim.name=sgd", "optim.lr=100", "data.check=0", "schedule.warmup_epochs=0"]
        trainer, batches = make_trainer(small, *sets, f"batch.accumulation={accumulation}")
        trainer.step(batches)
        return [p.detach() for p in trainer.student.parameters()]

    updated, fresh = weights(1), list(make_trainer(small, "data.check=0")[0].student.parameters())
    assert max((a - b).abs().max() for a, b in zip(updated, fresh, strict=True)) > 0.01
    for one, other in zip(updated, weights(4), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
