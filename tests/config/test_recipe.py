"""Recipes: how files, flags and ``--set`` are read, error messages, digests, and writing."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cskd_pipeline.config.reading import find_recipe, load_recipe, recipe_names
from cskd_pipeline.config.sections import (
    DumpRecipe,
    OptimSection,
    RunSection,
    TrainRecipe,
    is_factory,
    key_info,
    key_types,
)
from cskd_pipeline.config.writing import adjustable_keys, result_digest, to_toml
from cskd_pipeline.errors import RecipeError, UsageError
from cskd_pipeline.runtime import resources
from cskd_pipeline.views.policy import ViewPolicy


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(folder: Path, text: str, kind: type = TrainRecipe, **overrides: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(kind, write(folder, text), **overrides)
    return caught.value.problems


def test_a_file_overrides_defaults_and_leaves_the_rest(tmp_path: Path) -> None:
    recipe = load_recipe(TrainRecipe, write(tmp_path, "[optim]\nlr = 2\nbetas = [0.8, 0.9]\n"))
    assert recipe.optim == OptimSection(lr=2.0, betas=(0.8, 0.9))
    assert isinstance(recipe.optim.lr, float)  # an integer is accepted as a number
    assert recipe.run == RunSection()
    assert recipe.views is None
    assert load_recipe(DumpRecipe) == DumpRecipe()


def test_an_integer_and_the_equal_float_have_one_digest(tmp_path: Path) -> None:
    """1 and 1.0 differ in JSON but are one learning rate."""
    pairs = [("optim", "lr", "1", "1.0"), ("optim", "betas", "[0, 0]", "[0.0, 0.0]"),
             ("views", "crop_area", "[1, 1]", "[1.0, 1.0]")]  # fmt: skip
    for section, key, *texts in pairs:
        one, other = (
            load_recipe(TrainRecipe, write(tmp_path, f"[{section}]\n{key} = {text}\n"))
            for text in texts
        )
        flagged = load_recipe(TrainRecipe, None, [f"{section}.{key}={texts[0]}"])
        assert result_digest(one) == result_digest(other) == result_digest(flagged), key
        assert to_toml(one) == to_toml(other)


@pytest.mark.parametrize("digits", [20, 400])
def test_integers_beyond_64_bits_are_refused(tmp_path: Path, digits: int) -> None:
    for text in ("9" * digits, "-" + "9" * digits):
        (problem,) = problems_of(tmp_path, f"[optim]\nlr = {text}\n")
        assert problem.startswith("optim.lr: found ")
        assert problem.endswith("expected a 64-bit integer")


def test_a_partial_policy_is_completed_by_deit_v1(tmp_path: Path) -> None:
    recipe = load_recipe(TrainRecipe, write(tmp_path, "[views]\nsize = 64\ncrop_area = [1, 1]\n"))
    assert recipe.views == ViewPolicy(size=64, crop_area=(1.0, 1.0))


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    problems = problems_of(
        tmp_path,
        """
        lr = 3
        [distil]
        method = "cskd"
        [distill]
        methd = "none"
        global_kind = "medium"
        kind = "hard"
        alpha = "half"
        [optim]
        betas = [0.9, true]
        epochs = 3
        [schedule]
        epochs = 0
        [run]
        compile = 1
        seed = true
        workers = 2.0
        amp = "b16"
        [student]
        kwargs = {depth = 2, since = 1979-05-27, deep = {rate = [0.5, nan]}}
        [batch]
        batch_size = 10
        accumulation = 3
        [views]
        flip = 2
        size = 3
        """,
    )
    assert set(problems) == {
        "lr: found an unknown section, did you mean optim.lr?",
        "distil: found an unknown section, did you mean distill?",
        "distill.methd: found an unknown key, did you mean distill.method?",
        "distill.global_kind: found 'medium', expected 'hard' or 'soft'",
        "distill.kind: found an unknown key, did you mean distill.global_kind or "
        "distill.spatial_kind?",
        "distill.alpha: found 'half', expected a number",
        "optim.betas[1]: found true, expected a number",
        "optim.epochs: found an unknown key, did you mean schedule.epochs?",
        "schedule.epochs: found 0, expected a value greater than or equal to 1",
        "run.compile: found 1, expected true or false",
        "run.seed: found true, expected an integer",
        "run.workers: found 2.0, expected an integer",
        "run.amp: found 'b16', expected 'off', 'bf16' or 'fp16', did you mean 'bf16'?",
        "student.kwargs.since: found datetime.date(1979, 5, 27), "
        "expected a string, number or boolean",
        "student.kwargs.deep.rate[1]: found nan, expected a finite number",
        "batch.accumulation: found 3, expected a divisor of batch.batch_size",
        "views: flip = 2.0 is above 1; size = 3 is below 8",
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("optim = 3", "optim: found 3, expected a table"),
        ("[optim]\nbetas = 0.9", "optim.betas: found 0.9, expected an array"),
        ("[optim]\nbetas = []", "optim.betas: found [], expected at least one value"),
        ("[views]\nmean = [0.5, 0.5]", "views.mean[2]: found nothing, expected a value"),
        ("[student]\nkwargs = 1", "student.kwargs: found 1, expected a table"),
        ("[optim]\nlr = inf", "optim.lr: found inf, expected a finite number"),
        ("[optim]\nlr = -1.0", "optim.lr: found -1.0, expected a value greater than 0"),
        ("[optim]\nsmoothing = 1.0", "optim.smoothing: found 1.0, expected a value less than 1"),
        ('[run]\nout = "a\\u0000b"', "text without a NUL character"),
        ("[run]\nseed = 9223372036854775808", "expected a 64-bit integer"),
        ('[run]\nout = "\\u001b[2J"\nseed = "\\u001b[2J"', r"run.seed: found '\x1b[2J'"),
    ],
)
def test_an_invalid_value_is_reported_with_the_expected_one(
    tmp_path: Path, text: str, problem: str
) -> None:
    [line] = problems_of(tmp_path, text)
    assert problem in line


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[cache]\nencodings = []", "cache.encodings: found [], expected one or more"),
        ('[cache]\nencodings = ["dense", "dense"]', "expected one or more, without duplicates"),
        ("[cache]\nviews = 6\nview_block = 4", "expected a divisor of cache.views"),
        ('[cache]\nencodings = "dense"', "found 'dense', expected an array"),
    ],
)
def test_dump_recipes_are_checked_too(tmp_path: Path, text: str, problem: str) -> None:
    [line] = problems_of(tmp_path, text, DumpRecipe)
    assert problem in line


def test_the_message_shows_the_file_and_every_problem(tmp_path: Path) -> None:
    path = write(tmp_path, "[run]\nsed = 1\namp = 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(TrainRecipe, path)
    assert str(caught.value).splitlines() == [
        "the recipe is not valid",
        f"  where:    {path}",
        "  - run.sed: found an unknown key, did you mean run.seed?",
        "  - run.amp: found 1, expected 'off', 'bf16' or 'fp16'",
    ]


def test_sets_override_the_file_and_flags_override_both(tmp_path: Path) -> None:
    path = write(tmp_path, "[optim]\nlr = 1.0\nweight_decay = 1.0\nsmoothing = 0.3\n")
    recipe = load_recipe(
        TrainRecipe,
        path,
        ["optim.lr=5e-4", "optim.weight_decay = 0.5", "optim.lr=0.25"],
        {"optim.smoothing": 0.2, "run.seed": None},
    )
    assert (recipe.optim.lr, recipe.optim.weight_decay) == (0.25, 0.5)
    assert recipe.optim.smoothing == 0.2
    assert recipe.run.seed == 0  # the flag was not passed


@pytest.mark.parametrize(
    ("text", "section", "key", "value"),
    [
        ("distill.method=none", "distill", "method", "none"),
        ('distill.method="none"', "distill", "method", "none"),
        ("run.device=0", "run", "device", "0"),
        ("run.out=1e3", "run", "out", "1e3"),
        ("data.shards=/data/a b/{0..3}.tar", "data", "shards", "/data/a b/{0..3}.tar"),
        ("data.shards=a=b", "data", "shards", "a=b"),
        ("run.compile=true", "run", "compile", True),
        ("optim.betas=[0.5, 0.6]", "optim", "betas", (0.5, 0.6)),
        ("student.kwargs={depth = 2}", "student", "kwargs", {"depth": 2}),
        ("student.kwargs.depth=2", "student", "kwargs", {"depth": 2}),
        ("student.kwargs.norm=rms", "student", "kwargs", {"norm": "rms"}),
        ('run.out="a"\nrun.seed=3', "run", "out", '"a"\nrun.seed=3'),
    ],
)
def test_set_takes_toml_values_and_bare_strings(
    text: str, section: str, key: str, value: object
) -> None:
    recipe = load_recipe(TrainRecipe, None, [text])
    assert getattr(getattr(recipe, section), key) == value


@pytest.mark.parametrize("text", ["optim.lr", "lr=3", ".lr=3", "optim.=3", "=3", ""])
def test_set_without_a_dotted_name_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"--set takes section\.key=value"):
        load_recipe(TrainRecipe, None, [text])


def test_problems_on_the_command_line_are_marked(tmp_path: Path) -> None:
    lines = problems_of(tmp_path, "[run]\nsed = 1\n", sets=["run.amp=b"], flags={"run.seed": -1})
    assert [line.partition(":")[0] for line in lines] == [
        "run.sed",
        "run.seed (from the command line)",
        "run.amp (from the command line)",
    ]


@pytest.mark.parametrize(
    ("sets", "flags", "problem"),
    [
        (
            ["data.shards.x=3"],
            {},
            "data.shards.x (from the command line): found data.shards = 'a.tar', expected a table",
        ),
        (
            ["student.kwargs.depth.x=3"],
            {},
            "student.kwargs.depth.x (from the command line): found student.kwargs.depth = 12, "
            "expected a table",
        ),
        (
            ["student.kwargs.depth=3", "student.kwargs={embed_dim=4}"],
            {},
            "student.kwargs.depth (from the command line): found student.kwargs on the "
            "command line too",
        ),
        (
            ["student.kwargs={embed_dim=4}", "student.kwargs.depth=3"],
            {},
            "student.kwargs.depth (from the command line): found student.kwargs on the "
            "command line too",
        ),
        (
            ["student.name.x=3"],
            {"student.name": "a"},
            "student.name.x (from the command line): found student.name on the command line too",
        ),
    ],
)
def test_a_set_inside_a_value_or_another_set_is_a_problem(
    tmp_path: Path, sets: list[str], flags: dict[str, Any], problem: str
) -> None:
    text = '[data]\nshards = "a.tar"\n[student]\nkwargs = {depth = 12}\n'
    [line] = problems_of(tmp_path, text, sets=sets, flags=flags)
    assert line.startswith(problem)


def test_a_set_that_contradicts_a_flag_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="disagree"):
        load_recipe(TrainRecipe, None, ["schedule.epochs=3"], {"schedule.epochs": 4})
    assert load_recipe(
        TrainRecipe, None, ["schedule.epochs=3"], {"schedule.epochs": 3}
    ).schedule.epochs == 3  # fmt: skip


def test_unreadable_recipes_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(TrainRecipe, tmp_path / "none.toml")
    with pytest.raises(RecipeError, match=r"not TOML[\s\S]*line 2"):
        load_recipe(TrainRecipe, write(tmp_path, "[run]\nseed = \n"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not TOML"):
        load_recipe(TrainRecipe, tmp_path / "binary.toml")
    (tmp_path / "large.toml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(RecipeError, match="too large"):
        load_recipe(TrainRecipe, tmp_path / "large.toml")
    (tmp_path / "deep.toml").write_text("[run]\nseed = " + "[" * 100_000)
    with pytest.raises(RecipeError, match="not TOML"):
        load_recipe(TrainRecipe, tmp_path / "deep.toml")


@pytest.mark.parametrize("joint", [".", " . ", '."a".', ".'/'.", '."=".'])
def test_deeply_nested_keys_are_refused_before_they_take_memory(tmp_path: Path, joint: str) -> None:
    """40,000 levels would take gigabytes."""
    key = joint.join(["a"] * 40_000)
    for text in (f"[student.kwargs]\n{key} = 1\n", f"[student.kwargs.{key}]\n"):
        with pytest.raises(RecipeError, match="nested too deeply"):
            load_recipe(TrainRecipe, write(tmp_path, text))
    tables = "[student.kwargs]\nx = " + "{a = " * 25 + "1" + "}" * 25
    with pytest.raises(RecipeError, match="at most 20 nested tables"):
        load_recipe(TrainRecipe, write(tmp_path, tables))


def test_dots_in_a_long_list_of_shards_are_not_nested_keys(tmp_path: Path) -> None:
    shards = ",".join(f"/data/v1.2/train-{n:04}.tar" for n in range(3000))
    recipe = load_recipe(TrainRecipe, write(tmp_path, f'[data]\nshards = "{shards}"\n'))
    assert recipe.data.shards == shards


def test_recipes_are_found_by_name_and_the_method_defaults_to_cskd() -> None:
    assert find_recipe(TrainRecipe, "paper_tiny").name == "paper_tiny_cskd.toml"
    assert find_recipe(TrainRecipe, "paper_tiny_deit").name == "paper_tiny_deit.toml"
    assert find_recipe(DumpRecipe, "paper_regnety_160").parent.name == "dump_teacher"
    assert load_recipe(TrainRecipe, "paper_base").student.name.startswith("deit_base")
    with pytest.raises(RecipeError, match="--recipe paper_small_cskd"):
        find_recipe(TrainRecipe, "paper_smal_cskd")
    with pytest.raises(RecipeError, match="no recipe of that name"):
        find_recipe(TrainRecipe, "paper_regnety_160")  # of the other stage


def test_any_path_of_a_file_is_accepted_as_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "[run]\nseed = 7\n")
    assert load_recipe(TrainRecipe, "recipe.toml").run.seed == 7
    path.rename(tmp_path / "mine")
    assert load_recipe(TrainRecipe, "mine").run.seed == 7
    assert load_recipe(TrainRecipe, "./mine").run.seed == 7


def test_recipes_created_in_code_are_checked_too() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        OptimSection(lr=-1.0)
    with pytest.raises(ValidationError, match="'bf16'"):
        replace(RunSection(), amp="x")
    with pytest.raises(ValidationError, match="view_block"):
        replace(DumpRecipe().cache, view_block=3, views=7)


@pytest.mark.parametrize(
    ("name", "refused", "accepted"),
    [
        ("data.num_classes", [-1, 65536], [0, 65535]),
        ("student.drop_path", [-0.1, 1.0], [0.0, 0.9]),
        ("distill.alpha", [-0.1, 1.1], [0.0, 1.0]),
        ("distill.spatial_weight", [-0.1], [0.0, 10.0]),
        ("distill.temperature", [0.0, -1.0], [0.1, 100.0]),
        ("optim.lr", [0.0, -1.0], [1e-9, 10.0]),
        ("optim.weight_decay", [-0.1], [0.0]),
        ("optim.betas", [(0.9, 1.0), (-0.1, 0.9)], [(0.0, 0.999)]),
        ("optim.clip_grad", [-1.0], [0.0, 5.0]),
        ("optim.smoothing", [1.0, -0.1], [0.0, 0.9]),
        ("schedule.epochs", [0], [1]),
        ("schedule.warmup_epochs", [-1], [0]),
        ("schedule.warmup_lr", [-1e-9], [0.0]),
        ("schedule.min_lr", [-1e-9], [0.0]),
        ("batch.batch_size", [1], [2]),
        ("batch.accumulation", [0], [1]),
        ("batch.repeats", [0], [1]),
        ("batch.shuffle_shards", [0], [1]),
        ("run.seed", [-1, 2**63], [0, 2**63 - 1]),
        ("run.ema", [1.0, -0.1], [0.0, 0.99996]),
        ("run.workers", [-2], [-1, 0]),
        ("run.threads", [-1], [0]),
        ("run.eval_every", [0], [1]),
        ("eval.crop_pct", [-0.1, 1.01], [0.0, 0.1, 0.875, 1.0]),
        ("run.checkpoint_every", [-1], [0]),
    ],
)
def test_values_out_of_range_are_refused(
    name: str, refused: list[object], accepted: list[object]
) -> None:
    for value in accepted:
        load_recipe(TrainRecipe, None, (), {name: value})
    for value in refused:
        with pytest.raises(RecipeError, match=rf"{name}.* .*expected a( 64-bit integer| value)"):
            load_recipe(TrainRecipe, None, (), {name: value})


def test_an_image_resized_to_more_than_ten_times_its_crop_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"eval.crop_pct .*expected 0, or 0.1 to 1"):
        load_recipe(TrainRecipe, None, (), {"eval.crop_pct": 0.09})


def all_fields(kind: type) -> list[tuple[str, str]]:
    return [
        (section.name, field.name)
        for section in fields(kind)
        if section.name != "views"
        for field in fields(getattr(kind(), section.name))
    ]


def test_every_number_has_limits_and_every_key_a_description() -> None:
    for kind in (DumpRecipe, TrainRecipe):
        for section, key in all_fields(kind):
            info = key_info(kind, f"{section}.{key}")
            assert info.description, key
            if key not in ("betas", "mean", "std"):  # their items have limits
                assert bool(info.metadata) == (info.annotation in (int, float)), key


def other_value(kind: type, name: str, value: object) -> object:
    """Return another valid value of the key."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        choices = get_args(key_types(kind)[name])
        return next((choice for choice in choices if choice != value), value + "x")
    if isinstance(value, tuple):
        return value[:-1] if len(value) > 1 else ("topk",) if value else (0.5, 0.5, 0.5)
    if isinstance(value, float):
        return value + 0.1 if value < 0.9 else value / 2
    return {"x": 1} if isinstance(value, dict) else max(1, value * 2)  # type: ignore[operator]


