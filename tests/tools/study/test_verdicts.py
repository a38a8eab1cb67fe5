"""The study's numbers, verdicts and comparisons."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cskd_pipeline.tools.study.arms import ARMS, CLAIMS, ForkPoint, StudyRun, runs_of
from cskd_pipeline.tools.study.ledger import load_recipes
from cskd_pipeline.tools.study.report import make_report
from cskd_pipeline.tools.study.run_study import Stages, StudyConfig
from cskd_pipeline.tools.study.verdicts import MeanOfRuns, judge, ordering

# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[55.8, 56.1, 55.2], [3.0, 3.0], [1e-3, 2.0, 70.0, 99.5, 12.0]])
def test_means_and_deviations_match_numpy(values: list[float]) -> None:
    spread = MeanOfRuns.of(values)
    assert spread.n == len(values)
    assert spread.mean == pytest.approx(np.mean(values))
    assert spread.deviation == pytest.approx(np.std(values, ddof=1))
    assert spread.error == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)))


def test_a_single_value_has_no_deviation() -> None:
    assert MeanOfRuns.of([41.5]) == MeanOfRuns(1, 41.5, None)
    assert str(MeanOfRuns.of([41.5])) == "41.50"
    assert str(MeanOfRuns.of([1.0, 2.0])) == "1.50 ± 0.71"


def seeds(*values: float) -> dict[int, float]:
    return dict(enumerate(values, start=1))


@pytest.mark.parametrize(
    ("better", "worse", "held", "clear", "word"),
    [
        (seeds(56, 55, 57), seeds(54, 53.2, 54.9), True, True, "held"),
        (seeds(56, 50, 53), seeds(52, 52, 52), True, False, "held, within noise"),
        (seeds(54, 53, 55), seeds(56, 55.2, 57.1), False, True, "did not hold"),
        (seeds(51, 54, 50), seeds(52, 52, 52), False, False, "did not hold, within noise"),
        (seeds(50, 51, 52), seeds(50, 51, 52), False, False, "did not hold: no difference"),
        (seeds(50, 52), seeds(51, 51), False, False, "did not hold: no difference"),
        (seeds(51, 52), seeds(50, 51), True, True, "held"),  # the same difference every time
        (seeds(56), seeds(54), True, None, "held, one seed only"),
        (seeds(54), seeds(56), False, None, "did not hold, one seed only"),
        (seeds(54), seeds(54), False, None, "did not hold: no difference, one seed only"),
        (seeds(56, math.nan), seeds(54, 53), None, None, "undecided"),
        (seeds(56, math.inf), seeds(54, 53), None, None, "undecided"),
    ],
)
def test_a_verdict_shows_whether_the_claim_held_and_whether_it_is_noise(
    better: dict[int, float], worse: dict[int, float], held: Any, clear: Any, word: str
) -> None:
    verdict = judge(better, worse)
    assert (verdict.held, verdict.clear) == (held, clear)
    assert verdict.word.startswith(word)


def test_differences_are_paired_by_seed() -> None:
    """Variation that methods share does not add noise to their difference."""
    better, worse = seeds(40, 60, 80), seeds(39, 58.9, 79.1)
    assert judge(better, worse).clear
    assert judge(better, worse).differences == pytest.approx((1.0, 1.1, 0.9))
    assert not judge(better, dict(zip(worse, (58.9, 79.1, 39), strict=True))).clear
    assert judge({3: 5.0, 1: 2.0}, {1: 1.0, 2: 9.0}).differences == (1.0,)  # seeds of both


def test_noise_ends_at_two_standard_errors() -> None:
    noise = np.array([-1.0, 0.0, 1.0])  # a standard error of 1 / sqrt(3)
    for mean, clear in ((1.16, True), (1.15, False), (-1.16, True), (-1.15, False)):
        assert judge(seeds(*(mean + noise)), seeds(0, 0, 0)).clear is clear


def test_the_numbers_of_a_verdict_are_readable() -> None:
    verdict = judge(seeds(56, 55, 57), seeds(54, 54, 54))
    assert verdict.numbers == ("56.00 ± 1.00 > 54.00 ± 0.00; Δ +2.00 ± 0.58: +2.00 +1.00 +3.00")
    assert judge(seeds(5), seeds(5)).numbers == "5.00 = 5.00; Δ +0.00: +0.00"
    assert " < " in judge(seeds(4, 5), seeds(5, 6)).numbers
    assert " ? " in judge(seeds(math.nan), seeds(5)).numbers


def test_an_ordering_is_as_strong_as_its_weakest_claim() -> None:
    held, noisy = judge(seeds(3, 3), seeds(1, 1.1)), judge(seeds(3, 5), seeds(2, 5.5))
    lost, lone = judge(seeds(1, 1), seeds(3, 3.1)), judge(seeds(3), seeds(1))
    unknown = judge(seeds(math.nan), seeds(1))
    assert ordering([held, held]) == "held"
    assert ordering([held, noisy]) == "held, within noise"
    assert ordering([noisy, lost]) == "did not hold"
    assert ordering([lone, lone]) == "held, one seed only"
    assert ordering([held, unknown]) == "undecided"


# --- comparisons ----------------------------------------------------------------------------------


def test_every_arm_runs_with_every_seed_and_forks_follow_their_trunk() -> None:
    full, forks = (runs_of(2, forks=which) for which in (False, True))
    assert [run.name for run in full] == ["none-2", "deit-2", "cskd_linear-2", "cskd_spatial-2"]
    assert [run.name for run in forks] == ["fork_linear-2", "fork_off-2"]
    names = {arm.name for arm in ARMS}
    assert all({claim.better, claim.worse} < names for claim in CLAIMS)


def reported(**top1: float) -> dict[str, Any]:
    """Return the report of one seed's runs; arms not named reached 50 %."""
    results = {
        StudyRun(arm, 1).name: {
            "top1": top1.get(arm.name, 50.0),
            "per_head": {"cls": 40.0} if arm.method == "none" else {"cls": 40.0, "dist": 41.0},
            "ema": {},
            "attention": [4.0, 8.0],
            "seconds": 1.0,
        }
        for arm in ARMS
    }
    return make_report(results, {1: ForkPoint(3, 60.0, True)})


