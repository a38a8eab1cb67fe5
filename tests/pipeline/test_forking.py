"""A fork continues another run's state with another loss, and CKF's progress restarts there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.errors import OutputError, WeightsError
from cskd_pipeline.models.checkpoint import read_header
from cskd_pipeline.pipeline import train as stage_two
from cskd_pipeline.tools.report.records import read_log
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.pipeline.test_training import assert_equal, final_state

EPOCHS = 3


def recipe_of(small: World, out: Path, *sets: str) -> TrainRecipe:
    every = ["schedule.warmup_epochs=0", "data.check=0", "distill.schedule=spatial", *sets]
    return world.train_recipe(
        small.shards, small.cache, out, sets=every, epochs=EPOCHS, batch_size=32
    )


@pytest.fixture(scope="module")
def trunk(small: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trunk") / "run"
    stage_two.train(recipe_of(small, out, "run.keep_every=2"))
    return out


def fork_of(trunk: Path, small: World, out: Path, *sets: str) -> TrainRecipe:
    return recipe_of(small, out, f"run.fork_from={trunk / 'state-00002.pt'}", *sets)


def test_states_are_kept_at_the_given_epochs(trunk: Path) -> None:
    assert [path.name for path in sorted(trunk.glob("state-*"))] == ["state-00002.pt"]


def test_a_fork_without_changes_equals_its_trunk(trunk: Path, small: World, tmp_path: Path) -> None:
    stage_two.train(fork_of(trunk, small, tmp_path / "fork"))
    expected, forked = final_state(trunk), final_state(tmp_path / "fork")
    for name in ("student", "ema", "optimizer", "update"):
        assert_equal(forked[name], expected[name])


def test_a_fork_has_its_own_loss_and_progress_and_its_trunks_history(
    trunk: Path, small: World, tmp_path: Path
) -> None:
    out, sets = tmp_path / "fork", ("distill.schedule=linear", "distill.step=update")
    stage_two.train(fork_of(trunk, small, out, *sets))
    rows, before = read_log(out / "summary.csv"), read_log(trunk / "summary.csv")
    assert [row["loss"] for row in rows[:2]] == [row["loss"] for row in before[:2]]
    # The last of one epoch's three updates: 1 - 2 / 3.
    assert [row["ckf_ratio"] for row in rows] == pytest.approx([1.0, 1.0, 1 / 3], abs=1e-6)
    assert rows[2]["loss"] != before[2]["loss"]
    [schedule, step, fork] = read_header(out / "last.safetensors").recipe_changes
    assert schedule == 'update 6: distill.schedule "spatial" -> "linear"'
    assert step == 'update 6: distill.step "epoch" -> "update"'
    assert fork == 'update 6: run.fork_from "" -> "run/state-00002.pt"'
    assert (out / "changes.jsonl").exists()


def test_a_stopped_fork_is_resumed_as_a_fork(
    trunk: Path, small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sets = tmp_path / "fork", ("distill.spatial_weight=0.0", "run.checkpoint_every=1")
    stage_two.train(fork_of(trunk, small, tmp_path / "full", *sets))
    step, recipe = stage_two.Trainer.step, fork_of(trunk, small, out, *sets)

    def interrupted(self: stage_two.Trainer, batches: object) -> object:
        if self.update == 7:
            raise KeyboardInterrupt
        return step(self, batches)  # type: ignore[arg-type]

    monkeypatch.setattr(stage_two.Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage_two.train(recipe)
    monkeypatch.undo()
    other = tmp_path / "other.pt"
    shutil.copy(trunk / "state.pt", other)
    for start in ("", "run.fork_from=gone.pt", f"run.fork_from={other}"):
        with pytest.raises(OutputError, match="started with another --fork-from"):
            stage_two.train(recipe_of(small, out, *sets, *filter(None, [start])), resume=True)
    stage_two.train(recipe, resume=True)
    assert_equal(final_state(out)["student"], final_state(tmp_path / "full")["student"])
    assert final_state(out)["forked_at"] == 2


def test_a_fork_killed_before_its_first_update_starts_again(
    trunk: Path, small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "fork"
    recipe = fork_of(trunk, small, out, "distill.schedule=linear")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("to_toml", "write_changes", "RunLog"):
        monkeypatch.setattr(stage_two, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            stage_two.train(recipe, resume=True)
        monkeypatch.undo()
    monkeypatch.setattr(stage_two, "RunLog", interrupt)
    (out / "changes.jsonl").unlink()
    with pytest.raises(KeyboardInterrupt):
        stage_two.train(recipe, resume=True)
    assert len((out / "changes.jsonl").read_text().splitlines()) == 1


def test_states_that_cannot_be_forked_are_refused(
    trunk: Path, small: World, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="state was saved with another recipe") as caught:
        stage_two.train(fork_of(trunk, small, tmp_path / "seed", "run.seed=5"))
    assert "run.seed: was 0, now 5" in str(caught.value.problems)
    ended = tmp_path / "ended.pt"
    shutil.copy(trunk / "state.pt", ended)
    with pytest.raises(OutputError, match="only at the end of an epoch") as caught:
        stage_two.train(recipe_of(small, tmp_path / "none-left", f"run.fork_from={ended}"))
    assert caught.value.found == "update 9 of 9, 3 per epoch"
    with pytest.raises(OutputError, match="the run was started from other weights"):
        stage_two.train(
            fork_of(
                trunk, small, tmp_path / "init", f"student.init_from={trunk / 'last.safetensors'}"
            )
        )
    with pytest.raises(WeightsError, match="the state to fork from does not exist"):
        stage_two.train(recipe_of(small, tmp_path / "gone", "run.fork_from=gone.pt"))
