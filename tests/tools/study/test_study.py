"""Small studies: they end with table and files, go on where they stopped, refuse what changed."""

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

from cskd_pipeline.config import TrainRecipe, load_recipe, to_toml
from cskd_pipeline.errors import OutputError, RecipeError
from cskd_pipeline.pipeline import train as stage_two
from cskd_pipeline.tools.make_shards import make_shards
from cskd_pipeline.tools.study import run_study as studying
from cskd_pipeline.tools.study.ledger import Ledger, load_recipes
from tests.pipeline import world
from tests.pipeline.conftest import World

NAMES = ("none", "deit", "cskd_spatial", "cskd_global", "cskd_linear", "cskd_x2", "cskd_cos")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five recipes of one epoch each."""
    folder = tmp_path_factory.mktemp("recipes")
    nowhere = Path()
    settings = ["run.threads=1", "run.ema=0", "schedule.warmup_epochs=0", *world.VIEWS]
    kinds: dict[str, dict[str, Any]] = {
        "teacher": {"student": world.TEACHER, "kwargs": world.TEACHER_KWARGS, "method": "none"}
    }
    small = "{img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2}"
    kinds |= {method: {"method": method, "kwargs": small} for method in ("none", "deit", "cskd")}
    for name, kind in kinds.items():
        recipe = world.train_recipe(
            nowhere, None, nowhere, sets=settings, epochs=1, batch_size=32, **kind
        )
        (folder / f"{name}.toml").write_text(to_toml(recipe))
    dump = world.dump_recipe(nowhere, nowhere, views=2, encodings='["envelope"]')
    (folder / "dump.toml").write_text(to_toml(dump))
    return folder


def study(small: World, recipes: Path, out: Path, *flags: object) -> list[object]:
    return [
        *("study", "--shards", small.shards, "--val-shards", small.validation, "--out", out),
        *("--recipes", recipes, "--jobs", 1, "--device", "cpu", *flags),
    ]


REAL_TRAIN = stage_two.train


class Watched:
    """Trains as ever, and as if stopped by a signal right after training number ``stop``."""

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
class Ended:
    """A study of two seeds, stopped in its fourth student and gone on with.

    ``before``: the files when it had been stopped, and when each was written.
    """

    out: Path
    report: dict[str, Any]
    first: Watched
    second: Watched
    before: dict[Path, int]


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def ended(small: World, recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    out = tmp_path_factory.mktemp("study") / "out"
    first, second = Watched(stop=5), Watched()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_two, "train", first)
        assert world.cli(*study(small, recipes, out, "--seeds", 2, "--quiet")) == 130
        before = files(out)
        patch.setattr(stage_two, "train", second)
        assert world.cli(*study(small, recipes, out, "--seeds", 2, "--quiet")) == 0
    return Ended(out, json.loads((out / "study.json").read_text()), first, second, before)


def test_all_students_are_in_the_report_with_means_and_deviations(ended: Ended) -> None:
    methods = {method["name"]: method for method in ended.report["methods"]}
    assert tuple(methods) == NAMES
    for name, method in methods.items():
        values = []
        for seed in ("1", "2"):
            with open(ended.out / "runs" / f"{name}-{seed}" / "summary.csv", newline="") as file:
                values.append(float(list(csv.DictReader(file))[-1]["top1"]))
            assert method["top1"][seed] == pytest.approx(values[-1])
        assert method["n"] == 2
        assert method["mean"] == pytest.approx(np.mean(values))
        assert method["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert ended.report["images"] == {"training": 96, "validation": 16}
    assert ended.report["cache"]["views"] == 2
    assert ended.report["recipes"]["cskd"].endswith("cskd.toml")


def test_the_claims_compare_what_they_say(ended: Ended) -> None:
    top1 = {m["name"]: m["top1"] for m in ended.report["methods"]}
    pairs = {"cskd > deit": ("cskd_linear", "deit"), "deit > none": ("deit", "none"),
             "CKF > spatial only": ("cskd_linear", "cskd_spatial")}  # fmt: skip
    claims = {claim["claim"]: claim for claim in ended.report["claims"]}
    assert set(claims) == set(pairs)
    for text, (better, worse) in pairs.items():
        paired = [top1[better][seed] - top1[worse][seed] for seed in ("1", "2")]
        assert claims[text]["paired"] == pytest.approx(paired)
        assert claims[text]["difference"] == pytest.approx(np.mean(paired))
        assert claims[text]["held"] == (np.mean(paired) > 0)


def test_runs_differ_in_method_schedule_and_seed_alone(ended: Ended) -> None:
    """Methods of one seed share first weights and order; what was run is in each run's folder."""
    found = {}
    for folder in sorted((ended.out / "runs").iterdir()):
        recipe = load_recipe(TrainRecipe, folder / "recipe.toml")
        name, _, seed = folder.name.rpartition("-")
        method, _, schedule = name.partition("_")
        assert (recipe.distill.method, recipe.run.seed) == (method, int(seed))
        assert recipe.distill.schedule == (schedule or "linear")
        assert bool(recipe.data.cache) == (method != "none")
        found[folder.name] = recipe.student, recipe.optim, recipe.schedule, recipe.batch
    assert set(found) == {f"{name}-{seed}" for name in NAMES for seed in (1, 2)}
    assert len(set(map(str, found.values()))) == 1


