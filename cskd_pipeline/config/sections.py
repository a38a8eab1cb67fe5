"""The sections of a recipe: every field, its default and what it means.

A field that cannot change a result (worker counts, folders, notes) is made by ``_free``: only the
others enter :func:`cskd_pipeline.config.result_digest`. Of these a resumed run keeps all but those
made by ``_adjustable``: the others decide what its samples, targets and tensors are, so that with
another value it would be another run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cskd_pipeline.views.policy import ViewPolicy


def _free(default: Any = None) -> Any:
    """A field that cannot change results."""
    return field(default=default, metadata={"result": False})


def _adjustable(default: Any = None) -> Any:
    """A field that can change results, and that a run may be resumed with another value of."""
    return field(default=default, metadata={"adjustable": True})


@dataclass(frozen=True)
class DumpData:
    shards: str = _free("")  # path, folder, brace pattern, glob, comma list, _info.json or manifest
    split: str = _free("")  # of an _info.json with several splits
    name: str = _free("")  # of the data set, for the manifest; empty: taken from the shards
    num_classes: int = 0  # 0: from the class names, or the teacher's own head
    corrupt: str = "error"  # images that cannot be decoded: error or skip


@dataclass(frozen=True)
class TeacherSection:
    name: str = ""  # timm name, torchvision:NAME or package.module:factory
    weights: str = "hub"  # hub, random, or a .safetensors/.pth file
    kwargs: dict[str, Any] = field(default_factory=dict)  # for the model's constructor
    mean: tuple[float, ...] = ()  # of each channel in [0, 1] units; empty: as the network states it
    std: tuple[float, ...] = ()
    precision: str = "float32"  # of the backbone: float32, bfloat16, float16; the head is float32
    seed: int = 0  # of weights = "random"


@dataclass(frozen=True)
class CacheSection:
    path: str = _free("")
    encodings: tuple[str, ...] = ("dense",)
    views: int = 1
    view_block: int = _free(0)  # views per unit; 0: the largest divisor of views up to 10 that fits
    root_seed: int = 0
    license: str = _free("")
    notes: str = _free("")


@dataclass(frozen=True)
class DumpLoop:
    batch_size: int = _free(128)  # views per teacher forward
    workers: int = _free(-1)  # -1: one per core but one
    threads: int = _free(0)  # of the network on CPU; 0: torch's choice
    device: str = _free("auto")
    channels_last: bool = _free(True)  # memory format of the network and its images
    compile: bool = _free(False)
    rank_timeout: int = _free(300)  # seconds without a sign of life, after which a rank is given up


@dataclass(frozen=True)
class DumpRecipe:
    """Stage one."""

    data: DumpData = DumpData()
    views: ViewPolicy = ViewPolicy()
    teacher: TeacherSection = TeacherSection()
    cache: CacheSection = CacheSection()
    dump: DumpLoop = DumpLoop()


@dataclass(frozen=True)
class TrainData:
    shards: str = _free("")
    val_shards: str = _free("")
    cache: str = _free("")
    split: str = _free("")
    val_split: str = _free("")
    num_classes: int = 0  # 0: from the cache, the class names, or an error
    missing: str = _adjustable("error")  # samples of the cache that the shards lack: error or skip
    drift: str = _adjustable("error")  # images or views unlike the teacher's: error, warn, skip
    # Other class names, order or labels on two sides: error, accept. Decides whether a run starts,
    # not what it computes: no part of the digest.
    classes: str = _free("error")
    corrupt: str = _adjustable("error")  # images that cannot be decoded: error or skip
    check: int = _free(64)  # views of the cache made again and compared before training; 0: none


@dataclass(frozen=True)
class StudentSection:
    name: str = "deit_tiny_distilled_patch16_224"
    kwargs: dict[str, Any] = field(default_factory=dict)
    drop_path: float = 0.0
    # Weights to start from: a student's file or folder. The path decides nothing; the weights' own
    # digest is kept in the run's state and in its students.
    init_from: str = _free("")


@dataclass(frozen=True)
class DistillSection:
    method: str = "cskd"  # none, deit, cskd
    global_kind: str = "hard"  # of the global term: hard, soft
    spatial_kind: str = "hard"  # of the spatial term: hard, soft
    encoding: str = "auto"  # auto: the smallest exact one that serves the kinds, else the closest
    alpha: float = 0.5  # weight of the global distillation term
    spatial_weight: float = 1.0  # lambda, weight of the spatial term
    temperature: float = 1.0
    scaling: str = "reference"  # of the soft terms: reference or mean
    schedule: str = "linear"  # of the CKF ratio: linear, x2, cos; spatial, global: 1, 0 always
    step: str = "epoch"  # when the ratio moves: epoch or update

    @property
    def kinds(self) -> dict[str, str]:
        """Return the kind of each term that the method has, by its key."""
        terms: dict[str, tuple[str, ...]] = {
            "none": (),
            "deit": ("global_kind",),
            "cskd": ("global_kind", "spatial_kind"),
        }
        return {key: getattr(self, key) for key in terms[self.method]}


@dataclass(frozen=True)
class OptimSection:
    name: str = "adamw"
    lr: float = _adjustable(1e-3)  # at a batch of 1024, scaled linearly
    weight_decay: float = 0.05
    betas: tuple[float, ...] = (0.9, 0.999)
    clip_grad: float = _adjustable(0.0)  # global norm; 0: off
    smoothing: float = 0.1


@dataclass(frozen=True)
class ScheduleSection:
    epochs: int = _adjustable(300)
    warmup_epochs: int = _adjustable(5)
    warmup_lr: float = _adjustable(1e-6)
    min_lr: float = _adjustable(1e-5)


@dataclass(frozen=True)
class BatchSection:
    batch_size: int = 1024  # global, per optimizer update
    accumulation: int = _adjustable(1)  # micro-batches per update
    repeats: int = 3  # views of one image in an epoch (repeated augmentation); 1: off
    shuffle_shards: int = 16  # samples are shuffled within blocks of this many shards


@dataclass(frozen=True)
class EvalSection:
    crop_pct: float = _adjustable(0.0)  # side of the central crop; 0: the student's own
    interpolation: str = _adjustable("auto")  # auto (the student's own), bicubic, bilinear, ...


@dataclass(frozen=True)
class RunSection:
    out: str = _free("")
    seed: int = 0
    amp: str = _adjustable("off")  # off, bf16, fp16
    ema: float = 0.99996  # decay of the weight average; 0: off
    device: str = _free("auto")
    workers: int = _free(-1)
    threads: int = _free(0)  # of the network on CPU; 0: torch's choice
    compile: bool = _free(False)
    channels_last: bool = _free(True)  # memory format of the network and its images
    eval_batch_size: int = _free(256)
    eval_every: int = _adjustable(1)  # epochs; the last epoch is always evaluated
    log_every: int = _free(50)  # updates between TensorBoard points
    checkpoint_every: int = _free(0)  # updates between checkpoints within an epoch; 0: epochs only
    rank_timeout: int = _free(300)  # seconds without a sign of life, after which a rank is given up
    wandb: str = _free("")  # project on Weights & Biases; empty: off


@dataclass(frozen=True)
class TrainRecipe:
    """Stage two. ``views`` may be absent (None): the cache's policy, or deit-v1 without a cache."""

    data: TrainData = TrainData()
    views: ViewPolicy | None = None
    student: StudentSection = StudentSection()
    distill: DistillSection = DistillSection()
    optim: OptimSection = OptimSection()
    schedule: ScheduleSection = ScheduleSection()
    batch: BatchSection = BatchSection()
    eval: EvalSection = EvalSection()
    run: RunSection = RunSection()
