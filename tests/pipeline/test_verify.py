"""``cache verify`` of a cache and a user's images, and train's own check of both."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cskd_pipeline.cache import layout
from cskd_pipeline.cache.convert import unit_data
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cache.writer import CacheWriter
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.data.join import join
from cskd_pipeline.data.replay import replay, spread_views
from cskd_pipeline.distill.encodings import ENCODINGS
from cskd_pipeline.errors import CacheError, JoinError, ViewDriftError
from cskd_pipeline.models.teacher import TeacherSource
from cskd_pipeline.pipeline.training_data import open_training_data
from cskd_pipeline.runtime.console import Terminal
from cskd_pipeline.tools import verify_cache
from cskd_pipeline.tools.verify_cache import agreement
from cskd_pipeline.views import apply
from cskd_pipeline.views.mixing import matching
from tests.cache.factories import data_files, rewrite_records
from tests.images import Sample
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.pipeline.test_layouts import ALTERED, REMOVED, modified, recompress, recut, samples

__all__ = ["samples"]  # a fixture

Capture = pytest.CaptureFixture[str]
Verify = Callable[..., tuple[int, dict[str, Any]]]
TEACHER = ("--teacher", world.TEACHER, "--weights", "random", "--device", "cpu")


@pytest.fixture
def verify(capsys: Capture) -> Verify:
    """Run ``cache verify --json``; return its exit code and report."""

    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = world.cli("cache", "verify", *arguments, "--json", "--quiet")
        return code, world.last_json(capsys.readouterr().out)

    return run


@pytest.fixture
def copy(small: World, tmp_path: Path) -> World:
    """The small world with a writable copy of its cache."""
    shutil.copytree(small.cache, tmp_path / "cache")
    return replace(small, cache=tmp_path / "cache")


def test_a_valid_cache_passes_every_depth(small: World, verify: Verify) -> None:
    code, report = verify(small.cache, "--shards", small.shards, *TEACHER)
    assert code == 0
    assert report["ok"] is True
    assert report["problems"] == []
    checks = report["checks"]
    depths = [
        *("units", "structure", "bytes", "classes", "join", "images", "views"),
        *("teacher", "logits"),
    ]
    assert list(checks) == depths
    names = [name for name in data_files(small.cache) if not name.startswith("digest/")]
    assert checks["structure"]["files"] == len(names)
    assert checks["bytes"]["views"] == 4 * 96
    assert checks["join"]["found"] == checks["images"]["equal"] == 96
    assert checks["views"]["bit_exact"] == checks["logits"]["views"] == 96
    assert checks["logits"]["dense"] == checks["logits"]["envelope"] == 1.0


def test_depth_structure_decodes_nothing(copy: World, verify: Verify) -> None:
    name = next(n for n in data_files(copy.cache) if n.startswith("dense/spatial"))
    data = bytearray((copy.cache / name).read_bytes())
    data[len(data) // 3] ^= 1
    (copy.cache / name).write_bytes(data)
    code, report = verify(copy.cache, "--depth", "structure")
    assert (code, report["ok"]) == (0, True)
    assert "bytes" not in report["checks"]
    code, report = verify(copy.cache)
    assert (code, report["ok"]) == (1, False)
    assert [(p["depth"], p["where"]) for p in report["problems"]] == [("bytes", name)]
    assert report["error"]["kind"] == "CacheError"
    assert "copy this file again" in report["error"]["action"]


def test_missing_units_are_a_problem_unless_partial(copy: World, verify: Verify) -> None:
    (copy.cache / "digest/c/1/2").unlink()
    code, report = verify(copy.cache)
    assert code == 1
    assert report["checks"]["units"] == {"done": 5, "total": 6, "problems": 1}
    assert "views 2-3 of shard 2" in report["problems"][0]["found"]
    code, report = verify(copy.cache, "--shards", copy.shards)  # existing units are compared
    assert (code, report["checks"]["views"]["bit_exact"]) == (1, 96)
    code, report = verify(copy.cache, "--partial", "--shards", copy.shards)
    assert (code, report["ok"]) == (0, True)
    assert report["checks"]["views"]["bit_exact"] == 96


def test_other_images_are_detected(
    small: World, samples: list[Sample], tmp_path: Path, verify: Verify
) -> None:
    other = recut(small, tmp_path / "modified", modified(samples))
    code, report = verify(small.cache, "--shards", other.shards)
    assert code == 1
    checks = report["checks"]
    assert checks["join"] == {
        **{"samples": 96, "found": 93, "unused": 2, "shards_alike": 0, "problems": len(REMOVED)}
    }
    assert checks["images"] == {"compared": 93, "equal": 89, "problems": len(ALTERED)}
    assert checks["views"]["bit_exact"] == checks["views"]["replayed"] == 89
    assert checks["views"]["other_image"] == len(ALTERED)
    assert checks["views"]["differing_by_rounding"] == 0  # they are not rendered at all
    problems = [p for p in report["problems"] if p["depth"] == "images"]
    tars = [Path(p["where"].split()[0]).name for p in problems]
    assert all(name.startswith("x-0") for name in tars), problems
    assert "--set data.missing=skip" in report["error"]["action"]
    assert "--set data.drift=skip" in report["error"]["action"]


def test_a_smaller_sample_is_spread_over_shards_and_views(small: World) -> None:
    joined = join(load_dataset(small.shards), open_cache(small.cache))
    rows = spread_views(joined, 12)
    assert len(rows) == 12
    assert set(rows[:, 0]) == set(range(4))
    assert set(rows[:, 1]) == set(range(3))
    assert replay(joined, rows).exact.all()
    assert len(spread_views(joined, 1000)) == 96


def shift_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate another release of an image library: some pixels differ by one."""
    render = apply.render

    def other(*arguments: Any) -> Any:
        pixels = render(*arguments)
        if pixels[0, 0, 0] % 2:
            pixels = pixels.copy()
            pixels[0, 0, 0] -= 1
        return pixels

    monkeypatch.setattr(apply, "render", other)


