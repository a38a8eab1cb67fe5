"""The sections of a recipe: every key, its default, its limits, and what it means.

The descriptions are also the help of the command line's flags, the ``examples`` what a shell's
completion offers. Every key decides the result (``_fixed``) but for those made by

- ``_free``: it cannot change a result (worker counts, folders, notes), so it is no part of
  :func:`cskd_pipeline.config.result_digest`;
- ``_adjustable``: it can, and yet a run may be resumed with another value. The others decide what
  samples, targets and tensors are: with another value it would be another run.

Encodings, models, devices and optimizers are open sets: their own modules check the names.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from cskd_pipeline.views.policy import ViewPolicy

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_SEEDS: Any = {"ge": 0, "lt": 2**63}


def _fixed(default: Any, description: str, mark: str = "", **limits: Any) -> Any:
    extra: Any = {"mark": mark}
    return Field(default, description=description, json_schema_extra=extra, **limits)


_adjustable = partial(_fixed, mark="adjustable")
_free = partial(_fixed, mark="free")

_SHARDS = (
    "Webdataset shards: a folder, a pattern such as 'train-{0000..1023}.tar' or 'train-*.tar', "
    "a comma list, an _info.json, or a manifest.json made by index."
)
_SPLIT = "Which split of an _info.json that has several."
_CORRUPT = "What to do about images that cannot be decoded."
_WORKERS = "Loader processes; -1: one for each core but one."
_THREADS = "Of the network on CPU; 0: torch's choice."
_DEVICE = "auto (a GPU where there is one), cpu, cuda, cuda:1."
_DEVICES = ["auto", "cpu", "cuda"]
_CHANNELS_LAST = "Memory format of the network and its images."
_COMPILE = "Run the network through torch.compile."
_RANK_TIMEOUT = "Seconds without a sign of life, after which a rank is given up."


@dataclass(frozen=True, config=_STRICT)
class DumpData:
    """Choose the images that the teacher sees."""

    shards: str = _free("", _SHARDS)
    split: str = _free("", _SPLIT)
    name: str = _free("", "Of the data set, for the manifest; empty: taken from the shards.")
    num_classes: int = _fixed(
        0, "0: from the class names, or the teacher's own head.", ge=0, le=65535
    )
    corrupt: Literal["error", "skip"] = _fixed("error", _CORRUPT)


@dataclass(frozen=True, config=_STRICT)
class TeacherSection:
    """Choose the teacher."""

    name: str = _fixed(
        "", "A CNN's timm name, torchvision:NAME, or package.module:factory of your own."
    )
    weights: str = _fixed(
        "hub",
        "The teacher's weights: hub, a .safetensors or .pth file, or random, for trials only.",
        examples=["hub", "random"],
    )
    kwargs: dict[str, Any] = _fixed({}, "For the model's constructor.")
    mean: tuple[Annotated[float, Field(ge=0, le=1)], ...] = _fixed(
        (),
        "Of the images that the teacher was trained on, in [0, 1] units; default: what the "
        "network states.",
    )
    std: tuple[Annotated[float, Field(gt=0, le=1)], ...] = _fixed(
        (), "Their standard deviation, in the same way."
    )
    precision: Literal["float32", "bfloat16", "float16"] = _fixed(
        "float32", "Of the backbone; the head is float32."
    )
    seed: int = _fixed(0, "Of weights = 'random'.", **_SEEDS)

    @field_validator("mean", "std")
    @classmethod
    def _three(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) not in (0, 3):
            raise ValueError("a number for each of three channels, or none at all")
        return value


@dataclass(frozen=True, config=_STRICT)
class CacheSection:
    """Choose what the cache holds."""

    path: str = _free("", "The cache to make, to go on with, or to extend by more views.")
    encodings: tuple[str, ...] = _fixed(
        ("dense",),
        "What to store: dense serves every loss; envelope hard ones, exactly, in 1/400 of the "
        "bytes; dense-q8 and topk soft ones, nearly. May be given more than once.",
        examples=["dense", "dense-q8", "topk", "envelope"],
    )
    views: int = _fixed(1, "Augmented views of every image.", ge=1, le=1_000_000)
    view_block: int = _free(
        0, "Views per unit; 0: the largest divisor of views up to 10 that fits.", ge=0, le=1000
    )
    root_seed: int = _fixed(0, "Of every view's augmentation.", **_SEEDS)
    license: str = _free("", "Of the cached logits, for the manifest.")
    notes: str = _free("", "For the manifest.")

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
    rank_timeout: int = _free(300, _RANK_TIMEOUT, ge=1, le=604_800)


@dataclass(frozen=True, config=_STRICT)
class DumpRecipe:
    """Describe stage one."""

    data: DumpData = DumpData()
    views: ViewPolicy = ViewPolicy()
    teacher: TeacherSection = TeacherSection()
    cache: CacheSection = CacheSection()
    dump: DumpLoop = DumpLoop()


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
    missing: Literal["error", "skip"] = _adjustable(
        "error", "What to do about samples of the cache that the shards lack."
    )
    drift: Literal["error", "warn", "skip"] = _adjustable(
        "error", "What to do about images or views unlike the teacher's."
    )
    # This decides whether a run starts, not what it computes: no part of the digest.
    classes: Literal["error", "accept"] = _free(
        "error", "What to do about other class names, order or labels on two sides."
    )
    corrupt: Literal["error", "skip"] = _adjustable("error", _CORRUPT)
    check: int = _free(
        64, "Views of the cache replayed and compared before training; 0: none.", ge=0
    )


@dataclass(frozen=True, config=_STRICT)
class StudentSection:
    """Choose the student."""

    name: str = _fixed("deit_tiny_distilled_patch16_224", "A ViT's timm name.")
    kwargs: dict[str, Any] = _fixed({}, "For the model's constructor.")
    drop_path: float = _fixed(0.0, "Rate of stochastic depth.", ge=0, lt=1)
    # The path decides nothing; the weights' own digest is kept in the run's state and students.
    init_from: str = _free(
        "",
        "Fine-tune a student: its .safetensors file, a run's folder, or an exported one; or a "
        ".pth file of the same timm model.",
    )


@dataclass(frozen=True, config=_STRICT)
class DistillSection:
    """Choose the loss and how the targets are fused."""

    method: Literal["none", "deit", "cskd"] = _fixed(
        "cskd",
        "Labels only, with the teacher's global logits, or with its logits at every location.",
    )
    global_kind: Literal["hard", "soft"] = _fixed("hard", "Of the global term.")
    spatial_kind: Literal["hard", "soft"] = _fixed("hard", "Of the spatial term.")
    encoding: str = _fixed(
        "auto", "auto: the smallest exact one that serves the kinds, else the closest."
    )
    alpha: float = _fixed(0.5, "Weight of the global distillation term.", ge=0, le=1)
    spatial_weight: float = _fixed(1.0, "Lambda, the weight of the spatial term.", ge=0)
    temperature: float = _fixed(1.0, "Of the soft terms.", gt=0)
    scaling: Literal["reference", "mean"] = _fixed("reference", "Of the soft terms.")
    schedule: Literal["linear", "x2", "cos", "spatial", "global"] = _fixed(
        "linear", "Of the CKF ratio; spatial and global: 1 and 0 always."
    )
    step: Literal["epoch", "update"] = _fixed("epoch", "When the ratio moves.")

    @property
    def kinds(self) -> dict[str, str]:
        """Return the kind of each term that the method has, by its key."""
        terms: dict[str, tuple[str, ...]] = {
            "none": (),
            "deit": ("global_kind",),
            "cskd": ("global_kind", "spatial_kind"),
        }
        return {key: getattr(self, key) for key in terms[self.method]}


@dataclass(frozen=True, config=_STRICT)
class OptimSection:
    """Choose the optimizer."""

    name: str = _fixed("adamw", "timm's name of the optimizer.")
    lr: float = _adjustable(1e-3, "At a batch of 1024, scaled linearly.", gt=0)
    weight_decay: float = _fixed(0.05, "Of the weight matrices; biases and norms have none.", ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = _fixed(
        (0.9, 0.999), "Of optimizers that have them."
    )
    clip_grad: float = _adjustable(0.0, "Global norm; 0: off.", ge=0)
    smoothing: float = _fixed(0.1, "Of the labels.", ge=0, lt=1)

    @field_validator("betas")
    @classmethod
    def _any(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value:
            raise ValueError("at least one number")
        return value


@dataclass(frozen=True, config=_STRICT)
class ScheduleSection:
    """Choose the length of a run and its learning rates' course."""

    epochs: int = _adjustable(300, "How long to train.", ge=1, le=1_000_000)
    warmup_epochs: int = _adjustable(5, "Of linear warm-up.", ge=0, le=1_000_000)
    warmup_lr: float = _adjustable(1e-6, "Where the warm-up starts.", ge=0)
    min_lr: float = _adjustable(1e-5, "Where the cosine ends.", ge=0)


