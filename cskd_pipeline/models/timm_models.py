"""timm and torchvision models by name; every failure to build one is an error of this package."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torchvision
from timm.models import PretrainedCfg, get_deprecated_models, get_pretrained_cfg
from torch import Tensor, nn

from cskd_pipeline.config.sections import HUB_PREFIXES, TORCHVISION
from cskd_pipeline.errors import CskdError, TeacherError
from cskd_pipeline.models.weights import load_into

# Arguments that do not describe a model: they download or open files (older timm unpickles the file
# at ``checkpoint_path``), or place its tensors, which is up to the caller.
FOREIGN_ARGUMENTS = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
    *("checkpoint_path", "cache_dir"),
    *("weights", "weights_backbone"),  # torchvision's
    *("device", "dtype"),
)


def create_timm(
    name: str,
    *,
    num_classes: int | None,
    size: int,
    kwargs: Mapping[str, Any],
    error: type[CskdError],
    pretrained: bool = False,
) -> nn.Module:
    """Call ``timm.create_model``, with ``img_size=size`` for models of a fixed input size.

    Args:
        num_classes: None keeps the model's own.
        kwargs: arguments of the model's constructor; its ``img_size``, if given, must be ``size``.
        error: the exception to raise for an unknown name, arguments that the model does not accept,
            and weights that cannot be downloaded.
    """
    if not name.startswith(HUB_PREFIXES) and not timm.is_model(name):
        raise _unknown_name(error, timm, name, name.split(".")[0], timm.list_models())
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
    except Exception as cause:  # raised by the model for bad arguments, or by a download library
        if pretrained:
            file = f"model.safetensors of timm/{name}"
            raise _download_failed(error, name, cause, file) from cause
        raise _bad_arguments(error, name, cause, arguments) from cause
    return model


def _refuse_foreign(name: str, kwargs: Mapping[str, Any], error: type[CskdError]) -> None:
    foreign = sorted(set(FOREIGN_ARGUMENTS) & set(kwargs))
    if foreign:
        raise error(
            "model arguments may not load files or place tensors",
            where=name,
            found=", ".join(foreign),
            expected="arguments that define the architecture",
            action="remove them; set a teacher's weights with --weights FILE",
        )


def create_torchvision(
    name: str, num_classes: int | None, kwargs: Mapping[str, Any], *, pretrained: bool
) -> nn.Module:
    """Create ``torchvision:NAME``, or ``torchvision:NAME.TAG`` with those published weights.

    ``pretrained_cfg`` records the mean and std of published weights; without them it is not set.
    """
    _refuse_foreign(name, kwargs, TeacherError)
    architecture, _, tag = name.removeprefix(TORCHVISION).partition(".")
    models = torchvision.models
    known = models.list_models(module=models)
    if architecture not in known:
        raise _unknown_name(TeacherError, torchvision, name, architecture, known)
    published = models.get_model_weights(architecture)
    tags = list(published.__members__)
    if tag and (tag not in tags or not pretrained):
        raise TeacherError(
            "torchvision has no weights with this tag"
            if pretrained
            else "a tag applies to torchvision's own weights only",
            where=name,
            found=tag,
            expected=f"one of {', '.join(tags)}" if pretrained else f"{TORCHVISION}{architecture}",
        )
    entry = published[tag] if tag else published.DEFAULT
    classes = len(entry.meta["categories"]) if pretrained else num_classes
    arguments = dict(kwargs) if classes is None else {**kwargs, "num_classes": classes}
    try:
        network: nn.Module = models.get_model(architecture, weights=None, **arguments)
    except Exception as cause:  # as in create_timm
        raise _bad_arguments(TeacherError, name, cause, arguments) from cause
    if pretrained:
        load_into(network, _download(name, entry), entry.url)
        transforms = entry.transforms()
        network.pretrained_cfg = {  # type: ignore[assignment]  # as on timm's networks
            **{"architecture": f"{TORCHVISION}{architecture}", "tag": entry.name},
            **{"mean": tuple(transforms.mean), "std": tuple(transforms.std)},
        }
    return network


def _download(name: str, entry: Any) -> Mapping[str, Tensor]:
    """Download the state dict of torchvision's published weights; run nothing in the file."""
    try:
        return entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as cause:  # raised by one of many download libraries
        raise _download_failed(TeacherError, name, cause, entry.url) from cause


def _unknown_name(
    error: type[CskdError], library: Any, name: str, architecture: str, known: Sequence[str]
) -> CskdError:
    close = difflib.get_close_matches(architecture, known, n=4)
    return error(
        f"{library.__name__} has no model of this name",
        where=name,
        found=f"{library.__name__} {library.__version__}"
        + (f"; similar names: {', '.join(close)}" if close else ""),
    )


def _bad_arguments(
    error: type[CskdError], name: str, cause: Exception, arguments: Mapping[str, Any]
) -> CskdError:
    return error(
        "the model cannot be created with these arguments",
        where=name,
        found=f"{type(cause).__name__}: {cause}",
        expected=f"arguments that {name} accepts, not {dict(arguments)}",
    )


def _download_failed(error: type[CskdError], name: str, cause: Exception, file: str) -> CskdError:
    return error(
        "the pretrained weights cannot be downloaded",
        where=name,
        found=f"{type(cause).__name__}: {cause}",
        action=f"check the name's tag and the network, or download {file} on another machine and "
        "pass that file as the weights",
    )


def classifiers(name: str) -> tuple[str, ...]:
    """Return the names of the model's classifier layers: two if it has a distillation head."""
    layers = getattr(_config(name), "classifier", None) or ()
    return (layers,) if isinstance(layers, str) else tuple(layers)


def class_count(state: Mapping[str, Tensor], name: str) -> int | None:
    """Return the class count of a state dict of timm's model ``name``; None without classifier."""
    weights = (f"{layer}.weight" for layer in classifiers(name))
    return next((len(state[weight]) for weight in weights if weight in state), None)


def _config(name: str) -> PretrainedCfg | None:
    """Return timm's configuration of the architecture; None for models defined on a hub."""
    known = None if name.startswith(HUB_PREFIXES) else _current_name(name)
    return None if known is None else get_pretrained_cfg(known.split(".")[0])


def _current_name(name: str) -> str | None:
    """Return the model's current name in timm, perhaps with a tag; None if timm removed the model.

    timm keeps no configuration (input size, classifier) under a deprecated name.
    """
    return get_deprecated_models().get(name.split(".")[0], name)
