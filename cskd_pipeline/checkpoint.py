"""What a training run leaves: students anyone can load, and the state to go on from.

A student is a ``.safetensors`` file with the timm model's own parameter names, so
``timm.create_model(name, checkpoint_path=file)`` takes it; its header says, as JSON, which model
and which heads. The training state is one ``state.pt``, written whole or not at all and read back
with ``weights_only=True``: tensors and plain values, nothing that could run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cskd_pipeline import documents
from cskd_pipeline.distill.weights import load_plain
from cskd_pipeline.errors import ManifestError, WeightsError
from cskd_pipeline.files import atomic_write

HEADER = "cskd"
FORMAT = 1


@dataclass(frozen=True)
class StudentCard:
    """What a student's file says of itself.

    ``kwargs`` are the timm constructor's, ``heads`` those whose mean is the answer, ``grid`` the
    teacher grid (rows, columns) that the dense head was trained on, or None.
    """

    model: str
    num_classes: int
    size: int
    heads: tuple[str, ...]
    method: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    weights: str = "last"  # last or ema
    epoch: int = 0
    top1: float | None = None  # percent, on the validation shards of the run
    class_names: tuple[str, ...] | None = None


def save_student(path: Path, state: dict[str, torch.Tensor], card: StudentCard) -> None:
    """Write a timm state dict and its card.

    Raises:
        OutputError: no space, or no permission.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    # One entry: the library writes several in random order, and equal runs leave equal files.
    header = {HEADER: json.dumps({"format": FORMAT, **asdict(card)})}
    data = save(tensors, metadata=header)  # save_file would deny other users the file
    atomic_write(path, lambda partial: partial.write_bytes(data))


def read_card(path: Path) -> StudentCard:
    """The card of a student's file.

    Raises:
        WeightsError: not a safetensors file, or one without a (known) card.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            "the checkpoint cannot be read", where=path, found=error, expected="a .safetensors file"
        ) from error
    try:
        document = documents.parse(metadata[HEADER].encode(), path)
        if document.pop("format") != FORMAT:
            raise ValueError(f"format {document}")
        for name in ("heads", "grid", "class_names"):
            if document[name] is not None:
                document[name] = tuple(document[name])
        card = StudentCard(**document)
        _check_card(card)
        return card
    except (KeyError, ValueError, TypeError, AttributeError, ManifestError) as error:
        raise WeightsError(
            "the checkpoint does not say which student it holds",
            where=path,
            found=f"{type(error).__name__}: {error}",
            expected=f"an entry {HEADER!r} of format {FORMAT} in its header, as train writes it",
        ) from error


def _check_card(card: StudentCard) -> None:
    """Refuse what decides how a model is made and is not of its kind.

    Raises:
        ValueError: names the field.
    """
    plain = {"model": str, "method": str, "num_classes": int, "size": int, "kwargs": dict}
    for name, kind in plain.items():
        if type(getattr(card, name)) is not kind:
            raise ValueError(f"{name} {getattr(card, name)!r}")
    if not all(0 < n <= 65535 for n in (card.num_classes, card.size, *(card.grid or ()))):
        raise ValueError(f"classes, size or grid {card.num_classes}, {card.size}, {card.grid}")
    if not card.heads or not set(card.heads) <= {"cls", "dist", "dense"}:
        raise ValueError(f"heads {card.heads}")
    if card.grid is not None and len(card.grid) != 2:
        raise ValueError(f"grid {card.grid}")


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state: nested dicts and lists of tensors and plain values.

    Raises:
        OutputError: no space, or no permission.
    """

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch's own; the write that failed is behind it
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise

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
            found=str(error).splitlines()[0],
            action="start again in a new output folder; the students beside it are still good",
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise WeightsError("the file holds no training state of this version", where=path)
    return state
