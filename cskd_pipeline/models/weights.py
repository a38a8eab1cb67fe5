"""The tensors of a checkpoint, read without running code from it."""

import argparse
import hashlib
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cskd_pipeline.errors import WeightsError

# Averages first, as in timm; "net" is the key of the common CIFAR scripts.
_NESTINGS = ("state_dict_ema", "model_ema", "state_dict", "model", "net")
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")  # torch's messages contain bold text
_FOREIGN = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")
_WRAPPERS = ("_orig_mod.", "module.")  # torch.compile, DistributedDataParallel


def load_state(path: Path | str) -> dict[str, Tensor]:
    """Load parameters and buffers by name, on the CPU.

    The file is safetensors, or any ``torch.save`` output of tensors and plain values; its content
    decides, not its name. Wrappers that training scripts put around the state dict are removed; a
    moving average takes precedence over its model, as in timm.

    Raises:
        WeightsError: no such file, not a checkpoint, or objects that cannot be loaded without
            running code.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError("no such weights file", where=path)
    try:
        if is_safetensors(path):
            checkpoint: object = load_file(path)
        else:
            # Training scripts store their arguments with the weights; a Namespace is plain data.
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = load_plain(path)
    except Exception as error:  # a damaged or hostile file can raise anything
        raise WeightsError(
            "the weights file does not load as plain tensors",
            where=path,
            found=load_failure(error),
            expected="a .safetensors file, or a torch checkpoint of tensors and plain values",
            action="no code in it was run; save the tensors alone in the code that wrote it: "
            "torch.save(model.state_dict(), FILE)",
        ) from error
    state = _unwrap(checkpoint)
    entries = state.items() if isinstance(state, dict) else ()
    if not entries or any(type(k) is not str or not isinstance(v, Tensor) for k, v in entries):
        raise WeightsError(
            "the weights file contains no state dict",
            where=path,
            found=_describe(state),
            expected=f"tensors by name, bare or under {', '.join(_NESTINGS)}",
        )
    for name, tensor in entries:
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise WeightsError(
                "a tensor claims more values than the file contains",
                where=path,
                found=f"{name} of shape {tuple(tensor.shape)}",
                expected="tensors with all of their values",
            )
    return {_bare(name): tensor for name, tensor in entries}


def is_safetensors(path: Path) -> bool:
    """Return whether a file starts like safetensors: the length of a header, then JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def load_plain(path: Path) -> object:
    """Load a ``torch.save`` file of tensors and plain values; run no code from it.

    Reject archives with compressed or overlapping entries or wrong checksums: torch accepts them.

    Raises:
        ValueError: such an archive.
        Exception: whatever ``torch.load`` raises.
    """
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"  # torch's own test
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("a compressed archive, which torch never writes")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ValueError("an archive whose entries overlap, which torch never writes")
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the CRC-32 of {damaged} does not match")
    with open(path, "rb") as file:  # given a path, torch would check the suffix
        return torch.load(file, map_location="cpu", weights_only=True)


def load_failure(error: Exception) -> str:
    """Return in one line why :func:`load_plain` failed; name a foreign object by its type."""
    text = _ESCAPE.sub("", str(error))
    kind = _FOREIGN.search(text)
    if kind:
        return f"an object of {kind[1]}, which is neither a tensor nor a plain value"
    reason = text.rpartition("WeightsUnpickler error:")[2].strip()  # skips torch's advice
    return f"{type(error).__name__}: {reason}".splitlines()[0]


def load_into(model: nn.Module, state: Mapping[str, Tensor], where: object) -> None:
    """Load ``state`` into ``model``; all names and shapes must match.

    Raises:
        WeightsError: missing or unexpected names or other shapes, with counts and examples; a dtype
            that does not convert.
    """
    own = model.state_dict()
    problems = {
        "missing": [name for name in own if name not in state and not _optional(name)],
        "unexpected": [name for name in state if name not in own and not _optional(name)],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    found = [f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names]
    if found:
        raise WeightsError(
            "the weights do not fit the model",
            where=where,
            found="; ".join(found),
            expected=f"the {len(own)} tensors of {type(model).__name__}",
            action="check the model's name, its arguments and the class count",
        )
    try:  # strict except for _optional names
        model.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        raise WeightsError(
            "the weights have a dtype that does not convert to the model's",
            where=where,
            found=str(error).splitlines()[-1].strip(),
            expected=f"the dtypes of {type(model).__name__}",
        ) from error


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) over names, dtypes, shapes and bytes, sorted by name.

    Equal digests mean equal models, independent of the file format.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unwrap(checkpoint: object) -> object:
    while isinstance(checkpoint, dict):
        inner = [checkpoint[key] for key in _NESTINGS if isinstance(checkpoint.get(key), dict)]
        if not inner:
            break
        checkpoint = inner[0]
    return checkpoint


def _bare(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _optional(name: str) -> bool:
    """Return whether ``name`` is batch norm's step counter, which inference does not use."""
    return name.endswith("num_batches_tracked")


def _describe(state: object) -> str:
    if not isinstance(state, dict):
        return type(state).__name__
    return f"a dict with {_some([str(key) for key in state])}" if state else "an empty dict"


def _some(names: Collection[str]) -> str:
    shown = list(names)[:3]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "")
