"""A checkpoint's tensors, read without running anything that is in it."""

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

# Averages first, as timm does; "net" is what the common CIFAR scripts write.
_NESTINGS = ("state_dict_ema", "model_ema", "state_dict", "model", "net")
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")  # torch writes in bold
_FOREIGN = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")
_WRAPPERS = ("_orig_mod.", "module.")  # torch.compile, DistributedDataParallel


def load_state(path: Path | str) -> dict[str, Tensor]:
    """Load parameters and buffers by name, on the CPU.

    Of a safetensors file, or of anything that ``torch.save`` wrote as long as it holds tensors and
    plain values only: contents decide which, not names. What training scripts wrap around the
    tensors is removed; of a model and its moving average the average is taken, as timm does.

    Raises:
        WeightsError: no such file, no checkpoint, or objects in it that only running code could
        make.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError("there is no such weights file", where=path)
    try:
        if is_safetensors(path):
            checkpoint: object = load_file(path)
        else:
            # Training scripts store their arguments beside the weights: a Namespace is only a
            # record.
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = load_plain(path)
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise WeightsError(
            "the weights file does not load as plain tensors",
            where=path,
            found=unloadable(error),
            expected="a .safetensors file, or a torch checkpoint of tensors and plain values",
            action="nothing in it was run; where it was made, torch.save(model.state_dict(), FILE) "
            "writes the tensors alone",
        ) from error
    state = _unwrap(checkpoint)
    entries = state.items() if isinstance(state, dict) else ()
    if not entries or any(type(k) is not str or not isinstance(v, Tensor) for k, v in entries):
        raise WeightsError(
            "the weights file holds no state dict",
            where=path,
            found=_describe(state),
            expected=f"tensors by name, bare or under {', '.join(_NESTINGS)}",
        )
    for name, tensor in entries:
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise WeightsError(
                "a tensor claims more values than the file holds",
                where=path,
                found=f"{name} of shape {tuple(tensor.shape)}",
                expected="tensors that were saved whole",
            )
    return {_bare(name): tensor for name, tensor in entries}


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as that format does: the length of a header, then JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def load_plain(path: Path) -> object:
    """Load what ``torch.save`` wrote of tensors and plain values; run nothing in it.

    torch itself looks at no checksum, and takes archives whose entries unfold.

    Raises:
        ValueError: an archive that is compressed or damaged; else what ``torch.load`` raises, which
            is any exception.
    """
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"  # as torch decides it
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            unfolded = sum(entry.file_size for entry in entries)
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or unfolded > path.stat().st_size:
                raise ValueError("an archive that unfolds, which torch never writes")
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the CRC-32 of {damaged} does not fit")
    with open(path, "rb") as file:  # of a path torch would look at the suffix
        return torch.load(file, map_location="cpu", weights_only=True)


def unloadable(error: Exception) -> str:
    """Explain in short why :func:`load_plain` failed: of a foreign object, its whole type."""
    text = _ESCAPE.sub("", str(error))
    kind = _FOREIGN.search(text)
    if kind:
        return f"an object made by {kind[1]}, which is neither a tensor nor a plain value"
    reason = text.rpartition("WeightsUnpickler error:")[2].strip()  # after torch's advice
    return f"{type(error).__name__}: {reason}".splitlines()[0]


def load_into(model: nn.Module, state: Mapping[str, Tensor], where: object) -> None:
    """Load ``state`` into ``model``; every name and every shape must agree.

    Raises:
        WeightsError: counts and examples of what is missing, unexpected or of another shape; a
            dtype that does not convert.
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
    try:  # strict but for what _optional lets through
        model.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        raise WeightsError(
            "the weights are of a dtype that the model's cannot be made from",
            where=where,
            found=str(error).splitlines()[-1].strip(),
            expected=f"the dtypes of {type(model).__name__}",
        ) from error


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) over names, dtypes, shapes and bytes in the order of the names.

    Equal digests mean equal models, whatever files they came in.
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
    """Batch norm's step counter: absent from old checkpoints, of no effect at inference."""
    return name.endswith("num_batches_tracked")


def _describe(state: object) -> str:
    if not isinstance(state, dict):
        return type(state).__name__
    return f"a dict with {_some([str(key) for key in state])}" if state else "an empty dict"


def _some(names: Collection[str]) -> str:
    shown = list(names)[:3]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "")
