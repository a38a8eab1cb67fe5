"""Parameters of commands, made from what a command's function takes.

``@app.command(...)`` reads the function's signature, and adds --quiet and --json. Each parameter is
typer's own, but for three kinds:

- ``terminal: Terminal`` is where the command shows its results, and knows these two flags; progress
  and news are shown there without it;
- ``load: RecipeLoader[DumpRecipe]`` stands for the recipe's flags that ``flags`` names, --recipe
  and --set. Type, limits, help and completion of a flag come from the recipe's key;
- a dataclass stands for its fields, each written as a parameter of its own would be.

::

    @app.command(flags="--shards --teacher --cache", epilog="Example: cskd-pipeline try ...")
    def try_it(terminal: Terminal, load: RecipeLoader[DumpRecipe], part: DumpRange) -> Outcome:
        recipe = load()  # or with more than flags say: load({"teacher.name": source})
        load.require(recipe, "--shards --teacher")

The flags themselves stand in :mod:`cskd_pipeline.cli.options`, where a command without a recipe
borrows them.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from operator import itemgetter
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import typer

from cskd_pipeline.cli.options import (
    Json,
    Quiet,
    Sets,
    flag,
    one_of,
    parse_channels,
    require,
    usage_of,
)
from cskd_pipeline.config.reading import load_recipe, recipe_names
from cskd_pipeline.config.sections import DumpRecipe, TrainRecipe, key_types
from cskd_pipeline.runtime.console import Terminal

R = TypeVar("R", DumpRecipe, TrainRecipe)
_Make = Callable[[dict[str, Any]], Any]  # of all that the parser gives, one argument
# What the command line has for an array: a flag more than once, and R,G,B.
_TYPES: dict[Any, Any] = {tuple[str, ...]: list[str], tuple[float, ...]: str}
_Made = tuple[list[inspect.Parameter], _Make]


@dataclass(frozen=True)
class RecipeLoader(Generic[R]):
    """Load the recipe that a command line means.

    Args:
        kind: ``DumpRecipe`` or ``TrainRecipe``.
        source: of --recipe.
        sets: of --set.
        given: key -> value of the flags that were given.
    """

    kind: type[R]
    source: str | None
    sets: Sequence[str]
    given: Mapping[str, Any]

    def __call__(self, more: Mapping[str, Any] | None = None) -> R:
        """Return the recipe, with ``more`` (key -> value) beside the flags."""
        return load_recipe(self.kind, self.source, self.sets, {**self.given, **(more or {})})

    def gives(self, key: str) -> bool:
        """Return whether --recipe, --set or a flag decides ``key``, and not its default."""
        sets = {text.partition("=")[0].strip() for text in self.sets}
        return self.source is not None or key in sets or key in self.given

    def require(self, recipe: R, flags: str) -> None:
        """Refuse a recipe in which a key of one of these flags is empty."""
        found = {}
        for name in flags.split():
            usage, key = usage_of(self.kind, name)
            section, _, last = key.partition(".")
            found[usage] = getattr(getattr(recipe, section), last)
        require(found)


def expanded(function: Callable[..., Any], flags: str = "") -> Callable[..., Any]:
    """Return ``function`` with the parameters that typer is to see; see the module."""
    shown, call = _arguments(function, flags.split())
    shown += [_parameter("quiet", Quiet, False), _parameter("json", Json, False)]

    @functools.wraps(function)
    def command(**given: Any) -> Any:
        """Call ``function`` with what it takes."""
        given["terminal"] = Terminal(quiet=given.pop("quiet"), json=given.pop("json")).attach()
        return call(given)

    # typer reads both; type checkers do not know the first, for which inspect looks.
    command.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in shown}
    return command


def _arguments(function: Any, flags: Sequence[str]) -> _Made:
    """Return the parameters that stand for those of ``function``, or of a dataclass, and what calls
    it with their values.
    """
    hints = get_type_hints(function, include_extras=True)
    shown: list[inspect.Parameter] = []
    makers: dict[str, _Make] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint: Any = hints[name]
        parameters: list[inspect.Parameter] = []
        if hint is Terminal:
            makers[name] = itemgetter("terminal")
        elif get_origin(hint) is RecipeLoader:
            parameters, makers[name] = _recipe(get_args(hint)[0], flags)
        elif is_dataclass(hint):
            parameters, makers[name] = _arguments(hint, ())
        else:
            parameters = [_parameter(name, hint, parameter.default)]
            makers[name] = itemgetter(name)
        shown += parameters
    return shown, lambda given: function(**{name: make(given) for name, make in makers.items()})


def _parameter(name: str, hint: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=hint)


def _recipe(kind: type, flags: Sequence[str]) -> _Made:
    """Return the parameters of a recipe's flags, --recipe and --set, and what makes the loader."""
    parameters = []
    arguments = {}
    for name in flags:
        key = usage_of(kind, name)[1]
        arguments[key] = name.strip("-").replace("-", "_")
        hint = _TYPES.get(key_types(kind)[key], key_types(kind)[key])
        parameters.append(
            _parameter(arguments[key], Annotated[hint | None, flag(name, kind)], None)
        )
    option = typer.Option(
        "--recipe",
        metavar="FILE|NAME",
        help="A TOML recipe, or the name of one in stages/.",
        autocompletion=lambda incomplete: one_of(*recipe_names(kind))(incomplete),
    )
    parameters.append(_parameter("recipe", Annotated[str | None, option], None))
    parameters.append(_parameter("set_", Sets, None))

    def make(given: dict[str, Any]) -> RecipeLoader[Any]:
        """Return the loader of a command line."""
        values = {key: given[name] for key, name in arguments.items()}
        values = {key: value for key, value in values.items() if value not in (None, [])}
        for key in {"teacher.mean", "teacher.std"} & set(values):
            values[key] = parse_channels(values[key], f"--{arguments[key]}")
        return RecipeLoader(kind, given["recipe"], given["set_"] or (), values)

    return parameters, make