def test_table_plot_and_verdicts_are_files(ended: Ended) -> None:
    table = (ended.out / "table.md").read_text()
    lines = table.splitlines()
    assert lines[0].startswith("| trained with | seeds | top-1 %, mean ± deviation |")
    for method, line in zip(ended.report["methods"], lines[2:], strict=False):
        assert line.startswith(f"| {method['label']} | 2 | {method['text']} |")
    for claim in ended.report["claims"]:
        assert f"- {claim['claim']}: {claim['verdict']} ({claim['numbers']})" in lines
    assert "- the paper's ordering cskd > deit > none: " in table
    with open(ended.out / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14
    heads = {(row["method"], bool(row["top1_dense"])) for row in rows}
    assert heads == {("none", False), ("deit", False), ("cskd", True)}
    svg = ET.fromstring((ended.out / "study.svg").read_bytes())
    texts = "".join(svg.itertext())
    assert all(method["label"] in texts for method in ended.report["methods"])
    assert (ended.out / "study.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_study_goes_on_without_doing_anything_twice(ended: Ended) -> None:
    assert ended.first.folders == ["teacher", "none-1", "deit-1", "cskd_spatial-1", "cskd_global-1"]
    left = [f"{name}-{seed}" for seed in (1, 2) for name in NAMES][3:]
    assert ended.second.folders == left
    # The run that was stopped after its last update goes on from its state, and does no other.
    stopped = ended.out / "runs/cskd_global-1"
    changed = {path for path, time in ended.before.items() if path.stat().st_mtime_ns != time}
    assert {path for path in changed if stopped not in path.parents} == set()
    assert stopped / "state.pt" not in changed
    assert ended.out / "results/cskd_global-1.json" not in ended.before
    assert ended.out / "results/none-1.json" in ended.before


def test_a_finished_study_only_reports_and_more_seeds_only_add(
    ended: Ended, small: World, recipes: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    watched = Watched()
    monkeypatch.setattr(stage_two, "train", watched)
    assert world.cli(*study(small, recipes, ended.out, "--seeds", 2)) == 0
    shown = capsys.readouterr().out
    assert "The paper's claims" in shown
    assert "cskd, CKF linear" in shown
    assert world.cli(*study(small, recipes, ended.out, "--seeds", 1, "--json", "--quiet")) == 0
    one = world.last_json(capsys.readouterr().out)
    assert {method["n"] for method in one["methods"]} == {1}
    assert "in the one seed there is" in one["claims"][0]["verdict"]
    assert watched.folders == []
    copy = tmp_path / "copy"  # stopped again as soon as it trains
    shutil.copytree(ended.out, copy)
    watched.stop = 1
    assert world.cli(*study(small, recipes, copy, "--seeds", 3, "--quiet")) == 130
    assert watched.folders == ["none-3"]


# --- refusals -------------------------------------------------------------------------------------


def test_a_changed_recipe_and_other_images_are_refused(
    ended: Ended, small: World, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "recipes"
    shutil.copytree(recipes, changed)
    before = files(ended.out)
    dump = (changed / "dump.toml").read_text()
    (changed / "dump.toml").write_text(dump.replace("flip = 0.5", "flip = 0.25"))
    assert world.cli(*study(small, changed, ended.out, "--quiet")) == 1
    told = capsys.readouterr().err
    assert "the study in this folder was begun with others" in told
    assert "another dump recipe" in told
    make_shards(small.shards.parent / "more", tmp_path / "other", shard_size=5, seed=5)
    other = World(tmp_path / "other", small.validation, small.cache)
    assert world.cli(*study(other, recipes, ended.out, "--quiet")) == 1
    assert "another training images" in capsys.readouterr().err
    assert files(ended.out) == before


def test_students_that_differ_in_more_than_the_method_are_refused(
    recipes: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "recipes"
    shutil.copytree(recipes, changed)
    text = (changed / "deit.toml").read_text()
    (changed / "deit.toml").write_text(text.replace("lr = 0.05", "lr = 0.06"))
    with pytest.raises(RecipeError, match="differ in more than the method"):
        load_recipes("cpu", changed)
    shutil.copy(changed / "none.toml", changed / "deit.toml")
    with pytest.raises(RecipeError, match="differ in more than the method"):
        load_recipes("cpu", changed)


def test_a_folder_of_something_else_is_refused(
    small: World, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    assert world.cli(*study(small, recipes, tmp_path)) == 1
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"top1": "high"}', '{"top1": 1, "top1": 2}'])
def test_a_damaged_result_is_told(text: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "study", {})
    assert ledger.find("none-1", "top1") is None
    ledger.add("none-1", {"top1": 5.0})
    assert ledger.find("none-1", "top1") == {"top1": 5.0}
    (tmp_path / "study/results/none-1.json").write_text(text)
    with pytest.raises(OutputError, match="damaged"):
        ledger.find("none-1", "top1")


# --- processes ------------------------------------------------------------------------------------


def test_several_students_at_a_time_are_processes_side_by_side(
    ended: Ended, small: World, recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ended.out, copy)
    for path in copy.glob("results/*-2.json"):
        path.unlink()
    asked: dict[str, Any] = {}

    def beside(
        calls: Mapping[str, Sequence[object]], processes: int, logs: Path
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        asked.update(calls=calls, processes=processes, logs=logs)
        for name, words in reversed(calls.items()):
            assert words[0] == "train"
            last = {"top1": 50.0, "top1_cls": 40.0}
            kept = ("student", "epochs", "updates", "seconds", "images_per_second", "out")
            yield name, {"last": last, **dict.fromkeys(kept, 1)}

    monkeypatch.setattr(studying, "side_by_side", beside)
    arguments = study(small, recipes, copy, "--seeds", 2, "--quiet")
    arguments[arguments.index("--jobs") + 1] = 2
    assert world.cli(*arguments) == 0
    assert list(asked["calls"]) == [f"{name}-2" for name in NAMES]
    assert (asked["processes"], asked["logs"]) == (2, copy / "logs")
    report = json.loads((copy / "study.json").read_text())
    assert {method["top1"]["2"] for method in report["methods"]} == {50.0}