FREE = {
    "data.shards", "data.val_shards", "data.cache", "data.split", "data.val_split", "data.name",
    "data.check", "data.classes", "student.init_from", "run.fork_from", "run.keep_every",
    "cache.path", "cache.view_block", "cache.license", "cache.notes",
    "dump.batch_size", "dump.workers",
    "dump.threads", "dump.device", "dump.channels_last", "dump.compile", "dump.rank_timeout",
    "run.out", "run.device", "run.workers",
    "run.threads", "run.compile", "run.channels_last",
    "run.eval_batch_size", "run.log_every", "run.checkpoint_every", "run.wandb",
    "run.rank_timeout",
}  # fmt: skip


@pytest.mark.parametrize("kind", [DumpRecipe, TrainRecipe])
def test_the_digest_depends_on_exactly_the_keys_that_change_results(kind: type) -> None:
    before = kind()
    if isinstance(before, DumpRecipe):  # settings of draws only count for this encoding
        before = replace(before, cache=replace(before.cache, encodings=("sampled",)))
    for section, key in all_fields(kind):
        values = getattr(before, section)
        after = replace(
            before,
            **{
                section: replace(
                    values, **{key: other_value(kind, f"{section}.{key}", getattr(values, key))}
                )
            },
        )
        same = result_digest(after) == result_digest(before)
        assert same == (f"{section}.{key}" in FREE), f"{section}.{key}"
    policy = replace(before, views=ViewPolicy(size=99))
    assert result_digest(policy) != result_digest(before)