def with_versions(cache: Path, **versions: str) -> None:
    """Write these library versions into the manifest."""
    manifest = open_cache(cache).manifest
    changed = replace(manifest, versions={**manifest.versions, **versions})
    (cache / layout.GROUP).write_bytes(layout.manifest_document(changed))


def test_pixels_that_differ_by_rounding_are_reported_with_the_versions(
    copy: World, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_versions(copy.cache, pillow="9.9.9")
    shift_pixels(monkeypatch)
    code, report = verify(copy.cache, "--shards", copy.shards)
    views = report["checks"]["views"]
    assert code == 1
    assert 20 < views["differing_by_rounding"] < 80
    assert views["bit_exact"] + views["differing_by_rounding"] == 96
    assert views["other_image"] == views["other_seed"] == 0
    assert any(line.startswith("pillow: 9.9.9 and ") for line in report["other_versions_here"])
    assert "pillow: 9.9.9 and " in report["problems"][0]["found"]


def test_seeds_not_derived_from_the_root_seed_are_reported(
    small: World, tmp_path: Path, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache whose manifest and records state another root seed than the one it used."""
    shutil.copytree(small.cache, tmp_path / "cache")
    manifest = open_cache(small.cache).manifest
    changed = replace(manifest, root_seed=manifest.root_seed + 1)
    (tmp_path / "cache" / layout.GROUP).write_bytes(layout.manifest_document(changed))
    rewrite_records(tmp_path / "cache")
    shift_pixels(monkeypatch)
    code, report = verify(tmp_path / "cache", "--shards", small.shards)
    assert code == 1
    views = report["checks"]["views"]
    assert views["other_seed"] == 96
    assert views["differing_by_rounding"] == 0  # reported once, by its cause
    assert len(report["problems"]) == 96


def test_the_teacher_runs_only_on_views_reproduced_bit_for_bit(
    small: World, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other pixels give other logits, which is not an error of the cached ones."""
    shift_pixels(monkeypatch)
    _, report = verify(small.cache, "--shards", small.shards, *TEACHER)
    checks = report["checks"]
    assert 0 < checks["views"]["bit_exact"] < 96
    assert checks["logits"]["views"] == checks["views"]["bit_exact"]
    assert {problem["depth"] for problem in report["problems"]} == {"views"}


def test_a_damaged_cache_is_not_compared_with_the_shards(
    copy: World, verify: Verify, capsys: Capture
) -> None:
    (copy.cache / "seed/c/0/0/0").unlink()
    assert world.cli("cache", "verify", copy.cache, "--shards", copy.shards) == 1
    assert "is damaged: it is not compared with the shards" in capsys.readouterr().err
    code, report = verify(copy.cache, "--shards", copy.shards, *TEACHER)
    assert code == 1
    assert list(report["checks"]) == ["units", "structure"]
    assert {problem["depth"] for problem in report["problems"]} == {"structure"}


@pytest.mark.parametrize("flags", [(), TEACHER])
def test_a_cache_without_a_finished_unit_is_compared_as_far_as_possible(
    small: World, tmp_path: Path, verify: Verify, flags: tuple[str, ...]
) -> None:
    CacheWriter.create(tmp_path / "cache", open_cache(small.cache).manifest)
    words = (tmp_path / "cache", "--shards", small.shards, *flags)
    code, report = verify(*words)
    assert code == 1
    assert report["checks"]["units"]["done"] == 0
    assert {problem["depth"] for problem in report["problems"]} == {"units"}
    code, report = verify(*words, "--partial")
    assert (code, report["ok"]) == (0, True)
    assert report["checks"]["images"]["compared"] == 0


def test_another_teacher_is_detected_by_its_weights(small: World, verify: Verify) -> None:
    arguments = ("--shards", small.shards, *TEACHER[2:])
    code, report = verify(small.cache, *arguments, "--teacher", "resnet14t")
    assert code == 1
    (problem,) = report["problems"]
    assert problem["depth"] == "teacher"
    assert open_cache(small.cache).manifest.teacher.weights_sha256 in problem["found"]


def test_mean_and_std_are_compared_before_any_logits(small: World, verify: Verify) -> None:
    """Another normalisation changes the logits of the right weights."""
    flags = ("--mean", "0.5,0.5,0.5", "--std", "0.229,0.224,0.225")
    code, report = verify(small.cache, "--shards", small.shards, *TEACHER, *flags)
    assert code == 1
    (problem,) = report["problems"]
    assert (problem["depth"], problem["where"]) == ("teacher", world.TEACHER)
    assert problem["found"] == (
        "mean is (0.5, 0.5, 0.5), in the cache's manifest (0.485, 0.456, 0.406)"
    )
    assert "logits" not in report["checks"]
    assert "--mean" in report["error"]["action"]
    flags = ("--mean", "0.485,0.456,0.406", *flags[2:])
    assert verify(small.cache, "--shards", small.shards, *TEACHER, *flags)[0] == 0


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ([0.981, 0.98], []),
        ([0.98, 0.979], ["the mean of all views"]),
        ([1.0, 0.5], ["the mean of all views"]),
        ([1.0, 0.499], ["view"]),
    ],
)
def test_logits_must_agree_overall_and_in_each_view(
    small: World,
    verify: Verify,
    monkeypatch: pytest.MonkeyPatch,
    values: list[float],
    wrong: list[str],
) -> None:
    monkeypatch.setattr(verify_cache, "agreement", lambda *_: np.array(values))
    samples = ("--samples", 2, "--batch-size", 2)
    code, report = verify(small.cache, "--shards", small.shards, *TEACHER, *samples)
    assert code == (1 if wrong else 0)
    problems = [p for p in report["problems"] if p["found"].startswith("envelope")]
    assert len(problems) == len(wrong)
    for problem, where in zip(problems, wrong, strict=True):
        assert where in problem["where"] + problem["found"]
        bound = 0.5 if where == "view" else 0.98
        assert problem["found"].endswith(f"expected at least {bound}")
    if wrong:
        assert "its logits are not" in report["error"]["action"]


