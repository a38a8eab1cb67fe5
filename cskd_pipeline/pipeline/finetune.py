"""Weights that a run starts from: a student's, adapted to other classes and another image size.

The backbone is kept. For other classes the heads are new, and for another grid timm resamples the
position embeddings. Everything else must fit, tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

from timm.layers import DropPath, resample_abs_pos_embed
from torch import Tensor, nn

from cskd_pipeline.errors import ManifestError, OutputError, WeightsError
from cskd_pipeline.models.checkpoint import (
    StudentHeader,
    bounded_student,
    has_header,
    header_problem,
    parse_header,
    read_student,
    student_file,
)
from cskd_pipeline.models.student import Grid, Student
from cskd_pipeline.models.timm_models import class_count, classifiers
from cskd_pipeline.models.weights import load_into, load_state, state_digest
from cskd_pipeline.runtime import schemas
from cskd_pipeline.runtime.classes import Classes, ClassGuard, difference

TIMM_CONFIG = "config.json"
TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# Ignored when comparing models: layers that act in training only, and attributes that depend on
# the input size or the classes.
_ONLY_TRAINS = (nn.Identity, nn.Dropout, DropPath)
_ADAPTED = (
    *("img_size", "grid_size", "num_patches", "input_resolution", "feat_size", "dynamic_img_size"),
    *("num_classes", "out_features", "training", "grad_checkpointing", "drop_rate"),
)


@dataclass(frozen=True)
class Source:
    """Weights to start from, and the header that describes their model; None for bare tensors.

    ``mean`` and ``std`` are in [0, 1] units, None unless the source states them.
    """

    path: Path
    state: dict[str, Tensor]
    header: StudentHeader | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the tensors, which does not depend on the file format."""
        return state_digest(self.state)


class Start(NamedTuple):
    """The outcome of starting from a source; ``new`` are the layers with fresh weights."""

    sha256: str
    new: tuple[str, ...]
    resized: tuple[Grid, Grid] | None  # old and new grid of the position embedding
    text: str

    def __str__(self) -> str:
        return self.text


def read_source(path: Path) -> Source:
    """Read the weights at ``path``: a student's file, a run's folder, a folder in timm's format, or
    a file of bare tensors.

    Raises:
        WeightsError: ``path`` is none of these, or damaged.
    """
    if not path.exists():
        raise WeightsError(
            "the weights to start from do not exist",
            where=path,
            expected="a student's .safetensors file, a run's folder, or a folder that export wrote",
        )
    if (path / TIMM_CONFIG).is_file() and not has_header(path / TIMM_WEIGHTS[0]):
        return _read_timm_folder(path)
    file = student_file(path)
    if not has_header(file):
        return Source(path, load_state(file))
    header, state = read_student(file)
    return Source(path, state, header)


def start_from(source: Source, student: Student, classes: Classes, guard: ClassGuard) -> Start:
    """Load the source's weights into ``student``, which has ``classes`` and its own image size.

    Heads are kept for the same classes, and new for other ones. The same classes in another order
    or spelling are refused: new heads would discard what the old ones learned.

    Raises:
        WeightsError: another architecture, or tensors that do not fit even when resized.
        ClassesError: the same classes in a different order or spelling, unless accepted.
    """
    model, state, header = student.model, dict(source.state), source.header
    if header is not None:
        _require_same_model(source, header, student)
        count, names = header.num_classes, header.class_names
    else:
        count, names = class_count(state, student.name) or 0, None
    before = Classes("the weights to start from", source.path, count, names)
    counts_agree = classes.count == before.count
    found = difference(classes, before) if counts_agree else None
    new = classifiers(student.name)
    if counts_agree and (found is None or found.same_classes):
        guard.compare(classes, before)
        new = ()
    own = model.state_dict()
    fresh = [name for name in own if name.rpartition(".")[0] in new]
    state |= {name: own[name].detach().cpu() for name in fresh}
    resized = _resize_positions(state, model)
    load_into(model, state, source.path)

    loaded, sha256 = sum(name in source.state for name in own.keys() - fresh), source.sha256
    lines = [f"starting from {source.path}: {loaded} tensors, SHA-256 {sha256[:12]}"]
    if new:
        others = "" if found is None else f", {found.kind}"
        counts = f"{before.count} classes before, {classes.count} now{others}"
        lines.append(f"new {' and '.join(new)} ({counts})")
    if resized is not None:
        grids = (f"{rows}x{columns}" for rows, columns in resized)
        lines.append(f"pos_embed resized from {' to '.join(grids)}")
    if header is None:
        lines.append("the file describes no model: assuming the student's arguments, mean and std")
    return Start(sha256, new, resized, "; ".join(lines))


