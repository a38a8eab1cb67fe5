"""The card of a published cache describes it correctly and escapes hostile text."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from markdown_it import MarkdownIt

from cskd_pipeline.cache.info import describe
from cskd_pipeline.cache.reader import open_cache
from cskd_pipeline.cli import app
from cskd_pipeline.errors import OutputError, printable
from cskd_pipeline.tools.markdown import escape
from cskd_pipeline.tools.publish.cache_card import MARK
from cskd_pipeline.tools.publish.publish_cache import PublishOptions, publish
from tests.cache.factories import dataset, make, teacher

EVIL = (
    "x](http://evil) ![i](http://evil/i.png) <script>alert(1)</script> `code` | cell | **b** "
    "```\n😀 # head\n- item\n1. one\n---\n\x1b[31m <!-- & &lt; {{x}} $y$ https://evil.example "
)


@pytest.fixture
def write_card(tmp_path: Path) -> Callable[..., str]:
    """Publish a cache with the given manifest fields and return its card."""

    def write(location: str | None = None, **changes: Any) -> str:
        make(tmp_path / "cache", **changes)
        publish(tmp_path / "cache", PublishOptions(location))
        return (tmp_path / "cache/README.md").read_text(encoding="utf-8")

    return write


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    metadata: dict[str, Any] = yaml.safe_load(front)
    return metadata


def body(card: str) -> list[Any]:
    """Return all tokens of the card's Markdown, including inline ones."""
    parser = MarkdownIt("gfm-like", {"linkify": False})
    tokens = parser.parse(card.split("---\n", 2)[2])
    return [part for token in tokens for part in (token, *(token.children or ()))]


def test_the_card_describes_the_cache(write_card: Callable[..., str], tmp_path: Path) -> None:
    card = write_card()
    info = describe(open_cache(tmp_path / "cache"))
    shown = " ".join(token.content for token in body(card))
    assert info["manifest_sha256"] in shown
    assert info["teacher"]["weights_sha256"] in shown
    assert "12 samples of 20 classes in 3 shards" in shown
    for name, encoding in info["encodings"].items():
        assert name in shown
        assert f"{encoding['bytes_per_view']:,.4g}" in shown


def test_the_front_matter_follows_the_hubs_schema(write_card: Callable[..., str]) -> None:
    front = front_matter(write_card(license="CC-BY-4.0"))
    assert front["pretty_name"] == "Teacher cache: resnet10t on toy"
    assert front["license"] == "cc-by-4.0"
    assert front["size_categories"] == ["n<1K"]
    assert "language" not in front
    assert "license_name" not in front


def test_other_licenses_keep_their_name(write_card: Callable[..., str]) -> None:
    front = front_matter(write_card(license="for research; ask us"))
    assert front["license"] == "other"
    assert front["license_name"] == "for research; ask us"


def test_the_commands_of_the_card_parse(write_card: Callable[..., str]) -> None:
    card = write_card(location="s3://a lab/it's")
    fence = next(token.content for token in body(card) if token.type == "fence")
    group: Any = typer.main.get_command(app)
    for line in fence.splitlines():
        program, *words = shlex.split(line)
        assert program == "cskd-pipeline"
        assert any(word.startswith("s3://a lab/it's@sha256:") for word in words)
        name = words.pop(0)
        command = group.commands[name]
        if name == "cache":
            command = command.commands[words.pop(0)]
        command.make_context(name, words)


def test_hostile_text_is_escaped(write_card: Callable[..., str]) -> None:
    card = write_card(
        dataset=replace(dataset(), name=EVIL),
        teacher=teacher(name=EVIL, source=EVIL),
        license=EVIL,
        notes=EVIL,
        versions={"torch": EVIL},
    )
    markup = [token.content.strip() for token in body(card) if token.type.startswith("html")]
    assert markup == [MARK]
    kinds = {token.type for token in body(card)}
    assert not kinds & {"link_open", "image", "strong_open", "hr"}
    assert not kinds & {"ordered_list_open", "bullet_list_open"}
    codes = [token.content for token in body(card) if token.type == "code_inline"]
    assert codes == [
        *("cache verify", "@sha256:", "preview.parquet", "datasets.load_dataset"),
        "sha256sum --quiet --check SHA256SUMS",
    ]
    headings = [
        token.content
        for before, token in zip(body(card), body(card)[1:], strict=False)
        if before.type == "heading_open"
    ]
    assert "head" not in headings
    assert "\x1b" not in card
    assert front_matter(card)["license_name"] == printable(EVIL.strip())
    rows = [line for line in card.splitlines() if line.startswith("| data set")]
    assert len(rows) == 1


@pytest.mark.parametrize(
    "value", [EVIL.splitlines()[0], "1. one", "- item", "---", "a_b*c*", "# h"]
)
def test_escaped_text_renders_as_the_original(value: str) -> None:
    tokens = MarkdownIt("commonmark").parse(escape(value))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    children = tokens[1].children or []
    assert "".join(child.content for child in children) == value.strip()
    assert {child.type for child in children} <= {"text", "text_special"}


def test_an_older_card_is_replaced_and_a_foreign_readme_is_kept(tmp_path: Path) -> None:
    make(tmp_path / "cache")
    readme = tmp_path / "cache/README.md"
    readme.write_text("my own words")
    with pytest.raises(OutputError, match="not written by this command"):
        publish(tmp_path / "cache", PublishOptions())
    assert readme.read_text() == "my own words"
    readme.unlink()
    publish(tmp_path / "cache", PublishOptions())
    first = readme.read_text()
    publish(tmp_path / "cache", PublishOptions("s3://bucket/it"))
    assert "s3://bucket/it" in readme.read_text() != first
