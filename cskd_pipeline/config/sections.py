"""The sections of a recipe: every key with its default, limits and description.

:func:`key_types` and :func:`key_info` look keys up by dotted name, ``section.key``. The
descriptions are also the help texts of flags, the ``examples`` a shell's completions. A key is

- ``_fixed``: it decides samples, targets or tensors; with another value it would be another run;
- ``_adjustable``: it changes the result too, but a run may be resumed with another value;
- ``_free``: it cannot change the result (worker counts, folders, notes), and is left out of
  :func:`cskd_pipeline.config.writing.result_digest`.

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

# Validators are built when the first recipe is read: --help needs only the descriptions.
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)
_SEEDS: Any = {"ge": 0, "lt": 2**63}


def _fixed(default: Any, description: str, mark: str = "", **limits: Any) -> Any:
    extra: Any = {"mark": mark}
    return Field(default, description=description, json_schema_extra=extra, **limits)


_adjustable = partial(_fixed, mark="adjustable")
_free = partial(_fixed, mark="free")

_SHARDS = (
    "Webdataset shards: a folder, a pattern such as 'train-{0000..1023}.tar' or 'train-*.tar', "
    "a comma-separated list, an _info.json, or a manifest.json written by the index command; paths "
    "or URLs (https://, s3://, gs://, hf://)."
)
_SPLIT = "Split to use, if the shards' _info.json has several."
_CORRUPT = "Action on images that cannot be decoded."
_KWARGS = "Keyword arguments for the model's constructor."
_WORKERS = "Number of loader processes; -1: one less than the number of CPU cores."
_THREADS = "CPU threads for the network; 0: torch's default."
_DEVICE = "Device: auto (a GPU if there is one), cpu, cuda, cuda:1."
_DEVICES = ["auto", "cpu", "cuda"]
_CHANNELS_LAST = "Use the channels_last memory format for the network and its images."
_COMPILE = "Compile the network with torch.compile."
_RANK_TIMEOUT = "Seconds without a heartbeat after which a rank counts as lost"


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
    """Images that the teacher sees."""

    shards: str = _free("", _SHARDS)
    split: str = _free("", _SPLIT)
    name: str = _free("", "Data set name for the manifest; empty: taken from the shards.")
    num_classes: int = _fixed(0, "Number of classes; 0: the shards' or teacher's.", ge=0, le=65535)
    corrupt: _OrSkip = _fixed("error", _CORRUPT)


@dataclass(frozen=True, config=_STRICT)
class TeacherSection:
    """The teacher network."""

    name: str = _fixed(
        "", "Teacher CNN: a timm name, torchvision:NAME, or your own package.module:factory."
    )
    weights: str = _fixed(
        "hub",
        "Teacher weights: hub, a .safetensors or .pth file, or random (for trials only).",
        examples=["hub", "random"],
    )
    kwargs: dict[str, Any] = _fixed({}, _KWARGS)
    mean: _Mean = _fixed((), "Mean of the teacher's input in [0, 1] units; empty: the model's own.")
    std: _Std = _fixed((), "Standard deviation of the teacher's input; empty: the model's own.")
    precision: _Precision = _fixed("float32", "Backbone precision; the head is always float32.")
    seed: int = _fixed(0, "Seed for weights = 'random'.", **_SEEDS)

    @field_validator("mean", "std")
    @classmethod
    def _three(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) not in (0, 3):
            raise ValueError("a number for each of three channels, or none")
        return value


@dataclass(frozen=True, config=_STRICT)
class CacheSection:
    """Location and contents of the cache."""

    path: str = _free("", "Cache folder to create, resume, or extend to more views.")
    encodings: tuple[str, ...] = _fixed(
        ("dense",),
        "Encoding to store: dense supports every loss; envelope hard losses, exactly, in 1/400 of "
        "the bytes; dense-q8 and topk soft losses, approximately; sampled soft losses, by unbiased "
        "draws. May be given more than once.",
        examples=["dense", "dense-q8", "topk", "envelope", "sampled"],
    )
    sampled_draws: int = _fixed(
        1, "Draws from each location's soft target in the encoding sampled.", ge=1, le=8
    )
    sampled_temperature: float = _fixed(
        1.0, "Temperature of the soft targets in the encoding sampled.", ge=0.01, le=1000.0
    )
    views: int = _fixed(1, "Number of augmented views per image.", ge=1, le=1_000_000)
    view_block: int = _free(
        0,
        "Views per unit; 0: up to 10, or as many as keep a large cache below 40,000 files.",
        ge=0,
        le=1000,
    )
    root_seed: int = _fixed(0, "Seed of all views' augmentation.", **_SEEDS)
    license: str = _free("", "License of the cached logits, stored in the manifest.")
    notes: str = _free("", "Notes for users of the cache, stored in the manifest.")

    @field_validator("encodings")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("one or more, without duplicates")
        return value

    @field_validator("view_block")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("views", value) % value:
            raise ValueError("a divisor of cache.views")
        return value


@dataclass(frozen=True, config=_STRICT)
class DumpLoop:
    """Speed and hardware of the dump."""

    batch_size: int = _free(128, "Number of views per batch.", ge=1)
    workers: int = _free(-1, _WORKERS, ge=-1, le=1024)
    threads: int = _free(0, _THREADS, ge=0, le=1024)
    device: str = _free("auto", _DEVICE, examples=_DEVICES)
    channels_last: bool = _free(True, _CHANNELS_LAST)
    compile: bool = _free(False, _COMPILE)
    rank_timeout: int = _free(
        300, f"{_RANK_TIMEOUT}; others then take over its units.", ge=1, le=604_800
    )


@dataclass(frozen=True, config=_STRICT)
class DumpRecipe:
    """Recipe of stage one."""

    data: DumpData = Field(default_factory=DumpData)
    views: ViewPolicy = Field(default_factory=ViewPolicy)
    teacher: TeacherSection = Field(default_factory=TeacherSection)
    cache: CacheSection = Field(default_factory=CacheSection)
    dump: DumpLoop = Field(default_factory=DumpLoop)


@dataclass(frozen=True, config=_STRICT)
class TrainData:
    """Images, the teacher's cache, and the action on differences between the two."""

    shards: str = _free("", _SHARDS)
    val_shards: str = _free("", "Shards to evaluate on; empty: no evaluation.")
    cache: str = _free(
        "",
        "Cache written by dump-teacher: a folder or a URL (https, s3, gs, hf); not used by method "
        "none.",
    )
    split: str = _free("", _SPLIT)
    val_split: str = _free("", "Split to use, if the validation shards' _info.json has several.")
    num_classes: int = _fixed(0, "Number of classes; 0: the cache's or shards'.", ge=0, le=65535)
    missing: _OrSkip = _adjustable("error", "Action on samples of the cache that the shards lack.")
    drift: _OrWarn = _adjustable("error", "Action on images or views unlike the teacher's.")
    # Decides whether a run starts, not what it computes, so it is left out of the digest.
    classes: _OrAccept = _free("error", "Action on class names, class order or labels that differ.")
    corrupt: _OrSkip = _adjustable("error", _CORRUPT)
    check: int = _free(64, "Views to replay and compare before training; 0: none.", ge=0)


