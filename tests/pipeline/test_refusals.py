"""Bad input causes one clear message and exit code 1, and leaves nothing behind."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry

from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.pipeline.dump import dump_teacher
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.processes import server

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def refused(capsys: Capture) -> Callable[..., str]:
    """Run a command that must be refused; return its message."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert world.cli(*arguments) == 1
        out, errors = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in errors
        assert "error:" in errors
        return errors

    return run


def train_args(small: World, out: Path, *more: object, cache: Path | None = None) -> list[object]:
    return [
        *("train", "--shards", small.shards, "--cache", cache or small.cache, "--out", out),
        *("--student", world.STUDENT, "--method", "cskd", "--epochs", 4, "--batch-size", 16),
        *("--workers", 0, "--device", "cpu", "-q"),
        *world.as_flags(world.train_sets()),
        *more,
    ]


def dump_args(shards: object, cache: Path, *more: object) -> list[object]:
    return [
        *("dump-teacher", "--shards", shards, "--cache", cache, "--teacher", world.TEACHER),
        *("--weights", "random", "--workers", 0, "--device", "cpu", "-q"),
        *world.as_flags(world.dump_sets()),
        *more,
    ]


@pytest.mark.parametrize(
    ("more", "facts"),
    [
        (["--set", "distil.method=cskd"], ["distil", "did you mean", "distill"]),
        (["--set", "distill.alpa=0.3"], ["distill.alpa", "alpha"]),
        (["--set", "data.num_classes=7"], ["4 classes", "7"]),
        (["--set", "views.size=48"], ["different view policy", "size", "48", "32"]),
        (["--set", "views.flip=0.1"], ["different view policy", "flip", "0.1"]),
        (["--set", "distill.encoding=topk"], ["no encoding topk", "dense, envelope"]),
        (["--set", "batch.repeats=8"], ["fewer views", "4 views", "at least 8"]),
        (["--set", "batch.accumulation=3"], ["batch.accumulation", "a divisor of"]),
    ],
)
def test_mismatches_are_refused_before_anything_is_written(
    small: World, tmp_path: Path, refused: Callable[..., str], more: list[str], facts: list[str]
) -> None:
    out = tmp_path / "run"
    message = refused(*train_args(small, out, *more))
    for fact in facts:
        assert fact in message, message
    assert not out.exists()


def test_a_student_coarser_than_the_teacher_is_refused(
    small: World, tmp_path: Path, refused: Callable[..., str]
) -> None:
    coarse = world.STUDENT_KWARGS.replace("patch_size=4", "patch_size=16")
    command = [
        str(word).replace(world.STUDENT_KWARGS, coarse)
        for word in train_args(small, tmp_path / "run")
    ]
    message = refused(*command)
    assert "coarser" in message
    assert "2x2" in message
    assert "4x4" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sets", "facts"),
    [
        (
            [f"student.kwargs={world.STUDENT_KWARGS[:-1]}, patch_drop_rate=0.25}}"],
            ["a token for every patch", " patch tokens", "8x8", "patch_drop_rate"],
        ),
        (["optim.name=adamm"], ["no optimizer of this name", "adamm", "did you mean adam"]),
        (["optim.name=zzz"], ["no optimizer of this name", "such as adamw"]),
        (["optim.name=adahessian"], ["second derivatives"]),
        (["optim.betas=[0.9]"], ["optim.name = adamw", "betas [0.9]", "2 betas", "[0.9, 0.999]"]),
        (["optim.name=lookahead_adan"], ["betas [0.9, 0.999]", "3 betas", "[0.98, 0.92, 0.99]"]),
    ],
)
def test_a_failing_first_step_is_refused_before_anything_is_written(
    small: World, tmp_path: Path, refused: Callable[..., str], sets: list[str], facts: list[str]
) -> None:
    message = refused(*train_args(small, tmp_path / "run", *world.as_flags(sets)))
    for fact in facts:
        assert fact in message, message
    assert not (tmp_path / "run").exists()


def test_the_trial_step_uses_micro_batches_of_the_real_size(
    small: World, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """Batch normalisation works with two images, but not with one."""
    kwargs = "student.kwargs={channels=[8, 8, 8, 8]}"
    words = ("--student", "resnet10t", "--method", "none", "--batch-size", 4, "--epochs", 1)
    sets = world.as_flags([kwargs, "batch.accumulation=4", *world.VIEWS])
    message = refused(*train_args(small, tmp_path / "run", *words, *sets))
    assert "more than one image in every micro-batch" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["lamb", "lookahead_adamw"])
