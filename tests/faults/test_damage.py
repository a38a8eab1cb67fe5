"""A lost or altered file is detected, unless every value still reads as it was written."""

from __future__ import annotations

import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.data.join import join
from cskd_pipeline.errors import CacheError, DataError, ManifestError, WeightsError
from cskd_pipeline.models.train_state import load_state
from tests.cache.factories import tree
from tests.faults.commands import Stages, canonical
from tests.faults.factories import stored_values, write_full_cache

FLIPS = 1000


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    write_full_cache(path)
    return path


def array_of(name: str) -> str | None:
    """Return the array that the file ``name`` is part of; None for metadata."""
    return None if name.endswith("zarr.json") else name.split("/c/")[0]


def flip(content: bytes, bit: int) -> bytes:
    out = bytearray(content)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def detected(check: Callable[[], None], name: str) -> bool:
    """Return whether ``check`` reports the altered file ``name``.

    ``check`` asserts that every value it reads is the one written.
    """
    try:
        check()
    except (CacheError, ManifestError, DataError, WeightsError) as error:
        return name in str(error) or pytest.fail(f"{name} is not named: {error}")
    return False


class Snapshot:
    """The values of an intact cache, to compare with after one of its files changed."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.reader = pickle.dumps(open_cache(cache))  # opens without reading the metadata
        reader = open_cache(cache)
        self.arrays = list(layout.stored_arrays(reader.manifest))
        self.manifest = reader.manifest
        self.values = {name: list(stored_values(reader, name)) for name in self.arrays}

    def check(self, name: str) -> None:
        """Read all values that depend on the file ``name``.

        Raises:
            CacheError, ManifestError: the reader detected that the file was altered.
        """
        array = array_of(name)
        if array is None:
            assert open_cache(self.cache).manifest == self.manifest
        else:
            assert list(stored_values(pickle.loads(self.reader), array)) == self.values[array]


def test_a_thousand_flipped_bits_are_all_detected(cache: Path) -> None:
    """Equally many in each kind of file: every array, every ``zarr.json``, the manifest."""
    files = tree(cache)
    kinds: dict[str, list[str]] = {}
    for name in files:
        kinds.setdefault(array_of(name) or name, []).append(name)
    snapshot = Snapshot(cache)
    assert set(snapshot.arrays) < set(kinds)
    assert {"zarr.json", "topk/zarr.json", "seed/zarr.json"} < set(kinds)
    rng = random.Random(20)
    undetected: list[str] = []
    for number in range(FLIPS):
        kind = list(kinds)[number % len(kinds)]
        name = rng.choice(kinds[kind])
        content = files[name]
        bit = rng.randrange(8 * len(content))
        (cache / name).write_bytes(flip(content, bit))
        if not detected(lambda name=name: snapshot.check(name), name):
            undetected.append(name)
        (cache / name).write_bytes(content)
    assert undetected == []


@pytest.mark.parametrize("emptied", [False, True], ids=["deleted", "emptied"])
def test_every_lost_file_of_a_complete_cache_is_named(cache: Path, emptied: bool) -> None:
    snapshot, lost = Snapshot(cache), set()
    for name, content in tree(cache).items():
        if emptied:
            (cache / name).write_bytes(b"")
        else:
            (cache / name).unlink()
        if name.startswith("digest/c/") and not emptied:  # its unit counts as missing
            with pytest.raises(CacheError, match="1 of 2 units missing"):
                open_cache(cache).require_done()
        else:
            with pytest.raises((CacheError, ManifestError)) as caught:
                snapshot.check(name)
            assert name in str(caught.value)
            array = array_of(name)
            if array is not None:
                part = "the record" if array == "digest" else f"array {array}"
                assert part in str(caught.value)
        lost.add(array_of(name) or "metadata")
        (cache / name).write_bytes(content)
    assert lost == {*snapshot.arrays, "metadata"}


def test_a_lost_file_stops_a_run_and_a_lost_unit_prevents_its_start(
    stages: Stages, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(stages.cache, cache)
    arguments = [cache if word == stages.cache else word for word in stages.train(tmp_path / "run")]
    lost = cache / "dense/spatial/c/3/2/0/0/0/0"  # of the last view, read late in the run
    content = lost.read_bytes()
    lost.unlink()
    result = stages.server.run(*arguments, log=stages.log)
    assert result.code == 1
    assert f"{lost}" in result.output
    assert "Traceback" not in result.output
    lost.write_bytes(content)
    (cache / "digest/c/1/2").unlink()
    result = stages.server.run(*arguments, log=stages.log)
    assert result.code == 1
    assert "1 of 6 units missing" in result.output


def test_a_flipped_bit_in_a_tar_is_detected_or_harmless(stages: Stages, tmp_path: Path) -> None:
    """Images are checked by their CRC, labels and keys by the cache, headers by their sums."""
    shards = tmp_path / "shards"
    shutil.copytree(stages.shards, shards)
    reader = open_cache(stages.cache)

    def read_all() -> list[object]:
        joined = join(load_dataset(shards, num_classes=4), reader)
        samples = np.argwhere(np.ones((len(reader.counts), max(reader.counts)), bool))
        samples = samples[samples[:, 1] < np.array(reader.counts)[samples[:, 0]]]
        images = [(i, data) for i, data, _ in joined.images.read(samples)]
        return [joined.missing, joined.images.labels(samples).tolist(), images]

    def check() -> None:
        assert read_all() == expected

    expected, rng, undetected = read_all(), random.Random(21), 0
    tar = sorted(shards.glob("*.tar"))[1]
    content = tar.read_bytes()
    for _ in range(100):
        tar.write_bytes(flip(content, rng.randrange(8 * len(content))))
        undetected += not detected(check, tar.name)
    assert undetected < 50  # bits of unused header fields and of padding


def test_a_flipped_bit_in_a_training_state_is_detected_or_harmless(
    stages: Stages, tmp_path: Path
) -> None:
    assert stages.server.run(*stages.train(tmp_path / "run"), log=stages.log).code == 0
    state = tmp_path / "run" / "state.pt"

    def check() -> None:
        assert canonical(load_state(state)) == expected

    content, rng, undetected = state.read_bytes(), random.Random(22), 0
    expected = canonical(load_state(state))
    for _ in range(150):
        state.write_bytes(flip(content, rng.randrange(8 * len(content))))
        undetected += not detected(check, str(state))
    assert undetected < 50  # bits of the archive's padding
