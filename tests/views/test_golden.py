"""The policy ``deit-v1``, pinned: draws, partners, mixes and pixels must be these for ever.

``python -m tests.views.test_golden`` pins them anew; do that only with a new policy version.
"""

from __future__ import annotations

import base64
import io
import json
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cskd_pipeline.views.apply import (
    apply_op,
    digest,
    erase_noise,
    mix_pixels,
    render,
    to_float,
)
from cskd_pipeline.views.bits import BitStream, derive_seed, normal_table, view_seed
from cskd_pipeline.views.decode import decode
from cskd_pipeline.views.draw import OPS, ViewParams, argument, draw
from cskd_pipeline.views.mixing import draw_mix, matching
from cskd_pipeline.views.policy import ViewPolicy
from tests.views.making import noise, scene

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "views.json"
POLICY = ViewPolicy()
SIZES = ((500, 375), (375, 500), (224, 224), (90, 640), (1, 1))
SHOWN = 90  # enough for every operation
SHARD = "5f" * 32  # as keys_sha256 looks

DRAWS_DRIFTED = """
Seeds no longer give the draws of deit-v1: caches that exist would train students on other views
than their teacher saw. Undo what changed the draws, or give it a new version in VERSIONS of
cskd_pipeline/views/policy.py and keep the code of this one. These values depend on no library:
numpy guarantees Philox's raw stream, and all that is made from it is made here.
"""
PIXELS_DRIFTED = f"""
The same draws no longer give the same pixels, with simplejpeg and Pillow {Image.__version__}. What
happens to decoded pixels is our own arithmetic: undo what changed it. If it is decoding that
drifted (see ``decoded``), keep pyproject.toml's ranges off the release of simplejpeg or Pillow that
brought it. Or give the pixels a new policy version; never pin them anew under the old one.
"""


def plain(params: ViewParams) -> dict[str, Any]:
    return {
        "crop": list(params.crop),
        "flip": params.flip,
        "ops": [[name, value] for name, value in params.ops],
        "erase": [list(box) for box in params.erase],
        "noise_seed": params.noise_seed,
    }


def views(count: int) -> list[tuple[int, tuple[int, int], ViewParams]]:
    """Seeds, image sizes and draws."""
    named = [(view_seed(7, f"key{i}", i), SIZES[i % len(SIZES)]) for i in range(count)]
    return [(seed, size, draw(seed, POLICY, *size)) for seed, size in named]


def checksum(document: object) -> int:
    return zlib.crc32(json.dumps(document).encode())


def stream() -> dict[str, Any]:
    bits = BitStream(20230711)
    return {
        "uint64": [bits.uint64() for _ in range(3)],
        "uniform": bits.uniform(),
        "below": bits.below(1000),
        "normal": [bits.normal() for _ in range(3)],
        "beta": [bits.beta(0.8, 0.8), bits.beta(1.0, 1.0)],
        "raw": bits.raw(2).tolist(),
        "normals": bits.normals(9).tolist(),
        "normal_table_crc32": zlib.crc32(normal_table().astype("<i2").tobytes()),
    }


def seeds() -> dict[str, int]:
    return {
        "view_seed(0, n01440764_10026, 0)": view_seed(0, "n01440764_10026", 0),
        "view_seed(1, n01440764_10026, 299)": view_seed(1, "n01440764_10026", 299),
        "view_seed(0, ä/ö, 1)": view_seed(0, "ä/ö", 1),
        "derive_seed()": derive_seed(),
        "derive_seed(-1, b'', '')": derive_seed(-1, b"", ""),
    }


def draws() -> dict[str, Any]:
    return {
        "first": [{"seed": seed, "size": list(size)} | plain(p) for seed, size, p in views(12)],
        "crc32 of 2000": checksum([plain(p) for _, _, p in views(2000)]),
    }


def partners() -> dict[str, Any]:
    return {
        "count 21, window 8": matching(3, SHARD, 21, 5, ViewPolicy(window=8)).tolist(),
        "crc32 of 1251, views 0 to 8": checksum(
            [matching(0, SHARD, 1251, view, POLICY).tolist() for view in range(9)]
        ),
    }


def mixes() -> dict[str, Any]:
    made = [draw_mix(derive_seed("a", i), derive_seed("b", i), POLICY) for i in range(500)]
    rows = [[mix.cutmix, mix.lam, list(mix.box)] for mix in made]
    return {"first": rows[:6], "crc32 of 500": checksum(rows)}


def operations() -> dict[str, list[int]]:
    """CRC-32 of both pictures after each operation, at levels 0, 8.3 and 10, both ways."""
    pictures = [np.asarray(scene(224, 224)), np.asarray(noise(224, 224))]
    return {
        op: [
            zlib.crc32(apply_op(picture, op, argument(op, level, sign), (124, 116, 104)).tobytes())
            for level, sign in ((0.0, 1.0), (8.3, 1.0), (8.3, -1.0), (10.0, 1.0))
            for picture in pictures
        ]
        for op in OPS
    }


def rendered() -> list[int]:
    return [
        digest(render(np.asarray(scene(*size)), params, POLICY)) for _, size, params in views(SHOWN)
    ]


