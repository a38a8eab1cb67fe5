"""``bench step`` times real training steps in turn; a step from a cache never syncs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cskd_pipeline.config.reading import load_recipe
from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.data.assemble import assemble, normalise
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.distill.encodings import ENCODINGS
from cskd_pipeline.distill.targets import EnvelopeTargets, LogitTargets
from cskd_pipeline.errors import StudentError
from cskd_pipeline.models.teacher import TeacherSource, load_teacher
from cskd_pipeline.pipeline.trainer import Trainer
from cskd_pipeline.tools.bench import bench_step as bench
from cskd_pipeline.views.policy import ViewPolicy
from tests.clock import FakeClock
from tests.pipeline import world

Capture = pytest.CaptureFixture[str]

SIZE = 32
POLICY = ViewPolicy(size=SIZE)
STUDENT = "deit_tiny_distilled_patch16_224"
SMALL = "student.kwargs={patch_size=8, embed_dim=16, depth=1, num_heads=2}"
TEACHER = "resnet10t"  # 1 x 1 locations at 32 px


def small_recipe(*sets: str) -> TrainRecipe:
    flags = {"batch.batch_size": 8, "run.device": "cpu", "student.name": STUDENT}
    return load_recipe(TrainRecipe, None, [SMALL, "run.threads=1", *sets], flags)


def small_trainers(device: str = "cpu", *sets: str) -> dict[str, Trainer]:
    return bench._trainers(small_recipe(*sets), POLICY, (2, 2), None, torch.device(device))


def test_ratios_are_step_times_relative_to_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, steps = FakeClock(), Counter[str]()
    seconds = {"none": 1.0, "deit": 1.25, "cskd": 1.5, "live": 6.0}
    real = bench._trainers

    class Stepped:
        def __init__(self, name: str, trainer: Trainer) -> None:
            self.name, self.device = name, trainer.device
            self.loader, self.student = trainer.loader, trainer.student

        def step(self, batches: Iterator[Batch]) -> Tensor:
            steps[self.name] += len(list(batches))
            clock.advance(seconds[self.name])
            return torch.zeros(4)

    def named(*arguments: Any) -> Any:
        return {name: Stepped(name, trainer) for name, trainer in real(*arguments).items()}

    monkeypatch.setattr(bench, "_trainers", named)
    monkeypatch.setattr(bench.timing, "clock", clock)
    report = bench.bench_step(
        _sized(small_recipe("batch.accumulation=2")),
        students=[STUDENT],
        teacher=TEACHER,
        rounds=3,
    )
    student = report["students"][STUDENT]
    assert student["ratio"]["cskd"] == {"median": 1.5, "low": 1.5, "high": 1.5}
    assert student["ratio"]["deit"]["median"] == 1.25
    assert student["ratio"]["live"]["median"] == 4.0
    assert student["images_per_second"]["none"]["median"] == 8.0
    assert steps == dict.fromkeys(seconds, 4 * 2)  # three rounds and warm-up, two micro-batches
    assert report["goal"] == {"cskd": 1.03, "live": {}}  # goals of live need a GPU and RegNetY-160


def _sized(recipe: TrainRecipe) -> TrainRecipe:
    return replace(recipe, views=POLICY)


def test_every_side_trains_by_its_own_method_from_its_own_targets() -> None:
    teacher = load_teacher(TeacherSource(TEACHER, "random", 1000), size=SIZE, batch_size=8)
    trainers = bench._trainers(small_recipe(), POLICY, teacher.grid, teacher, torch.device("cpu"))
    batch = bench.synthetic_batch(POLICY, 8, teacher.grid)
    assert list(trainers) == ["none", "deit", "cskd", "live"]
    methods = [trainer.loss.method for trainer in trainers.values()]
    assert methods == ["none", "deit", "cskd", "cskd"]
    assert trainers["none"].targets(batch) is None
    assert isinstance(trainers["cskd"].targets(batch), EnvelopeTargets)
    live = trainers["live"].targets(batch)
    assert isinstance(live, LogitTargets)
    views = normalise(assemble(batch, POLICY), teacher.mean, teacher.std)
    assert torch.equal(live.global_, teacher.respond(views).global_)
    for name, trainer in trainers.items():
        _, base, global_, spatial = trainer.step(iter([batch])).tolist()
        assert base > 0
        assert (global_ > 0) == (name != "none")
        assert (spatial > 0) == (name in ("cskd", "live"))


def test_a_live_teacher_and_its_cached_logits_give_equal_losses() -> None:
    teacher = load_teacher(TeacherSource(TEACHER, "random", 1000), size=SIZE, batch_size=8)
    trainers = bench._trainers(small_recipe(), POLICY, teacher.grid, teacher, torch.device("cpu"))
    batch = bench.synthetic_batch(POLICY, 8, teacher.grid)
    logits = teacher.respond(normalise(assemble(batch, POLICY), teacher.mean, teacher.std))
    cached = ENCODINGS["envelope"].encode(logits.spatial, logits.global_, np.zeros(8, np.uint64))
    batch.targets.update(cached)
    for _ in range(3):
        from_cache, from_teacher = (trainers[name].step(iter([batch])) for name in ("cskd", "live"))
        assert torch.equal(from_cache, from_teacher)


def test_the_synthetic_batch_is_mixed_and_erased_and_has_real_envelopes() -> None:
    batch = bench.synthetic_batch(POLICY, 64, (7, 7))
    assert 0.1 < len(batch.erase_box) / 64 < 0.5
    cutmix = (batch.cutmix_box[:, 2:].prod(1) > 0).float().mean()
    assert 0.3 < cutmix < 0.7
    assert 1.5 < bench._lines_per_location(batch) < 3.5
    assert assemble(batch, POLICY).shape == (64, 3, SIZE, SIZE)


SYNCING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}


class ForbidSync(TorchDispatchMode):
    """Fails on operations that make the host wait for a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in SYNCING, f"{func} reads a value back"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["none", "deit", "cskd"])
