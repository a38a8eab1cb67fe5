"""Small studies write tables and plots, resume where they stopped, and refuse changes."""

from __future__ import annotations

import csv
import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cskd_pipeline.config.reading import load_recipe
from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.config.writing import to_toml
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.errors import OutputError, RecipeError
from cskd_pipeline.pipeline import train as stage_two
from cskd_pipeline.tools.make_shards import make_shards
from cskd_pipeline.tools.study import run_study as studying
from cskd_pipeline.tools.study.arms import fork_point
from cskd_pipeline.tools.study.ledger import Ledger, load_recipes
from tests.pipeline import world
from tests.pipeline.conftest import World

FULL = ("none", "deit", "cskd_linear", "cskd_spatial")
FORKS = ("fork_linear", "fork_off")
NAMES = (*FULL, *FORKS)
EPOCHS = 2


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write five recipes of two epochs each."""
    folder = tmp_path_factory.mktemp("recipes")
    unset = Path()
    settings = ["run.threads=1", "schedule.warmup_epochs=0", *world.VIEWS]
    kinds: dict[str, dict[str, Any]] = {
        "teacher": {"student": world.TEACHER, "kwargs": world.TEACHER_KWARGS, "method": "none"}
    }
    small = "{img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2}"
    kinds |= {method: {"method": method, "kwargs": small} for method in ("none", "deit", "cskd")}
    for name, kind in kinds.items():
        recipe = world.train_recipe(
            unset, None, unset, sets=settings, epochs=EPOCHS, batch_size=32, **kind
        )
        (folder / f"{name}.toml").write_text(to_toml(recipe))
    dump = world.dump_recipe(unset, unset, views=2, encodings='["envelope"]')
    (folder / "dump.toml").write_text(to_toml(dump))
    return folder


def study(small: World, recipes: Path, out: Path, *flags: object) -> list[object]:
    return [
        *("study", "--shards", small.shards, "--val-shards", small.validation, "--out", out),
        *("--recipes", recipes, "--jobs", 1, "--device", "cpu", *flags),
    ]


REAL_TRAIN = stage_two.train


class RecordedTrain:
    """Replaces ``train``: records recipes, and is interrupted after run number ``stop``."""

    def __init__(self, stop: int = 0) -> None:
        self.stop, self.recipes = stop, list[TrainRecipe]()

    def __call__(self, recipe: TrainRecipe, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.recipes.append(recipe)
        summary = REAL_TRAIN(recipe, *args, **kwargs)
        if len(self.recipes) == self.stop:
            raise KeyboardInterrupt
        return summary

    @property
    def folders(self) -> list[str]:
        return [Path(recipe.run.out).name for recipe in self.recipes]


@dataclass(frozen=True)
class Study:
    """A study of two seeds, stopped in its fourth student and resumed.

    ``before`` maps the files of the stopped study to their modification times.
    """

    out: Path
    report: dict[str, Any]
    first: RecordedTrain
    second: RecordedTrain
    before: dict[Path, int]


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(small: World, recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    out = tmp_path_factory.mktemp("study") / "out"
    first, second = RecordedTrain(stop=5), RecordedTrain()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_two, "train", first)
        assert world.cli(*study(small, recipes, out, "--seeds", 2, "--quiet")) == 130
        before = files(out)
        patch.setattr(stage_two, "train", second)
        assert world.cli(*study(small, recipes, out, "--seeds", 2, "--quiet")) == 0
    return Study(out, json.loads((out / "study.json").read_text()), first, second, before)


def test_all_students_are_in_the_report_with_means_and_deviations(finished: Study) -> None:
    methods = {arm["name"]: arm for arm in finished.report["arms"]}
    assert tuple(methods) == NAMES
    for name, method in methods.items():
        values = []
        for seed in ("1", "2"):
            with open(finished.out / "runs" / f"{name}-{seed}" / "summary.csv", newline="") as file:
                values.append(float(list(csv.DictReader(file))[-1]["top1"]))
            assert method["top1"][seed] == pytest.approx(values[-1])
        assert method["n"] == 2
        assert method["mean"] == pytest.approx(np.mean(values))
        assert method["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert finished.report["images"] == {"training": 96, "validation": 16}
    assert finished.report["cache"]["views"] == 2
    assert finished.report["recipes"]["cskd"].endswith("cskd.toml")


def test_every_claim_compares_its_two_arms(finished: Study) -> None:
    top1 = {arm["name"]: arm["top1"] for arm in finished.report["arms"]}
    pairs = {
        "cskd > deit": ("cskd_linear", "deit"),
        "deit > none": ("deit", "none"),
        "CKF > r = 1, full runs": ("cskd_linear", "cskd_spatial"),
        "CKF > r = 1, from the fork": ("fork_linear", "cskd_spatial"),
        "no spatial term > r = 1, from the fork": ("fork_off", "cskd_spatial"),
        "CKF > no spatial term, from the fork": ("fork_linear", "fork_off"),
    }
    claims = {claim["claim"]: claim for claim in finished.report["claims"]}
    assert set(claims) == set(pairs)
    for text, (better, worse) in pairs.items():
        paired = [top1[better][seed] - top1[worse][seed] for seed in ("1", "2")]
        assert claims[text]["paired"] == pytest.approx(paired)
        assert claims[text]["difference"] == pytest.approx(np.mean(paired))
        assert claims[text]["held"] == (np.mean(paired) > 0)


def test_runs_differ_only_in_method_schedule_and_seed(finished: Study) -> None:
    """Runs of one seed share initial weights and order; each folder has the run's recipe."""
    shared = {}
    for folder in sorted((finished.out / "runs").iterdir()):
        recipe = load_recipe(TrainRecipe, folder / "recipe.toml")
        name, _, seed = folder.name.rpartition("-")
        distill = recipe.distill
        expected = {"none": "none", "deit": "deit"}.get(name, "cskd")
        assert (distill.method, recipe.run.seed) == (expected, int(seed))
        assert distill.schedule == ("spatial" if name == "cskd_spatial" else "linear")
        assert distill.spatial_weight == (0.0 if name == "fork_off" else 1.0)
        assert bool(recipe.data.cache) == (name != "none")
        trunk = finished.out / "runs" / f"cskd_spatial-{seed}" / "state-00001.pt"
        assert recipe.run.fork_from == (str(trunk) if name in FORKS else "")
        shared[folder.name] = recipe.student, recipe.optim, recipe.schedule, recipe.batch
    assert set(shared) == {f"{name}-{seed}" for name in NAMES for seed in (1, 2)}
    assert len(set(map(str, shared.values()))) == 1