plain = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("aä .\"'\n", max_size=3), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    out=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lr=st.floats(1e-300, 1e300),
    kwargs=st.dictionaries(st.text("ab-_ .=#\x7f", max_size=3), plain, max_size=3),
    policy=st.sampled_from([None, ViewPolicy(), ViewPolicy(size=8, erase_ratio=(0.1, 10.0))]),
)
def test_a_written_recipe_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    out: str,
    lr: float,
    kwargs: dict[str, Any],
    policy: ViewPolicy | None,
) -> None:
    recipe = load_recipe(
        TrainRecipe, None, (), {"run.out": out, "optim.lr": lr, "student.kwargs": kwargs}
    )
    recipe = replace(recipe, views=policy)
    path = tmp_path_factory.getbasetemp() / "written.toml"
    path.write_bytes(to_toml(recipe).encode())
    again = load_recipe(TrainRecipe, path)
    assert again == recipe
    assert result_digest(again) == result_digest(recipe)


def test_every_packaged_recipe_reads_back_equal(tmp_path: Path) -> None:
    for kind in (DumpRecipe, TrainRecipe):
        for name in recipe_names(kind):
            recipe = load_recipe(kind, name)
            assert load_recipe(kind, write(tmp_path, to_toml(recipe))) == recipe


def test_choices_match_the_modules_that_implement_them() -> None:
    from cskd_pipeline.distill import ckf, encodings, losses
    from cskd_pipeline.models import student, teacher
    from cskd_pipeline.runtime import device

    def choices(kind: type) -> dict[str, tuple[str, ...]]:
        types = key_types(kind).items()
        return {
            name: get_args(type_)
            for name, type_ in types
            if get_origin(type_) is Literal and not name.startswith("data.")
        }

    assert choices(DumpRecipe) == {"teacher.precision": tuple(teacher.PRECISIONS)}
    assert choices(TrainRecipe) == {
        "distill.method": losses.METHODS,
        "distill.global_kind": losses.KINDS,
        "distill.spatial_kind": losses.KINDS,
        "distill.scaling": losses.SCALINGS,
        "distill.schedule": tuple(ckf.SCHEDULES),
        "distill.step": ("epoch", "update"),
        "eval.interpolation": ("auto", *student.INTERPOLATIONS),
        "run.amp": tuple(device.AMP),
    }
    assert set(key_info(DumpRecipe, "cache.encodings").examples or ()) == set(encodings.ENCODINGS)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *(("os:system", True), ("my.models:net", True), ("torchvision.models:vgg11", True)),
        *(("resnet18.a1_in1k", False), ("torchvision:resnet18", False)),
        *(("hf-hub:a/b", False), ("hf_hub:a/b", False), ("local-dir:a", False)),
    ],
)
def test_a_recipe_file_may_name_any_model_except_a_factory(
    name: str, code: bool, tmp_path: Path
) -> None:
    assert is_factory(name) == code
    text = f'[teacher]\nname = "{name}"\n'
    if code:
        [line] = problems_of(tmp_path, text, DumpRecipe)
        assert "would run code" in line
    else:
        assert load_recipe(DumpRecipe, write(tmp_path, text)).teacher.name == name