def test_views_targets_loss_and_gradients_never_wait_for_the_device(method: str) -> None:
    trainer = small_trainers()[method]
    batch = bench.synthetic_batch(POLICY, 8, (2, 2))
    trainer.parts(batch)  # constants are copied to the device once
    with ForbidSync():
        trainer.parts(batch).total.backward()
    with pytest.raises(AssertionError, match="reads a value back"), ForbidSync():
        float(torch.ones(1).sum())


def test_the_dense_head_gets_pooled_tokens() -> None:
    """With 16 patch tokens and 4 locations per view, the head gets 4 rows per view."""
    trainer = small_trainers()["cskd"]
    rows = []
    model: Any = trainer.student.model
    model.head_dist.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape))
    trainer.parts(bench.synthetic_batch(POLICY, 8, (2, 2)))
    assert sorted(shape[:-1].numel() for shape in rows) == [8, 8 * 4]


def test_the_fused_optimizer_matches_the_plain_one_and_never_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, where the float16 scaler would otherwise check gradients for overflow."""
    batch = bench.synthetic_batch(POLICY, 8, (2, 2))
    sets = ("run.amp=fp16", "optim.clip_grad=1.0", "run.ema=0.9")
    sets = (*sets, "optim.lr=1.0", "schedule.warmup_epochs=0")
    plain = small_trainers("cpu", *sets)["cskd"]
    monkeypatch.setattr("cskd_pipeline.pipeline.from_recipe.FUSED_ON", ("cpu",))
    fused = small_trainers("cpu", *sets)["cskd"]
    for trainer in (plain, fused):
        for _ in range(2):
            trainer.step(iter([batch]))
    start = small_trainers("cpu", *sets)["cskd"]
    for one, other, initial in zip(
        *(trainer.student.parameters() for trainer in (fused, plain, start)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        assert not torch.equal(one, initial)
    with ForbidSync():
        fused.step(iter([batch]))
    with pytest.raises(AssertionError, match="reads a value back"), ForbidSync():
        plain.step(iter([batch]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["fp16", "bf16"])
@pytest.mark.parametrize("method", ["none", "deit", "cskd"])
def test_on_a_gpu_the_host_never_waits_in_a_step(method: str, amp: str) -> None:
    trainer = small_trainers("cuda", f"run.amp={amp}")[method]
    batch = bench.synthetic_batch(POLICY, 8, (2, 2)).to("cuda")
    trainer.step(iter([batch]))  # one-time initialisation
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(iter([batch]))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_unknown_student_is_refused() -> None:
    with pytest.raises(StudentError, match="deit_tinny"):
        bench.bench_step(small_recipe(), students=["deit_tinny"], teacher=None, rounds=3)


def test_the_command_prints_every_side(capsys: Capture) -> None:
    words = ("--size", SIZE, "--batch-size", 8, "--rounds", 3, "--quiet", "--set", SMALL)
    words = (*words, "--device", "cpu", "--set", "run.threads=1")
    assert world.cli("bench", "step", *words, "--teacher", TEACHER) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["none", "deit", "cskd", "live"]
    assert world.cli("bench", "step", *words, "--teacher", "none", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["students"]) == [STUDENT]
    assert list(report["students"][STUDENT]["ratio"]) == ["deit", "cskd"]
    assert (report["device"], report["batch_size"], report["size"]) == ("cpu", 8, SIZE)


@pytest.mark.parametrize(
    ("words", "students", "size"),
    [
        ("", [STUDENT], 224),
        ("--set views.size=32", [STUDENT], 32),
        ("--size 48 --set views.size=48", [STUDENT], 48),
        ("--set student.name=b", ["b"], 224),
        ("--student a --student b", ["a", "b"], 224),
        ("--student b --set student.name=b", ["b"], 224),
        ("--recipe R", ["c"], 64),
        ("--recipe R --student a --size 48", ["a"], 48),
    ],
)
def test_the_command_line_overrides_the_recipes_student_and_size(
    words: str, students: list[str], size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[student]\nname = "c"\n[views]\nsize = 64\n')
    calls: list[Any] = []

    def measured(recipe: TrainRecipe, *, students: Any, **_: Any) -> Any:
        calls.append((students, (recipe.views or ViewPolicy()).size))
        return {"students": {}}

    monkeypatch.setattr(bench, "bench_step", measured)
    line = words.replace("R", str(recipe)).split()
    assert world.cli("bench", "step", "--device", "cpu", *line) == 0
    assert calls == [(students, size)]


@pytest.mark.parametrize(
    "words",
    [
        "--size 48 --set views.size=32",
        "--student a --set student.name=b",
        "--student a --student b --set student.name=b",
    ],
)
def test_a_flag_and_a_set_that_disagree_are_refused(words: str, capsys: Capture) -> None:
    assert world.cli("bench", "step", "--device", "cpu", *words.split()) == 2
    assert "a flag and --set disagree" in capsys.readouterr().err


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_and_images_of_a_step_have_the_requested_memory_format(channels_last: bool) -> None:
    formats = {True: torch.channels_last, False: torch.contiguous_format}
    trainer = small_trainers("cpu", f"run.channels_last={str(channels_last).lower()}")["none"]
    patches = trainer.student.model.patch_embed.proj
    seen: list[Tensor] = []
    patches.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trainer.step(iter([bench.synthetic_batch(POLICY, 8, (2, 2))]))
    for tensor in (*seen, patches.weight):
        assert tensor.is_contiguous(memory_format=formats[channels_last])
        assert not tensor.is_contiguous(memory_format=formats[not channels_last])
    assert len(seen) == 1
