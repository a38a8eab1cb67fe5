"""Parameters of commands, derived from the signatures of their functions.

``@app.command(...)`` reads the signature, and adds --quiet and --json. A parameter is typer's own,
with three exceptions:

- ``terminal: Terminal`` is where the command prints; it knows --quiet and --json, and shows
  progress and log messages even if the function does not take it;
- ``load: RecipeLoader[DumpRecipe]`` stands for the recipe flags listed in ``flags``, --recipe and
  --set. Type, limits, help and completion of a flag come from the recipe's key;
- a dataclass stands for its fields, each written like a parameter.

::

    @app.command(flags="--shards --teacher --cache", example="try --shards 'train-*.tar'")
    def try_it(terminal: Terminal, load: RecipeLoader[DumpRecipe], part: DumpRange) -> Outcome:
        recipe = load()  # or, overriding keys: load({"teacher.name": source})
        load.require(recipe, "--shards --teacher")

The flags are defined in :mod:`cskd_pipeline.cli.options`, which commands without a recipe use too.
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
_Build = Callable[[dict[str, Any]], Any]  # one argument, from all parsed values
# Arrays on the command line: a repeated flag, and R,G,B.
_TYPES: dict[Any, Any] = {tuple[str, ...]: list[str], tuple[float, ...]: str}
_Expanded = tuple[list[inspect.Parameter], _Build]


@dataclass(frozen=True)
class RecipeLoader(Generic[R]):
    """A callable that loads the recipe of a command line.

    Args:
        kind: ``DumpRecipe`` or ``TrainRecipe``.
        source: value of --recipe.
        sets: values of --set.
        given: key -> value of the flags that were given.
    """

    kind: type[R]
    source: str | None
    sets: Sequence[str]
    given: Mapping[str, Any]

    def __call__(self, more: Mapping[str, Any] | None = None) -> R:
        """Load the recipe, with ``more`` (key -> value) in addition to the flags."""
        return load_recipe(self.kind, self.source, self.sets, {**self.given, **(more or {})})

    def gives(self, key: str) -> bool:
        """Return whether --recipe, --set or a flag sets ``key``, rather than its default."""
        sets = {text.partition("=")[0].strip() for text in self.sets}
        return self.source is not None or key in sets or key in self.given

    def require(self, recipe: R, flags: str) -> None:
        """Refuse a recipe in which the key of one of these flags is empty."""
        values = {}
        for name in flags.split():
            usage, key = usage_of(self.kind, name)
            section, _, last = key.partition(".")
            values[usage] = getattr(getattr(recipe, section), last)
        require(values)


def expand(function: Callable[..., Any], flags: str = "") -> Callable[..., Any]:
    """Return ``function`` with the parameters that typer sees."""
    shown, call = _arguments(function, flags.split())
    shown += [_parameter("quiet", Quiet, False), _parameter("json", Json, False)]

    @functools.wraps(function)
    def command(**given: Any) -> Any:
        """Call ``function`` with its arguments."""
        given["terminal"] = Terminal(quiet=given.pop("quiet"), json=given.pop("json")).attach()
        return call(given)

    # typer reads both; type checkers do not know the first, which inspect reads.
    command.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in shown}
    return command


def _arguments(function: Any, flags: Sequence[str]) -> _Expanded:
    """Return the expanded parameters of a function or dataclass, and a builder of its call."""
    hints = get_type_hints(function, include_extras=True)
    shown: list[inspect.Parameter] = []
    builders: dict[str, _Build] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint: Any = hints[name]
        parameters: list[inspect.Parameter] = []
        if hint is Terminal:
            builders[name] = itemgetter("terminal")
        elif get_origin(hint) is RecipeLoader:
            parameters, builders[name] = _recipe(get_args(hint)[0], flags)
        elif is_dataclass(hint):
            parameters, builders[name] = _arguments(hint, ())
        else:
            parameters = [_parameter(name, hint, parameter.default)]
            builders[name] = itemgetter(name)
        shown += parameters
    return shown, lambda given: function(**{name: build(given) for name, build in builders.items()})


def _parameter(name: str, hint: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=hint)


def _recipe(kind: type, flags: Sequence[str]) -> _Expanded:
    """Return the parameters of a recipe's flags, --recipe and --set, and the loader's builder."""
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
        help="A TOML recipe: a file, or a name in stages/.",
        autocompletion=lambda incomplete: one_of(*recipe_names(kind))(incomplete),
    )
    parameters.append(_parameter("recipe", Annotated[str | None, option], None))
    parameters.append(_parameter("set_", Sets, None))

    def build(given: dict[str, Any]) -> RecipeLoader[Any]:
        """Return the loader of a command line."""
        values = {key: given[name] for key, name in arguments.items()}
        values = {key: value for key, value in values.items() if value not in (None, [])}
        for key in {"teacher.mean", "teacher.std"} & set(values):
            values[key] = parse_channels(values[key], f"--{arguments[key]}")
        return RecipeLoader(kind, given["recipe"], given["set_"] or (), values)

    return parameters, build
