"""Students' files: written whole, read back as they were saved, made within bounds."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from cskd_pipeline.errors import ManifestError, StudentError, WeightsError
from cskd_pipeline.models.header import FORMAT, StudentHeader, parse_header
from cskd_pipeline.models.student import Student, create_student
from cskd_pipeline.models.weights import is_safetensors, load_into, load_state, state_digest
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.atomic import write_bytes

HEADER = "cskd"


def save_student(path: Path, state: dict[str, torch.Tensor], header: StudentHeader) -> None:
    """Write a timm state dict and its header.

    Raises:
        OutputError: no space, or no permission.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    # One entry: the library writes several in random order, and equal runs leave equal files.
    about = {"format": FORMAT, "sha256": state_digest(tensors), **asdict(header)}
    # save_file would deny other users the file.
    write_bytes(path, save(tensors, metadata={HEADER: json.dumps(about)}))


def student_file(path: Path) -> Path:
    """Return the file of ``path``: itself; of a run's folder the best student, else the last; of
    an exported folder its model.

    Raises:
        WeightsError: a folder without any.
    """
    if not path.is_dir():
        return path
    for name in ("best", "last", "model"):  # a run without validation shards has no best student
        if (path / f"{name}.safetensors").is_file():
            return path / f"{name}.safetensors"
    raise WeightsError(
        "the folder holds no student",
        where=path,
        expected="best.safetensors or last.safetensors, as train leaves them, or model.safetensors "
        "of export",
    )


def read_header(path: Path) -> StudentHeader:
    """Read the header of a student's file.

    Raises:
        WeightsError: not a safetensors file, or one without a (known) header.
    """
    return _read_header(path)[0]


def has_header(path: Path) -> bool:
    """Say that a file's header claims a student, rightly or not.

    Raises:
        WeightsError: not a safetensors file.
    """
    return HEADER in _metadata(path)


def read_student(path: Path) -> tuple[StudentHeader, dict[str, torch.Tensor]]:
    """Read the header of a student's file and its tensors, which are those that were saved.

    Raises:
        WeightsError: no header, or tensors of another digest than it states.
    """
    header, digest = _read_header(path)
    state = load_state(path)
    if digest is not None and state_digest(state) != digest:
        raise WeightsError(
            "the checkpoint is damaged: its tensors are not those that were saved",
            where=path,
            found=f"SHA-256 {state_digest(state)}",
            expected=digest,
            action="copy it again from where it came from",
        )
    return header, state


def load_student(path: Path, device: torch.device) -> tuple[Student, StudentHeader]:
    """Load the student of a ``.safetensors`` file that ``train`` wrote.

    Raises:
        WeightsError: no header, damage, or tensors that do not fit the model it names.
        StudentError: a model that cannot be made.
    """
    header, state = read_student(path)
    arguments = {name: getattr(header, name) for name in ("num_classes", "size", "kwargs")}
    student = bounded_student(header.model, state, path, **arguments)
    student.preprocessing = student.preprocessing.changed(header.crop_pct, header.interpolation)
    student.require(method=header.method, grid=header.grid)
    there = {"cls": True, "dist": student.has_distillation_token, "dense": header.grid is not None}
    given = sorted(name for name, is_there in there.items() if is_there)
    if not set(header.heads) <= set(given):
        raise WeightsError(
            "the checkpoint names heads that its model does not have",
            where=path,
            found=", ".join(header.heads),
            expected="some of " + ", ".join(given),
        )
    load_into(student.model, state, path)
    return student.to(device), header


def bounded_student(
    name: str,
    state: Mapping[str, torch.Tensor],
    where: Path,
    *,
    num_classes: int,
    size: int,
    kwargs: Mapping[str, Any],
) -> Student:
    """Make a fresh model as a stranger's file names it; refuse one far larger than its ``state``.

    The model is built on the meta device first, where tensors have shapes and no memory, and its
    parameters and buffers are counted as layers register them. The factors leave room for what
    timm's models make besides their state (tables of positions, at most four times as much).

    Raises:
        WeightsError: a model larger than that.
        StudentError: a model that cannot be made.
    """
    stored = sum(tensor.numel() for tensor in state.values())

    def create() -> Student:
        return create_student(name, num_classes=num_classes, size=size, kwargs=kwargs)

    try:
        with _registered_at_most(6 * stored + 2**24, 8 * len(state) + 256), torch.device("meta"):
            create()
    except StudentError as error:
        if not isinstance(error.__cause__, OversizeError):
            raise
        raise WeightsError(
            "the checkpoint names a model that is larger than its tensors",
            where=where,
            found=f"{name} with {dict(kwargs)} at {size} px",
            expected=f"a model of {len(state)} tensors and {stored} values",
        ) from error
    return create()


class OversizeError(Exception):
    """A model has more or larger tensors than it may have."""


@contextmanager
def _registered_at_most(values: int, tensors: int) -> Iterator[None]:
    """Raise :class:`OversizeError` once layers have registered more tensors, or more values in
    them.
    """

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal values, tensors
        if tensor is not None:
            values, tensors = values - tensor.numel(), tensors - 1
        if values < 0 or tensors < 0:
            raise OversizeError(f"{type(module).__name__}.{name} is more than there may be")

    with (
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ):
        yield


def _read_header(path: Path) -> tuple[StudentHeader, str | None]:
    """The student's header, and the SHA-256 that the tensors must have."""
    metadata = _metadata(path)
    try:
        return parse_header(schemas.parse(metadata[HEADER].encode(), path))
    except (KeyError, ValueError, TypeError, AttributeError, ManifestError) as error:
        raise WeightsError(
            "the checkpoint does not state which student it holds",
            where=path,
            found=f"{type(error).__name__}: {error}",
            expected=f"an entry {HEADER!r} of format {FORMAT} in its header, as train writes it",
        ) from error


def _metadata(path: Path) -> dict[str, str]:
    try:
        if not is_safetensors(path):
            raise WeightsError(
                "the checkpoint cannot be read",
                where=path,
                found="no safetensors header",
                expected="a .safetensors file that train or export wrote",
                action="of what torch.save writes, train --init-from takes the tensors",
            )
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            "the checkpoint cannot be read", where=path, found=error, expected="a .safetensors file"
        ) from error
