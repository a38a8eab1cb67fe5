"""Resampling equals Pillow's at every size; compiled code needs no writable folder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import cskd_pipeline
from cskd_pipeline.views import kernels
from cskd_pipeline.views.apply import digest, render
from cskd_pipeline.views.draw import draw
from cskd_pipeline.views.policy import ViewPolicy
from tests.views.factories import noise, scene

PACKAGE = Path(cskd_pipeline.__file__).parent


def by_pillow(image: Image.Image, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    top, left, height, width = box
    crop = image.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC))


@settings(deadline=None, max_examples=150)
@given(
    height=st.integers(1, 700),
    width=st.integers(1, 300),
    size=st.sampled_from([8, 31, 64, 224]),
    flat=st.booleans(),
    flip=st.booleans(),
)
@example(height=1, width=1, size=8, flat=False, flip=False)
@example(height=330, width=2, size=224, flat=False, flip=True)  # Pillow begins with the rows
@example(height=202, width=2, size=224, flat=False, flip=False)
@example(height=2, width=290, size=8, flat=True, flip=True)
@example(height=64, width=64, size=64, flat=False, flip=False)
def test_a_box_is_resized_to_pillows_pixels(
    height: int, width: int, size: int, flat: bool, flip: bool
) -> None:
    image = (scene if flat else noise)(width + 5, height + 3)
    found = kernels.resized(np.asarray(image), (2, 4, height, width), size, flip)
    expected = by_pillow(image, (2, 4, height, width), size)
    assert np.array_equal(found[:, ::-1] if flip else found, expected)
    assert found.flags.c_contiguous


def test_pixels_outside_the_box_have_no_effect() -> None:
    pixels = np.array(noise(60, 50))
    before = kernels.resized(pixels, (10, 20, 30, 25), 16, False)
    inside = pixels[10:40, 20:45].copy()
    pixels[:] = 255 - pixels
    pixels[10:40, 20:45] = inside
    assert np.array_equal(kernels.resized(pixels, (10, 20, 30, 25), 16, False), before)


@pytest.mark.parametrize("writable", [True, False])
def test_views_are_the_same_with_and_without_cached_code(writable: bool, tmp_path: Path) -> None:
    """Without a writable folder every process compiles."""
    program = (
        "import json, numpy as np\n"
        "from numba.core import caching\n"
        + ("" if writable else "caching.CacheImpl._locator_classes = []\n")
        + "from tests.views.test_kernels import some_views\n"
        "print(json.dumps(some_views()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PACKAGE.parent,
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(some_views())
    assert bool(list(tmp_path.rglob("*.nbc"))) == writable


SUM = """
from cskd_pipeline.views.kernels import compiled

@compiled
def inner(x):
    return 3 * x

@compiled
def outer(x):
    return inner(x) + 1
"""


def outer_of(module: Path) -> Any:
    """Return the function as in a new process: not compiled yet, its files in place."""
    space: dict[str, Any] = {"__name__": module.stem, "__file__": str(module)}
    exec(compile(module.read_text(), str(module), "exec"), space)  # the text above
    return space["outer"]


@pytest.mark.parametrize("kind", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_truncated_compiled_code_is_compiled_again(kind: str, share: float, tmp_path: Path) -> None:
    (tmp_path / "sum.py").write_text(SUM)
    assert outer_of(tmp_path / "sum.py")(2) == 7
    files = sorted(tmp_path.rglob(kind))
    before = {file: file.stat().st_size for file in files}
    assert len(files) == 2
    for file, size in before.items():
        os.truncate(file, int(size * share))
    assert outer_of(tmp_path / "sum.py")(2) == 7
    again = outer_of(tmp_path / "sum.py")
    assert again(2) == 7
    assert sum(again.stats.cache_hits.values()) == 1, "the recompiled code is not on disk"


def test_compiled_code_that_can_be_neither_read_nor_replaced_is_not_needed(
    tmp_path: Path,
) -> None:
    (tmp_path / "sum.py").write_text(SUM)
    assert outer_of(tmp_path / "sum.py")(2) == 7
    for file in tmp_path.rglob("*.nbi"):
        file.unlink()
        file.mkdir()
    assert outer_of(tmp_path / "sum.py")(2) == 7


def test_a_full_disk_does_not_prevent_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numba.core.caching import IndexDataCacheFile

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "_save_data", full)
    (tmp_path / "sum.py").write_text(SUM)
    assert outer_of(tmp_path / "sum.py")(2) == 7


def some_views() -> list[int]:
    """Return digests of views that use few kernels, since compiling all takes long."""
    policy = ViewPolicy(size=32, randaugment_ops=0)
    image = np.asarray(scene(60, 40))
    return [digest(render(image, draw(seed, policy, 60, 40), policy)) for seed in range(4)]