def test_views_with_another_partner_image_are_not_compared(
    small: World, samples: list[Sample], tmp_path: Path, verify: Verify
) -> None:
    """Their own pixels and digest are the cache's, but the mixed view is not."""
    content = [recompress(s) if i in ALTERED else s for i, s in enumerate(samples)]
    other = recut(small, tmp_path / "altered", content)
    code, report = verify(small.cache, "--shards", other.shards, *TEACHER)
    assert code == 1
    assert {problem["depth"] for problem in report["problems"]} == {"images"}
    cache = open_cache(small.cache)
    joined = join(load_dataset(small.shards), cache)
    starts = np.cumsum([0, *cache.counts])
    compared = 0
    for view, shard, offset in spread_views(joined, 96).tolist():
        partner = matching(
            cache.manifest.root_seed,
            cache.manifest.dataset.shard_ids[shard],
            cache.counts[shard],
            view,
            cache.manifest.policy,
        )[offset]
        compared += not {starts[shard] + offset, starts[shard] + partner} & set(ALTERED)
    assert report["checks"]["views"]["bit_exact"] == 96 - len(ALTERED)
    assert report["checks"]["logits"]["views"] == compared < 96 - len(ALTERED)
    assert report["checks"]["logits"]["dense"] == 1.0


def shift_classes(copy: World, names: tuple[str, ...], units: int) -> None:
    """Rewrite the first units, complete and with valid checksums, every class shifted by one."""
    shutil.move(copy.cache, old := copy.cache.with_name("old"))
    reader = open_cache(old)
    writer = CacheWriter.create(copy.cache, reader.manifest)
    for number, unit in enumerate(writer.todo()):
        data = unit_data(reader, writer.manifest, unit, unit.shard)
        for name in names if number < units else ():
            data.arrays[name][:] = np.roll(data.arrays[name], 1, axis=2)
        writer.write_unit(unit, data)