def test_forks_share_their_trunks_epochs_and_then_diverge(finished: Study) -> None:
    """The fork is halfway, after the first of two epochs."""
    for seed in ("1", "2"):
        fork = finished.report["forks"][seed]
        assert fork["epoch"] == 1
        assert fork["reached"] == (fork["dense"] >= finished.report["teacher"]["local"])
        curves = {arm["name"]: arm["runs"][seed]["rows"] for arm in finished.report["arms"]}
        first = {name: curves[name][0] for name in (*FORKS, "cskd_spatial")}
        assert first["fork_linear"] == first["fork_off"] == first["cskd_spatial"]
        assert [row["ckf_ratio"] for row in curves["cskd_spatial"]] == [1.0, 1.0]
        heads = {"top1", "top1_cls", "top1_dist", "top1_dense"}
        measured = heads | {f"ema_{name}" for name in heads}
        assert set(curves["fork_off"][1]) == {"epoch", "ckf_ratio", *measured}
        assert not list((finished.out / f"runs/cskd_spatial-{seed}").glob("state-*"))


def test_attention_distances_are_between_patches(finished: Study) -> None:
    for arm in finished.report["arms"]:
        [distance] = arm["attention"]
        # 4 x 4 patches of 8 pixels: 16.1 px on average for uniform attention.
        assert 10 < distance < 20


