"""Small inputs that expand: refused by their claimed size, or read only up to a limit."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from numcodecs.zstd import Zstd
from PIL import Image, PngImagePlugin, WebPImagePlugin

from cskd_pipeline.cache import layout, slabs
from cskd_pipeline.cache.manifest import CacheManifest, DatasetManifest
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.data.tar_index import read_index
from cskd_pipeline.errors import CacheError, ManifestError, ShardError, WeightsError
from cskd_pipeline.models.checkpoint import StudentHeader, save_student
from cskd_pipeline.models.weights import load_state
from cskd_pipeline.runtime import schemas
from cskd_pipeline.views.decode import decode
from tests.cache.factories import dataset, make, manifest, rewrite_records
from tests.faults.commands import Stages
from tests.views.test_decode import chunk, png

Bounded = Callable[..., str]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    make(tmp_path / "cache")
    return tmp_path / "cache"


# JSON

DOCUMENTS = {
    "deep": lambda: b'{"a":' * 10**6,
    "long number": lambda: b'{"a":' + b"9" * 10**6 + b"}",
    "large number": lambda: b'{"a": 1e999999999}',
    "duplicate name": lambda: b'{"format": "cskd-cache", "format": "cskd-dataset"}',
    "many lists": lambda: b"[" + b"[]," * (6 * 2**20) + b"[]]",
    "many objects": lambda: b"[" + b'{"a":{}},' * (2 * 2**20) + b"{}]",
    "many numbers": lambda: b"[" + b"1.5," * (6 * 2**20) + b"1]",
    "long string": lambda: b'{"a": "' + b"x" * (70 * 2**20) + b'"}',
    "surrogates": lambda: b'{"\\ud800": "\\udfff\\u0000"}',
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_json_bomb_is_refused(cache: Path, bounded: Bounded, kind: str) -> None:
    (cache / "zarr.json").write_bytes(DOCUMENTS[kind]())
    assert str(cache) in bounded("cache", "info", cache)


def test_checking_a_mixed_list_for_duplicates_is_fast() -> None:
    """Mixed types cannot be sorted, and comparing all pairs would take hours."""
    comparisons = 0

    class Counted(str):
        def __eq__(self, other: object) -> bool:
            nonlocal comparisons
            comparisons += 1
            return super().__eq__(other)

        __hash__ = str.__hash__

    mixed = [Counted(i) if i % 2 else i for i in range(20_000)]
    with pytest.raises(ManifestError):
        CacheManifest.from_json(manifest().to_json() | {"encodings": mixed})
    assert comparisons < 100_000


# Manifests that imply huge arrays


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 2**31 - 1},
        {"count": 10**6, "key_bytes": 65535},
        {"views": 10**6, "view_block": 1000, "count": 10**6},
        {"grid": (1024, 1024), "classes": 65535},
        {"classes": 2**31 - 1},
    ],
)
def test_readers_and_writers_refuse_a_manifest_that_implies_huge_chunks(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    document = manifest(encodings=("dense",)).to_json()
    document["dataset"]["shards"][0] |= {
        k: v for k, v in changes.items() if "_bytes" in k or k == "count"
    }
    document |= {k: v for k, v in changes.items() if k.startswith("view")}
    document["teacher"] |= {"grid": list(changes.get("grid", (2, 3)))}
    if "classes" in changes:
        document["dataset"] |= {"num_classes": changes["classes"], "class_names": None}
        document["teacher"]["num_classes"] = changes["classes"]
    oversized = CacheManifest.from_json(document)
    (tmp_path / "zarr.json").write_bytes(layout.manifest_document(oversized))
    for attempt in (
        lambda: open_cache(tmp_path),
        lambda: CacheWriter.create(tmp_path / "new", oversized),
    ):
        with pytest.raises(CacheError, match="chunks too large"):
            attempt()
    assert not (tmp_path / "new").exists()


def test_a_manifest_with_too_many_units_is_refused() -> None:
    shards = [
        {**dataset().to_json()["shards"][0], "name": f"{n}.tar", "keys_sha256": f"{n:064x}"}
        for n in range(20)
    ]
    document = manifest(views=10**6, view_block=1).to_json()
    document["dataset"]["shards"] = shards
    with pytest.raises(ManifestError, match="20,000,000 units"):
        CacheManifest.from_json(document)


def test_millions_of_missing_units_are_reported_briefly(tmp_path: Path) -> None:
    CacheWriter.create(tmp_path, manifest(views=10**6, view_block=1, encodings=("envelope",)))
    with pytest.raises(CacheError, match="3000000 of 3000000 units missing") as caught:
        open_cache(tmp_path).require_done()
    assert len(caught.value.problems) == 1000


# Chunks


def frame(values: bytes, claims: int | None) -> bytes:
    """Return a zstd frame whose header claims a false length, or none (RFC 8878, 3.1)."""
    plain = bytes(Zstd(level=3, checksum=True).encode(values))
    descriptor = plain[4]
    assert descriptor >> 6 == 2  # four bytes of length, after the window byte if any
    start = 5 + (0 if descriptor & 0x20 else 1)
    if claims is None:  # a window of 128 MiB instead
        return plain[:4] + bytes([descriptor & 0x1F, 17 << 3]) + plain[start + 4 :]
    if claims < 2**32:
        return plain[:start] + struct.pack("<I", claims) + plain[start + 4 :]
    wide = bytes([descriptor | 0xC0])
    return plain[:4] + wide + plain[5:start] + struct.pack("<Q", claims) + plain[start + 4 :]


@pytest.mark.parametrize(
    ("length", "claims"),
    [
        *((100_000_000, 10**12), (100_000_000, 20), (100_000_000, None)),
        *((100_000, 20), (70_000, 2**63), (70_000, 2**31)),
    ],
)
def test_a_chunk_that_would_expand_is_refused(
    cache: Path, bounded: Bounded, length: int, claims: int | None
) -> None:
    """``label`` of five samples is 20 bytes: claim another length, or contain more."""
    bomb = frame(bytes(length), claims)
    (cache / "label/c/0/0").write_bytes(bomb)
    (cache / "top1/c/0/0/0").write_bytes(bomb)
    rewrite_records(cache)
    with pytest.raises(CacheError, match=r"not a zstd frame of 20|zstd: |more than"):
        open_cache(cache).labels(0)
    assert "array top1" in bounded("cache", "info", cache)


def test_a_chunk_with_an_appended_frame_is_damaged(cache: Path) -> None:
    intact = (cache / "label/c/0/0").read_bytes()
    bomb = Zstd(level=3, checksum=True).encode(bytes(50_000_000))
    (cache / "label/c/0/0").write_bytes(intact + bytes(bomb)[:400])
    rewrite_records(cache)
    with pytest.raises(CacheError, match="the cache is damaged"):
        open_cache(cache).labels(0)


def test_rows_across_many_chunks_are_bounded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk of a ragged array is small; their sum may not be."""
    monkeypatch.setattr(slabs, "MAX_SLAB_BYTES", 1000)
    with pytest.raises(CacheError, match="more than 1000 bytes"):
        open_cache(cache).rows("envelope", 0, 0, [0])


