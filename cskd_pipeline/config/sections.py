"""The sections of a recipe: every key, its default, its limits, and what it means.

:func:`key_types` and :func:`key_info` find them by dotted name, ``section.key``.

The descriptions are also the help of the command line's flags, the ``examples`` what a shell's
completion offers. Every key decides the result (``_fixed``) but for those made by

- ``_free``: it cannot change a result (worker counts, folders, notes), so it is no part of
  :func:`cskd_pipeline.config.writing.result_digest`;
- ``_adjustable``: it can, and yet a run may be resumed with another value. The others decide what
  samples, targets and tensors are: with another value it would be another run.

Encodings, models, devices and optimizers are open sets: their own modules check the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass, is_pydantic_dataclass
from pydantic.fields import FieldInfo

from cskd_pipeline.views.policy import ViewPolicy

# Validators are built when a recipe is read first: help needs the descriptions alone.
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)
_SEEDS: Any = {"ge": 0, "lt": 2**63}


def _fixed(default: Any, description: str, mark: str = "", **limits: Any) -> Any:
    extra: Any = {"mark": mark}
    return Field(default, description=description, json_schema_extra=extra, **limits)


_adjustable = partial(_fixed, mark="adjustable")
_free = partial(_fixed, mark="free")

_SHARDS = (
    "Webdataset shards: a folder, a pattern such as 'train-{0000..1023}.tar' or 'train-*.tar', "
    "a comma list, an _info.json, or a manifest.json made by index; each may be a URL: https://, "
    "s3://, gs://, hf://."
)
_SPLIT = "Which split of an _info.json that has several."
_CORRUPT = "On images that cannot be decoded."
_WORKERS = "Loader processes; -1: one for each core but one."
_THREADS = "Threads of the network on CPU; 0: torch's choice."
_DEVICE = "auto (a GPU where there is one), cpu, cuda, cuda:1."
_DEVICES = ["auto", "cpu", "cuda"]
_CHANNELS_LAST = "Keep the network and its images in the channels_last format."
_COMPILE = "Run the network through torch.compile."
_RANK_TIMEOUT = "Seconds without a sign of life, after which a rank is given up"


_OrSkip = Literal["error", "skip"]
_OrWarn = Literal["error", "warn", "skip"]
_OrAccept = Literal["error", "accept"]
_Precision = Literal["float32", "bfloat16", "float16"]
_Method = Literal["none", "deit", "cskd"]
_Kind = Literal["hard", "soft"]
_Scaling = Literal["reference", "mean"]
_Schedule = Literal["linear", "x2", "cos", "spatial", "global"]
_Interpolation = Literal["auto", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
_Mean = tuple[Annotated[float, Field(ge=0, le=1)], ...]
_Std = tuple[Annotated[float, Field(gt=0, le=1)], ...]
_Betas = tuple[Annotated[float, Field(ge=0, lt=1)], ...]


@dataclass(frozen=True, config=_STRICT)
class DumpData:
    """Choose the images that the teacher sees."""

    shards: str = _free("", _SHARDS)
    split: str = _free("", _SPLIT)
    name: str = _free("", "Name of the data set in the manifest; empty: from the shards.")
    num_classes: int = _fixed(0, "0: from the class names, or the teacher's head.", ge=0, le=65535)
    corrupt: _OrSkip = _fixed("error", _CORRUPT)


@dataclass(frozen=True, config=_STRICT)
class TeacherSection:
    """Choose the teacher."""

    name: str = _fixed(
        "", "A CNN's timm name, torchvision:NAME, or your own package.module:factory."
    )
    weights: str = _fixed(
        "hub",
        "The teacher's weights: hub, a .safetensors or .pth file, or random, for trials only.",
        examples=["hub", "random"],
    )
    kwargs: dict[str, Any] = _fixed({}, "Arguments for the model's constructor.")
    mean: _Mean = _fixed((), "Of the teacher's training images, in [0, 1] units; else its own.")
    std: _Std = _fixed((), "Standard deviation of those images; else the teacher's own.")
    precision: _Precision = _fixed("float32", "Of the backbone; the head is always float32.")
    seed: int = _fixed(0, "Seed of weights = 'random'.", **_SEEDS)

    @field_validator("mean", "std")
    @classmethod
    def _three(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) not in (0, 3):
            raise ValueError("a number for each of three channels, or none at all")
        return value


@dataclass(frozen=True, config=_STRICT)
class CacheSection:
    """Choose what the cache holds."""

    path: str = _free("", "The cache to create, resume, or extend to more views.")
    encodings: tuple[str, ...] = _fixed(
        ("dense",),
        "What to store: dense serves every loss; envelope hard ones, exactly, in 1/400 of the "
        "bytes; dense-q8 and topk soft ones, nearly; sampled soft ones by unbiased draws. "
        "May be given more than once.",
        examples=["dense", "dense-q8", "topk", "envelope", "sampled"],
    )
    sampled_draws: int = _fixed(
        1, "Draws of each location's soft target, of the encoding sampled.", ge=1, le=8
    )
    sampled_temperature: float = _fixed(
        1.0, "Temperature of the soft targets that sampled draws from.", ge=0.01, le=1000.0
    )
    views: int = _fixed(1, "Augmented views of every image.", ge=1, le=1_000_000)
    view_block: int = _free(
        0,
        "Views per unit; 0: up to 10, or, in a large cache, what keeps it below 40,000 files.",
        ge=0,
        le=1000,
    )
    root_seed: int = _fixed(0, "Seed of every view's augmentation.", **_SEEDS)
    license: str = _free("", "License of the cached logits, for the manifest.")
    notes: str = _free("", "Whatever readers of the manifest should know.")

    @field_validator("encodings")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("one or more, each once")
        return value

    @field_validator("view_block")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("views", value) % value:
            raise ValueError("a divisor of cache.views")
        return value


@dataclass(frozen=True, config=_STRICT)
class DumpLoop:
    """Choose how fast, and on what, the teacher runs."""

    batch_size: int = _free(128, "Images in a batch.", ge=1)
    workers: int = _free(-1, _WORKERS, ge=-1, le=1024)
    threads: int = _free(0, _THREADS, ge=0, le=1024)
    device: str = _free("auto", _DEVICE, examples=_DEVICES)
    channels_last: bool = _free(True, _CHANNELS_LAST)
    compile: bool = _free(False, _COMPILE)
    rank_timeout: int = _free(
        300, f"{_RANK_TIMEOUT}, and its units are taken over.", ge=1, le=604_800
    )


@dataclass(frozen=True, config=_STRICT)
class DumpRecipe:
    """Describe stage one."""

    data: DumpData = Field(default_factory=DumpData)
    views: ViewPolicy = Field(default_factory=ViewPolicy)
    teacher: TeacherSection = Field(default_factory=TeacherSection)
    cache: CacheSection = Field(default_factory=CacheSection)
    dump: DumpLoop = Field(default_factory=DumpLoop)


@dataclass(frozen=True, config=_STRICT)
class TrainData:
    """Choose the images, the cache beside them, and what happens where the two differ."""

    shards: str = _free("", _SHARDS)
    val_shards: str = _free("", "Shards to evaluate on; without, none is done.")
    cache: str = _free(
        "",
        "What dump-teacher made: a folder, or where it is published (https, s3, gs, hf); not for "
        "method none.",
    )
    split: str = _free("", _SPLIT)
    val_split: str = _free("", _SPLIT)
    num_classes: int = _fixed(0, "0: from the cache, the class names, or an error.", ge=0, le=65535)
    missing: _OrSkip = _adjustable("error", "On samples of the cache that the shards lack.")
    drift: _OrWarn = _adjustable("error", "On images or views that differ from the teacher's.")
    # This decides whether a run starts, not what it computes: no part of the digest.
    classes: _OrAccept = _free("error", "On class names, order or labels that differ.")
    corrupt: _OrSkip = _adjustable("error", _CORRUPT)
    check: int = _free(64, "Views replayed and compared before training; 0: none.", ge=0)


@dataclass(frozen=True, config=_STRICT)
class StudentSection:
    """Choose the student."""

    name: str = _fixed("deit_tiny_distilled_patch16_224", "A ViT's timm name.")
    kwargs: dict[str, Any] = _fixed({}, "Arguments for the model's constructor.")
    drop_path: float = _fixed(0.0, "Rate of stochastic depth.", ge=0, lt=1)
    # The path decides nothing; the weights' own digest is kept in the run's state and students.
    init_from: str = _free(
        "",
        "Fine-tune a student: its .safetensors file, a run's or an export's folder; or a .pth file "
        "of the same timm model.",
    )


@dataclass(frozen=True, config=_STRICT)
class DistillSection:
    """Choose the loss and how the targets are fused."""

    method: _Method = _fixed(
        "cskd",
        "Labels only, with the teacher's global logits, or with its logits at every location.",
    )
    global_kind: _Kind = _fixed("hard", "Targets of the global term: labels or distributions.")
    spatial_kind: _Kind = _fixed("hard", "Targets of the spatial term, in the same way.")
    encoding: str = _fixed("auto", "auto: the smallest exact one for the kinds, else the closest.")
    alpha: float = _fixed(0.5, "Weight of the global term.", ge=0, le=1)
    spatial_weight: float = _fixed(1.0, "Lambda, weight of the spatial term.", ge=0)
    temperature: float = _fixed(1.0, "Temperature of the soft terms.", gt=0)
    scaling: _Scaling = _fixed("reference", "Scaling of the soft terms: the authors' or a mean.")
    schedule: _Schedule = _fixed(
        "linear", "Of the CKF ratio r; spatial: always 1, global: always 0."
    )
    step: Literal["epoch", "update"] = _fixed("epoch", "How often r changes.")


@dataclass(frozen=True, config=_STRICT)
class OptimSection:
    """Choose the optimizer."""

    name: str = _fixed("adamw", "timm's name of the optimizer.")
    lr: float = _adjustable(
        1e-3, "Peak rate at a batch of 1024; scaled linearly with the batch.", gt=0
    )
    weight_decay: float = _fixed(0.05, "Weight decay; biases and norms have none.", ge=0)
    betas: _Betas = _fixed(
        (0.9, 0.999), "Of optimizers that have betas or a momentum.", min_length=1
    )
    clip_grad: float = _adjustable(0.0, "Largest global norm of the gradients; 0: off.", ge=0)
    smoothing: float = _fixed(0.1, "Label smoothing.", ge=0, lt=1)


@dataclass(frozen=True, config=_STRICT)
class ScheduleSection:
    """Choose the length of a run and its learning rates' course."""

    epochs: int = _adjustable(300, "Epochs to train.", ge=1, le=1_000_000)
    warmup_epochs: int = _adjustable(5, "Epochs of linear warm-up.", ge=0, le=1_000_000)
    warmup_lr: float = _adjustable(1e-6, "Rate at the start of the warm-up.", ge=0)
    min_lr: float = _adjustable(1e-5, "Rate at the end of the cosine.", ge=0)