def noises() -> list[int]:
    return [
        zlib.crc32(erase_noise(p).astype("<i2").tobytes()) for _, _, p in views(SHOWN) if p.erase
    ]


DECODED = ["jpeg", "jpeg progressive 4:4:4", "jpeg grey", "jpeg cmyk", "png palette", "webp"]


def files() -> dict[str, bytes]:
    """One of each kind; made once, as encoders change."""
    picture = scene(48, 40)
    made = (
        (picture, "JPEG", {"quality": 80}),
        (picture, "JPEG", {"quality": 90, "progressive": True, "subsampling": 0}),
        (picture.convert("L"), "JPEG", {"quality": 80}),
        (picture.convert("CMYK"), "JPEG", {"quality": 80}),
        (picture.quantize(32), "PNG", {}),
        (picture, "WEBP", {"quality": 80}),
    )
    result = {}
    for name, (image, kind, options) in zip(DECODED, made, strict=True):
        file = io.BytesIO()
        image.save(file, kind, **options)
        result[name] = file.getvalue()
    return result


def decoded(data: dict[str, bytes]) -> dict[str, int]:
    return {name: zlib.crc32(decode(file, name).tobytes()) for name, file in data.items()}


SECTIONS: dict[str, tuple[Callable[[], object], str]] = {
    "policy": (POLICY.digest, DRAWS_DRIFTED),
    "stream": (stream, DRAWS_DRIFTED),
    "seeds": (seeds, DRAWS_DRIFTED),
    "draws": (draws, DRAWS_DRIFTED),
    "matching": (partners, DRAWS_DRIFTED),
    "mix": (mixes, DRAWS_DRIFTED),
    "erase_noise": (noises, DRAWS_DRIFTED),
    "operations": (operations, PIXELS_DRIFTED),
    "rendered": (rendered, PIXELS_DRIFTED),
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("section", SECTIONS)
def test_deit_v1_is_as_pinned(section: str, golden: dict[str, Any]) -> None:
    make, drifted = SECTIONS[section]
    assert make() == golden[section], drifted


def test_the_pinned_views_show_every_operation_and_erasing(golden: dict[str, Any]) -> None:
    params = [p for _, _, p in views(SHOWN)]
    assert {name for p in params for name, _ in p.ops} == set(OPS)
    assert len(golden["erase_noise"]) == sum(bool(p.erase) for p in params) > 0
    assert {p.flip for p in params} == {True, False}
    assert {mix[0] for mix in golden["mix"]["first"]} == {True, False}


def test_files_decode_to_the_pinned_pixels(golden: dict[str, Any]) -> None:
    data = {name: base64.b64decode(text) for name, text in golden["files"].items()}
    assert list(data) == DECODED
    assert decoded(data) == golden["decoded"], PIXELS_DRIFTED


def replay(backwards: bool = False) -> dict[str, list[float]]:
    """For views of pictures in file form: CRC-32 of the floats after mixing, and how mixed."""
    pictures = [decode(file, name) for name, file in files_pinned().items()]
    items = [(number, view) for number in range(len(pictures)) for view in range(4)]
    result = {}
    for number, view in reversed(items) if backwards else items:
        partner = matching(9, SHARD, len(pictures), view, POLICY).tolist()[number]
        keys = [view_seed(9, str(n), view) for n in (number, partner)]
        both = []
        for n, key in zip((number, partner), keys, strict=True):
            height, width, _ = pictures[n].shape
            params = draw(key, POLICY, width, height)
            both.append(to_float(render(pictures[n], params, POLICY), params, POLICY))
        mix = draw_mix(*keys, POLICY)
        crc = zlib.crc32(mix_pixels(*both, mix).tobytes())
        result[f"{number} {view}"] = [crc, mix.cutmix, mix.lam, *mix.box]
    return result


def files_pinned() -> dict[str, bytes]:
    texts = json.loads(GOLDEN.read_text(encoding="utf-8"))["files"]
    return {name: base64.b64decode(text) for name, text in texts.items()}


def test_a_view_replayed_in_another_process_is_bit_identical() -> None:
    """Another hash seed, other global random states, the views in another order."""
    program = (
        "import json, random, numpy\n"
        "random.seed(5); numpy.random.seed(6)\n"
        "from tests.views.test_golden import replay\n"
        "print(json.dumps(replay(backwards=True)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "2", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout)
    assert there == replay()
    assert len({crc for crc, *_ in there.values()}) == len(there) == 24
    assert {cutmix for _, cutmix, *_ in there.values()} == {True, False}


def test_no_global_random_state_is_read_or_moved() -> None:
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    one = replay()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    random.seed(2)
    np.random.seed(2)
    assert replay() == one


if __name__ == "__main__":
    data = files_pinned() if GOLDEN.exists() else files()
    document = {name: make() for name, (make, _) in SECTIONS.items()}
    document["files"] = {name: base64.b64encode(file).decode() for name, file in data.items()}
    document["decoded"] = decoded(data)
    lines = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in document.items())
    GOLDEN.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
