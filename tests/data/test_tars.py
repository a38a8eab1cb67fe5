"""Reading tars: the same samples as webdataset; truncated or invalid tars are refused."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import pickle
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from cskd_pipeline.cache.manifest import ShardInfo, keys_sha256
from cskd_pipeline.data import shards as shards_module
from cskd_pipeline.data import tar_index
from cskd_pipeline.data.shards import TarShard
from cskd_pipeline.data.tar_index import IMAGE_FIELDS, ShardIndex, read_index
from cskd_pipeline.errors import ShardError
from tests.images import sample, samples, write_shard

IMAGE = sample(0)[1]["jpg"]


def same(one: ShardIndex, other: ShardIndex) -> bool:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def write_tar(
    path: Path, members: list[tuple[str, bytes]], format_: int = tarfile.USTAR_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=format_) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def refused(path: Path, num_classes: int | None = None) -> str:
    with pytest.raises(ShardError) as caught:
        _ = TarShard(path, num_classes=num_classes).index
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_shard_has_the_samples_that_webdataset_reads(shards: Path) -> None:
    for path in sorted(shards.glob("*.tar")):
        shard = TarShard(path)
        peers = list(webdataset.WebDataset(str(path), shardshuffle=False))
        assert shard.keys == [peer["__key__"] for peer in peers]
        assert len(shard) == len(peers)
        for i, peer in enumerate(peers):
            image = next(peer[field] for field in IMAGE_FIELDS if field in peer)
            assert next(shard.read_images([i])) == image
            assert shard.label(i) == int(peer.get("cls", re.findall(rb"\d+", peer["json"])[0]))


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_dialect_reads_the_same(tmp_path: Path, format_: int) -> None:
    names = ["a_1", "train/very/deep/" + "d" * 90 + "/b_2", "c_3"]
    if format_ != tarfile.USTAR_FORMAT:
        names += ["long_" + "x" * 150, "naïve_4"]
    path = tmp_path / "dialect.tar"
    with tarfile.open(path, "w", format=format_) as tar:
        for number, name in enumerate(names):
            for field, data in (("jpg", IMAGE + bytes([number])), ("cls", b"%d\n" % number)):
                info = tarfile.TarInfo(f"{name}.{field}")
                info.size = len(data)
                info.uid = 0 if format_ == tarfile.USTAR_FORMAT else 2**22  # does not fit in octal
                info.mtime = 1.5 if format_ == tarfile.PAX_FORMAT else 1
                tar.addfile(info, io.BytesIO(data))
    shard = TarShard(path)
    assert shard.keys == names
    assert [shard.label(i) for i in range(len(names))] == list(range(len(names)))
    assert list(shard.read_images(range(len(names)))) == [
        IMAGE + bytes([number]) for number in range(len(names))
    ]


def test_the_fast_path_for_headers_agrees_with_tarfile(shards: Path) -> None:
    for path in shards.glob("*.tar"):
        found = []
        for kind in (tarfile.TarInfo, tar_index._Header):
            with tarfile.open(path, "r:", tarinfo=kind) as tar:
                found.append([(m.name, m.size, m.offset, m.offset_data, m.type) for m in tar])
        assert found[0] == found[1]


def test_keys_end_at_the_first_dot_and_other_members_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("v1.0")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in (
            ("__about__", b"skipped"),
            ("README", b"no ending"),
            ("v1.0/.hidden.jpg", b"skipped"),
            ("v1.0/x.JPG", IMAGE),
            ("v1.0/x.seg.png", b"another field"),
            ("v1.0/x.cls", b" 3\n"),
            ("y.webp", IMAGE),
            ("y.json", b'{"cls": 1}'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    shard = TarShard(path)
    assert shard.keys == ["v1.0/x", "y"]
    assert shard.index.label.tolist() == [3, 1]


def test_truncation_at_any_position_is_noticed(tmp_path: Path) -> None:
    """Unless only zeros at the end are missing."""
    intact = write_shard(tmp_path / "intact.tar", samples(0, 4))
    data, index = intact.read_bytes(), read_index(intact)
    path = tmp_path / "cut.tar"
    refusals, last_data = 0, len(data.rstrip(b"\0"))
    for length in range(0, len(data), 256):
        path.write_bytes(data[:length])
        try:
            assert same(read_index(path), index)
            assert length > last_data
        except ShardError:
            refusals += 1
    assert refusals >= last_data // 256


def test_truncation_between_members_is_named(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "cut.tar", samples(0, 4))
    with tarfile.open(path) as tar:
        end = tar.getmembers()[3].offset
    path.write_bytes(path.read_bytes()[:end])
    assert "truncated: its end-of-archive marker is missing" in refused(path)
    path.write_bytes(path.read_bytes() + bytes(512))  # one block of zeros is half a marker
    assert "truncated: its end-of-archive marker is missing" in refused(path)


def test_a_flipped_bit_in_a_header_is_noticed(tmp_path: Path) -> None:
    intact = write_shard(tmp_path / "intact.tar", samples(0, 3))
    data, index = intact.read_bytes(), read_index(intact)
    with tarfile.open(intact) as tar:
        headers = [member.offset for member in tar]
    rng = np.random.default_rng(0)
    path = tmp_path / "flipped.tar"
    noticed = 0
    for _ in range(200):
        at = int(rng.choice(headers)) + int(rng.integers(0, 512))
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(flipped)
        try:
            # Bits that no reader checks: after the end of a number in the checksum field.
            assert same(read_index(path), index)
        except ShardError:
            noticed += 1
    assert noticed > 190


def test_concatenated_tars_are_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "joined.tar", samples(0, 2))
    path.write_bytes(
        path.read_bytes() + write_shard(tmp_path / "b.tar", samples(2, 2)).read_bytes()
    )
    assert "has data after its end" in refused(path)


@pytest.mark.parametrize(
    ("name", "compress"), [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)]
)
def test_a_compressed_tar_is_refused_with_a_remedy(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    path = write_shard(tmp_path / "shard.tar", samples(0, 2))
    path.write_bytes(compress(path.read_bytes()))
    message = refused(path)
    assert f"compressed with {name}" in message
    assert "decompress it once" in message


@pytest.mark.parametrize("content", [b"", b"hello", b"x" * 5000, bytes(100), b"\0" * 10240])
def test_a_file_that_is_not_a_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(content)
    assert re.search("not a tar|truncated|no samples", refused(path))


def test_a_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "absent.tar")
    assert "Is a directory" in refused(tmp_path)


BAD_SAMPLES = {
    "a sample has no image": [("a.cls", b"1")],
    "a sample has several images": [("a.jpg", IMAGE), ("a.png", IMAGE), ("a.cls", b"1")],
    "a sample has no label": [("a.jpg", IMAGE)],
    "a sample has a duplicate field": [("a.jpg", IMAGE), ("a.JPG", IMAGE)],
    "two samples have the same key": [
        *(("a.jpg", IMAGE), ("a.cls", b"1")),
        *(("b.jpg", IMAGE), ("b.cls", b"1")),
        *(("a.jpg", IMAGE), ("a.cls", b"1")),
    ],
    "a sample's key cannot be used": [("k" * 2000 + ".jpg", IMAGE), ("k" * 2000 + ".cls", b"1")],
}


@pytest.mark.parametrize("problem", BAD_SAMPLES)
def test_a_bad_sample_is_refused(tmp_path: Path, problem: str) -> None:
    path = write_tar(tmp_path / "bad.tar", BAD_SAMPLES[problem], tarfile.PAX_FORMAT)
    assert problem in refused(path)


@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "b.jpg", "a.cls", "b.cls"],  # all images, then all labels
        ["a.cls", "b.cls", "a.jpg", "b.jpg"],
        ["a.jpg", "a.cls", "b.jpg", "b.cls", "a.json"],  # a complete sample and a late file
    ],
)
def test_scattered_files_of_one_sample_are_refused(tmp_path: Path, names: list[str]) -> None:
    scattered = [(name, IMAGE if name.endswith("jpg") else b"1") for name in names]
    message = refused(write_tar(tmp_path / "scattered.tar", scattered))
    assert "the files of a sample are not consecutive" in message
    assert "tar --sort=name" in message
    assert "scattered.tar: a" in message


def test_operating_system_metadata_is_skipped_anywhere(tmp_path: Path) -> None:
    members = [
        ("a/x.jpg", IMAGE),
        ("a/._x.jpg", b"half of a file"),
        ("a/x.cls", b"1"),
        ("a/._x.cls", b"half of a file"),
        ("a/.DS_Store", b""),
        ("__MACOSX/a/._x.jpg", b"half of a file"),
        ("a/__MACOSX/x.jpg", b"half of a file"),
        ("a/@eaDir/x.jpg/SYNOPHOTO_THUMB_M.jpg", b"a thumbnail"),
        ("./._y.jpg", b"half of a file"),
        ("./y.jpg", IMAGE),
        ("./y.cls", b"2"),
    ]
    shard = TarShard(write_tar(tmp_path / "mac.tar", members))
    assert shard.keys == ["a/x", "./y"]
    assert shard.index.label.tolist() == [1, 2]
    assert list(shard.read_images([0, 1])) == [IMAGE, IMAGE]


def test_a_name_that_is_not_utf8_is_refused_and_spelled_out(tmp_path: Path) -> None:
    path = tmp_path / "latin.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in (("a.jpg", IMAGE), ("a.cls", b"1"), ("caf\u00e9.jpg", IMAGE)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    message = refused(path)
    assert "not UTF-8" in message
    assert r"caf\xe9.jpg" in message
    with tarfile.open(path, encoding="latin-1") as tar:
        last = tar.getmembers()[-1]
    assert f"byte {last.offset_data}" in message


@pytest.mark.parametrize(
    "label", [b"", b"cat", b"-1", b"1.0", b"1_0", b"9" * 40, b"4294967296", b"\xff"]
)
def test_a_label_that_is_not_a_class_number_is_refused(tmp_path: Path, label: bytes) -> None:
    path = write_tar(tmp_path / "bad.tar", [("key_7.jpg", IMAGE), ("key_7.cls", label)])
    message = refused(path)
    assert "not a class number" in message
    assert "key_7.cls" in message


@pytest.mark.parametrize(
    "label",
    [b"{}", b"[1]", b'{"label": "1"}', b'{"label": true}', b'{"label": 1.0}', b"{", b"[" * 9999],
)
def test_a_json_label_that_is_not_a_class_number_is_refused(tmp_path: Path, label: bytes) -> None:
    path = write_tar(tmp_path / "bad.tar", [("a.jpg", IMAGE), ("a.json", label)])
    assert "not a class number" in refused(path)


def test_a_label_out_of_range_names_the_sample(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "shard.tar", samples(0, 5))
    message = refused(path, num_classes=4)
    assert "1 labels are out of range" in message
    assert "owl_0004" in message
    shard = TarShard(path)
    _ = shard.index
    with pytest.raises(ShardError, match="1 labels are out of range"):
        replace(shard, num_classes=4)
    assert replace(shard, num_classes=5).num_classes == 5


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, b"Z"])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "link.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    assert "neither a file nor a folder" in refused(path)


@pytest.mark.parametrize("size", [2**30, -512])  # read(-512) would read everything
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_claims_a_large_size_is_refused(
    tmp_path: Path, kind: bytes, size: int
) -> None:
    header = tarfile.TarInfo("a.jpg")
    header.type, header.size = kind, size
    path = tmp_path / "bomb.tar"
    with open(path, "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**31)  # sparse on disk, but of the claimed size
    assert "a header claims a size of" in refused(path)


@pytest.mark.parametrize("size", ["-512", "-1536", "9" * 30])
def test_a_negative_or_huge_size_is_refused(tmp_path: Path, size: str) -> None:
    record = f" size={size}\n"
    record = f"{len(record) + 2}{record}"
    extension = tarfile.TarInfo("pax")
    extension.type, extension.size = tarfile.XHDTYPE, len(record)
    path = tmp_path / "back.tar"
    path.write_bytes(
        extension.tobuf(tarfile.USTAR_FORMAT)
        + record.encode().ljust(512, b"\0")
        + tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT)
        + bytes(10240)
    )
    refused(path)


def test_images_are_read_in_the_requested_order(shards: Path) -> None:
    shard = TarShard(shards / "train-0000.tar")
    order = [7, 0, 20, 7]
    assert list(shard.read_images(order)) == [next(shard.read_images([i])) for i in order]


def test_a_file_truncated_while_in_use_is_noticed(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "shard.tar", samples(0, 3))
    shard = TarShard(path)
    _ = shard.index
    with open(path, "r+b") as file:
        file.truncate(int(shard.index.offset[2]) + 10)
    assert next(shard.read_images([1]))
    with pytest.raises(ShardError, match="truncated while in use"):
        next(shard.read_images([2]))


def test_a_failing_disk_is_reported(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    shard = TarShard(shards / "train-0000.tar")
    _ = shard.index
    monkeypatch.setattr(shards_module.os, "pread", fail)
    with pytest.raises(ShardError, match="cannot be read") as caught:
        next(shard.read_images([0]))
    assert caught.value.found == "Input/output error"


def test_a_pickled_shard_includes_its_index(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = TarShard(shards / "train-0000.tar")
    _ = shard.index
    message = pickle.dumps(shard)
    assert len(message) < 200 * len(shard)
    monkeypatch.setattr(shards_module, "read_index", None)
    copy = pickle.loads(message)
    assert copy.keys == shard.keys
    assert next(copy.read_images([3])) == next(shard.read_images([3]))


def test_with_a_manifest_headers_are_read_on_first_use_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shard(tmp_path / "shard.tar", samples(0, 3))
    keys = [key for key, _ in samples(0, 3)]
    info = ShardInfo.of("shard.tar", keys, path.stat().st_size, "0" * 64)
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "read_index", None)
        shard = TarShard(path, info=info)
        assert (len(shard), shard.keys_sha256) == (3, keys_sha256(keys))
    assert shard.keys == keys
    write_shard(path, samples(10, 3))
    with pytest.raises(ShardError, match="do not match its manifest"):
        _ = TarShard(path, info=info).index