@dataclass(frozen=True, config=_STRICT)
class BatchSection:
    """Choose what makes an update."""

    batch_size: int = _fixed(1024, "Images in an optimizer update.", ge=2)
    accumulation: int = _adjustable(1, "Micro-batches per update.", ge=1)
    repeats: int = _fixed(3, "Views per image and epoch (repeated augmentation).", ge=1, le=1000)
    shuffle_shards: int = _fixed(16, "Shards in a block within which samples are shuffled.", ge=1)

    @field_validator("accumulation")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("batch_size", value) % value:
            raise ValueError("a divisor of batch.batch_size")
        return value


@dataclass(frozen=True, config=_STRICT)
class EvalSection:
    """Choose how images are prepared for an evaluation."""

    crop_pct: float = _adjustable(0.0, "Side of the central crop; 0: the student's.", ge=0, le=1)
    interpolation: _Interpolation = _adjustable("auto", "auto: the student's own.")

    @field_validator("crop_pct")
    @classmethod
    def _honest(cls, value: float) -> float:
        if 0.0 < value < 0.1:  # the whole image would be resized to ten times the view
            raise ValueError("0, or 0.1 to 1")
        return value


@dataclass(frozen=True, config=_STRICT)
class RunSection:
    """Choose a run's folder, precision, processes and notes."""

    out: str = _free("", "The run's folder: checkpoints, summary.csv, its recipe.")
    seed: int = _fixed(0, "Seed of weights, order and views.", **_SEEDS)
    amp: Literal["off", "bf16", "fp16"] = _adjustable("off", "Automatic mixed precision.")
    ema: float = _fixed(0.99996, "Decay of the weight average; 0: off.", ge=0, lt=1)
    device: str = _free("auto", _DEVICE, examples=_DEVICES)
    workers: int = _free(-1, _WORKERS, ge=-1, le=1024)
    threads: int = _free(0, _THREADS, ge=0, le=1024)
    compile: bool = _free(False, _COMPILE)
    channels_last: bool = _free(True, _CHANNELS_LAST)
    eval_batch_size: int = _free(256, "Images in a batch of an evaluation.", ge=1)
    eval_every: int = _adjustable(
        1, "Epochs between evaluations; the last is always evaluated.", ge=1
    )
    log_every: int = _free(50, "Updates between TensorBoard points.", ge=1)
    checkpoint_every: int = _free(0, "Updates between checkpoints; 0: after epochs only.", ge=0)
    keep_every: int = _free(
        0, "Epochs between states that are kept, state-00010.pt; 0: only the last state.", ge=0
    )
    # The state says all that decides the result; what the fork changes is in changes.jsonl.
    fork_from: str = _free(
        "", "Continue from another run's state, with another loss or CKF schedule."
    )
    rank_timeout: int = _free(300, f"{_RANK_TIMEOUT}.", ge=1, le=604_800)
    wandb: str = _free("", "Curves on Weights & Biases too: the project (extra: wandb).")


