"""A command's parameters, derived from its function's signature and the recipe's keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
import typer.main

from cskd_pipeline.cli.options import FLAGS, Split, flag
from cskd_pipeline.cli.parameters import RecipeLoader, expand
from cskd_pipeline.config.sections import DumpRecipe, TrainRecipe, key_info, key_types
from cskd_pipeline.errors import UsageError
from cskd_pipeline.runtime.console import Terminal
from cskd_pipeline.runtime.progress import restore_reporting


@dataclass(frozen=True)
class Both:
    """Two options, one of which is required."""

    needed: Annotated[int, typer.Option(help="One.")]
    split: Split = None


def command(function: Any, flags: str = "") -> Any:
    app = typer.Typer()
    app.command()(expand(function, flags))
    return typer.main.get_command(app)


def called(function: Any, flags: str, line: str) -> Any:
    with restore_reporting():
        return command(function, flags).main(line.split(), standalone_mode=False)


def dump(load: RecipeLoader[DumpRecipe]) -> Any:
    return load


def train(load: RecipeLoader[TrainRecipe], both: Both, last: bool = False) -> Any:
    return load, both, last


def test_every_flag_has_a_key_with_help() -> None:
    for kind, flags in FLAGS.items():
        for usage, key in flags.items():
            option = flag(usage.partition(" ")[0], kind)
            assert key in key_types(kind)
            assert option.help, key


def test_help_follows_the_signature_and_ends_with_quiet_and_json() -> None:
    options = [parameter.opts[0] for parameter in command(train, "--epochs --shards").params]
    expected = "--epochs --shards --recipe --set --needed --split --last --quiet --json"
    assert [name for name in options if "completion" not in name] == expected.split()


def test_a_flag_has_its_keys_limits_choices_and_help() -> None:
    epochs, method = command(train, "--epochs --method").params[:2]
    for parameter, key in ((epochs, "schedule.epochs"), (method, "distill.method")):
        assert parameter.help == key_info(TrainRecipe, key).description
    for wrong in ("--epochs 0", "--epochs 1000001", "--epochs x", "--method both"):
        with pytest.raises(typer.BadParameter):
            called(train, "--epochs --method", f"{wrong} --needed 1")
    with pytest.raises(KeyError, match="no flag --teacher"):
        command(train, "--teacher")


def test_only_given_values_reach_the_recipe_also_zero() -> None:
    load, both, last = called(train, "--epochs --workers", "--workers 0 --needed 3 --last")
    assert load.given == {"run.workers": 0}
    assert load().run.workers == 0
    assert load({"schedule.epochs": 7}).schedule.epochs == 7
    assert (both, last) == (Both(3), True)


def test_arrays_are_repeated_flags_or_three_numbers() -> None:
    flags = "--encoding --mean --std"
    recipe = called(dump, flags, "--encoding topk --encoding dense --mean 0.1,0.2,0.3")()
    assert recipe.cache.encodings == ("topk", "dense")
    assert (recipe.teacher.mean, recipe.teacher.std) == ((0.1, 0.2, 0.3), ())
    assert called(dump, flags, "")() == DumpRecipe()
    for wrong in ("1,2", "1,2,nan", "inf,1,1", "0,1,1", "1,1,-0.5"):
        with pytest.raises(UsageError, match="--std takes R,G,B"):
            called(dump, flags, f"--std {wrong}")
    assert called(dump, flags, "--mean=0,0,0")().teacher.mean == (0.0, 0.0, 0.0)
    with pytest.raises(UsageError, match="--mean takes R,G,B"):
        called(dump, flags, "--mean 0,0,nan")


def test_missing_values_are_named_as_their_flags_are_written() -> None:
    load = called(dump, "", "--set teacher.name=resnet18")
    with pytest.raises(UsageError) as caught:
        load.require(load(), "--teacher --shards --cache")
    assert caught.value.expected == "--shards SHARDS, --cache DIR"
    load.require(load(), "--teacher")


def test_the_terminal_knows_the_two_flags_that_every_command_has() -> None:
    def look(terminal: Terminal) -> Any:
        return terminal

    for line, tone in (
        ("", (False, False)),
        ("-q --json", (True, True)),
        ("--quiet", (True, False)),
    ):
        terminal = called(look, "", line)
        assert (terminal.quiet, terminal.json) == tone
