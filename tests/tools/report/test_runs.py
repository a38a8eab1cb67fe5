"""The page of training runs in a real browser: its numbers, and hostile names."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from cskd_pipeline.cache.reader import Cache, open_cache
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.errors import UsageError
from cskd_pipeline.models.checkpoint import read_header, save_student
from cskd_pipeline.pipeline.train import train
from cskd_pipeline.runtime.classes import ClassGuard
from cskd_pipeline.tools.report import curves
from cskd_pipeline.tools.report.dense_overlay import compare
from cskd_pipeline.tools.report.page import PageOptions
from cskd_pipeline.tools.report.records import read_runs
from cskd_pipeline.views.apply import mix_pixels, render, to_float
from cskd_pipeline.views.decode import decode
from cskd_pipeline.views.draw import draw
from cskd_pipeline.views.mixing import draw_mix, matching
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.tools.report.browser import all_of, console_messages, one, open_page
from tests.tools.report.fake_runs import log_text, make_run, rows

Capture = pytest.CaptureFixture[str]
EVIL = '<img src=x onerror="window.hurt=1"> $x_1$ \u202e'
BOLD = '<b onclick="window.hurt=2">cskd'
EPOCHS = 3


@dataclass(frozen=True)
class Shown:
    """A real run ``cskd``, a fake one ``plain``, and the page of both with predictions."""

    cskd: Path
    plain: Path
    page: Path
    report: dict[str, Any]


@pytest.fixture(scope="module")
def shown(small: World, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    root = tmp_path_factory.mktemp("runs")
    recipe = world.train_recipe(
        small.shards,
        small.cache,
        root / BOLD,
        epochs=EPOCHS,
        kwargs=world.STUDENT_KWARGS.replace("}", ", drop_rate=0.2}"),  # off in evaluation mode
        sets=[f'data.val_shards="{small.validation}"'],
    )
    train(recipe)
    plain = make_run(root / EVIL.replace("/", "|"), method="none", sets=(f"run.wandb={EVIL}",))
    report = show(root / "page", root / BOLD, plain, "--shards", small.shards, "--images", 5)
    return Shown(root / BOLD, plain, root / "page/index.html", report)


def show(out: Path, *words: object) -> dict[str, Any]:
    """Run the command and return its --json object."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        assert world.cli("show", *words, "--out", out, "--json", "-q") == 0
    report: dict[str, Any] = json.loads(stdout.getvalue())
    return report


# The browser


