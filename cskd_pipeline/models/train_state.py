"""Training states, from which a run resumes: written atomically, read without running code."""

from pathlib import Path
from typing import Any

import torch

from cskd_pipeline.errors import WeightsError
from cskd_pipeline.models.weights import load_failure, load_plain
from cskd_pipeline.runtime.atomic import atomic_write

FORMAT = 2


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state: nested dicts and lists of tensors and plain values."""

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch hides the cause, such as a full disk or a signal
                if error.__context__ is None:
                    raise
                raise error.__context__ from error

    atomic_write(path, write)


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state without running code from it.

    Raises:
        WeightsError: a damaged file, objects other than tensors and plain values, another format.
    """
    try:
        state = load_plain(path)
    except Exception as error:  # a damaged or hostile file can raise anything
        raise WeightsError(
            "the training state cannot be read",
            where=path,
            found=load_failure(error),
            action="start again in a new output folder; the students next to it are still valid",
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise WeightsError(
            "the file is not a training state of this version",
            where=path,
            action="resume with the version that wrote it, or start again in a new output folder",
        )
    return state


def find_nonfinite(state: Any, prefix: str = "") -> str | None:
    """Return the dotted name of a state's first tensor with NaN or infinite values, or None."""
    if isinstance(state, torch.Tensor):
        return None if bool(torch.isfinite(state).all()) else prefix
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        found = (find_nonfinite(value, f"{prefix}.{name}".lstrip(".")) for name, value in items)
        return next((name for name in found if name is not None), None)
    return None