@pytest.mark.parametrize(("units", "wrong"), [(0, 0), (1, 35 // 2), (6, 96)])
def test_logits_of_another_teacher_are_detected(
    copy: World, verify: Verify, units: int, wrong: int
) -> None:
    shift_classes(copy, ("dense/spatial", "dense/global"), units)
    code, report = verify(copy.cache, "--shards", copy.shards, *TEACHER)
    assert code == (1 if wrong else 0)
    problems = report["problems"]
    assert {problem["depth"] for problem in problems} == ({"logits"} if wrong else set())
    assert abs(len(problems) - wrong) <= 1  # a unit is half of a shard's views
    assert all(problem["found"].startswith("dense, view ") for problem in problems)
    assert report["checks"]["logits"]["envelope"] == 1.0
    assert report["checks"]["logits"]["dense"] == pytest.approx(1 - len(problems) / 96)


def test_agreement_is_the_share_of_equal_labels_or_the_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    spatial, other = torch.randn(2, 5, 7, 3, 3, generator=generator).half()
    global_ = torch.randn(5, 7, generator=generator).half()
    seeds = np.arange(5, dtype=np.uint64)
    dense, quantised = ENCODINGS["dense"], ENCODINGS["dense-q8"]
    shares = agreement(
        dense, dense.encode(spatial, global_, seeds), dense.encode(other, global_, seeds)
    )
    for b in range(5):
        at_one = (spatial[b].argmax(0) == other[b].argmax(0)).float().mean()
        fused = [
            (0.5 * d[b].float() + 0.5 * global_[b].float()[:, None, None]) for d in (spatial, other)
        ]
        at_half = (fused[0].argmax(0) == fused[1].argmax(0)).float().mean()
        assert shares[b] == pytest.approx(float(at_one + at_half + 1) / 3)
    overlap = agreement(
        quantised,
        quantised.encode(spatial, global_, seeds),
        quantised.encode(other, global_, seeds),
    )
    for b in range(5):
        overlaps = [1.0]
        for r in (1.0, 0.5):
            p, q = (
                torch.softmax(r * d[b].double() + (1 - r) * global_[b].double()[:, None, None], 0)
                for d in (spatial, other)
            )
            overlaps.append(float(1 - (p - q).abs().sum(0).mean() / 2))
        assert overlap[b] == pytest.approx(sum(overlaps) / 3, abs=0.02)


def test_a_teacher_needs_shards_and_its_flags_a_teacher(small: World, capsys: Capture) -> None:
    for flag, value in (("--teacher", "resnet10t"), ("--samples", 5), ("--split", "train")):
        assert world.cli("cache", "verify", small.cache, flag, value) == 2
        assert "add --shards SHARDS" in capsys.readouterr().err
    for flag, value in (("--weights", "hub"), ("--batch-size", 5), ("--device", "cpu")):
        words = ("--shards", small.shards, flag, value)
        assert world.cli("cache", "verify", small.cache, *words) == 2
        assert "add --teacher NAME" in capsys.readouterr().err


def test_without_json_a_table_and_the_problems_are_printed(copy: World, capsys: Capture) -> None:
    assert world.cli("cache", "verify", copy.cache, "--shards", copy.shards, "--quiet") == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[2:]] == [
        *("units", "structure", "bytes", "classes", "join", "images", "views")
    ]
    assert err == ""
    (copy.cache / "seed/c/0/0/0").unlink()
    assert world.cli("cache", "verify", copy.cache, "--quiet") == 1
    assert "- structure: seed/c/0/0/0: the file is missing" in capsys.readouterr().err


# The check of a sample before training


def test_training_starts_by_checking_a_sample(
    small: World, tmp_path: Path, capsys: Capture
) -> None:
    recipe = world.train_recipe(small.shards, small.cache, tmp_path / "run")
    Terminal().attach()
    open_training_data(recipe)
    assert "checked 64 views of the cache: 64 are reproduced bit for bit" in capsys.readouterr().err
    skip = world.train_recipe(small.shards, small.cache, tmp_path / "run", sets=["data.check=0"])
    Terminal().attach()
    open_training_data(skip)
    assert "checked" not in capsys.readouterr().err


def test_different_views_stop_training_before_it_starts_or_are_reported(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    shift_pixels(monkeypatch)
    recipe = world.train_recipe(small.shards, small.cache, tmp_path / "run")
    Terminal().attach()
    with pytest.raises(ViewDriftError, match="not those the teacher saw"):
        open_training_data(recipe)
    warned = world.train_recipe(
        small.shards, small.cache, tmp_path / "run", sets=["data.drift=warn"]
    )
    Terminal().attach()
    open_training_data(warned)
    output = capsys.readouterr().err
    assert "warning: checked 64 views" in output
    assert "0 are of other images" in output


def test_another_image_in_the_sample_stops_training_before_it_starts(
    small: World, samples: list[Sample], tmp_path: Path
) -> None:
    """It is in one of the 64 checked views."""
    rows = spread_views(join(load_dataset(small.shards), open_cache(small.cache)), 64)
    starts = [0, 35, 70]
    number = starts[int(rows[5, 1])] + int(rows[5, 2])
    content = [recompress(s) if i == number else s for i, s in enumerate(samples)]
    other = recut(small, tmp_path / "one altered", content)
    recipe = world.train_recipe(other.shards, small.cache, tmp_path / "run")
    with pytest.raises(JoinError, match="not the one the cache was made from"):
        open_training_data(recipe)
    skipped = world.train_recipe(
        other.shards, small.cache, tmp_path / "run", sets=["data.drift=skip"]
    )
    allowed = open_training_data(skipped).views.allowed
    assert allowed is not None
    assert sum(int(mask.sum()) for mask in allowed) == 95


def test_damaged_targets_of_the_sample_stop_training_before_it_starts(
    copy: World, tmp_path: Path
) -> None:
    for path in (copy.cache / "envelope").rglob("*"):
        if path.is_file() and path.name != "zarr.json":
            path.write_bytes(path.read_bytes()[:-1])
    sets = ["distill.encoding=envelope"]
    recipe = world.train_recipe(copy.shards, copy.cache, tmp_path / "run", sets=sets)
    with pytest.raises(CacheError, match="damaged"):
        open_training_data(recipe)


def test_a_factory_is_not_called_with_the_arguments_of_a_foreign_manifest(
    small: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = replace(open_cache(small.cache).manifest.teacher, kwargs={"path": "/etc/passwd"})
    sources: list[TeacherSource] = []
    monkeypatch.setattr(verify_cache, "load_teacher", lambda source, **_: sources.append(source))
    for name in ("tests.own:network", "resnet10t"):
        verify_cache._load_teacher(verify_cache.TeacherChoice(name, device="cpu"), recorded)
    assert [dict(source.kwargs) for source in sources] == [{}, {"path": "/etc/passwd"}]
    assert "without the arguments" in caplog.text
