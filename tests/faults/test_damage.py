"""Files that were lost or altered: each is found, or what is read is provably what was written."""

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
from tests.cache.making import tree
from tests.faults.commands import Stages, canonical
from tests.faults.making import make_full, said_of

FLIPS = 1000


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    make_full(path)
    return path


def array_of(name: str) -> str | None:
    """The array whose values the file ``name`` holds; None for metadata."""
    return None if name.endswith("zarr.json") else name.split("/c/")[0]


def flipped(content: bytes, bit: int) -> bytes:
    out = bytearray(content)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def found(look: Callable[[], None], name: str) -> bool:
    """Whether a look at a file that was altered is refused, with its name; else it found no change.

    ``look`` asserts that what it reads is what was written.
    """
    try:
        look()
    except (CacheError, ManifestError, DataError, WeightsError) as error:
        return name in str(error) or pytest.fail(f"{name} is not named: {error}")
    return False


class Watch:
    """What a whole cache says, and whether it still does after one of its files changed."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.reader = pickle.dumps(open_cache(cache))  # opens without looking at the metadata
        reader = open_cache(cache)
        self.arrays = list(layout.stored_arrays(reader.manifest))
        self.manifest = reader.manifest
        self.said = {name: list(said_of(reader, name)) for name in self.arrays}

    def look(self, name: str) -> None:
        """Read all that the file ``name`` decides.

        Raises:
            CacheError, ManifestError: it is not what was written, and the reader says so.
        """
        array = array_of(name)
        if array is None:
            assert open_cache(self.cache).manifest == self.manifest
        else:
            assert list(said_of(pickle.loads(self.reader), array)) == self.said[array]


def test_a_thousand_flipped_bits_are_all_found(cache: Path) -> None:
    """As many in each kind of file: every array, every ``zarr.json``, the manifest."""
    files = tree(cache)
    kinds: dict[str, list[str]] = {}
    for name in files:
        kinds.setdefault(array_of(name) or name, []).append(name)
    watch = Watch(cache)
    assert set(watch.arrays) < set(kinds)
    assert {"zarr.json", "topk/zarr.json", "seed/zarr.json"} < set(kinds)
    rng = random.Random(20)
    silent: list[str] = []
    for number in range(FLIPS):
        kind = list(kinds)[number % len(kinds)]
        name = rng.choice(kinds[kind])
        content = files[name]
        bit = rng.randrange(8 * len(content))
        (cache / name).write_bytes(flipped(content, bit))
        if not found(lambda name=name: watch.look(name), name):
            silent.append(name)
        (cache / name).write_bytes(content)
    assert silent == []


@pytest.mark.parametrize("emptied", [False, True], ids=["deleted", "emptied"])
def test_every_file_of_a_finished_cache_is_missed(cache: Path, emptied: bool) -> None:
    watch, missed = Watch(cache), set()
    for name, content in tree(cache).items():
        if emptied:
            (cache / name).write_bytes(b"")
        else:
            (cache / name).unlink()
        if name.startswith("digest/c/") and not emptied:  # the unit is undone, and made again
            with pytest.raises(CacheError, match="1 of 2 units missing"):
                open_cache(cache).require_done()
        else:
            with pytest.raises((CacheError, ManifestError)) as caught:
                watch.look(name)
            assert name in str(caught.value)
            array = array_of(name)
            if array is not None:
                what = "the record" if array == "digest" else f"array {array}"
                assert what in str(caught.value)
        missed.add(array_of(name) or "metadata")
        (cache / name).write_bytes(content)
    assert missed == {*watch.arrays, "metadata"}


def test_a_run_does_not_start_on_a_lost_unit_nor_go_past_a_lost_file(
    stages: Stages, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(stages.cache, cache)
    words = [cache if word == stages.cache else word for word in stages.train(tmp_path / "run")]
    lost = cache / "dense/spatial/c/3/2/0/0/0/0"  # of the last view: the run is under way by then
    content = lost.read_bytes()
    lost.unlink()
    ended = stages.server.run(*words, log=stages.log)
    assert ended.code == 1
    assert f"{lost}" in ended.output
    assert "Traceback" not in ended.output
    lost.write_bytes(content)
    (cache / "digest/c/1/2").unlink()
    ended = stages.server.run(*words, log=stages.log)
    assert ended.code == 1
    assert "1 of 6 units missing" in ended.output


def test_a_flipped_bit_in_a_tar_is_found_or_changes_nothing(stages: Stages, tmp_path: Path) -> None:
    """Images by their CRC, labels and keys by the cache, headers by their sums."""
    shards = tmp_path / "shards"
    shutil.copytree(stages.shards, shards)
    reader = open_cache(stages.cache)

    def everything() -> list[object]:
        joined = join(load_dataset(shards, num_classes=4), reader)
        samples = np.argwhere(np.ones((len(reader.counts), max(reader.counts)), bool))
        samples = samples[samples[:, 1] < np.array(reader.counts)[samples[:, 0]]]
        images = [(i, data) for i, data, _ in joined.images.read(samples)]
        return [joined.missing, joined.images.labels(samples).tolist(), images]

    def unchanged() -> None:
        assert everything() == whole

    whole, rng, silent = everything(), random.Random(21), 0
    tar = sorted(shards.glob("*.tar"))[1]
    content = tar.read_bytes()
    for _ in range(100):
        tar.write_bytes(flipped(content, rng.randrange(8 * len(content))))
        silent += not found(unchanged, tar.name)
    assert silent < 50  # fields of headers that say nothing, and what fills up blocks


def test_a_flipped_bit_in_a_training_state_is_found_or_changes_nothing(
    stages: Stages, tmp_path: Path
) -> None:
    assert stages.server.run(*stages.train(tmp_path / "run"), log=stages.log).code == 0
    state = tmp_path / "run" / "state.pt"

    def unchanged() -> None:
        assert canonical(load_state(state)) == whole

    content, rng, silent = state.read_bytes(), random.Random(22), 0
    whole = canonical(load_state(state))
    for _ in range(150):
        state.write_bytes(flipped(content, rng.randrange(8 * len(content))))
        silent += not found(unchanged, str(state))
    assert silent < 50  # what fills up the archive
