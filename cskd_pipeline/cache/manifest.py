"""Manifests of data sets and caches: JSON checked against ``manifests/*.schema.json``.

``DatasetManifest`` lists tar shards; ``CacheManifest`` adds teacher, view policy and provenance.
Both are frozen; ``to_json`` and ``from_json`` are inverses. All problems of a document are reported
at once, each with JSON path, found and expected value.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from cskd_pipeline.distill.encodings import Sampled
from cskd_pipeline.errors import CskdError, ManifestError
from cskd_pipeline.runtime import atomic, schemas
from cskd_pipeline.runtime.classes import Classes
from cskd_pipeline.views.policy import ViewPolicy

DATASET_FORMAT, CACHE_FORMAT = 1, 2  # versions of the two documents
MAX_UNITS = 10_000_000  # blocks of views times tar shards; the paper's ImageNet recipe has 30,720

# Versions that determine pixels or logits: a cache written with several lists all of them.
DECIDING_VERSIONS = ("pillow", "libjpeg_turbo", "simplejpeg", "torch", "timm")


def keys_sha256(keys: Iterable[str]) -> str:
    """Return the SHA-256 (hex) of sample keys in order, each as UTF-8 and a zero byte."""
    return hashlib.sha256(b"".join(key.encode() + b"\0" for key in keys)).hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries behind a cache's bytes, without importing torch."""
    from PIL import features

    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("pillow", "simplejpeg", "numpy", "torch", "timm", "zarr", "numcodecs"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    turbo = features.version_feature("libjpeg_turbo")
    if turbo is not None:
        found["libjpeg_turbo"] = str(turbo)
    return found


def utc_now() -> str:
    """Return the current time as recorded in manifests: UTC, ISO 8601, in seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class ShardInfo:
    """One tar: ``name``, ``count`` of samples, length in ``bytes``, and digests of its contents.

    ``sha256`` is the tar's (None: remote, and its store reports none), ``keys_sha256`` that of its
    sample keys in order; ``key_bytes`` is the length of the longest key in UTF-8.
    """

    name: str
    count: int
    bytes: int
    sha256: str | None
    keys_sha256: str
    key_bytes: int

    @classmethod
    def of(cls, name: str, keys: Sequence[str], size: int, sha256: str | None) -> ShardInfo:
        """Return the shard ``name`` of ``size`` bytes with the samples ``keys``."""
        longest = max(len(key.encode()) for key in keys)
        return cls(name, len(keys), size, sha256, keys_sha256(keys), longest)


@dataclass(frozen=True)
class DatasetManifest:
    """Tar shards, numbered in order, and the classes of their labels.

    ``class_names`` has ``num_classes`` entries, or is None if the names are unknown. ``location``
    is the URL of the folder with the tars; None: they are in the document's folder.
    """

    name: str
    num_classes: int
    shards: tuple[ShardInfo, ...]
    class_names: tuple[str, ...] | None = None
    location: str | None = None

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Return the number of samples in each shard."""
        return tuple(shard.count for shard in self.shards)

    @cached_property
    def shard_ids(self) -> tuple[str, ...]:
        """Return the ID of each shard's samples and their order: its ``keys_sha256``."""
        return tuple(shard.keys_sha256 for shard in self.shards)

    @property
    def samples(self) -> int:
        """Return the number of samples in all shards."""
        return sum(self.counts)

    def classes(self, of: str, where: object) -> Classes:
        """Return the classes for a comparison, as those of ``of`` at ``where``."""
        return Classes(of, where, self.num_classes, self.class_names)

    def to_json(self) -> dict[str, Any]:
        """Return the document."""
        return {
            "format": "cskd-dataset",
            "format_version": DATASET_FORMAT,
            "name": self.name,
            "num_classes": self.num_classes,
            "class_names": None if self.class_names is None else list(self.class_names),
            "shards": [asdict(shard) for shard in self.shards],
        } | ({} if self.location is None else {"location": self.location})

    @classmethod
    def from_json(cls, document: object, where: object = "dataset manifest") -> DatasetManifest:
        """Check ``document`` and build the manifest.

        Raises:
            ManifestError: the document is invalid; lists every problem.
        """
        return cls._build(_check(document, "dataset", where, _dataset_problems))

    @classmethod
    def _build(cls, document: Any) -> DatasetManifest:
        names = document["class_names"]
        return cls(
            name=document["name"],
            num_classes=int(document["num_classes"]),
            shards=tuple(ShardInfo(**shard) for shard in document["shards"]),
            class_names=None if names is None else tuple(names),
            location=document.get("location"),
        )

    def save(self, path: Path) -> None:
        """Write the document to a file atomically."""
        atomic.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> DatasetManifest:
        """Read the document in a file.

        Raises:
            ManifestError: not JSON, too large, or invalid.
            FileNotFoundError: no such file.
        """
        return cls.from_json(schemas.read(path), where=path)


@dataclass(frozen=True)
class TeacherInfo:
    """The network that computed a cache's logits.

    Args:
        name: timm name, ``torchvision:NAME``, ``package.module:factory``, or free text.
        source: origin of its weights: ``hub``, ``file``, ``random``, or free text.
        weights_sha256: hex digest; :func:`~cskd_pipeline.models.weights.state_digest` returns one.
        num_classes, grid: K, and (rows, columns), of its spatial logits.
        size: side of its input, in pixels.
        mean, std: normalisation of its input, in [0, 1] units.
        precision: precision of its backbone.
        kwargs: arguments of the model's constructor.
        top1: accuracy from another source, 0 to 1, or None; the accuracy on the dump's own views
            is in the cache's array ``top1``.
    """

    name: str
    source: str
    weights_sha256: str
    num_classes: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    grid: tuple[int, int]
    precision: str = "float32"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    top1: float | None = None


@dataclass(frozen=True)
class CacheManifest:
    """The contents of a cache and its origin; ``cache.schema.json`` describes the fields."""

    dataset: DatasetManifest
    teacher: TeacherInfo
    policy: ViewPolicy
    root_seed: int
    views: int
    view_block: int
    encodings: tuple[str, ...]
    versions: Mapping[str, str]
    created: str
    license: str = ""
    notes: str = ""
    other_versions: tuple[Mapping[str, str], ...] = ()
    parent: Mapping[str, Any] | None = None
    """The origin of a converted cache: :meth:`as_parent` of its source."""
    sampled: Sampled = field(default_factory=Sampled)
    """The draws of the encoding ``sampled``, if ``encodings`` names it."""

    @property
    def blocks(self) -> int:
        """Return the number of view blocks, ``views / view_block``."""
        return self.views // self.view_block

    def to_json(self) -> dict[str, Any]:
        """Return the document."""
        teacher = asdict(self.teacher)
        for name in ("mean", "std", "grid"):
            teacher[name] = list(teacher[name])
        return {
            "format": "cskd-cache",
            "format_version": CACHE_FORMAT,
            "dataset": self.dataset.to_json(),
            "teacher": teacher,
            "policy": self.policy.to_json(),
            "root_seed": self.root_seed,
            "views": self.views,
            "view_block": self.view_block,
            "encodings": list(self.encodings),
            "versions": dict(self.versions),
            "other_versions": [dict(versions) for versions in self.other_versions],
            "license": self.license,
            "notes": self.notes,
            "created": self.created,
            **({} if self.parent is None else {"parent": dict(self.parent)}),
            **({"sampled": self.sampled.to_json()} if Sampled.name in self.encodings else {}),
        }

    def as_parent(self, digest: str | None) -> dict[str, Any]:
        """Return the ``parent`` entry of a converted cache; ``digest`` is None if unfinished."""
        return {
            "digest": digest,
            "manifest_sha256": self.digest(),
            "created": self.created,
            "encodings": list(self.encodings),
            "views": self.views,
            "shards": len(self.dataset.shards),
        }

    @classmethod
    def from_json(cls, document: object, where: object = "cache manifest") -> CacheManifest:
        """Check ``document`` and build the manifest.

        Raises:
            ManifestError: the document is invalid; lists every problem.
        """
        found = _check(document, "cache", where, _cache_problems)
        teacher = dict(found["teacher"])
        for name in ("mean", "std", "grid"):
            teacher[name] = tuple(teacher[name])
        same = ("root_seed", "views", "view_block", "versions", "created", "license", "notes")
        return cls(
            dataset=DatasetManifest._build(found["dataset"]),
            teacher=TeacherInfo(**teacher),
            policy=ViewPolicy.from_json(found["policy"]),
            encodings=tuple(found["encodings"]),
            other_versions=tuple(found["other_versions"]),
            parent=found.get("parent"),
            sampled=Sampled(**found.get("sampled", {})),
            **{name: found[name] for name in same},
        )

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the canonical JSON: sorted keys, no spaces, ASCII."""
        return schemas.sha256(self.to_json())

    def lineage(self) -> str:
        """Return the SHA-256 (hex) of everything that determines the bytes of a unit's files.

        Included are the data set's contents and classes, teacher, policy, root seed, view block,
        encodings and draws; not names, provenance, versions, or the number of views, which grows.
        """
        return schemas.sha256(self._deciding("view_block"))

    def conflicts(self, other: CacheManifest) -> list[tuple[str, Any, Any]]:
        """Return (path, own value, other value) of all that forbids adding ``other``'s units.

        Not compared: views and their blocks (a cache grows), versions (see
        :meth:`version_differences`), provenance, free text, names of data (its contents decide),
        and the SHA-256 of a tar if one of the two is unknown.
        """
        mine, theirs = self._deciding(), other._deciding()
        for document in (mine, theirs):
            del document["dataset"]["class_names"]
        return list(_differences(mine, theirs, ""))

    def _deciding(self, *also: str) -> dict[str, Any]:
        """Return the parts of the document that determine a unit's values."""
        document = self.to_json()
        deciding = ("format_version", "dataset", "teacher", "policy", "root_seed", "encodings")
        names = (*deciding, "sampled", *also)
        document = {name: document[name] for name in names if name in document}
        del document["teacher"]["source"], document["teacher"]["top1"], document["dataset"]["name"]
        for shard in document["dataset"]["shards"]:
            del shard["name"]
        return document

    def version_differences(self, versions: Mapping[str, str]) -> list[str]:
        """List the versions that determine pixels or logits and differ: recorded and present."""
        known = [
            {name: recorded.get(name) for name in DECIDING_VERSIONS}
            for recorded in (self.versions, *self.other_versions)
        ]
        present = {name: versions.get(name) for name in DECIDING_VERSIONS}
        if present in known:
            return []
        return [
            f"{n}: {known[0][n]} and {present[n]}" for n in present if present[n] != known[0][n]
        ]


def _check(
    document: Any, schema: str, where: object, beyond: Callable[[Any], Iterator[str]]
) -> Any:
    problems = schemas.schema_problems(document, schema)
    problems = problems or list(islice(beyond(document), schemas.MAX_PROBLEMS))
    if problems:
        raise ManifestError(where, problems)
    return document


def _differences(mine: Any, theirs: Any, at: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for name in dict.fromkeys((*mine, *theirs)):
            path = f"{at}.{name}" if at else name
            yield from _differences(mine.get(name), theirs.get(name), path)
    elif at == "dataset.shards" and len(mine) == len(theirs):
        for number, (ours, other) in enumerate(zip(mine, theirs, strict=True)):
            yield from _differences(ours, other, f"{at}[{number}]")
    elif at.endswith(".sha256") and None in (mine, theirs):
        return
    elif mine != theirs:
        if at == "dataset.shards":
            mine, theirs = f"{len(mine)} shards", f"{len(theirs)} shards"
        yield at, mine, theirs


def _dataset_problems(document: Any, at: str = "$") -> Iterator[str]:
    """Yield the problems of a data set's document that its schema cannot express."""
    names, classes = document["class_names"], document["num_classes"]
    if names is not None and len(names) != classes:
        yield f"{at}.class_names: found {len(names)} names, expected num_classes = {classes}"
    seen: dict[tuple[str, str], int] = {}
    for number, shard in enumerate(document["shards"]):
        path = f"{at}.shards[{number}]"
        name = shard["name"]
        parts = name.split("/")
        if "\\" in name or ":" in name or "|" in name or {"", ".", ".."} & set(parts):
            yield f"{path}.name: found {name!r}, expected a file name or a path inside the folder"
        elif not name.isprintable():
            yield f"{path}.name: found {name!r}, expected printable characters"
        for identity in ("name", "keys_sha256"):
            first = seen.setdefault((identity, shard[identity]), number)
            if first != number:
                yield f"{path}.{identity}: found that of shards[{first}], expected a unique value"


def _cache_problems(document: Any) -> Iterator[str]:
    """Yield the problems of a cache's document that its schema cannot express."""
    yield from _dataset_problems(document["dataset"], "$.dataset")
    data = document["dataset"]
    if "location" in data:
        yield "$.dataset: found a location, expected none in a cache"
    views, block, teacher = document["views"], document["view_block"], document["teacher"]
    if views % block:
        yield f"$.views: found {views}, expected a multiple of view_block = {block}"
    units = -(-views // block) * len(data["shards"])
    if units > MAX_UNITS:
        yield f"$.views: found {units:,} units, expected at most {MAX_UNITS:,}"
    if teacher["num_classes"] != data["num_classes"]:
        yield (
            f"$.teacher.num_classes: found {teacher['num_classes']}, "
            f"expected the data set's num_classes = {data['num_classes']}"
        )
    drawn = Sampled.name in document["encodings"]
    if drawn != ("sampled" in document):
        found, expected = ("nothing", "draws and temperature") if drawn else ("draws", "none")
        yield f"$.sampled: found {found}, expected {expected} according to $.encodings"
    try:
        policy = ViewPolicy.from_json(document["policy"])
    except (CskdError, TypeError, ValueError) as error:
        reason = getattr(error, "found", None) or error
        yield f"$.policy: found {reason}, expected a built-in or registered view policy"
    else:
        if policy.size != teacher["size"]:
            yield f"$.teacher.size: found {teacher['size']}, expected policy.size = {policy.size}"
