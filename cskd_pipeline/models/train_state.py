"""Training states: what a run needs to go on, written whole and read without running anything."""

from pathlib import Path
from typing import Any

import torch

from cskd_pipeline.errors import WeightsError
from cskd_pipeline.models.weights import load_plain, unloadable
from cskd_pipeline.runtime.atomic import atomic_write

FORMAT = 2


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state: nested dicts and lists of tensors and plain values."""

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch's own; a full disk or a signal is behind it
                if error.__context__ is None:
                    raise
                raise error.__context__ from error

    atomic_write(path, write)


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state without running anything in it.

    Raises:
        WeightsError: a damaged file, or one that holds more than tensors and plain values.
    """
    try:
        state = load_plain(path)
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        raise WeightsError(
            "the training state cannot be read",
            where=path,
            found=unloadable(error),
            action="start again in a new output folder; the students beside it are still good",
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise WeightsError(
            "the file holds no training state of this version",
            where=path,
            action="continue with the version that wrote it, or start again in a new output folder",
        )
    return state


def find_nonfinite(state: Any, at: str = "") -> str | None:
    """Return the dotted name of the first tensor of a state that holds NaN or infinity, or None."""
    if isinstance(state, torch.Tensor):
        return None if bool(torch.isfinite(state).all()) else at
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        found = (find_nonfinite(value, f"{at}.{name}".lstrip(".")) for name, value in items)
        return next((name for name in found if name is not None), None)
    return None
