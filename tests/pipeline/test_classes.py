"""Class k must be the same class on both sides of every join: by name, order and labels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import load_file
from timm.models import save_for_hf

from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.config.reading import load_recipe
from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.models.checkpoint import StudentHeader, read_header, save_student
from cskd_pipeline.pipeline.train import train
from cskd_pipeline.tools.make_shards import make_shards
from tests.images import write_shard
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.pipeline.test_finetuning import KWARGS, draw_colours

Capture = pytest.CaptureFixture[str]
NAMES = ("bars", "cross", "disc", "square")
ACCEPT = ("--set", "data.classes=accept")


@pytest.fixture
def refused(capsys: Capture) -> Callable[..., str]:
    """Run a command that must exit with 1; return its message as one line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert world.cli(*arguments) == 1
        return " ".join(capsys.readouterr().err.split())

    return run


@pytest.fixture
def passes(capsys: Capture) -> Callable[..., tuple[dict[str, Any], str]]:
    """Run a command that must succeed; return its summary, and its stderr as one line."""

    def run(*arguments: object) -> tuple[dict[str, Any], str]:
        capsys.readouterr()
        assert world.cli(*arguments, "--json") == 0
        captured = capsys.readouterr()
        return world.last_json(captured.out), " ".join(captured.err.split())

    return run


def with_names(shards: Path, to: Path, names: Sequence[str] | None) -> Path:
    """Copy the tars, with another list of class names, or without one."""
    shutil.copytree(shards, to)
    (to / "_info.json").unlink()
    (to / "classes.json").unlink()
    if names is not None:
        (to / "classes.json").write_text(json.dumps(names))
    return to


def with_reversed_labels(shards: Path, to: Path, names: Sequence[str] | None) -> Path:
    """Write the same images with reversed labels, as from a reversed list of names."""
    to.mkdir()
    for shard in load_dataset(shards).shards:
        rows = range(len(shard))
        content = [
            (
                shard.key(i),
                {"jpg": next(shard.read_images([i])), "cls": b"%d" % (3 - shard.label(i))},
            )
            for i in rows
        ]
        write_shard(to / shard.path.name, content)
    if names is not None:
        (to / "classes.json").write_text(json.dumps(names))
    return to


def train_args(shards: Path, cache: Path | None, out: Path, *more: object) -> list[object]:
    method = ("none",) if cache is None else ("cskd", "--cache", cache)
    views = world.VIEWS if cache is None else []
    return [
        *("train", "--shards", shards, "--out", out, "--student", world.STUDENT),
        *("--method", *method, "--epochs", 1, "--batch-size", 16, "--workers", 0),
        *("--device", "cpu", *world.as_flags([*world.train_sets(), *views]), *more),
    ]


