"""The examples train on real images from a cache, and their loss decreases."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cskd_pipeline.models.student import dense_logits
from tests.examples.conftest import EXAMPLES, STUDENT, Digits

Example = Callable[[str], ModuleType]


def code_lines(path: Path) -> int:
    """Count the lines of code, without blank lines, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
                              tokenize.DEDENT, tokenize.ENDMARKER):  # fmt: skip
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            assert node.end_lineno is not None
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def decreases(values: torch.Tensor) -> bool:
    """Return whether the last quarter averages 10 % below the first; require finite values."""
    quarter = len(values) // 4
    assert bool(torch.isfinite(values).all())
    return float(values[-quarter:].mean()) < 0.9 * float(values[:quarter].mean())


def test_the_plain_loop_has_at_most_thirty_lines_of_code(tmp_path: Path) -> None:
    assert code_lines(EXAMPLES / "plain_loop.py") <= 30
    path = tmp_path / "counted.py"
    path.write_text('"""Doc\nstring."""\n\nx = 1  # one\n# none\ny = [\n    2,\n]\n')
    assert code_lines(path) == 4


def test_the_plain_loop_trains_with_its_own_schedule_and_weight(
    digits: Digits, example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, calls = example("plain_loop"), []
    loss = module.DistillationLoss.__call__

    def record(self: Any, heads: Any, labels: Any, targets: Any, r: float, t: float) -> Any:
        parts = loss(self, heads, labels, targets, r, t)
        base, global_, spatial = (float(part) for part in parts[1:])
        total = 0.5 * base + 0.5 * global_ + (1 + t) * spatial
        calls.append((t, r, float(parts.total.detach()) == pytest.approx(total, rel=1e-5)))
        return parts

    monkeypatch.setattr(module.DistillationLoss, "__call__", record)
    torch.manual_seed(0)
    model, curve = module.train(*digits, epochs=8, batch_size=16, lr=3e-3, **STUDENT)
    assert calls == [(e / 8, (1 - e / 8) ** 3, True) for e in range(8) for _ in range(6)]
    assert curve.shape == (48, 4)
    assert decreases(curve[:, 1:].sum(dim=1))
    assert curve[-12:, 1].mean() < curve[:12, 1].mean()
    assert model.num_classes == 10


def test_the_timm_loop_trains_from_the_cached_loader(digits: Digits, example: Example) -> None:
    torch.manual_seed(0)
    model, curve = example("timm_train").train(*digits, epochs=8, batch_size=16, **STUDENT)
    assert len(curve) == 8
    assert decreases(torch.tensor(curve))
    assert dense_logits(model.eval(), torch.zeros(1, 3, 48, 48)).cls.shape == (1, 10)


def test_lightning_trains_and_resumes_in_mid_epoch(
    digits: Digits, example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    module = example("lightning_module")
    curves: list[list[float]] = []
    images: list[torch.Tensor] = []
    step = module.Distillation.training_step

    def record(self: Any, batch: Any, number: int) -> Any:
        loss = step(self, batch, number)
        curves[-1].append(float(loss.detach()))
        images.append(batch.images[0])
        return loss

    def fit(**options: Any) -> None:
        torch.manual_seed(0)
        curves.append([])
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=9, save_top_k=-1)
        trainer = lightning.Trainer(
            max_epochs=4, use_distributed_sampler=False, accelerator="cpu", callbacks=[saver],
            logger=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module.Distillation(*digits, batch_size=16, lr=3e-3, **STUDENT), **options)

    monkeypatch.setattr(module.Distillation, "training_step", record)
    fit()
    assert len(curves[0]) == 24
    assert decreases(torch.tensor(curves[0]))
    fit(ckpt_path=tmp_path / "step=9.ckpt")  # an epoch has six steps
    assert curves[1] == pytest.approx(curves[0][9:], rel=1e-5)
    assert torch.equal(torch.stack(images[24:]), torch.stack(images[9:24]))
