"""What a training run leaves: students anyone can load, and the state to go on from.

A student is a ``.safetensors`` file with the timm model's own parameter names, so
``timm.create_model(name, checkpoint_path=file)`` takes it; its header says, as JSON, which model,
which heads, where it comes from, and the SHA-256 of its tensors. The training state is one
``state.pt``, written whole or not at all and read back with ``weights_only=True``: tensors and
plain values, nothing that could run.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cskd_pipeline import documents
from cskd_pipeline.distill.allocation import AllocationLimit, OversizeError
from cskd_pipeline.distill.student import Student, create_student
from cskd_pipeline.distill.weights import load_plain, state_digest
from cskd_pipeline.distill.weights import load_state as load_weights
from cskd_pipeline.errors import ManifestError, StudentError, WeightsError
from cskd_pipeline.files import atomic_write

HEADER = "cskd"
FORMAT = 1
"""Of training states."""
STUDENT_FORMAT = 2
"""Of students' headers; those of format 1 have no digest of the tensors."""
MAX_ARGUMENT = 65535
"""The largest number among a stranger's model arguments."""


@dataclass(frozen=True)
class StudentCard:
    """What a student's file says of itself.

    ``kwargs`` are the timm constructor's, ``heads`` those whose mean is the answer, ``grid`` the
    teacher grid (rows, columns) that the dense head was trained on, or None. The digests are
    SHA-256 in hex: of the recipe's deciding fields, of the cache's manifest, and of the weights
    that the run started from.
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
    dataset: str | None = None
    teacher: str | None = None  # its timm name
    recipe_sha256: str | None = None
    cache_sha256: str | None = None
    init_sha256: str | None = None


def save_student(path: Path, state: dict[str, torch.Tensor], card: StudentCard) -> None:
    """Write a timm state dict and its card.

    Raises:
        OutputError: no space, or no permission.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    # One entry: the library writes several in random order, and equal runs leave equal files.
    about = {"format": STUDENT_FORMAT, "sha256": state_digest(tensors), **asdict(card)}
    header = {HEADER: json.dumps(about)}
    data = save(tensors, metadata=header)  # save_file would deny other users the file
    atomic_write(path, lambda partial: partial.write_bytes(data))


def student_file(path: Path) -> Path:
    """The student that ``path`` means: itself, or of a folder the best, else the last.

    Raises:
        WeightsError: a folder without either.
    """
    if not path.is_dir():
        return path
    for name in ("best", "last"):  # a run without validation shards has no best student
        if (path / f"{name}.safetensors").is_file():
            return path / f"{name}.safetensors"
    raise WeightsError(
        "the folder holds no student",
        where=path,
        expected="best.safetensors or last.safetensors, as train leaves them",
    )


def read_card(path: Path) -> StudentCard:
    """The card of a student's file.

    Raises:
        WeightsError: not a safetensors file, or one without a (known) card.
    """
    return _read_header(path)[0]


def read_student(path: Path) -> tuple[StudentCard, dict[str, torch.Tensor]]:
    """The card of a student's file and its tensors, which are those that were saved.

    Raises:
        WeightsError: no card, or tensors of another digest than it says.
    """
    card, digest = _read_header(path)
    state = load_weights(path)
    if digest is not None and state_digest(state) != digest:
        raise WeightsError(
            "the checkpoint is damaged: its tensors are not those that were saved",
            where=path,
            found=f"SHA-256 {state_digest(state)}",
            expected=digest,
            action="copy it again from where it came from",
        )
    return card, state


def load_student(path: Path, device: torch.device) -> tuple[Student, StudentCard]:
    """The student of a ``.safetensors`` file that ``train`` wrote.

    Raises:
        WeightsError: no card, damage, or tensors that do not fit the model it names.
        StudentError: a model that cannot be made.
    """
    card, state = read_student(path)
    student = _bounded_student(card, state, path)
    student.require(method=card.method, grid=card.grid)
    given = {"cls", "dist" if student.has_distillation_token else "", "dense" if card.grid else ""}
    if not set(card.heads) <= given:
        raise WeightsError(
            "the checkpoint names heads that its model does not have",
            where=path,
            found=", ".join(card.heads),
            expected="some of " + ", ".join(filter(None, sorted(given))),
        )
    try:
        student.model.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(
            "the checkpoint's tensors do not fit the model it names",
            where=path,
            found=str(error).splitlines()[-1].strip(),
            expected=card.model,
        ) from error
    return student.to(device), card