DIGESTS = {
    "dump_teacher/paper_regnety_160":
    "46d9d5b0868499d45bb0138397cc2bcedcc65d95004e448db5a0e4811c29dd9d",
    "train/finetune_cifar100":
    "57b795f7ce8d64a387fdf6bb72178c2692a83228586b19a6a16b055209a7a82b",
    "train/paper_base_cskd":
    "facb96293a9a8fbfe9496fb2941beedf09ce4bff7ed678a53273e13741bf7b38",
    "train/paper_base_deit":
    "8491a646bff3a819da98f6c414b196e5c10f6967d23aad094473a61bb3bf15ba",
    "train/paper_base_none":
    "61c893520dd490f17d9e7df7b80cb5cef53cd184957e0056f0af0a8e19b471e1",
    "train/paper_small_cskd":
    "ac922fb644b5aef0efa098e16e95c7c6aa2feba7d148b1851510b2b915f0bc84",
    "train/paper_small_deit":
    "f19c07de7d58519428400dde4254d572277f8f901b112cc430e2c9f87d6e0daf",
    "train/paper_small_none":
    "8efd247d02eac69e057d00db8ba2ec399efc09329befe638286c6d8dd5257df2",
    "train/paper_tiny_cskd":
    "ec72c9b3e6454e6f4d392b9a3fb905204fdc69874f5f5a32c7c582b3dc9ba8fd",
    "train/paper_tiny_deit":
    "28083fe32ab0c7e53e1bbaf6925badf115dd7eb7bc52c5a61b6e5d5058ad1de1",
    "train/paper_tiny_none":
    "cca27b40049eb2ce80fa59010892ae46d7054df8759e27535f06b20256f53215",
}  # fmt: skip
"""Digests of the recipes of published figures, which states and students of long runs store."""


