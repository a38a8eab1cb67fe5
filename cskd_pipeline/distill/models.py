"""timm models by name; every way of not getting one is a clear error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from cskd_pipeline.errors import CskdError

HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's own
# Arguments of timm.create_model that fetch or open files, and so are not the model's. Older timm
# unpickles what ``checkpoint_path`` names.
FETCHING = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
    *("checkpoint_path", "cache_dir"),
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
    """``timm.create_model`` at an input size, whether the model must be told it or not.

    Args:
        num_classes: None leaves the model's own.
        kwargs: for the model's constructor; an ``img_size`` there must be ``size``.
        error: what to raise.

    Raises:
        error: an unknown name, arguments the model does not take, weights that cannot be fetched.
    """
    if not name.startswith(HUB_PREFIXES) and not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=4)
        raise error(
            "timm has no model of this name",
            where=name,
            found=f"timm {timm.__version__}" + (f", which has {', '.join(close)}" if close else ""),
        )
    fetching = sorted(set(FETCHING) & set(kwargs))
    if fetching:
        raise error(
            "these arguments would fetch or open files; a model's own do not",
            where=name,
            found=", ".join(fetching),
            expected="arguments of the model's constructor",
            action="leave them out; a teacher's weights are --weights FILE",
        )
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
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as problem:  # bad arguments fail inside the model, fetching in many libraries
        found = f"{type(problem).__name__}: {problem}"
        if pretrained:
            raise error(
                "the pretrained weights could not be had",
                where=name,
                found=found,
                action="check the name's tag and the network, or fetch model.safetensors of "
                f"timm/{name} elsewhere and pass that file as the weights",
            ) from problem
        raise error(
            "the model cannot be made with these arguments",
            where=name,
            found=found,
            expected=f"arguments that timm's {name} takes, not {arguments}",
        ) from problem
    return model


def classes_in(state: Mapping[str, Tensor], name: str) -> int | None:
    """The class count of a state dict: the rows of what the model ``name`` calls its classifier."""
    classifier = getattr(_config(name), "classifier", None)
    for layer in (classifier,) if isinstance(classifier, str) else classifier or ():
        if f"{layer}.weight" in state:
            return len(state[f"{layer}.weight"])
    return None


def _config(name: str) -> PretrainedCfg | None:
    """What timm says of the architecture; None for models that only the hub knows."""
    if name.startswith(HUB_PREFIXES):
        return None
    return get_pretrained_cfg(name.split(".")[0])