def _bounded_student(card: StudentCard, state: dict[str, torch.Tensor], path: Path) -> Student:
    """The model that the card names; one far larger than ``state`` is not made.

    The factors leave room for what timm's models make besides their state (tables of positions, at
    most four times as much).
    """
    stored = sum(tensor.numel() for tensor in state.values())
    limit = AllocationLimit(values=6 * stored + 2**24, tensors=8 * len(state) + 256)
    try:
        with limit:
            return create_student(
                card.model, num_classes=card.num_classes, size=card.size, kwargs=card.kwargs
            )
    except StudentError as error:
        if not isinstance(error.__cause__, OversizeError):
            raise
        raise WeightsError(
            "the checkpoint names a model that is larger than its tensors",
            where=path,
            found=f"{card.model} with {card.kwargs} at {card.size} px",
            expected=f"a model of {len(state)} tensors and {stored} values",
        ) from error


def _read_header(path: Path) -> tuple[StudentCard, str | None]:
    """The card, and the SHA-256 that the tensors must have."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            "the checkpoint cannot be read", where=path, found=error, expected="a .safetensors file"
        ) from error
    try:
        document = documents.parse(metadata[HEADER].encode(), path)
        version, digest = document.pop("format"), None
        if version == STUDENT_FORMAT:
            digest = document.pop("sha256")
            _check_digest("sha256", digest)
        elif version != 1:
            raise ValueError(f"format {version!r}")
        for name in ("heads", "grid", "class_names"):
            if document[name] is not None:
                document[name] = tuple(document[name])
        card = StudentCard(**document)
        _check_card(card)
        return card, digest
    except (KeyError, ValueError, TypeError, AttributeError, ManifestError) as error:
        raise WeightsError(
            "the checkpoint does not say which student it holds",
            where=path,
            found=f"{type(error).__name__}: {error}",
            expected=f"an entry {HEADER!r} of format {STUDENT_FORMAT} in its header, as train "
            "writes it",
        ) from error


def _check_card(card: StudentCard) -> None:
    """Refuse what decides how a model is made, or is told of it, and is not of its kind.

    Raises:
        ValueError: names the field.
    """
    plain = {"model": str, "method": str, "num_classes": int, "size": int, "kwargs": dict}
    for name, kind in (plain | {"weights": str, "epoch": int}).items():
        if type(getattr(card, name)) is not kind:
            raise ValueError(f"{name} {getattr(card, name)!r}")
    if not all(0 < n <= 65535 for n in (card.num_classes, card.size, *(card.grid or ()))):
        raise ValueError(f"classes, size or grid {card.num_classes}, {card.size}, {card.grid}")
    if not card.heads or not set(card.heads) <= {"cls", "dist", "dense"}:
        raise ValueError(f"heads {card.heads}")
    if card.grid is not None and len(card.grid) != 2:
        raise ValueError(f"grid {card.grid}")
    if card.top1 is not None and not (type(card.top1) is float and math.isfinite(card.top1)):
        raise ValueError(f"top1 {card.top1!r}")
    if not all(type(name) is str for name in card.class_names or ()):
        raise ValueError("class_names that are no text")
    for name in ("dataset", "teacher"):
        if type(getattr(card, name)) not in (str, type(None)):
            raise ValueError(f"{name} {getattr(card, name)!r}")
    for name in ("recipe_sha256", "cache_sha256", "init_sha256"):
        if getattr(card, name) is not None:
            _check_digest(name, getattr(card, name))
    _check_arguments(card.kwargs)


def _check_digest(name: str, value: Any) -> None:
    if type(value) is not str or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{name} {value!r}")


def _check_arguments(value: Any) -> None:
    """Refuse numbers and collections with which a constructor could be kept busy for ever."""
    if isinstance(value, dict | list):
        if len(value) > 1000:
            raise ValueError(f"kwargs with {len(value)} entries in one place")
        for item in value.values() if isinstance(value, dict) else value:
            _check_arguments(item)
    elif isinstance(value, int | float) and not abs(value) <= MAX_ARGUMENT:
        raise ValueError(f"kwargs with the number {value}")


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