def test_it_opens_from_disk_with_a_clean_console(chrome: webdriver.Chrome, shown: Shown) -> None:
    open_page(chrome, shown.page)
    assert console_messages(chrome) == []
    titles = {title.text for title in all_of(chrome, ".plot h3")}
    every = [curve.title for group in curves.GROUPS.values() for curve in group]
    first = {"Top-1 over epochs", "Top-1 over training time"}
    assert titles == {*every, *first, "Locations at which student and teacher agree"}
    assert len(all_of(chrome, ".plot svg[role=img]")) == len(titles)
    assert len(all_of(chrome, "figure[data-view]")) == 5
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", shown.page.read_text())
    ids = chrome.execute_script("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids)) > len(titles)  # each plot refers to its own shapes


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_vertically(chrome: webdriver.Chrome, shown: Shown, dark: bool) -> None:
    open_page(chrome, shown.page, width=360, height=740, dark=dark)
    wide, page_width = chrome.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= page_width == 360
    cells = "[...document.querySelectorAll('td')].map((td) => td.getBoundingClientRect().right)"
    assert chrome.execute_script(f"return Math.max(...{cells})") <= 360  # no column is cut


def test_names_and_recipes_stay_text(chrome: webdriver.Chrome, shown: Shown) -> None:
    open_page(chrome, shown.page)
    one(chrome, "#at").send_keys(Keys.PAGE_UP)
    assert chrome.execute_script("return window.hurt") is None
    assert not all_of(chrome, "main img:not(.stage img), main [onerror], main b")
    cells = [cell.get_attribute("textContent") for cell in all_of(chrome, "#runs td")]
    escaped = EVIL.replace("\u202e", r"\u202e")
    assert cells.count(escaped) == 2  # the run's name, and a value of its recipe
    assert r"""<img src=x onerror="window.hurt=1"> $x_1$""" in one(chrome, "#top1 .key").text
    assert "\u202e" not in shown.page.read_text()


def painted(chrome: webdriver.Chrome) -> list[list[dict[str, Any]]]:
    """Return labels and marks of all cells, by view, then by panel (teacher first)."""
    panels: list[list[dict[str, Any]]] = chrome.execute_script("""
        return [...document.querySelectorAll("[data-view]")].map((figure) =>
            [...figure.querySelectorAll("[data-panel]")].map((panel) => {
                const cells = [...panel.querySelectorAll(".locations span")];
                return {
                    labels: cells.map((cell) => Number(cell.dataset.label)),
                    same: cells.map((cell) => cell.classList.contains("same")),
                    share: panel.querySelector(".share").textContent,
                };
            }));
    """)
    return panels


def test_the_slider_updates_the_teacher_and_the_agreement(
    chrome: webdriver.Chrome, shown: Shown, small: World
) -> None:
    compared, _ = compare(
        read_runs([shown.cskd]),
        ClassGuard(),
        PageOptions(str(small.shards), images=5, samples=256),
    )
    assert compared is not None
    [student] = compared.students
    open_page(chrome, shown.page)
    slider = one(chrome, "#at")
    ratio = 1 - int(slider.get_attribute("value")) / 100
    assert ratio == pytest.approx(1 / EPOCHS, abs=0.01)  # the run's last
    for r, keys in ((ratio, ""), (1.0, Keys.HOME), (0.0, Keys.END)):
        slider.send_keys(keys)
        expected = compared.teacher.at(r)
        total = 0
        for view, (teacher, panel) in enumerate(painted(chrome)):
            assert teacher["labels"] == expected[view].ravel().tolist()
            assert panel["labels"] == student.labels[view].ravel().tolist()
            same = (expected[view] == student.labels[view]).ravel()
            assert panel["same"] == same.tolist()
            assert not any(teacher["same"])
            assert panel["share"] == f"agrees at {same.sum()} of 16"
            total += int(same.sum())
        assert (
            f"{BOLD} agrees at {total / 0.8 + 1e-9:.1f} % of 80 locations"
            in one(chrome, "#status").text
        )


def test_a_location_is_read_out_for_every_panel(chrome: webdriver.Chrome, shown: Shown) -> None:
    open_page(chrome, shown.page)
    figure = one(chrome, '[data-view="1"]')
    one(figure, '[data-panel="1"] .locations span').click()
    chrome.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    label = chrome.switch_to.active_element.get_attribute("aria-label")
    text = one(figure, ".readout").text
    assert text.startswith("Row 1, column 2: teacher: ")
    assert text.endswith(f"; {BOLD}: {label}")


# Numbers


def test_student_labels_are_those_of_its_patch_tokens(shown: Shown, small: World) -> None:
    """Expected labels are computed from the image files without the page's code."""
    compared, omitted = compare(
        read_runs([shown.cskd]),
        ClassGuard(),
        PageOptions(str(small.shards), images=6, samples=24),
    )
    assert compared is not None
    assert omitted == {}
    assert compared.counted == (24, 4, 4)
    assert all(view.same and view.exact for view in compared.views)
    header = read_header(shown.cskd / "best.safetensors")
    model: Any = timm.create_model(header.model, num_classes=header.num_classes, **header.kwargs)
    model.load_state_dict(load_file(shown.cskd / "best.safetensors"))
    model.eval()
    mean, std = (np.array(model.default_cfg[name], np.float32) for name in ("mean", "std"))
    reader = open_cache(small.cache)
    for i, view in enumerate(compared.views):
        shard, offset = reader.find([view.key])[0].tolist()
        seen = pixels(small.shards, reader, view.number, shard, offset)
        x = torch.from_numpy((seen - mean) / std).permute(2, 0, 1)[None].float()
        with torch.inference_mode():
            tokens = model.head_dist(model.forward_features(x)[0, 2:])  # (64, K)
        locations = tokens.reshape(4, 2, 4, 2, -1).mean(dim=(1, 3))  # 8x8 tokens to 4x4
        assert compared.students[0].labels[i].tolist() == locations.argmax(-1).tolist()


def pixels(shards: Path, reader: Cache, view: int, shard: int, offset: int) -> np.ndarray:
    """Return a view as the network saw it, (S, S, 3) float32."""
    policy, tar = reader.manifest.policy, load_dataset(str(shards)).shards[shard]
    root, count = reader.manifest.root_seed, len(tar)
    partner = int(matching(root, tar.keys_sha256, count, view, policy)[offset])
    seeds, views = [], []
    for sample in (offset, partner):
        seeds.append(int(reader.seeds(view, shard)[sample]))
        image = decode(next(tar.read_images([sample])), tar.key(sample))
        params = draw(seeds[-1], policy, image.shape[1], image.shape[0])
        views.append(to_float(render(image, params, policy), params, policy))
    return mix_pixels(views[0], views[1], draw_mix(seeds[0], seeds[1], policy))


def test_agreement_is_the_share_of_equal_labels(shown: Shown, small: World) -> None:
    runs = read_runs([shown.cskd])
    compared, _ = compare(runs, ClassGuard(), PageOptions(str(small.shards), images=40, samples=40))
    assert compared is not None
    [student] = compared.students
    for r in (0.0, 0.37, 1.0):
        same = compared.teacher.at(r) == student.labels
        assert student.at(r) == pytest.approx(same.mean())
    assert student.agreement.max() > student.agreement.min()


def test_the_page_shows_the_logged_numbers(
    chrome: webdriver.Chrome, shown: Shown, small: World
) -> None:
    real, plain = shown.report["runs"].values()
    [run] = read_runs([shown.cskd])
    assert real["best"] == run.best()
    assert (real["epochs"], real["epochs_in_all"], real["method"]) == (EPOCHS, EPOCHS, "cskd")
    assert real["dense"]["student"].endswith("best.safetensors")
    assert set(real["dense"]["agreement"]) == {"r=1", "r=0", "last"}
    logged = rows(4, method="none")
    assert plain["best"] == {"top1": 35.25, "epoch": 4, "weights": "ema"}
    assert (plain["top1"], plain["ema_top1"], plain["loss"]) == (34.5, 35.25, logged[-1]["loss"])
    assert plain["data_wait"] == pytest.approx(sum(r["data_wait"] for r in logged) / 4)
    assert plain["dense"] == "method none trains no dense head"
    assert shown.report["differences"]["distill.method"] == ["cskd", "none"]
    assert shown.report["bytes"] == shown.page.stat().st_size
    open_page(chrome, shown.page)
    one(chrome, "#figures summary").click()
    cells = [cell.text for cell in all_of(chrome, "#figures tr:nth-child(2) td")][1:]
    assert cells == ["none", "-", "4", "35.25", "epoch 4, EMA", "34.5", "35.25", "503", "3.4"]
    assert "is left out: method none trains no dense head." in one(chrome, "#dense").text
    first, second = (row.text for row in all_of(chrome, "#top1 tbody tr"))
    assert first.split()[-8:] == ["35.25", "-", "1", "4", "50", "seconds", "503", "3.4"]
    behind = real["best"]["top1"] - 35.25
    assert f"{real['best']['top1']:.2f} {behind:.2f} 1 3 " in second
    assert "reaches 35.25 % top-1 in 50 seconds" in one(chrome, ".lede").text
    described = [d.get_attribute("textContent") for d in all_of(chrome, ".plot svg desc")]
    assert any("34.5 at epoch 4" in text for text in described)


def test_every_plot_is_exported(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", method="none", shift=1.0)]
    common = {"top1_epochs", "top1_time", "loss", "loss_base"}
    common |= {"top1", "top1_ema", "top1_cls", "top1_dist"}
    every = common | {"loss_global", "loss_spatial", "top1_dense"}
    for kind, head, names, chosen in (
        ("svg", b"<?xml", every, runs),
        ("png", b"\x89PNG", common, runs[1:]),
    ):
        report = show(tmp_path / kind, *chosen, "--export", kind)
        files = {path.name for path in (tmp_path / kind).iterdir()}
        assert files == {"index.html", *(f"{name}.{kind}" for name in names)}
        assert {Path(path).name for path in report["plots"]} == files - {"index.html"}
        data = [Path(path).read_bytes() for path in report["plots"]]
        assert all(one.startswith(head) for one in data)
        assert len(set(data)) == len(names)
    for group in curves.GROUPS.values():
        for curve in group:
            assert f">{curve.y_label}<" in (tmp_path / f"svg/{curve.name}.svg").read_text()


def test_a_run_in_its_first_epoch_is_shown(chrome: webdriver.Chrome, tmp_path: Path) -> None:
    run = make_run(tmp_path / "new", logged=0)
    report = show(tmp_path / "out", run)
    assert report["runs"]["new"]["best"] is None
    open_page(chrome, tmp_path / "out/index.html")
    assert console_messages(chrome) == []
    assert "new has not finished an epoch yet" in one(chrome, "#runs").text
    assert "0 of 4" in one(chrome, "#top1 table").text


def test_long_recipe_differences_are_cut(chrome: webdriver.Chrome, tmp_path: Path) -> None:
    keys = ", ".join(f"k{n} = {n}" for n in range(5000))
    runs = [
        make_run(tmp_path / "a", sets=(f"student.kwargs={{{keys}}}",)),
        make_run(tmp_path / "b"),
    ]
    report = show(tmp_path / "out", *runs)
    assert len(report["differences"]) == 5000
    open_page(chrome, tmp_path / "out/index.html")
    assert len(all_of(chrome, "#runs details:first-of-type tbody tr")) == 200
    one(chrome, "#runs summary").click()
    assert "4800 more keys are listed by --json." in one(chrome, "#runs").text


# Missing or incompatible students


def test_without_a_dense_head_no_cache_is_needed(chrome: webdriver.Chrome, tmp_path: Path) -> None:
    run = make_run(tmp_path / "deit", method="deit", logged=0)
    show(tmp_path / "out", run, "--shards", "nowhere")
    open_page(chrome, tmp_path / "out/index.html")
    assert console_messages(chrome) == []
    assert "deit is left out: method deit trains no dense head." in one(chrome, "#dense").text
    assert not all_of(chrome, "#dense table, #dense .controls")


@pytest.mark.parametrize("field", ["grid", "size", "num_classes"])
def test_a_student_of_another_cache_is_left_out_with_the_reason(
    shown: Shown, small: World, tmp_path: Path, field: str
) -> None:
    run = shutil.copytree(shown.cskd, tmp_path / "run")
    header = replace(read_header(run / "best.safetensors"), class_names=None)
    other: dict[str, Any] = {"grid": (2, 2), "size": 64, "num_classes": 7}
    state = load_file(run / "best.safetensors")
    save_student(run / "best.safetensors", state, replace(header, **{field: other[field]}))
    compared, omitted = compare(
        read_runs([run]),
        ClassGuard(),
        PageOptions(str(small.shards), images=2, samples=2),
    )
    assert compared is None
    assert str(other[field]) in omitted["run"]


def test_a_damaged_student_is_refused(
    shown: Shown, small: World, tmp_path: Path, capsys: Capture
) -> None:
    run = shutil.copytree(shown.cskd, tmp_path / "run")
    save_file(load_file(run / "best.safetensors"), run / "best.safetensors")  # without its header
    words = ("show", run, "--shards", small.shards, "--out", tmp_path / "out")
    assert world.cli(*words) == 1
    assert "has no valid student header" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", ["", "https://example.org/cache", "gone"])
def test_a_recipe_may_name_only_a_local_cache(small: World, tmp_path: Path, named: str) -> None:
    run = make_run(tmp_path / "run")
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('cache = "cache"', f'cache = "{named}"'))
    options = PageOptions(str(small.shards), images=1, samples=1)
    with pytest.raises(UsageError, match="--cache"):
        compare(read_runs([run]), ClassGuard(), options)


# Refusals


def test_invalid_arguments_are_refused_and_leave_no_file(
    small: World, tmp_path: Path, capsys: Capture
) -> None:
    run = make_run(tmp_path / "run")
    broken = make_run(tmp_path / "broken")
    (broken / "summary.csv").write_text(log_text(rows(3)).replace("\n2,", "\n2,\x1b[2J"))
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((run, small.cache), 1, "not a training run"),
        ((run, run), 2, "duplicate run"),
        ((run, broken), 1, r"line 3: loss \x1b[2J"),
        ((tmp_path / "nothing",), 2, "neither a cache nor a training run"),
        ((tmp_path,), 2, "neither a cache nor a training run"),
        ((run, "--epochs", 5), 2, "--epochs has an effect only for a cache"),
        ((run, "--cache", small.cache), 2, "--cache has an effect only for runs with --shards"),
        ((run, "--images", 5), 2, "--images has an effect only for runs with --shards"),
        ((small.cache, "--shards", small.shards, "--cache", "c"), 2, "effect only for runs"),
        ((run, "--export", "pdf"), 2, "pdf"),
    ]
    for words, code, expected in cases:
        assert world.cli("show", *words, "--out", tmp_path / "out") == code, words
        message = capsys.readouterr().err
        assert expected in message
        assert "Traceback" not in message
        assert not (tmp_path / "out").exists()


def test_an_existing_page_is_replaced(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", epochs=2, logged=1, method="none")
    show(tmp_path / "out", run)
    first = (tmp_path / "out/index.html").read_bytes()
    show(tmp_path / "out", run)
    assert (tmp_path / "out/index.html").read_bytes() == first  # equal runs, equal pages
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.html"]