def test_table_plot_and_verdicts_are_files(finished: Study) -> None:
    table = (finished.out / "table.md").read_text()
    lines = table.splitlines()
    assert lines[0].startswith("| trained with | seeds | top-1 % | each seed | cls | dist |")
    for arm, line in zip(finished.report["arms"], lines[2:], strict=False):
        assert line.startswith(f"| {arm['label']} | 2 | {arm['text']} |")
    for claim in finished.report["claims"]:
        assert f"- {claim['claim']}: {claim['verdict']} ({claim['numbers']})" in lines
    assert "- the paper's ordering cskd > deit > none: " in table
    with open(finished.out / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(NAMES)
    with_dense = {row["arm"] for row in rows if row["top1_dense"] and row["ema_top1_dense"]}
    assert with_dense == set(NAMES) - {"none", "deit"}
    with open(finished.out / "curves.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * len(NAMES) * EPOCHS
    svg = ET.fromstring((finished.out / "study.svg").read_bytes())
    texts = "".join(svg.itertext())
    assert all(arm["label"] in texts for arm in finished.report["arms"])
    assert (finished.out / "study.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_study_resumes_without_repeating_work(finished: Study) -> None:
    assert finished.first.folders == ["teacher", *(f"{name}-1" for name in FULL)]
    remaining = [f"{name}-{seed}" for seed in (1, 2) for name in NAMES][3:]
    assert finished.second.folders == remaining
    # The run stopped after its last update resumes from its state, without another update.
    stopped = finished.out / "runs/cskd_spatial-1"
    after = files(finished.out)
    changed = {path for path, time in finished.before.items() if after.get(path) != time}
    assert {path for path in changed if stopped not in path.parents} == set()
    assert stopped / "state.pt" not in changed
    assert finished.out / "results/cskd_spatial-1.json" not in finished.before
    assert finished.out / "results/none-1.json" in finished.before


def test_a_finished_study_only_reports_and_more_seeds_are_added(
    finished: Study, small: World, recipes: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recorded = RecordedTrain()
    monkeypatch.setattr(stage_two, "train", recorded)
    assert world.cli(*study(small, recipes, finished.out, "--seeds", 2)) == 0
    out = capsys.readouterr().out
    assert "The paper's claims" in out
    assert "fork: no spatial term" in out
    assert world.cli(*study(small, recipes, finished.out, "--seeds", 1, "--json", "--quiet")) == 0
    one = world.last_json(capsys.readouterr().out)
    assert {arm["n"] for arm in one["arms"]} == {1}
    assert "one seed only" in one["claims"][0]["verdict"]
    assert recorded.folders == []
    copy = tmp_path / "copy"  # stopped again in its first training
    shutil.copytree(finished.out, copy)
    recorded.stop = 1
    assert world.cli(*study(small, recipes, copy, "--seeds", 3, "--quiet")) == 130
    assert recorded.folders == ["none-3"]


# --- refusals -------------------------------------------------------------------------------------


def test_a_changed_recipe_and_other_images_are_refused(
    finished: Study, small: World, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "recipes"
    shutil.copytree(recipes, changed)
    before = files(finished.out)
    dump = (changed / "dump.toml").read_text()
    (changed / "dump.toml").write_text(dump.replace("flip = 0.5", "flip = 0.25"))
    assert world.cli(*study(small, changed, finished.out, "--quiet")) == 1
    err = capsys.readouterr().err
    assert "the study in this folder was started with other recipes or images" in err
    assert "changed: dump recipe" in err
    make_shards(small.shards.parent / "more", tmp_path / "other", shard_size=5, seed=5)
    other = World(tmp_path / "other", small.validation, small.cache)
    assert world.cli(*study(other, recipes, finished.out, "--quiet")) == 1
    assert "changed: training images" in capsys.readouterr().err
    assert files(finished.out) == before


def test_students_that_differ_in_more_than_the_method_are_refused(
    recipes: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "recipes"
    shutil.copytree(recipes, changed)
    text = (changed / "deit.toml").read_text()
    (changed / "deit.toml").write_text(text.replace("lr = 0.05", "lr = 0.06"))
    with pytest.raises(RecipeError, match="differ in more than the method"):
        load_recipes(changed)
    shutil.copy(changed / "none.toml", changed / "deit.toml")
    with pytest.raises(RecipeError, match="differ in more than the method"):
        load_recipes(changed)


def test_recipes_of_one_epoch_are_refused_before_anything_is_trained(
    small: World, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "recipes"
    shutil.copytree(recipes, changed)
    for method in ("none", "deit", "cskd"):
        path = changed / f"{method}.toml"
        path.write_text(path.read_text().replace(f"epochs = {EPOCHS}", "epochs = 1"))
    assert world.cli(*study(small, changed, tmp_path / "out")) == 1
    assert "a run of one epoch cannot be forked" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results").exists()


def test_a_folder_with_other_files_is_refused(
    small: World, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    assert world.cli(*study(small, recipes, tmp_path)) == 1
    assert "contains other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"top1": "high"}', '{"top1": 1, "top1": 2}'])
def test_a_damaged_result_is_refused(text: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "study", {})
    assert ledger.find("none-1", "top1") is None
    ledger.add("none-1", {"top1": 5.0})
    assert ledger.find("none-1", "top1") == {"top1": 5.0}
    (tmp_path / "study/results/none-1.json").write_text(text)
    with pytest.raises(OutputError, match="damaged"):
        ledger.find("none-1", "top1")


# --- processes ------------------------------------------------------------------------------------


def test_parallel_students_are_separate_processes(
    finished: Study, small: World, recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.out, copy)
    for path in copy.glob("results/*-2.json"):
        path.unlink()
    waves: list[tuple[list[str], int, Path]] = []

    def parallel(
        calls: Mapping[str, Sequence[object]], processes: int, logs: Path
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        waves.append((list(calls), processes, logs))
        for name, words in reversed(calls.items()):
            assert words[0] == "train"
            last = {"top1": 50.0, "top1_cls": 40.0}
            keys = ("student", "epochs", "updates", "seconds", "images_per_second")
            folder = {"out": str(words[list(words).index("--out") + 1])}
            yield name, {"last": last, **dict.fromkeys(keys, 1), **folder}

    monkeypatch.setattr(studying, "side_by_side", parallel)
    arguments = study(small, recipes, copy, "--seeds", 2, "--quiet")
    arguments[arguments.index("--jobs") + 1] = 2
    assert world.cli(*arguments) == 0
    names = [[f"{arm}-2" for arm in arms] for arms in (FULL, FORKS)]
    assert waves == [(wave, 2, copy / "logs") for wave in names]
    report = json.loads((copy / "study.json").read_text())
    assert {arm["top1"]["2"] for arm in report["arms"]} == {50.0}


# --- digits, and the fork point -------------------------------------------------------------------


def test_without_shards_the_study_writes_the_digits_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(recipe: TrainRecipe, *, resume: bool) -> None:
        assert load_dataset(recipe.data.shards).samples == 100
        assert load_dataset(recipe.data.val_shards).samples == 50
        raise KeyboardInterrupt

    monkeypatch.setattr(studying, "DIGITS", {"train": 100, "validation": 50})
    monkeypatch.setattr(stage_two, "train", stopped)
    out = tmp_path / "out"
    assert world.cli("study", "--out", out, "--device", "cpu", "--quiet") == 130
    written = files(out / "shards")
    assert written
    assert world.cli("study", "--out", out, "--device", "cpu", "--quiet") == 130
    assert files(out / "shards") == written
    (out / "results" / "images.json").unlink()  # as if killed before it was written
    assert world.cli("study", "--out", out, "--device", "cpu", "--quiet") == 130
    assert [path.name for path in files(out / "shards")] == [path.name for path in written]


@pytest.mark.parametrize(
    ("dense", "local", "epoch", "reached"),
    [
        ([10.0 * n for n in range(1, 11)], 35.0, 4, True),
        ([10.0 * n for n in range(1, 11)], 60.0, 5, False),
        ([None] * 20, 0.5, 10, False),
        ([90.0, 95.0], 50.0, 1, True),
        ([50.0, 90.0], 80.0, 1, False),
    ],
)
def test_a_trunk_is_forked_when_it_reaches_the_local_accuracy(
    dense: list[float | None], local: float, epoch: int, reached: bool
) -> None:
    fork = fork_point(dense, local)
    assert (fork.epoch, fork.reached) == (epoch, reached)
    assert fork.dense == dense[epoch - 1]