@pytest.mark.parametrize(
    ("claim", "better", "worse"),
    [
        ("cskd > deit", "cskd_linear", "deit"),
        ("deit > none", "deit", "none"),
        ("CKF > r = 1, from the fork", "fork_linear", "cskd_spatial"),
        ("CKF > r = 1, full runs", "cskd_linear", "cskd_spatial"),
    ],
)
def test_a_claim_holds_if_its_first_arm_is_better(claim: str, better: str, worse: str) -> None:
    for top1, held in (({better: 60.0, worse: 55.0}, True), ({better: 55.0, worse: 60.0}, False)):
        verdict = {entry["claim"]: entry for entry in reported(**top1)["claims"]}[claim]
        assert verdict["held"] is held
        assert verdict["difference"] == pytest.approx(5.0 if held else -5.0)


def test_heads_are_compared_if_both_arms_have_them() -> None:
    by_head = {one["claim"]: one["by_head"] for one in reported(fork_off=52.0)["claims"]}
    assert set(by_head["deit > none"]) == {"mean", "cls"}
    late = by_head["no spatial term > r = 1, from the fork"]
    assert {name: verdict["difference"] for name, verdict in late.items()} == {
        "mean": 2.0,
        "cls": 0.0,
        "dist": 0.0,
    }


def test_the_papers_order_holds_and_its_reverse_does_not() -> None:
    assert reported(cskd_linear=60, deit=55, none=50)["ordering"]["verdict"].startswith("held")
    assert reported(cskd_linear=50, deit=55, none=60)["ordering"]["verdict"] == "did not hold"


def test_the_cache_uses_the_teachers_last_weights() -> None:
    stages = Stages(StudyConfig(Path("out")), load_recipes("digits"), "shards", "val")
    words = list(map(str, stages.dump()))
    weights = Path(words[words.index("--weights") + 1])
    trained = list(map(str, stages.teacher()))
    assert weights == Path(trained[trained.index("--out") + 1]) / "last.safetensors"


@pytest.mark.parametrize(("family", "size"), [("digits", 48), ("cifar10", 32)])
def test_the_recipes_of_a_family_are_consistent(family: str, size: int) -> None:
    recipes = load_recipes(family)
    cskd = recipes.students["cskd"]
    assert recipes.teacher.student.name == recipes.dump.teacher.name
    assert recipes.teacher.student.kwargs == recipes.dump.teacher.kwargs
    assert recipes.teacher.views is not None
    assert recipes.teacher.views.size == recipes.dump.views.size == size
    assert recipes.teacher.distill.method == "none"
    assert cskd.views == recipes.dump.views
    assert recipes.dump.cache.views >= cskd.schedule.epochs  # as many views as method none sees
    assert cskd.run.eval_every == 1  # the fork point needs the dense head's top-1
    assert cskd.distill.global_kind == cskd.distill.spatial_kind == "hard"
    assert cskd.run.ema > 0.9