def indices(good: np.ndarray, length: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield false shard indices: (chunks, 2) start and length."""
    for name, entry in {
        "beyond the end": (length, 50),
        "far beyond": (2**62, 50),
        "no offset": (2**63, 50),
        "negative if signed": (2**64 - 50, 50),
        "too long": (0, 2**40),
        "longer than memory": (0, 2**64 - 2),
        "into the index": (length - 30, 30),
        "empty": (0, 0),
        "another chunk": tuple(good[1].tolist()),
    }.items():
        changed = good.copy()
        changed[0] = entry
        yield name, changed


def test_an_index_with_a_false_offset_is_refused(cache: Path) -> None:
    """Its checksum matches. Another chunk of the file is well formed: it is read, harmlessly."""
    array = layout.stored_arrays(manifest())["dense/global"]
    path = cache / array.key(0, 0)
    content = path.read_bytes()
    size = 16 * int(np.prod(array.chunks_per_file))
    good = np.frombuffer(content[-size - 4 : -4], "<u8").reshape(-1, 2)
    assert len(good) == 2
    refused, names = set(), []
    for name, index in indices(good, len(content)):
        table = index.tobytes()
        checksum = google_crc32c.value(table).to_bytes(4, "little")
        path.write_bytes(content[: -size - 4] + table + checksum)
        names.append(name)
        rewrite_records(cache)
        try:
            open_cache(cache).rows("dense", 0, 0, [0])
        except CacheError as error:
            if "array dense/global" in str(error):
                refused.add(name)
    assert refused == set(names) - {"another chunk"}


# Images


def animation(kind: str) -> bytes:
    """Return a small file of twenty frames."""
    frames = [Image.new("RGB", (600, 600), (10 * n, 0, 0)) for n in range(20)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], lossless=True)
    return file.getvalue()


IMAGES = {
    "large": lambda: png(50_000, 50_000, 8, 2, b""),
    "wide": lambda: png(100_000_001, 1, 8, 0, b""),
    "text": lambda: png(
        1, 1, 8, 2, bytes(4), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 1))
    ),
    "profile": lambda: png(
        1, 1, 8, 2, bytes(4), chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000), 1))
    ),
    "cut": lambda: png(5000, 5000, 8, 2, bytes(1000)),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_bomb_is_refused_naming_its_sample(
    stages: Stages, tmp_path: Path, bounded: Bounded, kind: str
) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for field, data in (("png", IMAGES[kind]()), ("cls", b"0")):
            member = tarfile.TarInfo(f"key_7.{field}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    words = (*stages.dump(tmp_path / "cache", workers=0), "--set", "data.num_classes=4")
    message = bounded(*words, "--shards", tmp_path / "t.tar", memory=240 * 10**6)
    assert "t.tar: key_7" in message


def test_pixels_beyond_the_claimed_size_are_not_decompressed() -> None:
    """The header claims 4 bytes of pixels; the 50 MB after them are never decompressed."""
    data = png(1, 1, 8, 2, bytes(50_000_000))
    tracemalloc.start()
    decode(data, "image")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_only_the_first_frame_of_an_animation_is_read(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = animation(kind)
    assert Image.open(io.BytesIO(data)).n_frames == 20  # type: ignore[attr-defined]
    for plugin in (PngImagePlugin.PngImageFile, WebPImagePlugin.WebPImageFile):
        monkeypatch.setattr(plugin, "seek", None)
    image = decode(data, "")
    assert image.shape == (600, 600, 3)
    assert image[5, 5].tolist() == [0, 0, 0]


# Tars


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def with_checksum(block: bytes) -> bytes:
    """Return the header block with its correct checksum (POSIX, ustar)."""
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(blank) + block[156:]


def padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 512) * 512, b"\0")


def record(name: str, value: str) -> bytes:
    """Return a pax record, which begins with its own length (POSIX, pax interchange format)."""
    length = len(f" {name}={value}\n")
    length += len(str(length + len(str(length))))
    return f"{length} {name}={value}\n".encode()


def extension(kind: bytes, data: bytes) -> bytes:
    return header("x", kind, len(data)) + padded(data)


SPARSE_10 = extension(
    tarfile.XHDTYPE, record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0")
)
TARS: dict[str, Callable[[], bytes]] = {
    "a member of 8 EB": lambda: header("a.jpg", size=2**62),
    "nested long names": lambda: extension(tarfile.GNUTYPE_LONGNAME, b"n" * 100) * 5000,
    "nested records": lambda: extension(tarfile.XHDTYPE, record("a", "b")) * 5000,
    "global records": lambda: b"".join(
        extension(tarfile.XGLTYPE, record(f"k{n}", "v" * 60_000)) + header(f"d{n}", tarfile.DIRTYPE)
        for n in range(2000)
    ),
    "a sparse map in records": lambda: SPARSE_10 + header("a.jpg", size=300 * 10**6)
    + padded(b"300000000\n" + b"1\n" * 20_000_000),
    "a sparse map in blocks": lambda: with_checksum(
        header("a.jpg", tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + bytes(29)
    ) + (b"00000000001\0" * 42 + b"\1" + bytes(7)) * 200_000,
    "pax sizes": lambda: extension(tarfile.XHDTYPE, record("size", "9" * 4000)) + header("a.jpg"),
    "pax of 2 GB": lambda: header("x", tarfile.XHDTYPE, 2**31) + bytes(1024),
    "many folders with long names": lambda: b"".join(
        extension(tarfile.GNUTYPE_LONGNAME, b"n" * 30_000) + header("d", tarfile.DIRTYPE)
        for _ in range(3000)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TARS)
def test_a_tar_bomb_is_refused(tmp_path: Path, bounded: Bounded, kind: str) -> None:
    """Memory is bounded whatever it claims or contains."""
    (tmp_path / "t.tar").write_bytes(TARS[kind]() + bytes(10240))
    message = bounded("index", tmp_path / "t.tar", "--num-classes", 4, "--out", tmp_path / "m.json",
                      memory=60 * 10**6)  # fmt: skip
    assert "t.tar" in message


def test_sparse_records_without_a_sparse_version_are_refused(tmp_path: Path) -> None:
    for name in ("GNU.sparse.map", "GNU.sparse.offset", "GNU.sparse.size", "GNU.sparse.name"):
        content = extension(tarfile.XHDTYPE, record(name, "1,2,3,x")) + header("a.jpg")
        (tmp_path / "t.tar").write_bytes(content + bytes(10240))
        with pytest.raises(ShardError):
            read_index(tmp_path / "t.tar")


# Weights


def test_weights_that_expand_are_refused(tmp_path: Path) -> None:
    """A compressed zip, one that lists its entries again, and a tensor larger than its storage."""
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "deflated.pth", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for entry in plain.namelist():
            deflated.writestr(entry, plain.read(entry))
    assert (tmp_path / "deflated.pth").stat().st_size < 10_000
    shutil.copy(tmp_path / "plain.pth", tmp_path / "repeated.pth")
    with zipfile.ZipFile(tmp_path / "repeated.pth", "a") as repeated:
        repeated.filelist *= 100
        repeated.writestr("more", "")
    assert (tmp_path / "repeated.pth").stat().st_size < 4_200_000
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "expanded.pth")
    load_state(tmp_path / "plain.pth")
    for name, message in (
        ("deflated", "compressed"),
        ("repeated", "entries overlap"),
        ("expanded", "claims more values"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_state(tmp_path / f"{name}.pth")


@pytest.mark.parametrize(
    "kwargs", [{"embed_dim": 16384, "depth": 48}, {"depth": 65535}, {"patch_size": 1}], ids=str
)
def test_a_header_cannot_demand_a_model_larger_than_its_file(
    stages: Stages, tmp_path: Path, bounded: Bounded, kwargs: dict[str, int]
) -> None:
    """Of 600 GB, 65,535 layers or 3.6 billion tokens."""
    claimed = StudentHeader(
        *("deit_tiny_distilled_patch16_224", 4, 60_000, ("cls", "dist"), "none"), kwargs=kwargs
    )
    save_student(tmp_path / "s.safetensors", {"head.weight": torch.zeros(4, 192)}, claimed)
    words = ("evaluate", tmp_path / "s.safetensors", "--shards", stages.shards, "--device", "cpu")
    assert "larger than its tensors" in bounded(*words)


def test_class_names_and_shard_lists_are_bounded_too(tmp_path: Path) -> None:
    for file in ("classes.json", "_info.json", "manifest.json"):
        folder = tmp_path / f"with {file.partition('.')[0]}"
        folder.mkdir()
        (folder / "t.tar").write_bytes(bytes(10240))
        (folder / file).write_bytes(DOCUMENTS["deep"]())
        with pytest.raises(ManifestError, match="expected a JSON document"):
            load_dataset(folder / file if file == "manifest.json" else folder)


def test_a_legitimate_manifest_of_many_shards_passes() -> None:
    """The limits are far above ImageNet-21k in 5,000 tars."""
    first = dataset().to_json()["shards"][0]
    document = dataset().to_json() | {"num_classes": 21_841, "class_names": None}
    document["shards"] = [
        {**first, "name": f"train-{n:05d}.tar", "keys_sha256": f"{n:064x}"} for n in range(5_000)
    ]
    text = json.dumps(document).encode()
    assert sum(map(text.count, (b",", b"[", b"{"))) < schemas.MAX_VALUES / 80
    assert DatasetManifest.from_json(json.loads(text)).samples == 25_000
