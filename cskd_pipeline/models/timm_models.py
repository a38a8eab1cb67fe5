"""Models by name, timm's, torchvision's and the user's own; every way of not getting one is a clear
error."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torchvision
from timm.models import PretrainedCfg, get_deprecated_models, get_pretrained_cfg
from torch import Tensor, nn

from cskd_pipeline.config.sections import HUB_PREFIXES, TORCHVISION, is_factory
from cskd_pipeline.errors import CskdError, TeacherError
from cskd_pipeline.models.weights import load_into

# Arguments that do not describe a model: they fetch or open files (older timm unpickles what
# ``checkpoint_path`` names), or say where its tensors lie, which is the caller's to say.
FOREIGN_ARGUMENTS = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
    *("checkpoint_path", "cache_dir"),
    *("weights", "weights_backbone"),  # torchvision's
    *("device", "dtype"),
)


@dataclass(frozen=True)
class TeacherSource:
    """A teacher as a recipe's ``[teacher]`` describes it, for data of ``num_classes``.

    Args:
        name: a timm name, ``torchvision:NAME``, or ``package.module:factory``: a callable (of
            ``kwargs``, and of ``num_classes`` where it takes that and it is known) that returns a
            network which :func:`~cskd_pipeline.models.cut.cut_network` can cut.
        weights: ``hub`` (timm's or torchvision's pretrained; a factory's as it made them),
            ``random``, or a file.
        num_classes: None takes the file's or the model's own.
        kwargs: for the model's constructor.
        mean, std: of each channel in [0, 1] units; empty: as the network's ``pretrained_cfg`` says.
        precision: of the backbone under autocast: float32, bfloat16 or float16.
        seed: of random weights.
    """

    name: str
    weights: str | Path = "hub"
    num_classes: int | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    precision: str = "float32"
    seed: int = 0


def build_teacher(
    source: TeacherSource, state: Mapping[str, Tensor] | None, size: int
) -> tuple[nn.Module, str, str]:
    """Build the network of ``source``; ``state``, of its weights file, is still to be loaded.

    Returns:
        The network, what to call it, and where its weights come from: ``hub``, ``file``, ``random``
        or ``factory``.
    """
    name, kwargs, num_classes = source.name, source.kwargs, source.num_classes
    is_hub = source.weights == "hub"
    origin = "hub" if is_hub else "random" if state is None else "file"
    if is_factory(name):
        return _call_factory(name, num_classes, kwargs), name, "factory" if is_hub else origin
    if name.startswith(TORCHVISION):
        classes = _linear_rows(state or {}) or num_classes
        network = _create_torchvision(name, classes, kwargs, pretrained=is_hub)
    else:
        classes = class_count(state or {}, name) or num_classes
        network = create_timm(
            name,
            num_classes=None if is_hub else classes,
            size=size,
            kwargs=kwargs,
            error=TeacherError,
            pretrained=is_hub,
        )
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    tag = config.get("tag") if is_hub else None
    return network, f"{config['architecture']}.{tag}" if tag else name, origin


def create_timm(
    name: str,
    *,
    num_classes: int | None,
    size: int,
    kwargs: Mapping[str, Any],
    error: type[CskdError],
    pretrained: bool = False,
) -> nn.Module:
    """Call ``timm.create_model`` for an input size, passed to models of a fixed one.

    Args:
        num_classes: None leaves the model's own.
        kwargs: for the model's constructor; an ``img_size`` there must be ``size``.
        error: raised for an unknown name, arguments that the model does not take, and weights that
            cannot be fetched.
    """
    if not name.startswith(HUB_PREFIXES) and not timm.is_model(name):
        raise _unknown(error, timm, name, name.split(".")[0], timm.list_models())
    known = _current_name(name)
    if known is None:
        raise error("timm has removed this model", where=name, found=f"timm {timm.__version__}")
    _refuse_foreign(name, kwargs, error)
    arguments = dict(kwargs)
    if getattr(_config(name), "fixed_input_size", False):
        arguments.setdefault("img_size", size)
    if arguments.get("img_size", size) != size:
        raise error(
            "the model's img_size is not the views' size",
            where=name,
            found=arguments["img_size"],
            expected=size,
        )
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    try:
        model: nn.Module = timm.create_model(known, pretrained=pretrained, **arguments)
    except Exception as problem:  # bad arguments fail inside the model, fetching in many libraries
        if pretrained:
            raise _out_of_reach(
                error, name, problem, f"model.safetensors of timm/{name}"
            ) from problem
        raise _not_made(error, name, problem, arguments) from problem
    return model


def _refuse_foreign(name: str, kwargs: Mapping[str, Any], error: type[CskdError]) -> None:
    foreign = sorted(set(FOREIGN_ARGUMENTS) & set(kwargs))
    if foreign:
        raise error(
            "these arguments fetch or open files, or place tensors: none is the model's own",
            where=name,
            found=", ".join(foreign),
            expected="arguments of the model's constructor",
            action="leave them out; a teacher's weights are --weights FILE",
        )


def _create_torchvision(
    name: str, num_classes: int | None, kwargs: Mapping[str, Any], *, pretrained: bool
) -> nn.Module:
    """``torchvision:NAME``, or ``torchvision:NAME.TAG`` of one of its published weights.

    What torchvision publishes says its mean and std; other weights may have been trained with any.
    """
    _refuse_foreign(name, kwargs, TeacherError)
    architecture, _, tag = name.removeprefix(TORCHVISION).partition(".")
    models = torchvision.models
    known = models.list_models(module=models)
    if architecture not in known:
        raise _unknown(TeacherError, torchvision, name, architecture, known)
    published = models.get_model_weights(architecture)
    tags = list(published.__members__)
    if tag and (tag not in tags or not pretrained):
        raise TeacherError(
            "a tag names weights that torchvision publishes",
            where=name,
            found=tag if pretrained else f"{tag}, and other weights",
            expected=f"one of {', '.join(tags)}" if pretrained else f"{TORCHVISION}{architecture}",
        )
    entry = published[tag] if tag else published.DEFAULT
    classes = len(entry.meta["categories"]) if pretrained else num_classes
    arguments = dict(kwargs) if classes is None else {**kwargs, "num_classes": classes}
    try:
        network: nn.Module = models.get_model(architecture, weights=None, **arguments)
    except Exception as problem:  # as in create_timm
        raise _not_made(TeacherError, name, problem, arguments) from problem
    if pretrained:
        load_into(network, _fetch(name, entry), entry.url)
        seen = entry.transforms()
        network.pretrained_cfg = {  # type: ignore[assignment]  # as timm's networks have it
            **{"architecture": f"{TORCHVISION}{architecture}", "tag": entry.name},
            **{"mean": tuple(seen.mean), "std": tuple(seen.std)},
        }
    return network


def _fetch(name: str, entry: Any) -> Mapping[str, Tensor]:
    """The tensors of weights that torchvision publishes; nothing in the file is run."""
    try:
        return entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as problem:  # fetching fails in many libraries
        raise _out_of_reach(TeacherError, name, problem, entry.url) from problem


def _unknown(
    error: type[CskdError], library: Any, name: str, architecture: str, known: Sequence[str]
) -> CskdError:
    close = difflib.get_close_matches(architecture, known, n=4)
    return error(
        f"{library.__name__} has no model of this name",
        where=name,
        found=f"{library.__name__} {library.__version__}"
        + (f", which has {', '.join(close)}" if close else ""),
    )


def _not_made(
    error: type[CskdError], name: str, problem: Exception, arguments: Mapping[str, Any]
) -> CskdError:
    return error(
        "the model cannot be made with these arguments",
        where=name,
        found=f"{type(problem).__name__}: {problem}",
        expected=f"arguments that {name} takes, not {dict(arguments)}",
    )


def _out_of_reach(error: type[CskdError], name: str, problem: Exception, file: str) -> CskdError:
    return error(
        "the pretrained weights cannot be fetched",
        where=name,
        found=f"{type(problem).__name__}: {problem}",
        action=f"check the name's tag and the network, or fetch {file} elsewhere and pass that "
        "file as the weights",
    )


def _call_factory(name: str, num_classes: int | None, kwargs: Mapping[str, Any]) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    arguments = dict(kwargs)
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        if num_classes is not None and _takes(factory, "num_classes"):
            arguments["num_classes"] = num_classes
        network = factory(**arguments)
    except Exception as error:  # the user's own code can fail in any way
        raise TeacherError(
            "the teacher's factory does not work",
            where=name,
            found=f"{type(error).__name__}: {error}",
            expected=f"an importable package.module:factory, callable with {arguments}",
            action="check PYTHONPATH and the two names; arguments are --set teacher.kwargs={...}",
        ) from error
    if not isinstance(network, nn.Module):
        raise TeacherError(
            "the teacher's factory gives no torch module", where=name, found=type(network).__name__
        )
    return network


def _takes(factory: Callable[..., Any], argument: str) -> bool:
    """Return whether a callable takes ``argument`` by name."""
    parameters = inspect.signature(factory).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def _linear_rows(state: Mapping[str, Tensor]) -> int | None:
    """The rows of a state dict's last matrix: the class count, where a linear layer ends it."""
    matrices = [tensor for tensor in state.values() if tensor.ndim == 2]
    return len(matrices[-1]) if matrices else None


def classifiers(name: str) -> tuple[str, ...]:
    """Return the layers that timm calls the model's classifier: two with a distillation head."""
    layers = getattr(_config(name), "classifier", None) or ()
    return (layers,) if isinstance(layers, str) else tuple(layers)


def class_count(state: Mapping[str, Tensor], name: str) -> int | None:
    """Return the rows of the classifier in a state dict of timm's model ``name``, if it has one."""
    weights = (f"{layer}.weight" for layer in classifiers(name))
    return next((len(state[weight]) for weight in weights if weight in state), None)


def _config(name: str) -> PretrainedCfg | None:
    """timm's configuration of the architecture; None for models that only the hub knows."""
    known = None if name.startswith(HUB_PREFIXES) else _current_name(name)
    return None if known is None else get_pretrained_cfg(known.split(".")[0])


def _current_name(name: str) -> str | None:
    """timm's name of the model today, which may have a tag; None: it has none any more.

    Of an old name timm knows nothing else: neither its input size nor its classifier.
    """
    return get_deprecated_models().get(name.split(".")[0], name)