@dataclass(frozen=True, config=_STRICT)
class TrainRecipe:
    """Describe stage two; without ``views``, the cache's policy, or deit-v1 without a cache."""

    data: TrainData = Field(default_factory=TrainData)
    views: ViewPolicy | None = None
    student: StudentSection = Field(default_factory=StudentSection)
    distill: DistillSection = Field(default_factory=DistillSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    batch: BatchSection = Field(default_factory=BatchSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    run: RunSection = Field(default_factory=RunSection)


@cache
def key_types(kind: type) -> Mapping[str, Any]:
    """Return dotted name -> type of every section and key; of ``X | None`` only X."""
    types: dict[str, Any] = {}
    for section, hint in get_type_hints(kind).items():
        types[section] = next((t for t in get_args(hint) if t is not type(None)), hint)
        types |= {f"{section}.{key}": t for key, t in get_type_hints(types[section]).items()}
    return types


def key_info(kind: type, name: str) -> FieldInfo:
    """Return default, limits, description and examples of the key called ``name``."""
    section, _, key = name.partition(".")
    owner = key_types(kind)[section]
    if is_pydantic_dataclass(owner):
        return owner.__pydantic_fields__[key]
    return FieldInfo.from_annotation(get_type_hints(owner)[key])  # the view policy's


def keys_marked(kind: type, mark: str) -> set[str]:
    """Return the dotted names of the keys that are ``free`` or ``adjustable``."""
    names = (name for name in key_types(kind) if "." in name)
    return {name for name in names if key_info(kind, name).json_schema_extra == {"mark": mark}}


TORCHVISION = "torchvision:"
HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's own


def is_factory(name: str) -> bool:
    """Return whether a model's name is ``package.module:factory``, code that building it runs."""
    return ":" in name and not name.startswith((TORCHVISION, *HUB_PREFIXES))
