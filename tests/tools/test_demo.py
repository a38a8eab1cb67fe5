"""The images and the commands of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cskd_pipeline.tools import demo_images
from cskd_pipeline.tools.demo import METHODS, printed, run_demo


def images(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): np.asarray(Image.open(path)).tobytes()
        for path in sorted(folder.rglob("*.png"))
    }


def test_the_seed_determines_the_images(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        demo_images.write_digit_folders(tmp_path / name, train=12, validation=4, seed=seed)
    a, b, c = (images(tmp_path / name) for name in "abc")
    assert len(a) == 16
    assert a == b != c
    assert {len(pixels) for pixels in a.values()} == {48 * 48 * 3}


def test_only_training_labels_are_noisy(tmp_path: Path) -> None:
    demo_images.write_digit_folders(tmp_path, train=400, validation=100, seed=1)
    _, labels = demo_images._scans()
    order = np.random.default_rng(1).permutation(len(labels))
    first = {"validation": 0, "train": demo_images.VALIDATION_DIGITS}
    correct = {
        split: [
            int(path.parent.name) == labels[order[start + int(path.stem)]]
            for path in (tmp_path / split).rglob("*.png")
        ]
        for split, start in first.items()
    }
    assert len(correct["validation"]) == 100
    assert all(correct["validation"])
    wrong = 1 - np.mean(correct["train"])
    assert abs(wrong - 0.27) < 0.08  # 3.5 standard deviations of 400


def test_a_cluttered_page_has_several_digits_of_its_class_and_at_most_one_of_others() -> None:
    _, classes = demo_images._scans()
    pool, rng = np.arange(600), np.random.default_rng(0)
    counts = set()
    for chosen in range(300):
        digits = demo_images._digits(chosen, pool, classes, demo_images.CLUTTERED, rng)
        own, *others = np.bincount(classes[digits], minlength=10)[
            [classes[chosen], *(k for k in range(10) if k != classes[chosen])]
        ]
        assert digits[0] == chosen
        assert set(digits) <= set(pool)
        assert max(others) <= 1
        counts.add((own, sum(others)))
    assert counts == {(own, others) for own in (4, 5) for others in range(5)}


def test_every_stage_runs_with_the_seed_and_the_report_names_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds, calls = list[int](), list[list[str]]()
    monkeypatch.setattr(
        demo_images,
        "write_digit_folders",
        lambda out, *, train, validation, seed: seeds.append(seed),
    )

    def command(words: list[str]) -> dict[str, Any]:
        calls.append(words)
        return {"model": "m", "top1": 50.0, "seconds": 1.0, "out": "o", "bytes_per_view": {}} | {
            "page": words[words.index("--out") + 1] if words[0] == "show" else None
        }

    report = run_demo(tmp_path / "demo", command, seed=5)
    assert seeds == [5]
    assert report["seed"] == 5
    trained = [words for words in calls if words[0] == "train"]
    recipes = [words[words.index("--recipe") + 1] for words in trained]
    assert recipes == ["demo_teacher", *(f"demo_{method}" for method in METHODS)]
    assert all("run.seed=5" in words for words in trained)
    assert ["--cache" in words for words in trained] == [False, False, True, True]
    [dump] = [words for words in calls if words[0] == "dump-teacher"]
    assert "cache.root_seed=5" in dump
    assert calls[-1][0] == "show"
    assert report["page"] == str(tmp_path / "demo/page")
    assert any(str(report["page"]) in part for part in printed(report) if isinstance(part, str))