@dataclass(frozen=True, config=_STRICT)
class BatchSection:
    """Choose what makes an update."""

    batch_size: int = _fixed(1024, "Images in an optimizer update.", ge=2)
    accumulation: int = _adjustable(1, "Micro-batches per update.", ge=1)
    repeats: int = _fixed(
        3, "Views of one image in an epoch (repeated augmentation); 1: off.", ge=1, le=1000
    )
    shuffle_shards: int = _fixed(
        16, "Samples are shuffled within blocks of this many shards.", ge=1
    )

    @field_validator("accumulation")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("batch_size", value) % value:
            raise ValueError("a divisor of batch.batch_size")
        return value


@dataclass(frozen=True, config=_STRICT)
class EvalSection:
    """Choose how images are prepared for an evaluation."""

    crop_pct: float = _adjustable(
        0.0, "Side of the central crop; 0: the student's own.", ge=0, le=1
    )
    interpolation: Literal[
        "auto", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"
    ] = _adjustable("auto", "auto: the student's own.")

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
    seed: int = _fixed(0, "Of weights, order of samples and views.", **_SEEDS)
    amp: Literal["off", "bf16", "fp16"] = _adjustable("off", "Automatic mixed precision.")
    ema: float = _fixed(0.99996, "Decay of the weight average; 0: off.", ge=0, lt=1)
    device: str = _free("auto", _DEVICE, examples=_DEVICES)
    workers: int = _free(-1, _WORKERS, ge=-1, le=1024)
    threads: int = _free(0, _THREADS, ge=0, le=1024)
    compile: bool = _free(False, _COMPILE)
    channels_last: bool = _free(True, _CHANNELS_LAST)
    eval_batch_size: int = _free(256, "Images in a batch of an evaluation.", ge=1)
    eval_every: int = _adjustable(1, "Epochs; the last epoch is always evaluated.", ge=1)
    log_every: int = _free(50, "Updates between TensorBoard points.", ge=1)
    checkpoint_every: int = _free(
        0, "Updates between checkpoints within an epoch; 0: epochs only.", ge=0
    )
    rank_timeout: int = _free(300, _RANK_TIMEOUT, ge=1, le=604_800)
    wandb: str = _free("", "Curves on Weights & Biases too: the project (extra: wandb).")


@dataclass(frozen=True, config=_STRICT)
class TrainRecipe:
    """Describe stage two; without ``views``, the cache's policy, or deit-v1 without a cache."""

    data: TrainData = TrainData()
    views: ViewPolicy | None = None
    student: StudentSection = StudentSection()
    distill: DistillSection = DistillSection()
    optim: OptimSection = OptimSection()
    schedule: ScheduleSection = ScheduleSection()
    batch: BatchSection = BatchSection()
    eval: EvalSection = EvalSection()
    run: RunSection = RunSection()