@dataclass(frozen=True, config=_STRICT)
class StudentSection:
    """The student network."""

    name: str = _fixed("deit_tiny_distilled_patch16_224", "Student ViT, by its timm name.")
    kwargs: dict[str, Any] = _fixed({}, _KWARGS)
    drop_path: float = _fixed(0.0, "Rate of stochastic depth.", ge=0, lt=1)
    # The path decides nothing: states and students record the digest of the weights themselves.
    init_from: str = _free(
        "",
        "Weights to fine-tune from: a student's .safetensors file, the folder of a run or an "
        "export, or a .pth file of the same timm model.",
    )


@dataclass(frozen=True, config=_STRICT)
class DistillSection:
    """The distillation loss and the CKF schedule."""

    method: _Method = _fixed(
        "cskd",
        "Supervise by labels (none), global teacher logits too (deit), or spatial ones too (cskd).",
    )
    global_kind: _Kind = _fixed("hard", "Global targets: hard labels or soft distributions.")
    spatial_kind: _Kind = _fixed("hard", "Spatial targets: hard labels or soft distributions.")
    encoding: str = _fixed("auto", "Encoding to read; auto: the smallest exact, else the closest.")
    alpha: float = _fixed(0.5, "Weight of the global term.", ge=0, le=1)
    spatial_weight: float = _fixed(1.0, "Weight of the spatial term (the paper's lambda).", ge=0)
    temperature: float = _fixed(1.0, "Temperature of the soft terms.", gt=0)
    scaling: _Scaling = _fixed("reference", "Scaling of the soft terms: the authors' or a mean.")
    schedule: _Schedule = _fixed(
        "linear", "Schedule of the CKF ratio r; spatial: always 1; global: always 0."
    )
    step: Literal["epoch", "update"] = _fixed("epoch", "Interval at which r changes.")


