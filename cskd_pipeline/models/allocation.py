"""A bound on what making a model may allocate, for models that a stranger's file asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class OversizeError(Exception):
    """More was asked for than the limit allows; nothing of that size was allocated."""


class AllocationLimit(TorchDispatchMode):
    """While active, new tensors may be so many, and hold so many values, all taken together.

    Every result is made on the meta device first, where it takes no memory, so an allocation that
    is too large is refused before it happens. Views and in-place operations allocate nothing.

    Args:
        values: elements of all new tensors.
        tensors: their number, which bounds the layers and what Python keeps for each.
    """

    def __init__(self, *, values: int, tensors: int) -> None:
        super().__init__()
        self.values = values
        self.tensors = tensors

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not func._schema.is_mutable and not func.is_view:
            for made in tree_leaves(_on_meta(func, args, kwargs)):
                if isinstance(made, Tensor):
                    self._take(made.numel())
        return func(*args, **kwargs)

    def _take(self, values: int) -> None:
        self.values -= values
        self.tensors -= 1
        if self.values < 0 or self.tensors < 0:
            raise OversizeError(f"a tensor of {values} values is more than what is left to make")


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """The shapes of a result; None where an operation has no form that makes only these."""
    args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs["device"] = torch.device("meta")
    try:
        return func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # by its own reasons; the real call tells them
        return None
