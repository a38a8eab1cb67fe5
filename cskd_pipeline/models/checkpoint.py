"""Student files: written atomically, verified when read, built within memory bounds."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from cskd_pipeline.errors import ManifestError, StudentError, WeightsError
from cskd_pipeline.models.student import INTERPOLATIONS, MIN_CROP_PCT, Student, create_student
from cskd_pipeline.models.weights import is_safetensors, load_into, load_state, state_digest
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.atomic import write_bytes
from cskd_pipeline.runtime.classes import Classes

HEADER = "cskd"
FORMAT = 2
"""Format of the header; format 1 has no digest of the tensors."""
MAX_ARGUMENT = 65535
"""Largest number accepted among the model arguments of a file."""

Side = Annotated[int, Field(gt=0, le=MAX_ARGUMENT)]
Head = Annotated[str, Field(pattern="^(cls|dist|dense)$")]
Filter = Annotated[str, Field(pattern=f"^({'|'.join(INTERPOLATIONS)})$")]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class StudentHeader:
    """The header of a student's file.

    ``kwargs`` are the timm constructor's; ``heads`` are those whose mean is the prediction;
    ``grid`` is the teacher grid (rows, columns) that the dense head was trained on, or None.
    ``crop_pct`` and ``interpolation`` define the resizing for evaluation; None: timm's for the
    model. ``accepted_classes`` has a line per class difference that the run accepted, and
    ``recipe_changes`` a line per key changed on resuming. Digests are SHA-256 in hex: of the
    recipe's deciding fields, of the cache's contents (None if unfinished), of the weights that the
    run started from, and of the file's own tensors.
    """

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str
    num_classes: Side
    size: Side
    heads: Annotated[tuple[Head, ...], Field(min_length=1)]
    method: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    grid: tuple[Side, Side] | None = None
    crop_pct: Annotated[float, Field(ge=MIN_CROP_PCT, le=1)] | None = None
    interpolation: Filter | None = None
    weights: str = "last"  # last or ema
    epoch: int = 0
    top1: float | None = None  # percent, on the validation shards of the run
    class_names: tuple[str, ...] | None = None
    accepted_classes: tuple[str, ...] = ()
    dataset: str | None = None
    teacher: str | None = None  # timm name
    recipe_sha256: Digest | None = None
    cache_sha256: Digest | None = None
    init_sha256: Digest | None = None
    recipe_changes: tuple[str, ...] = ()
    sha256: Digest | None = None  # of the tensors: set by save_student, absent in format 1

    def classes(self, where: object) -> Classes:
        """Return the student's classes for a comparison; ``where`` names its file in messages."""
        return Classes("the student", where, self.num_classes, self.class_names)


_HEADER: TypeAdapter[StudentHeader] = TypeAdapter(StudentHeader)