@dataclass(frozen=True, config=_STRICT)
class OptimSection:
    """The optimizer."""

    name: str = _fixed("adamw", "Optimizer, by its timm name.")
    lr: float = _adjustable(
        1e-3, "Peak learning rate at batch size 1024; scaled linearly with the batch size.", gt=0
    )
    weight_decay: float = _fixed(0.05, "Weight decay; not applied to biases and norms.", ge=0)
    betas: _Betas = _fixed(
        (0.9, 0.999), "Betas, for optimizers that have betas or a momentum.", min_length=1
    )
    clip_grad: float = _adjustable(0.0, "Maximum global norm of the gradients; 0: off.", ge=0)
    smoothing: float = _fixed(0.1, "Label smoothing.", ge=0, lt=1)


@dataclass(frozen=True, config=_STRICT)
class ScheduleSection:
    """Length of the run and learning rate schedule."""

    epochs: int = _adjustable(300, "Number of epochs to train.", ge=1, le=1_000_000)
    warmup_epochs: int = _adjustable(5, "Epochs of linear warm-up.", ge=0, le=1_000_000)
    warmup_lr: float = _adjustable(1e-6, "Learning rate at the start of the warm-up.", ge=0)
    min_lr: float = _adjustable(1e-5, "Learning rate at the end of the cosine decay.", ge=0)


@dataclass(frozen=True, config=_STRICT)
class BatchSection:
    """Batches and the order of samples."""

    batch_size: int = _fixed(1024, "Images per optimizer update, over all ranks.", ge=2)
    accumulation: int = _adjustable(1, "Micro-batches per update.", ge=1)
    repeats: int = _fixed(3, "Views per image and epoch (repeated augmentation).", ge=1, le=1000)
    shuffle_shards: int = _fixed(16, "Shards per block; samples are shuffled within blocks.", ge=1)

    @field_validator("accumulation")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("batch_size", value) % value:
            raise ValueError("a divisor of batch.batch_size")
        return value


@dataclass(frozen=True, config=_STRICT)
class EvalSection:
    """Preprocessing of images for evaluation."""

    crop_pct: float = _adjustable(
        0.0, "Side of the central crop over the resized side; 0: the student's own.", ge=0, le=1
    )
    interpolation: _Interpolation = _adjustable("auto", "Resizing filter; auto: the student's own.")

    @field_validator("crop_pct")
    @classmethod
    def _honest(cls, value: float) -> float:
        if 0.0 < value < 0.1:  # the image would be resized to more than ten times the crop
            raise ValueError("0, or 0.1 to 1")
        return value


@dataclass(frozen=True, config=_STRICT)
class RunSection:
    """Output, precision, hardware and logging of the run."""

    out: str = _free("", "Output folder for checkpoints, summary.csv and the recipe.")
    seed: int = _fixed(0, "Random seed for weights, order and, without a cache, views.", **_SEEDS)
    amp: Literal["off", "bf16", "fp16"] = _adjustable("off", "Automatic mixed precision.")
    ema: float = _fixed(0.99996, "Decay of the moving average of the weights; 0: off.", ge=0, lt=1)
    device: str = _free("auto", _DEVICE, examples=_DEVICES)
    workers: int = _free(-1, _WORKERS, ge=-1, le=1024)
    threads: int = _free(0, _THREADS, ge=0, le=1024)
    compile: bool = _free(False, _COMPILE)
    channels_last: bool = _free(True, _CHANNELS_LAST)
    eval_batch_size: int = _free(256, "Images per evaluation batch.", ge=1)
    eval_every: int = _adjustable(
        1, "Epochs between evaluations; the last epoch is always evaluated.", ge=1
    )
    log_every: int = _free(50, "Updates between TensorBoard points.", ge=1)
    checkpoint_every: int = _free(0, "Updates between checkpoints; 0: only after epochs.", ge=0)
    keep_every: int = _free(
        0, "Epochs between states to keep (state-00010.pt); 0: only the last state.", ge=0
    )
    # The state has all that decides the result, and changes.jsonl what the fork changes.
    fork_from: str = _free(
        "", "State of another run to continue from, with another loss or CKF schedule."
    )
    rank_timeout: int = _free(300, f"{_RANK_TIMEOUT}.", ge=1, le=604_800)
    wandb: str = _free("", "Weights & Biases project for the curves; needs the extra wandb.")


@dataclass(frozen=True, config=_STRICT)
class TrainRecipe:
    """Recipe of stage two; without ``views``: the cache's policy, or deit-v1 without a cache."""

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
    """Return dotted name -> type of every section and key; for ``X | None``, X."""
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
    """Return the dotted names of the keys marked ``free`` or ``adjustable``."""
    names = (name for name in key_types(kind) if "." in name)
    return {name for name in names if key_info(kind, name).json_schema_extra == {"mark": mark}}


TORCHVISION = "torchvision:"
HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's own


def is_factory(name: str) -> bool:
    """Return whether a model's name is ``package.module:factory``, code that is run to build it."""
    return ":" in name and not name.startswith((TORCHVISION, *HUB_PREFIXES))
