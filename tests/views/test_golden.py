"""The policy ``deit-v1``, pinned: its draws, partners, mixes and pixels must never change.

``python -m tests.views.test_golden`` writes new values; do that only for a new policy version.
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
from tests.views.factories import noise, scene

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "views.json"
POLICY = ViewPolicy()
SIZES = ((500, 375), (375, 500), (224, 224), (90, 640), (1, 1))
RENDERED = 90  # enough views for every operation
SHARD = "5f" * 32  # in the form of keys_sha256

DRAWS_DRIFTED = """
Seeds no longer give the draws of deit-v1: existing caches would train students on other views than
their teacher's. Revert the change, or add a version to VERSIONS in cskd_pipeline/views/policy.py
and keep the code of this one. No library can be the cause: numpy guarantees Philox's raw stream,
from which this package computes everything.
"""
PIXELS_DRIFTED = f"""
The same draws no longer give the same pixels, with simplejpeg and Pillow {Image.__version__}.
Operations on decoded pixels are this package's own arithmetic: revert the change. If decoding
changed (see ``decoded``), exclude that release of simplejpeg or Pillow in pyproject.toml. Or add a
policy version; never write new values for the old one.
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
    """Return seeds, image sizes and draws."""
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
    drawn = [draw_mix(derive_seed("a", i), derive_seed("b", i), POLICY) for i in range(500)]
    rows = [[mix.cutmix, mix.lam, list(mix.box)] for mix in drawn]
    return {"first": rows[:6], "crc32 of 500": checksum(rows)}


def operations() -> dict[str, list[int]]:
    """Return CRC-32s of two images after each operation at levels 0, 8.3 (both signs) and 10."""
    images = [np.asarray(scene(224, 224)), np.asarray(noise(224, 224))]
    return {
        op: [
            zlib.crc32(apply_op(image, op, argument(op, level, sign), (124, 116, 104)).tobytes())
            for level, sign in ((0.0, 1.0), (8.3, 1.0), (8.3, -1.0), (10.0, 1.0))
            for image in images
        ]
        for op in OPS
    }


def rendered() -> list[int]:
    return [
        digest(render(np.asarray(scene(*size)), params, POLICY))
        for _, size, params in views(RENDERED)
    ]


def noises() -> list[int]:
    return [
        zlib.crc32(erase_noise(p).astype("<i2").tobytes()) for _, _, p in views(RENDERED) if p.erase
    ]


DECODED = ["jpeg", "jpeg progressive 4:4:4", "jpeg grey", "jpeg cmyk", "png palette", "webp"]


def files() -> dict[str, bytes]:
    """Encode an image in each format; done once, as encoders change."""
    source = scene(48, 40)
    encodings = (
        (source, "JPEG", {"quality": 80}),
        (source, "JPEG", {"quality": 90, "progressive": True, "subsampling": 0}),
        (source.convert("L"), "JPEG", {"quality": 80}),
        (source.convert("CMYK"), "JPEG", {"quality": 80}),
        (source.quantize(32), "PNG", {}),
        (source, "WEBP", {"quality": 80}),
    )
    result = {}
    for name, (image, kind, options) in zip(DECODED, encodings, strict=True):
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
    compute, message = SECTIONS[section]
    assert compute() == golden[section], message


def test_the_pinned_views_cover_every_operation_and_erasing(golden: dict[str, Any]) -> None:
    params = [p for _, _, p in views(RENDERED)]
    assert {name for p in params for name, _ in p.ops} == set(OPS)
    assert len(golden["erase_noise"]) == sum(bool(p.erase) for p in params) > 0
    assert {p.flip for p in params} == {True, False}
    assert {mix[0] for mix in golden["mix"]["first"]} == {True, False}


def test_files_decode_to_the_pinned_pixels(golden: dict[str, Any]) -> None:
    data = {name: base64.b64decode(text) for name, text in golden["files"].items()}
    assert list(data) == DECODED
    assert decoded(data) == golden["decoded"], PIXELS_DRIFTED


def replay(backwards: bool = False) -> dict[str, list[float]]:
    """Return CRC-32s of float views of the pinned files after mixing, and the mixes."""
    images = [decode(file, name) for name, file in files_pinned().items()]
    items = [(number, view) for number in range(len(images)) for view in range(4)]
    result = {}
    for number, view in reversed(items) if backwards else items:
        partner = matching(9, SHARD, len(images), view, POLICY).tolist()[number]
        keys = [view_seed(9, str(n), view) for n in (number, partner)]
        both = []
        for n, key in zip((number, partner), keys, strict=True):
            height, width, _ = images[n].shape
            params = draw(key, POLICY, width, height)
            both.append(to_float(render(images[n], params, POLICY), params, POLICY))
        mix = draw_mix(*keys, POLICY)
        crc = zlib.crc32(mix_pixels(*both, mix).tobytes())
        result[f"{number} {view}"] = [crc, mix.cutmix, mix.lam, *mix.box]
    return result


def files_pinned() -> dict[str, bytes]:
    texts = json.loads(GOLDEN.read_text(encoding="utf-8"))["files"]
    return {name: base64.b64decode(text) for name, text in texts.items()}


def test_a_view_replayed_in_another_process_is_bit_identical() -> None:
    """With another hash seed, other global random states and the views in reverse order."""
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
    replayed = json.loads(done.stdout)
    assert replayed == replay()
    assert len({crc for crc, *_ in replayed.values()}) == len(replayed) == 24
    assert {cutmix for _, cutmix, *_ in replayed.values()} == {True, False}


def test_global_random_state_is_neither_read_nor_changed() -> None:
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
    document = {name: compute() for name, (compute, _) in SECTIONS.items()}
    document["files"] = {name: base64.b64encode(file).decode() for name, file in data.items()}
    document["decoded"] = decoded(data)
    lines = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in document.items())
    GOLDEN.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