def save_student(path: Path, state: dict[str, torch.Tensor], header: StudentHeader) -> None:
    """Write a timm state dict and its header, to which the tensors' digest is added."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    digest = state_digest(tensors)
    document = {"format": FORMAT, "sha256": digest} | asdict(replace(header, sha256=digest))
    # A single metadata entry, since safetensors orders several randomly and equal runs must write
    # equal files; write_bytes, since save_file makes the file unreadable to other users.
    write_bytes(path, save(tensors, metadata={HEADER: json.dumps(document)}))


def student_file(path: Path) -> Path:
    """Resolve ``path``: a file to itself, a run's folder to its best student or else its last, an
    exported folder to its model.
    """
    if not path.is_dir():
        return path
    for name in ("best", "last", "model"):  # a run without validation shards has no best student
        if (path / f"{name}.safetensors").is_file():
            return path / f"{name}.safetensors"
    raise WeightsError(
        "the folder contains no student",
        where=path,
        expected="best.safetensors or last.safetensors of train, or model.safetensors of export",
    )


def read_header(path: Path) -> StudentHeader:
    """Read the header of a student's file.

    Raises:
        WeightsError: not a safetensors file, no header, or one that is invalid.
    """
    try:
        document = schemas.parse(_metadata(path)[HEADER].encode(), path)
        version = document.pop("format")
        if version not in (1, FORMAT):
            raise ValueError(f"format {version!r}")
        header = parse_header(document)
        if version == FORMAT and header.sha256 is None:
            raise ValueError("no SHA-256 of the tensors")
    except (KeyError, ValueError, TypeError, AttributeError, ManifestError) as error:
        raise WeightsError(
            "the checkpoint has no valid student header",
            where=path,
            found=header_problem(error),
            expected=f"an entry {HEADER!r} of format {FORMAT} in its metadata, as written by train",
        ) from error
    return header


def has_header(path: Path) -> bool:
    """Return whether a file is safetensors with a student header, valid or not."""
    return path.is_file() and is_safetensors(path) and HEADER in _metadata(path)


def read_student(path: Path) -> tuple[StudentHeader, dict[str, torch.Tensor]]:
    """Read the header and the tensors of a student's file, and verify the tensors' digest.

    Raises:
        WeightsError: no valid header, or a digest that does not match.
    """
    header, state = read_header(path), load_state(path)
    if header.sha256 is None:  # format 1
        return header, state
    found = state_digest(state)
    if found != header.sha256:
        raise WeightsError(
            "the checkpoint is damaged: its tensors do not match their digest",
            where=path,
            found=f"SHA-256 {found}",
            expected=header.sha256,
            action="copy it again from its source",
        )
    return header, state


def load_student(path: Path, device: torch.device) -> tuple[Student, StudentHeader]:
    """Load a student from a ``.safetensors`` file written by ``train``.

    Raises:
        WeightsError: no valid header, damaged tensors, or tensors that do not fit the model.
        StudentError: a model that cannot be created.
    """
    header, state = read_student(path)
    student = bounded_student(header, state, path)
    student.preprocessing = student.preprocessing.override(header.crop_pct, header.interpolation)
    student.require(method=header.method, grid=header.grid)
    has = {"cls": True, "dist": student.has_distillation_token, "dense": header.grid is not None}
    if not all(has[name] for name in header.heads):
        raise WeightsError(
            "the checkpoint names heads that its model does not have",
            where=path,
            found=", ".join(header.heads),
            expected="some of " + ", ".join(sorted(name for name in has if has[name])),
        )
    load_into(student.model, state, path)
    return student.to(device), header


def bounded_student(
    header: StudentHeader, state: Mapping[str, torch.Tensor], where: Path
) -> Student:
    """Create the model that an untrusted header names; refuse one far larger than its ``state``.

    The model is first built on the meta device, whose tensors take no memory, while its parameters
    and buffers are counted as layers register them. The limits leave room for buffers outside the
    state dict (timm's position tables, at most four times as many values).

    Raises:
        WeightsError: a model beyond these limits.
        StudentError: a model that cannot be created.
    """
    stored = sum(tensor.numel() for tensor in state.values())

    def create() -> Student:
        return create_student(
            header.model, num_classes=header.num_classes, size=header.size, kwargs=header.kwargs
        )

    try:
        with _limit_registered(6 * stored + 2**24, 8 * len(state) + 256), torch.device("meta"):
            create()
    except StudentError as error:
        if not isinstance(error.__cause__, OversizeError):
            raise
        raise WeightsError(
            "the checkpoint names a model that is larger than its tensors",
            where=where,
            found=f"{header.model} with {header.kwargs} at {header.size} px",
            expected=f"a model of {len(state)} tensors and {stored} values",
        ) from error
    return create()


class OversizeError(Exception):
    """A model has more or larger tensors than its limits allow."""


@contextmanager
def _limit_registered(values: int, tensors: int) -> Iterator[None]:
    """Raise :class:`OversizeError` if layers register more tensors or values than these."""

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal values, tensors
        if tensor is not None:
            values, tensors = values - tensor.numel(), tensors - 1
        if values < 0 or tensors < 0:
            raise OversizeError(f"{type(module).__name__}.{name} exceeds the limits")

    with (
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ):
        yield


def parse_header(document: dict[str, Any]) -> StudentHeader:
    """Validate a JSON object as a header; its model arguments must be small.

    Raises:
        ValueError: an invalid entry, which :func:`header_problem` names.
    """
    header = _HEADER.validate_json(json.dumps(document))
    names, count = header.class_names, header.num_classes
    if names is not None and len(names) != count:
        raise ValueError(f"{len(names)} class names for {count} classes")
    _check_arguments(header.kwargs)
    return header


def header_problem(error: Exception) -> str:
    """Return the problem of a header in one line."""
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {error}"
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, not {first['input']!r}"


def _check_arguments(value: Any) -> None:
    """Refuse numbers and collections so large that a constructor might never return."""
    if isinstance(value, dict | list):
        if len(value) > 1000:
            raise ValueError(f"kwargs with {len(value)} entries in one table or list")
        for item in value.values() if isinstance(value, dict) else value:
            _check_arguments(item)
    elif isinstance(value, int | float) and not abs(value) <= MAX_ARGUMENT:
        raise ValueError(f"kwargs with the number {value}")


def _metadata(path: Path) -> dict[str, str]:
    try:
        if not is_safetensors(path):
            raise WeightsError(
                "the checkpoint cannot be read",
                where=path,
                found="no safetensors header",
                expected="a .safetensors file written by train or export",
                action="pass a torch.save file to train --init-from, which reads its tensors",
            )
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            "the checkpoint cannot be read", where=path, found=error, expected="a .safetensors file"
        ) from error