def test_other_optimizers_of_timm_train(small: World, tmp_path: Path, name: str) -> None:
    flags = ("--epochs", 1, *world.as_flags([f"optim.name={name}"]))
    assert world.cli(*train_args(small, tmp_path / "run", *flags)) == 0


class Halving(torch.optim.SGD):
    """A user's own optimizer, in timm's registry during a test."""

    instances = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        type(self).instances += 1


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_registry, "_optimizers", dict(default_registry._optimizers))
    for name in ("halving", "my_halving"):
        default_registry.register(OptimInfo(name, Halving))


@pytest.mark.usefixtures("registered")
def test_a_registered_optimizer_trains(small: World, tmp_path: Path) -> None:
    flags = ("--epochs", 1, *world.as_flags(["optim.name=halving"]))
    before = Halving.instances
    assert world.cli(*train_args(small, tmp_path / "run", *flags)) == 0
    assert Halving.instances > before


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("name", "fact"),
    [
        # timm would silently use the part after the last underscore, a different optimizer.
        ("my_halving", "register it as myhalving"),
        ("my_adamw", "no optimizer of this name"),
        ("lookahead_my_halving", "register it as myhalving"),
    ],
)
def test_an_optimizer_name_that_timm_would_truncate_is_refused(
    small: World, tmp_path: Path, refused: Callable[..., str], name: str, fact: str
) -> None:
    message = refused(*train_args(small, tmp_path / "run", *world.as_flags([f"optim.name={name}"])))
    assert fact in message
    assert not (tmp_path / "run").exists()


def test_compilation_without_a_compiler_is_refused_before_anything_is_written(
    small: World, tmp_path: Path
) -> None:
    command = train_args(small, tmp_path / "run", *world.as_flags(["run.compile=true"]))
    no_compiler = {"PATH": str(tmp_path), "CC": "", "CXX": ""}
    ended = server().run(*command, log=tmp_path / "log", environment=no_compiler)
    assert ended.code == 1
    for words in ("torch.compile does not work", "compiler", "gcc", "run.compile=false"):
        assert words in ended.output
    assert "Traceback" not in ended.output[ended.output.index("error:") :]
    assert not (tmp_path / "run").exists()


def test_a_student_of_another_input_size_is_refused(
    small: World, tmp_path: Path, refused: Callable[..., str]
) -> None:
    other = world.STUDENT_KWARGS.replace("img_size=32", "img_size=64")
    command = [
        str(word).replace(world.STUDENT_KWARGS, other)
        for word in train_args(small, tmp_path / "run")
    ]
    message = refused(*command)
    assert "img_size" in message
    assert "64" in message
    assert "32" in message


def test_soft_targets_from_an_envelope_cache_are_refused(
    small: World, tmp_path: Path, refused: Callable[..., str]
) -> None:
    cache = tmp_path / "cache"
    recipe = world.dump_recipe(small.shards, cache, views=2, encodings='["envelope"]')
    dump_teacher(recipe)
    soft = ("--set", "distill.spatial_kind=soft")
    message = refused(*train_args(small, tmp_path / "run", *soft, cache=cache))
    assert "does not support hard targets and soft targets at temperature 1" in message
    assert "encodings envelope" in message
    assert "use --set distill.global_kind=hard --set distill.spatial_kind=hard, or" in message
    assert "--encoding dense" in message
    assert not (tmp_path / "run").exists()


def test_an_unfinished_cache_is_refused_with_the_missing_units_and_the_command(
    small: World, tmp_path: Path, refused: Callable[..., str]
) -> None:
    cache = tmp_path / "cache"
    dump_teacher(world.dump_recipe(small.shards, cache), shard_range=(0, 2))
    message = refused(*train_args(small, tmp_path / "run", cache=cache))
    assert "2 of 6 units missing" in message
    assert "dump-teacher" in message