@pytest.fixture(scope="module")
def run(small: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one epoch."""
    out = tmp_path_factory.mktemp("classes") / "run"
    train(world.train_recipe(small.shards, small.cache, out, epochs=1))
    return out


# A student and the shards it is evaluated on


def test_classes_numbered_in_text_order_are_refused(
    tmp_path: Path, refused: Callable[..., str], passes: Callable[..., Any]
) -> None:
    draw_colours(tmp_path / "padded", 12, 2, seed=0)
    for number in range(12):
        folder = tmp_path / "padded" / f"hue{number:02d}"
        shutil.copytree(folder, tmp_path / "plain" / str(number))
        folder.rename(folder.with_name(f"n{number:08d}"))
    for name in ("padded", "plain"):
        make_shards(tmp_path / name, tmp_path / f"{name} shards")
    trained = world.train_recipe(
        *(tmp_path / "padded shards", None, tmp_path / "run", "none", world.VIEWS),
        epochs=1,
        batch_size=4,
        kwargs=KWARGS,
    )
    train(trained)
    evaluate = ["evaluate", tmp_path / "run", "--workers", 0, "--device", "cpu"]
    summary, output = passes(*evaluate, "--shards", tmp_path / "padded shards")
    assert (summary["accepted_classes"], output) == ([], "")

    message = refused(*evaluate, "--shards", tmp_path / "plain shards")
    for words in (
        "the shards and the student do not have the same classes: other names with the same 12 "
        "numbers in another order, as one side sorts numbers as text: 0, 1, 10, 11, 2, …",
        'class 2: "10" in the shards, "n00000002" in the student',
        "pass --accept-classes",
    ):
        assert words in message
    summary, output = passes(
        *evaluate, "--shards", tmp_path / "plain shards", "--accept-classes", "--quiet"
    )
    assert "accepted by --accept-classes: classes of the shards and the student: other" in output
    [line] = summary["accepted_classes"]
    assert "the same 12 numbers in another order" in line

    (tmp_path / "plain shards/classes.json").unlink()
    (tmp_path / "plain shards/_info.json").unlink()
    summary, output = passes(*evaluate, "--shards", tmp_path / "plain shards", "--quiet")
    assert output == (
        "warning: no class names in the shards: class k is taken as class k of the student"
    )


def test_no_flag_accepts_another_number_of_classes(
    run: Path, small: World, tmp_path: Path, refused: Callable[..., str]
) -> None:
    more = with_names(small.validation, tmp_path / "more", (*NAMES, "zebra"))
    message = refused("evaluate", run, "--shards", more, "--accept-classes")
    assert "5 names and 4, 4 of them in common" in message
    assert 'class 4: "zebra" in the shards, none in the student' in message


# A run's shards, validation shards and cache


def test_shards_with_the_caches_classes_in_another_order_are_refused(
    small: World, tmp_path: Path, refused: Callable[..., str], passes: Callable[..., Any]
) -> None:
    other = with_names(small.shards, tmp_path / "other", NAMES[::-1])
    message = refused(*train_args(other, small.cache, tmp_path / "run"))
    assert "the training shards and the cache do not have the same classes: the same 4" in message
    assert 'class 0: "square" in the training shards, "bars" in the cache' in message
    assert f"bars, cross, disc, square as in {small.cache}" in message
    assert "pass --set data.classes=accept" in message
    assert not (tmp_path / "run").exists()

    summary, output = passes(*train_args(other, small.cache, tmp_path / "run", *ACCEPT, "--quiet"))
    [line] = summary["accepted_classes"]
    assert line.startswith("classes of the training shards and the cache: the same 4 names in")
    assert f"accepted by --set data.classes=accept: {line}" in output
    card = read_header(tmp_path / "run/last.safetensors")
    assert (card.accepted_classes, card.class_names) == ((line,), NAMES[::-1])
    recipe = load_recipe(TrainRecipe, tmp_path / "run/recipe.toml")
    assert recipe.data.classes == "accept"


@pytest.mark.parametrize("cached", [True, False])
def test_validation_shards_with_other_classes_are_refused(
    small: World,
    tmp_path: Path,
    refused: Callable[..., str],
    passes: Callable[..., Any],
    cached: bool,
) -> None:
    cache = small.cache if cached else None
    other = with_names(small.validation, tmp_path / "other", NAMES[::-1])
    words = train_args(small.shards, cache, tmp_path / "run", "--val-shards", other)
    message = refused(*words)
    assert "the validation shards and the training shards do not have the same classes" in message
    assert 'class 0: "square" in the validation shards, "bars" in the training shards' in message
    assert not (tmp_path / "run").exists()
    if not cached:
        summary, _ = passes(*words, *ACCEPT, "--quiet")
        [line] = summary["accepted_classes"]
        assert line.startswith("classes of the validation shards and the training shards: ")
        assert read_header(tmp_path / "run/best.safetensors").accepted_classes == (line,)


def test_validation_shards_with_more_classes_are_refused_by_name(
    small: World, tmp_path: Path, refused: Callable[..., str]
) -> None:
    other = with_names(small.validation, tmp_path / "other", ("ant", *NAMES))
    words = train_args(small.shards, None, tmp_path / "run", "--val-shards", other)
    message = refused(*words, *ACCEPT)
    assert "5 names and 4, 4 of them in common" in message
    assert 'class 0: "ant" in the validation shards, "bars" in the training shards' in message


def test_missing_class_names_cause_a_warning_and_students_get_the_caches(
    small: World, tmp_path: Path, passes: Callable[..., Any]
) -> None:
    shards = with_names(small.shards, tmp_path / "shards", None)
    validation = with_names(small.validation, tmp_path / "validation", None)
    words = train_args(shards, small.cache, tmp_path / "run", "--val-shards", validation, "--quiet")
    summary, output = passes(*words, "--set", "schedule.warmup_epochs=0")
    assert output == (
        "warning: no class names in the training shards: class k is taken as class k of the cache "
        "warning: no class names in the validation shards: class k is taken as class k of the "
        "training shards"
    )
    assert summary["accepted_classes"] == []
    assert read_header(tmp_path / "run/last.safetensors").class_names == NAMES


def test_labels_that_differ_from_the_caches_are_refused_before_the_first_step(
    small: World, tmp_path: Path, refused: Callable[..., str], passes: Callable[..., Any]
) -> None:
    """Without names on one side, only labels by key reveal another numbering."""
    other = with_reversed_labels(small.shards, tmp_path / "other", None)
    message = refused(*train_args(other, small.cache, tmp_path / "run"))
    assert "96 of 96 samples have labels that differ from the cache's" in message
    assert "0 to 3, 1 to 2" in message
    assert "--set data.classes=accept" in message
    assert not (tmp_path / "run").exists()
    summary, output = passes(*train_args(other, small.cache, tmp_path / "run", *ACCEPT, "--quiet"))
    line = "96 of 96 samples have labels that differ from the cache's"
    assert summary["accepted_classes"] == [line]
    assert line in output
    assert read_header(tmp_path / "run/last.safetensors").accepted_classes == (line,)


# Initial weights


def student_with(run: Path, names: tuple[str, ...] | None, to: Path) -> Path:
    card = replace(read_header(run / "last.safetensors"), class_names=names)
    save_student(to, load_file(run / "last.safetensors"), card)
    return to


def test_weights_of_the_same_classes_in_another_order_are_refused(
    run: Path,
    small: World,
    tmp_path: Path,
    refused: Callable[..., str],
    passes: Callable[..., Any],
) -> None:
    init = student_with(run, NAMES[::-1], tmp_path / "init.safetensors")
    words = train_args(small.shards, None, tmp_path / "run", "--init-from", init)
    message = refused(*words)
    assert "the training shards and the weights to start from do not have the same" in message
    assert "the same 4 names in another order" in message
    assert not (tmp_path / "run").exists()
    summary, output = passes(*words, *ACCEPT)
    assert "new head" not in output
    [line] = summary["accepted_classes"]
    assert line.startswith("classes of the training shards and the weights to start from: ")
    assert read_header(tmp_path / "run/last.safetensors").accepted_classes == (line,)


@pytest.mark.parametrize(
    ("names", "warning"),
    [
        (("ant", "bee", "cat", "disc"), "4 now, 1 of 4 names in common"),
        (None, "no class names in the weights to start from"),
    ],
)
def test_weights_of_other_classes_get_new_heads_and_unknown_ones_a_warning(
    run: Path,
    small: World,
    tmp_path: Path,
    passes: Callable[..., Any],
    names: tuple[str, ...] | None,
    warning: str,
) -> None:
    init = student_with(run, names, tmp_path / "init.safetensors")
    words = train_args(small.shards, None, tmp_path / "run", "--init-from", init)
    _, output = passes(*words)
    assert warning in output
    assert ("new head and head_dist" in output) == (names is not None)


def test_class_names_of_a_model_in_timms_format_are_compared(
    small: World, tmp_path: Path, refused: Callable[..., str]
) -> None:
    arguments: dict[str, Any] = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model(world.STUDENT, num_classes=4, img_size=32, **arguments)
    for names, problem in ((NAMES[::-1], "the same 4 names in another order"),
                        (NAMES[:3], "3 class names for 4 classes")):  # fmt: skip
        folder = tmp_path / f"timm {len(names)}"
        save_for_hf(
            model,
            str(folder),
            model_config={"label_names": list(names)},
            model_args={**arguments, "img_size": 32},
            safe_serialization=True,
        )
        words = train_args(small.shards, None, tmp_path / "run", "--init-from", folder)
        assert problem in refused(*words)


# Resuming


def test_a_run_resumes_only_with_its_own_classes(
    small: World, tmp_path: Path, refused: Callable[..., str], passes: Callable[..., Any]
) -> None:
    shards = with_names(small.shards, tmp_path / "shards", NAMES)
    words = train_args(shards, None, tmp_path / "run", "--set", "data.num_classes=4")
    passes(*words)
    (shards / "classes.json").write_text(json.dumps(NAMES[::-1]))
    message = refused(*words, "--resume")
    assert "the training shards and the training state do not have the same classes" in message
    summary, _ = passes(*words, "--resume", *ACCEPT, "--quiet")
    [line] = summary["accepted_classes"]
    assert "the training state" in line
    (shards / "classes.json").unlink()
    _, output = passes(*words, "--resume", "--quiet")
    assert "no class names in the training shards" in output


def test_accepted_differences_stay_recorded_when_a_run_resumes(
    run: Path, small: World, tmp_path: Path, passes: Callable[..., Any]
) -> None:
    """Initial weights are compared only once."""
    init = student_with(run, NAMES[::-1], tmp_path / "init.safetensors")
    words = train_args(small.shards, None, tmp_path / "run", "--init-from", init, *ACCEPT)
    first, _ = passes(*words)
    again, _ = passes(*words, "--resume")
    assert len(first["accepted_classes"]) == 1
    assert again["accepted_classes"] == first["accepted_classes"]


# Commands on a cache and shards


def test_verify_lists_names_and_labels_unless_they_are_accepted(
    small: World, tmp_path: Path, capsys: Capture
) -> None:
    other = with_reversed_labels(small.shards, tmp_path / "other", NAMES[::-1])
    verify = ["cache", "verify", small.cache, "--shards", other, "--json", "--quiet"]
    capsys.readouterr()
    assert world.cli(*verify) == 1
    report = world.last_json(capsys.readouterr().out)
    assert report["checks"]["classes"] == {
        **{"labels_compared": 96, "relabelled": 96, "problems": 2 + 96}
    }
    problems = [p["found"] for p in report["problems"] if p["depth"] == "classes"]
    assert problems[0].startswith("classes of the shards and the cache: the same 4 names in")
    assert problems[1:3] == [
        "96 of 96 samples have labels that differ from the cache's",
        "the label differs from the cache's, 0",
    ]
    assert "--accept-classes" in report["error"]["action"]
    assert world.cli(*verify, "--accept-classes") == 0
    captured = capsys.readouterr()
    report = world.last_json(captured.out)
    assert report["checks"]["classes"]["problems"] == 0
    assert report["checks"]["images"]["equal"] == 96
    assert "accepted by --accept-classes: classes of the shards and the cache" in captured.err


def test_pages_refuse_different_classes(
    run: Path,
    small: World,
    tmp_path: Path,
    refused: Callable[..., str],
    passes: Callable[..., Any],
) -> None:
    other = with_names(small.shards, tmp_path / "other", NAMES[::-1])
    page = ("--images", 2, "--samples", 2, "--out", tmp_path / "page")
    for target in ((small.cache,), (run, "--cache", small.cache)):
        words = ["show", *target, "--shards", other, *page]
        message = refused(*words)
        assert "the shards and the cache do not have the same classes" in message
        assert not (tmp_path / "page").exists()
        summary, output = passes(*words, "--accept-classes", "--quiet")
        assert len(summary["accepted_classes"]) == 1
        assert summary["accepted_classes"][0] in output
        shutil.rmtree(tmp_path / "page")


def test_a_page_refuses_a_student_with_other_classes_than_the_cache(
    run: Path, small: World, tmp_path: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    student_with(run, NAMES[::-1], tmp_path / "run/last.safetensors")
    words = ["show", tmp_path / "run", "--cache", small.cache, "--shards", small.shards]
    message = refused(*words, "--out", tmp_path / "page", "--images", 2, "--samples", 2)
    assert "the student of run and the cache do not have the same classes" in message


# The dump


def dump_args(shards: Path, cache: Path, *more: object) -> list[object]:
    return [
        *("dump-teacher", "--shards", shards, "--cache", cache, "--shard-range", "2:3"),
        *("--teacher", world.TEACHER, "--weights", "random", "--workers", 0, "--device", "cpu"),
        *world.as_flags(world.dump_sets('["envelope"]', 2)),
        *more,
    ]


def test_a_dump_resumes_only_with_its_own_classes(
    small: World, tmp_path: Path, refused: Callable[..., str], passes: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache"
    passes(*dump_args(small.shards, cache))
    other = with_names(small.shards, tmp_path / "other", NAMES[::-1])
    message = refused(*dump_args(other, cache))
    assert "contains another cache" in message
    assert "dataset.class_names: the same 4 names in another order" in message
    assert "--accept-classes accepts it" in message
    _, output = passes(*dump_args(other, cache, "--accept-classes", "--quiet"))
    assert "accepted by --accept-classes: classes of the cache and the new data" in output
    (other / "classes.json").unlink()
    _, output = passes(*dump_args(other, cache, "--quiet", "--set", "data.num_classes=4"))
    assert "no class names in the new data" in output
    assert open_cache(cache).manifest.dataset.class_names == NAMES


def test_a_teacher_from_train_must_have_the_shards_classes(
    small: World, tmp_path: Path, refused: Callable[..., str], passes: Callable[..., Any]
) -> None:
    kwargs = {"output_stride": 8, "channels": [8, 12, 16, 24]}
    model = timm.create_model(world.TEACHER, num_classes=4, **kwargs)
    card = StudentHeader(world.TEACHER, 4, 32, ("cls",), "none", kwargs, class_names=NAMES[::-1])
    save_student(tmp_path / "teacher.safetensors", model.state_dict(), card)
    words = dump_args(small.shards, tmp_path / "cache")
    words[words.index("random")] = tmp_path / "teacher.safetensors"
    message = refused(*words)
    assert "the shards and the teacher do not have the same classes: the same 4 names" in message
    assert not (tmp_path / "cache").exists()
    _, output = passes(*words, "--accept-classes", "--quiet")
    assert "accepted by --accept-classes: classes of the shards and the teacher" in output
