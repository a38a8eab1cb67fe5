"""The page of a cache in a real browser, with hostile names too."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from cskd_pipeline.cache.manifest import DatasetManifest
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.data.join import join
from cskd_pipeline.tools.report import page
from cskd_pipeline.tools.report.gallery import choose_views
from cskd_pipeline.tools.report.labels import read_labels
from tests.pipeline import world
from tests.pipeline.conftest import World
from tests.tools.report.browser import all_of, console_messages, one, open_page

Capture = pytest.CaptureFixture[str]

HOSTILE = (
    "<img src=x onerror=\"window.hurt='img'\">",
    "</script><script>window.hurt='script'</script>",
    "\u202egnp.exe & <b>bold</b> " + "long " * 190,
    "'\"><svg onload=\"window.hurt='svg'\"> {{ 7*7 }} `${window.hurt=1}`",
)


@pytest.fixture(scope="module")
def hostile(small: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a cache whose classes have hostile names."""
    root = tmp_path_factory.mktemp("hostile")
    shards = shutil.copytree(small.shards, root / "shards")
    index = shards / "train.json"
    assert world.cli("index", shards, "--out", index, "-q") == 0
    dataset = DatasetManifest.from_json(json.loads(index.read_text()))
    named = replace(dataset, class_names=HOSTILE, name="<script>window.hurt='name'</script>")
    document = json.loads(index.read_text()) | named.to_json()
    index.write_text(json.dumps(document))
    words = ["dump-teacher", "--shards", index, "--teacher", world.TEACHER, "--weights", "random"]
    words += ["--cache", root / "c", "--workers", 0, "--device", "cpu", "-q"]
    assert world.cli(*words, *world.as_flags(world.dump_sets())) == 0
    return show(root / "c", index, root / "page", "--images", 3)


def show(cache: Path, shards: Path, out: Path, *more: object) -> Path:
    assert world.cli("show", cache, "--shards", shards, "--out", out, "-q", *more) == 0
    return out / "index.html"