def check_resumed(init_from: str, record: Mapping[str, str] | None, where: Path) -> bool:
    """Refuse to resume a run with weights that it did not start from; load nothing.

    Args:
        init_from: ``student.init_from`` of the current recipe.
        record: ``from`` and ``sha256`` of the weights that the run started from, out of its state.

    Returns:
        False if the weights no longer exist, and could not be compared; the run needs them no more.

    Raises:
        OutputError: different weights.
        WeightsError: no weights at a new path.
    """
    found = None
    if init_from:
        if record is not None and record["from"] == init_from and not Path(init_from).exists():
            return False
        found = read_source(Path(init_from)).sha256
    expected = None if record is None else record["sha256"]
    if found != expected:
        raise OutputError(
            "the run was started from other weights",
            where=where,
            found=f"--init-from {init_from}, SHA-256 {found[:12]}" if found else "no --init-from",
            expected=f"{record['from']}, SHA-256 {record['sha256'][:12]}" if record else "none",
            action="pass the same --init-from, or start again in a new output folder",
        )
    return True


def _read_timm_folder(path: Path) -> Source:
    """Read a folder that timm wrote for the hub: ``config.json`` and ``model.safetensors``."""
    config = path / TIMM_CONFIG
    try:
        document = schemas.read(config)
        pretrained = document.get("pretrained_cfg", document)
        kwargs = document.get("model_args") or {}
        size = kwargs.get("img_size") or pretrained["input_size"][1:]
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            raise ValueError(f"an input of {height}x{width} pixels")
        if "img_size" in kwargs:
            kwargs["img_size"] = height
        names = document.get("label_names", pretrained.get("label_names"))
        has_names = isinstance(names, list) and all(type(name) is str for name in names)
        header = parse_header(
            {
                "model": document["architecture"],
                "num_classes": document.get("num_classes", pretrained.get("num_classes")),
                "size": height,
                "heads": ["cls"],
                "method": "none",
                "kwargs": kwargs,
                "class_names": names if has_names else None,
            }
        )
        mean, std = (tuple(map(float, pretrained[name])) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError, AttributeError, ManifestError) as error:
        raise WeightsError(
            "the folder does not describe a usable classifier",
            where=config,
            found=header_problem(error),
            expected="architecture, num_classes, mean, std and a square input, as timm writes them",
        ) from error
    weights = next((path / name for name in TIMM_WEIGHTS if (path / name).is_file()), path)
    return Source(path, load_state(weights), header, mean, std)


def _require_same_model(source: Source, header: StudentHeader, student: Student) -> None:
    found, expected = header.model, student.name
    if _architecture(found) != _architecture(expected):
        raise WeightsError(
            "the weights to start from have another architecture",
            where=source.path,
            found=found,
            expected=expected,
            action=f"pass --student {found.partition('.')[0]}, or start from a {expected}",
        )
    theirs = bounded_student(header, source.state, source.path)
    before, now = _settings(theirs.model), _settings(student.model)
    before |= {"mean": source.mean or theirs.mean, "std": source.std or theirs.std}
    now |= {"mean": student.mean, "std": student.std}
    problems = [
        f"{name}: found {before.get(name, 'none')}, expected {now.get(name, 'none')}"
        for name in before.keys() | now.keys()
        if before.get(name) != now.get(name)
    ]
    if problems:
        raise WeightsError(
            "the weights to start from belong to a model with other settings",
            where=source.path,
            found=f"{found} with {header.kwargs}",
            expected=f"{expected} with {student.kwargs}",
            problems=sorted(problems, key=lambda line: (line.partition(":")[0].count("."), line)),
            action="set student.name and student.kwargs to those of the weights' model",
        )


def _settings(model: nn.Module) -> dict[str, object]:
    """Return every layer's class and plain attributes, by name: models with equal tensor shapes may
    still differ in these (attention heads, strides, epsilons).
    """
    found: dict[str, object] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, _ONLY_TRAINS):
            continue
        found[name or "model"] = type(layer).__name__
        for key, value in vars(layer).items():
            plain = isinstance(value, int | float | str | tuple)
            if plain and not key.startswith("_") and not key.endswith(_ADAPTED):
                found[f"{name}.{key}".lstrip(".")] = value
    return found


def _architecture(name: str) -> str:
    """Return a timm name without tag and resolution, which affect the position embedding only."""
    return re.sub(r"_\d{2,4}$", "", name.partition(".")[0])


def _resize_positions(state: dict[str, Tensor], model: nn.Module) -> tuple[Grid, Grid] | None:
    """Resample ``pos_embed`` (1, prefix + H * W, C) in ``state`` to the model's grid, if needed.

    Anything but a square grid of the model's width is left unchanged, for ``load_into`` to refuse.
    """
    theirs, ours = state.get("pos_embed"), getattr(model, "pos_embed", None)
    grid: Any = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if theirs is None or ours is None or grid is None or theirs.shape == ours.shape:
        return None
    network: Any = model
    prefix = 0 if network.no_embed_class else network.num_prefix_tokens
    tokens = theirs.shape[1] - prefix if theirs.ndim == 3 else -1
    side = isqrt(max(tokens, 0))
    if tokens < 1 or side * side != tokens or theirs.shape[2] != ours.shape[2]:
        return None
    state["pos_embed"] = resample_abs_pos_embed(
        theirs, new_size=list(grid), old_size=[side, side], num_prefix_tokens=prefix
    )
    return (side, side), tuple(grid)