def test_shards_that_lack_samples_of_the_cache_are_refused_or_skipped(
    small: World, tmp_path: Path, refused: Callable[..., str], capsys: Capture
) -> None:
    fewer = tmp_path / "shards"
    shutil.copytree(small.shards, fewer)
    (fewer / "_info.json").unlink()
    sorted(fewer.glob("*.tar"))[0].unlink()
    command = [
        fewer if word == small.shards else word for word in train_args(small, tmp_path / "run")
    ]
    message = refused(*command)
    assert "32 of the cache's 96 samples are not in the shards" in message
    assert message.count("missing: ") > 1
    assert world.cli(*command, "--set", "data.missing=skip") == 0
    assert "without 32 samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        (lambda tar: tar.write_bytes(b"no tar at all" * 99), ["tar"]),
        (lambda tar: tar.write_bytes(tar.read_bytes()[:-20_000]), ["truncated"]),
        (lambda tar: _relabel(tar, "17"), ["17", "0 to 3"]),
    ],
)
def test_damaged_shards_are_refused_by_both_stages(
    small: World,
    tmp_path: Path,
    refused: Callable[..., str],
    damage: Callable[[Path], object],
    facts: list[str],
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(small.shards, shards)
    tar = sorted(shards.glob("*.tar"))[1]
    damage(tar)
    messages = [
        refused(*dump_args(shards, tmp_path / "cache")),
        refused(*[shards if w == small.shards else w for w in train_args(small, tmp_path / "run")]),
    ]
    for message in messages:
        assert tar.name in message
        assert any(fact in message for fact in facts), message
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run").exists()


def _relabel(tar: Path, label: str) -> None:
    """Change the first sample's label."""
    rewritten = tar.with_suffix(".new")
    with tarfile.open(tar) as old, tarfile.open(rewritten, "w") as new:
        changed = False
        for member in old:
            data = old.extractfile(member)
            assert data is not None
            content = data.read()
            if member.name.endswith(".cls") and not changed:
                content, changed = label.encode(), True
                member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    rewritten.replace(tar)


@pytest.mark.parametrize("command", ["train", "dump"])
def test_an_output_folder_with_other_contents_is_left_alone(
    small: World, tmp_path: Path, refused: Callable[..., str], command: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.csv").write_text("years of work")
    arguments = train_args(small, out) if command == "train" else dump_args(small.shards, out)
    message = refused(*arguments)
    assert "contains other files" in message
    assert "summary.csv" in message
    assert [path.name for path in out.iterdir()] == ["summary.csv"]


def test_a_cache_of_another_teacher_is_not_resumed(
    small: World, tmp_path: Path, refused: Callable[..., str]
) -> None:
    before = open_cache(small.cache).manifest
    message = refused(*dump_args(small.shards, small.cache, "--set", "teacher.seed=1"))
    assert "contains another cache" in message
    assert "weights_sha256" in message
    assert open_cache(small.cache).manifest == before


@pytest.mark.parametrize(
    ("name", "kwargs"), [("vit_tiny_patch16_224", "{}"), ("vgg11", "{mlp_ratio=0.01}")]
)
def test_a_teacher_without_spatial_logits_is_refused_with_the_reason(
    small: World, tmp_path: Path, refused: Callable[..., str], name: str, kwargs: str
) -> None:
    command = [
        *("dump-teacher", "--shards", small.shards, "--cache", tmp_path / "cache", "-q"),
        *("--teacher", name, "--weights", "random", "--set", "views.size=224"),
        *("--set", f"teacher.kwargs={kwargs}"),
    ]
    assert "gives no spatial logits" in refused(*command)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("stage", ["train", "dump"])
def test_a_full_disk_stops_with_a_message_and_the_same_command_resumes(
    small: World,
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    """The kernel reports the full disk only at fsync."""
    target = tmp_path / "target"
    command = train_args(small, target) if stage == "train" else dump_args(small.shards, target)
    original, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert "no space left" in refused(*command)
    monkeypatch.setattr(os, "fsync", original)
    assert world.cli(*command, *(["--resume"] if stage == "train" else [])) == 0


def test_with_json_a_refusal_is_one_json_object_on_stdout(
    small: World, tmp_path: Path, capsys: Capture
) -> None:
    capsys.readouterr()
    assert world.cli(*train_args(small, tmp_path / "run", "--set", "views.size=48", "--json")) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "CacheError"
    assert error["exit_code"] == 1