def test_recipes_keep_their_digests() -> None:
    digests = {}
    for path in resources.stages().glob("*/*.toml"):
        if path.parent.name == "study" or path.stem.startswith("demo"):
            continue  # short runs, whose recipes may change
        kind = DumpRecipe if path.stem in recipe_names(DumpRecipe) else TrainRecipe
        digests[f"{path.parent.name}/{path.stem}"] = result_digest(load_recipe(kind, path))
    assert digests == DIGESTS


def test_settings_of_draws_enter_the_digest_only_if_the_encoding_draws() -> None:
    def digest(encoding: str, key: str) -> str:
        sets = [f'cache.encodings=["{encoding}"]', f"cache.sampled_{key}"]
        return result_digest(load_recipe(DumpRecipe, None, sets))

    for key in ("draws", "temperature"):
        assert digest("dense", f"{key}=2") == digest("dense", f"{key}=3")
        assert digest("sampled", f"{key}=2") != digest("sampled", f"{key}=3")


def test_digests_are_stable() -> None:
    kwargs = "student.kwargs={depth=2,x=[1,2.0,true,'a'],y={z=1e-9}}"
    sets = [kwargs, "views.size=64", "optim.lr=2", "data.classes=accept"]
    assert result_digest(load_recipe(TrainRecipe, "paper_tiny", sets)) == (
        "0f124827e05d83ba23faf8f4d8f1671dca93860b10afcd87e52dace0665d575e"
    )
    assert result_digest(TrainRecipe()) == (
        "d873f48f0053b9b40e7c6157a89e151c1a68bf0a2b93e9cc4e12a58e62ae3dab"
    )


def test_only_these_keys_may_change_when_a_run_is_resumed() -> None:
    assert adjustable_keys(TrainRecipe) == {
        "data.missing", "data.drift", "data.corrupt", "optim.lr", "optim.clip_grad",
        "schedule.epochs", "schedule.warmup_epochs", "schedule.warmup_lr", "schedule.min_lr",
        "batch.accumulation", "eval.crop_pct", "eval.interpolation", "run.amp", "run.eval_every",
    }  # fmt: skip
    assert adjustable_keys(DumpRecipe) == set()
