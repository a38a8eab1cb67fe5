"""Evaluation: normalised images in, top-1 and top-5 of a student's heads out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cskd_pipeline.data.evalset import EvalBatch
from cskd_pipeline.errors import DataError
from cskd_pipeline.models.student import Heads
from cskd_pipeline.pipeline.evaluate import Metrics, measure

K = 7


class Scripted(torch.nn.Module):
    """A student that returns given logits and records its images."""

    mean, std = (0.1, 0.4, 0.7), (0.5, 0.25, 2.0)

    def __init__(self, *batches: Heads) -> None:
        super().__init__()
        self.outputs = iter(batches)
        self.weight = torch.nn.Parameter(torch.zeros(1))  # determines the device
        self.shown: list[Tensor] = []

    def forward(self, images: Tensor, grid: Any = None) -> Heads:
        self.shown.append(images)
        return next(self.outputs)


def evaluate(student: Any, batches: list[EvalBatch], heads: tuple[str, ...]) -> Metrics:
    return measure(student, batches, heads, (2, 2))


def batch_of(labels: list[int]) -> EvalBatch:
    pixels = torch.randint(0, 256, (len(labels), 4, 4, 3), dtype=torch.uint8)
    return EvalBatch(pixels, torch.tensor(labels))


def ranked(*orders: str) -> Tensor:
    """Return logits that rank the classes in these orders, the largest first."""
    logits = torch.zeros(len(orders), K)
    for row, order in enumerate(orders):
        for rank, digit in enumerate(order):
            logits[row, int(digit)] = float(K - rank)
    return logits


def test_a_students_images_are_normalised_with_its_mean_and_std() -> None:
    batch = batch_of([0, 1])
    student = Scripted(Heads(torch.rand(2, K)))
    evaluate(student, [batch], ("cls",))
    for channel in range(3):
        pixels = batch.pixels[..., channel].float() / 255
        expected = (pixels - student.mean[channel]) / student.std[channel]
        torch.testing.assert_close(student.shown[0][:, channel], expected)


def test_each_trained_head_and_the_mean_of_their_logits_are_evaluated() -> None:
    """With batches of unequal size: the last may be short."""
    cls = ranked("0123456", "5012346", "6543210")
    dist = ranked("1203456", "1234506", "5012346")
    dense = 3 * ranked("0123456", "5432106", "0123456")
    heads = Heads(cls, dist, dense[:, :, None, None].expand(3, K, 2, 2))
    short = Heads(*(ranked("0123456") for _ in range(2)), ranked("0123456")[:, :, None, None])
    labels = [[0, 5, 6], [0]]

    def top(names: tuple[str, ...]) -> dict[str, tuple[float, float]]:
        metrics = evaluate(Scripted(heads, short), [batch_of(row) for row in labels], names)
        return {name: (value["top1"], value["top5"]) for name, value in metrics.items()}

    alone = {"cls": (100.0, 100.0), "dist": (25.0, 75.0), "dense": (75.0, 75.0)}
    assert top(("cls", "dist", "dense")) == {**alone, "mean": (75.0, 75.0)}
    assert top(("cls", "dist")) == {
        "cls": alone["cls"], "dist": alone["dist"], "mean": (25.0, 100.0)
    }  # fmt: skip
    assert top(("cls",)) == {"cls": alone["cls"], "mean": alone["cls"]}


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        evaluate(Scripted(), [], ("cls",))