@pytest.fixture(scope="module")
def plain(small: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page")
    return show(small.cache, small.shards, out, "--images", 5, "--epochs", 10)


def labels(chrome: webdriver.Chrome) -> list[int]:
    """Return the labels of all locations, view by view."""
    values: list[int] = chrome.execute_script(
        "return [...document.querySelectorAll('.locations span')].map(s => Number(s.dataset.label))"
    )
    return values


def test_it_opens_from_disk_with_a_clean_console(chrome: webdriver.Chrome, plain: Path) -> None:
    open_page(chrome, plain)
    assert console_messages(chrome) == []
    assert len(all_of(chrome, "figure[data-view]")) == 5
    widths = chrome.execute_script(
        "return [...document.querySelectorAll('#gallery img')].map(i => i.naturalWidth)"
    )
    assert widths == [world.SIZE] * 5
    assert len(all_of(chrome, "#moments [data-r] svg")) == 3 * 3
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", plain.read_text())


def test_the_slider_turns_local_labels_into_the_global_one(
    chrome: webdriver.Chrome, plain: Path, small: World
) -> None:
    open_page(chrome, plain)
    cache = open_cache(small.cache)
    rows = choose_views(join(load_dataset(str(small.shards)), cache), 5)
    expected = read_labels(cache, rows)
    slider = one(chrome, "#at")
    seen = [labels(chrome)]
    for _ in range(100):
        slider.send_keys(Keys.ARROW_RIGHT)
        seen.append(labels(chrome))
    for step, shown in enumerate(seen):
        assert shown == expected.at(1 - step / 100).ravel().tolist(), step
    assert one(chrome, "#status").text.startswith("r = 0.00: ")
    assert len(set(map(tuple, seen))) > 3  # labels change in between, too


def test_every_class_is_outlined_by_its_region_and_the_largest_are_named(
    chrome: webdriver.Chrome, plain: Path
) -> None:
    """The view's own classes always; others if they cover a sixteenth of the locations."""
    open_page(chrome, plain)
    kinds, names = set(), sorted(world.CLASSES)
    for step in (0, 50, 100):
        chrome.execute_script("arguments[0].value = arguments[1]", one(chrome, "#at"), step)
        one(chrome, "#at").send_keys(Keys.ARROW_LEFT)
        for view in outlines(chrome):
            shown = [int(label) for label in view["labels"]]
            own = [int(k) for k in view["of"].split()]
            expected = {k for k in shown if k in own or shown.count(k) * 16 >= len(shown)}
            regions = [[k == label for label in shown] for k in expected]
            assert sorted(view["inside"]) == sorted(regions)
            named = {names[k] for k in expected}
            assert set(view["names"]) <= named
            assert view["names"]
            shares = {f"{names[k]} {shown.count(k)}" for k in expected}
            rest = sum(k not in expected for k in shown)
            assert set(view["legend"]) == shares | ({f"other {rest}"} if rest else set())
            kinds |= set(view["kinds"])
    assert {"own", "partner", "other"} <= kinds


def outlines(chrome: webdriver.Chrome) -> list[dict[str, Any]]:
    """Return for each view its labels, the locations inside each outline, and its texts."""
    views: list[dict[str, Any]] = chrome.execute_script("""
        return [...document.querySelectorAll("#gallery [data-view]")].map((figure) => {
            const svg = figure.querySelector(".outlines svg");
            const paths = [...svg.querySelectorAll("path:not(.casing)")];
            const columns = svg.viewBox.baseVal.width / 100;
            const cells = [...figure.querySelectorAll(".locations span")];
            const middle = (i) =>
                new DOMPoint(100 * (i % columns) + 50, 100 * Math.floor(i / columns) + 50);
            const text = (selector) =>
                [...figure.querySelectorAll(`${selector}:not([hidden])`)].map((e) => e.textContent);
            return {
                labels: cells.map((cell) => cell.dataset.label), of: figure.dataset.classes,
                inside: paths.map((path) => cells.map((_, i) => path.isPointInFill(middle(i)))),
                kinds: paths.map((path) => path.getAttribute("class")),
                names: text(".outlines .name"), legend: text(".legend li:not(.of)"),
            };
        });
    """)
    return views


def test_the_button_plays_to_the_end_and_stops(chrome: webdriver.Chrome, plain: Path) -> None:
    open_page(chrome, plain)
    slider, button = one(chrome, "#at"), one(chrome, "#play")
    chrome.execute_script("arguments[0].value = 97", slider)
    button.click()
    assert button.get_attribute("aria-label") == "pause"
    WebDriverWait(chrome, 5, 0.05).until(lambda _: "play" in button.get_attribute("aria-label"))
    assert slider.get_attribute("value") == "100"
    assert one(chrome, "#status").text.startswith("r = 0.00: ")


def test_a_schedule_steps_through_its_epochs(chrome: webdriver.Chrome, plain: Path) -> None:
    open_page(chrome, plain)
    assert [option.text for option in all_of(chrome, "#drive option")] == [
        "r", "epochs, linear", "epochs, x2", "epochs, cos",
    ]  # fmt: skip
    one(chrome, "#drive").send_keys("epochs, x2")
    slider = one(chrome, "#at")
    shown_epochs = []
    for _ in range(3):
        shown_epochs.append(one(chrome, "#status").text.partition(":")[0])
        slider.send_keys(Keys.ARROW_RIGHT)
    assert shown_epochs == [
        "epoch 1 of 10, r = 1.00", "epoch 2 of 10, r = 0.81", "epoch 3 of 10, r = 0.64",
    ]  # fmt: skip


def test_arrow_keys_move_between_locations_and_read_them_out(
    chrome: webdriver.Chrome, plain: Path
) -> None:
    open_page(chrome, plain)
    figure = one(chrome, '[data-view="1"]')
    first = one(figure, ".locations span")
    first.click()
    chrome.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    chrome.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    text = one(figure, ".readout").text
    assert text.startswith("Row 2, column 2: ")
    assert chrome.switch_to.active_element.get_attribute("aria-label") in text
    assert text.count("(r ") >= 1


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_vertically_and_both_schemes_are_readable(
    chrome: webdriver.Chrome, plain: Path, hostile: Path, dark: bool
) -> None:
    for path in (plain, hostile):
        open_page(chrome, path, width=360, height=740, dark=dark)
        wide, page_width = chrome.execute_script(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert wide <= page_width == 360
    ground, ink = chrome.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    )
    assert contrast(ground, ink) > 7
    assert (luminance(ground) < 0.1) == dark


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(ground: str, ink: str) -> float:
    low, high = sorted((luminance(ground), luminance(ink)))
    return (high + 0.05) / (low + 0.05)


def test_hostile_names_stay_text(chrome: webdriver.Chrome, hostile: Path) -> None:
    open_page(chrome, hostile)
    slider = one(chrome, "#at")
    for _ in range(5):
        slider.send_keys(Keys.PAGE_UP)
    assert console_messages(chrome) == []
    assert chrome.execute_script("return window.hurt") is None
    assert len(all_of(chrome, "script")) == 2
    assert not all_of(chrome, "main b, main img:not(.stage img), main [onload], main [onerror]")
    body = one(chrome, "body").text
    assert "<img src=x onerror=" in body
    assert "<script>window.hurt='name'</script>" in one(chrome, "h1").text
    assert "\u202e" not in hostile.read_text()
    title = one(chrome, ".locations span[title]").get_attribute("title")
    assert len(title) <= 100


def test_the_content_security_policy_stops_injected_markup(
    chrome: webdriver.Chrome, tmp_path: Path
) -> None:
    """Markup injected on purpose neither runs nor loads anything."""
    evil = "<p id=in>in</p><img src=x onerror=\"window.hurt=1\"><img src='http://127.0.0.1:9/x'>"
    evil += "<script>window.hurt=2</script>"
    document = page.render("base.html", "t", data={}).replace("<main>", f"<main>{evil}")
    path = tmp_path / "evil.html"
    path.write_text(document)
    open_page(chrome, path)
    assert one(chrome, "#in").text == "in"
    assert chrome.execute_script("return window.hurt") is None
    assert sum("Content Security Policy" in text for text in console_messages(chrome)) >= 2


def test_only_our_own_markup_is_unescaped() -> None:
    templates = files("cskd_pipeline.tools.report").joinpath("templates").iterdir()
    text = "".join(one.read_text() for one in templates if one.name.endswith(".html"))
    assert set(re.findall(r"(\S+)\s*\|\s*safe", text)) == {
        "style", "script", "plot.svg()", "view.image",
    }  # fmt: skip
    assert "autoescape" not in text


def test_data_cannot_close_its_script_element() -> None:
    scripts = ("locations.js",)
    document = page.render("base.html", "t", data={"a": "</script><b>&"}, scripts=scripts)
    inside = re.search(r'id="data">(.*?)</script>', document)
    assert inside is not None
    assert "<" not in inside[1]
    assert json.loads(inside[1]) == {"a": "</script><b>&"}


def test_the_report_and_the_page_agree(small: World, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "page"
    words = ["show", small.cache, "--shards", small.shards, "--out", out, "--export", "svg"]
    assert world.cli(*words, "--json", "--images", 4, "--samples", 60) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    names = {"index.html", "agreement.svg"}
    assert {path.name for path in out.iterdir()} == names
    assert report["bytes"] == (out / "index.html").stat().st_size
    assert (report["views_shown"], report["views_exact"]) == (4, 4)
    assert report["views_counted"] <= 60
    # The smallest exact encoding is read; with ten classes that is dense.
    assert (report["labels_from"], report["labels_exact"]) == ("dense", True)
    text = (out / "index.html").read_text()
    assert 1 < report["labels_per_location"] < 10
    assert f"<dd>{report['labels_per_location']:.2f}</dd><dt>labels per location" in text
    inside = re.search(r'id="data">(.*?)</script>', text)
    assert inside is not None
    assert json.loads(inside[1])["agreement"][100] == pytest.approx(
        report["agreement"]["r=1"], abs=1e-4
    )
    assert "6 of 6 units are finished" in text


def test_the_page_of_an_unfinished_cache_lists_missing_shards(small: World, tmp_path: Path) -> None:
    words = ["dump-teacher", "--shards", small.shards, "--teacher", world.TEACHER, "-q"]
    words += ["--weights", "random", "--cache", tmp_path / "c", "--workers", 0, "--device", "cpu"]
    words += world.as_flags(world.dump_sets())
    assert world.cli(*words, "--shard-range", "1:2") == 0
    text = show(tmp_path / "c", small.shards, tmp_path / "page").read_text()
    assert "2 of 6 units are finished" in text
    assert re.search(r">train-0+\.tar</td><td [^<]*>32</td><td [^<]*>0</td>", text)


def test_changed_images_have_a_warning(small: World, tmp_path: Path) -> None:
    """Views of recompressed images are shown with a warning."""
    world.draw_images(tmp_path / "images", per_class=24, seed=9)
    words = ["make-shards", tmp_path / "images", tmp_path / "shards", "--shard-size", 35, "-q"]
    assert world.cli(*words) == 0
    text = show(small.cache, tmp_path / "shards", tmp_path / "page", "--images", 4).read_text()
    assert text.count("Not from the image that the teacher saw.") == 4


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ((), 2, "--shards SHARDS"),
        (("--shards", "none-*.tar"), 1, "no file matches"),
        (("--shards", "shards", "--images", "0"), 2, "--images"),
    ],
)
def test_invalid_arguments_are_refused_and_leave_no_file(
    small: World, tmp_path: Path, capsys: Capture, words: tuple[str, ...], code: int, expected: str
) -> None:
    root = small.shards.parent
    arguments = [root / word if (root / word).exists() else word for word in words]
    assert world.cli("show", small.cache, *arguments, "--out", tmp_path / "page") == code
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message
    assert not (tmp_path / "page").exists()
