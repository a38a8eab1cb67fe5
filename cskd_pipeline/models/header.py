"""The header of a student's file, and the checks of what is in it."""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from cskd_pipeline.models.student import INTERPOLATIONS, LEAST_CROP_PCT
from cskd_pipeline.runtime.classes import Classes

FORMAT = 2
"""Of the header; those of format 1 have no digest of the tensors."""
MAX_ARGUMENT = 65535
"""The largest number among a stranger's model arguments."""

Side = Annotated[int, Field(gt=0, le=MAX_ARGUMENT)]
Head = Annotated[str, Field(pattern="^(cls|dist|dense)$")]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class StudentHeader:
    """The header of a student's file.

    ``kwargs`` are the timm constructor's, ``heads`` those whose mean is the prediction, ``grid``
    the teacher grid (rows, columns) that the dense head was trained on, or None. ``crop_pct`` and
    ``interpolation`` say how images are resized to evaluate it; None: as timm does for the model.
    ``accepted_classes`` has a line for each difference between classes with which the run was made
    all the same, ``recipe_changes`` one for what was changed where it was resumed. The digests are
    SHA-256 in hex: of the recipe's deciding fields, of the contents of the cache (None where it was
    not finished), and of the weights that the run started from.
    """

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str
    num_classes: Side
    size: Side
    heads: Annotated[tuple[Head, ...], Field(min_length=1)]
    method: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    grid: tuple[Side, Side] | None = None
    crop_pct: Annotated[float, Field(ge=LEAST_CROP_PCT, le=1)] | None = None
    interpolation: str | None = None
    weights: str = "last"  # last or ema
    epoch: int = 0
    top1: float | None = None  # percent, on the validation shards of the run
    class_names: tuple[str, ...] | None = None
    accepted_classes: tuple[str, ...] = ()
    dataset: str | None = None
    teacher: str | None = None  # its timm name
    recipe_sha256: Digest | None = None
    cache_sha256: Digest | None = None
    init_sha256: Digest | None = None
    recipe_changes: tuple[str, ...] = ()

    def classes(self, where: object) -> Classes:
        """Return the classes, for a comparison; ``where`` is the student's file."""
        return Classes("the student", where, self.num_classes, self.class_names)


_HEADER: TypeAdapter[StudentHeader] = TypeAdapter(StudentHeader)
_DIGEST: TypeAdapter[str] = TypeAdapter(Digest)


def parse_header(document: Any) -> tuple[StudentHeader, str | None]:
    """Read a header's JSON document: the header, and the SHA-256 that the tensors must have.

    Raises:
        KeyError, ValueError, TypeError, AttributeError: what is missing, or not of its kind.
    """
    version, digest = document.pop("format"), None
    if version not in (1, FORMAT):
        raise ValueError(f"format {version!r}")
    try:
        if version == FORMAT:
            digest = _DIGEST.validate_python(document.pop("sha256"))
        header = _HEADER.validate_json(json.dumps(document))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "sha256"
        raise ValueError(f"{name}: {first['msg']}, not {first['input']!r}") from error
    if header.interpolation not in (None, *INTERPOLATIONS):
        raise ValueError(f"interpolation {header.interpolation!r}")
    if header.class_names is not None and len(header.class_names) != header.num_classes:
        raise ValueError(f"{len(header.class_names)} class_names of {header.num_classes} classes")
    check_arguments(header.kwargs)
    return header, digest


def check_arguments(value: Any) -> None:
    """Refuse numbers and collections with which a constructor could be kept busy for ever.

    Raises:
        ValueError: names the number.
    """
    if isinstance(value, dict | list):
        if len(value) > 1000:
            raise ValueError(f"kwargs with {len(value)} entries in one table or list")
        for item in value.values() if isinstance(value, dict) else value:
            check_arguments(item)
    elif isinstance(value, int | float) and not abs(value) <= MAX_ARGUMENT:
        raise ValueError(f"kwargs with the number {value}")
