"""The list of omitted samples is kept by convert and merge, per tar shard."""

from __future__ import annotations

from pathlib import Path

import pytest

from cskd_pipeline.cache.convert import Conversion, convert
from cskd_pipeline.cache.merge import merge
from cskd_pipeline.cache.omitted import CORRUPT, LIST
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.errors import CacheError
from tests.cache.factories import make, manifest
from tests.serving import serving

HEADER = "reason,shard,offset,key\n"
LISTED = f'{HEADER}corrupt,0,3,a\ncorrupt,1,0,"b,""c"\ncorrupt,2,7,é\n'


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("omitted") / "c"
    make(path, encodings=("envelope",))
    (path / LIST).write_text(LISTED)
    (path / CORRUPT).write_text("{}")
    return path


def test_slices_and_merges_carry_their_part_of_the_list(source: Path, tmp_path: Path) -> None:
    slices = [tmp_path / "a", tmp_path / "b"]
    for path, shards in zip(slices, ((0, 1), (1, 3)), strict=True):
        convert(source, path, Conversion(shards=shards))
    assert not any((path / CORRUPT).exists() for path in slices)  # it belongs to other tars
    assert (slices[0] / LIST).read_text() == f"{HEADER}corrupt,0,3,a\n"
    assert (slices[1] / LIST).read_text() == f'{HEADER}corrupt,0,0,"b,""c"\ncorrupt,1,7,é\n'
    merge(slices, tmp_path / "full")
    assert (tmp_path / "full" / LIST).read_text() == LISTED
    (slices[0] / LIST).unlink()
    merge(slices, tmp_path / "full")  # merging again keeps the list
    assert (tmp_path / "full" / LIST).read_text() == LISTED


def test_the_list_of_a_remote_cache_is_copied(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CSKD_CACHE_DIR", str(tmp_path / "copies"))
    with serving(source) as served:
        convert(served.url, tmp_path / "c", Conversion(view_block=4))
        assert (tmp_path / "c" / LIST).read_text() == LISTED
        assert (tmp_path / "c" / CORRUPT).read_text() == "{}"
        (source / LIST).unlink()
        (source / CORRUPT).unlink()
        try:
            monkeypatch.setenv("CSKD_CACHE_DIR", str(tmp_path / "fresh"))
            convert(served.url, tmp_path / "d")
        finally:
            (source / LIST).write_text(LISTED)
            (source / CORRUPT).write_text("{}")
    assert not any((tmp_path / "d" / name).exists() for name in (LIST, CORRUPT))


@pytest.mark.parametrize("text", ["", "a,b\n", f"{HEADER}corrupt,x,0,k\n", f"{HEADER}corrupt,0\n"])
def test_a_malformed_list_is_refused(tmp_path: Path, text: str) -> None:
    CacheWriter.create(tmp_path / "c", manifest())
    (tmp_path / "c" / LIST).write_text(text)
    with pytest.raises(CacheError, match="left out cannot be read"):
        convert(tmp_path / "c", tmp_path / "d")
