"""Commands, flags, recipes, keys and rooms named in README, docs/ and CONTRIBUTING exist.

``python -m tests.test_documents`` renews ``docs/recipe-keys.md`` from the recipes' models.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest

import cskd_pipeline
from cskd_pipeline.config.sections import DumpRecipe, TrainRecipe, key_info, key_types
from cskd_pipeline.views.policy import ViewPolicy
from tests.cli.test_cli import commands
from tests.test_structure import FLOORS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "stages").glob("*/*.toml"))
PROGRAM = re.compile(r"(?:cskd-pipeline|-m cskd_pipeline) ([a-z][^`]*)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def calls(text: str) -> Iterator[list[str]]:
    """Yield the words after the program's name, for every call in a code block or span."""
    code: list[str] = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    code += re.findall(r"`([^`\n]+)`", prose)
    for piece in code:
        for line in piece.replace("\\\n", " ").replace("\\|", "|").splitlines():
            if match := PROGRAM.search(line.partition(" #")[0]):
                words = match[1]
                if words.count("'") % 2:  # the line is quoted for a shell
                    words = words.rstrip("'")
                yield shlex.split(words)


def command_of(words: list[str]) -> tuple[str, Any] | None:
    known = commands()
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in known:
            return name, known[name]
    return None


def problems_of_calls(text: str) -> list[str]:
    """Return the calls of unknown commands or with unknown flags."""
    problems = []
    for words in calls(text):
        known = command_of(words)
        if known is None:
            problems.append(f"no command: {' '.join(words[:2])}")
            continue
        name, command = known
        flags = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
        given = {
            word.strip("[]").partition("=")[0] for word in words if word.startswith(("-", "[-"))
        }
        problems += [f"{name} has no {flag}" for flag in sorted(given - flags - {"--help"})]
    return problems


def dotted(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in table.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{name}.")


def keys_of_recipes() -> set[str]:
    return {key for path in RECIPES for key in dotted(tomllib.loads(text_of(path)))}


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_calls_use_existing_commands_and_flags(page: Path) -> None:
    assert problems_of_calls(text_of(page)) == []


def test_commands_md_calls_every_command() -> None:
    table = text_of(ROOT / "docs/commands.md")
    called = [command_of(words) for words in calls(table)]
    assert {name for name, _ in filter(None, called)} == set(commands())


def test_invalid_calls_are_reported() -> None:
    text = "`cskd-pipeline cache inform x`\n"
    text += "```\nx; cskd-pipeline train \\\n  --steps 3 --out o # --x\n```\n"
    assert problems_of_calls(text) == ["train has no --steps", "no command: cache inform"]


@each_page
def test_recipes_and_their_keys_exist(page: Path) -> None:
    text = text_of(page)
    names = {path.stem for path in RECIPES}
    assert set(re.findall(r"--recipe (\w+)", text)) <= names
    for name, choices in re.findall(r"`(paper_(?:\w*?)\{([\w,]+)\}\w*)`", text):
        assert {re.sub(r"\{.*\}", choice, name) for choice in choices.split(",")} <= names
    known = keys_of_recipes()
    assert set(re.findall(r"--set '?([a-z_.]+)=", text)) <= known
    sections = {key.partition(".")[0] for key in known}
    named = re.findall(r"`(\w+\.(?!json|csv|toml)\w+)(?:=[^`]*)?`", text)
    assert {key for key in named if key.partition(".")[0] in sections} <= known


@each_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text_of(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+\.md)\)", text_of(ROOT / "README.md")))
    assert linked == {f"docs/{page.name}" for page in PAGES if page.parent == ROOT / "docs"}


def test_the_readme_begins_with_the_first_command() -> None:
    lines = text_of(ROOT / "README.md").splitlines()
    assert lines.index("make demo") < 15


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "api.md"],  # its blocks are signatures
    ids=lambda path: path.name,
)
def test_python_blocks_compile_and_use_only_public_names(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL):
        compile(block, page.name, "exec")
        assert set(re.findall(r"\bcskd\.(\w+)", block)) <= set(cskd_pipeline.PUBLIC)
    named = set(re.findall(r"`cskd_pipeline\.(\w+)[`(]", text_of(page)))
    assert named <= set(cskd_pipeline.PUBLIC)


@each_page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^(\w+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    blocks = re.findall(r"^make (\w+)", text_of(page), re.MULTILINE)
    assert {*blocks, *re.findall(r"`make (\w+)", text_of(page))} <= targets


def test_the_map_lists_the_rooms_in_import_order() -> None:
    table = text_of(ROOT / "CONTRIBUTING.md").partition("## The map")[2].partition("\n## ")[0]
    rooms = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert [{room} for room in rooms] == [floor for floor in FLOORS if floor != {"__main__"}]


def test_the_citation_has_the_version_and_license() -> None:
    citation = text_of(ROOT / "CITATION.cff")
    assert f"\nversion: {cskd_pipeline.__version__}\n" in citation
    assert "\nlicense: Apache-2.0\n" in citation
    assert "arXiv:2307.08500" in citation


# --- the reference of recipe keys -----------------------------------------------------------------

KEYS = ROOT / "docs/recipe-keys.md"
INTRODUCTION = """# Recipe keys

Generated from the code by `python -m tests.test_documents`; [recipes](recipes.md) shows their use.
On resume, `fixed` keys decide the result and must be unchanged, `may change` keys may have a new
value, and `free` keys do not affect the result.
"""
MARKS = {"": "fixed", "adjustable": "may change", "free": "free"}


def limits_of(kind: Any, metadata: list[Any]) -> str:
    words = [f"`{choice}`" for choice in get_args(kind) if isinstance(choice, str)]
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for limit in metadata:
        for name, sign in signs.items():
            value = getattr(limit, name, None)
            if value is not None:
                words.append(f"{sign} {'2^63' if value == 2**63 else value}")
    return ", ".join(words)


def code_of(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def section_of_keys(kind: Any, title: str) -> Iterator[str]:
    yield f"\n## {title}\n"
    for name, type_ in key_types(kind).items():
        if "." not in name and type_ is not ViewPolicy:
            yield f"\n### {name}\n\n{type_.__doc__}\n"
            yield "\n| key | default | limits | meaning | on resume |\n|---|---|---|---|---|\n"
        elif "." in name and not name.startswith("views."):
            info = key_info(kind, name)
            mark = MARKS[info.json_schema_extra["mark"]]  # type: ignore[index,call-overload]
            limits = limits_of(type_, info.metadata)
            cells = (f"`{name}`", code_of(info.default), limits, str(info.description), mark)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def page_of_keys() -> str:
    dump = "".join(section_of_keys(DumpRecipe, "Stage one"))
    train = "".join(section_of_keys(TrainRecipe, "Stage two"))
    views = "".join(f"| `views.{k}` | {code_of(v)} |\n" for k, v in asdict(ViewPolicy()).items())
    return (
        f"{INTRODUCTION}{dump}{train}\n## views, in both stages\n\nDeiT's augmentation (arXiv "
        "2012.12877, table 9): lengths in pixels, areas and probabilities as fractions. Stage two "
        f"uses the cache's values. All keys are fixed.\n\n| key | default |\n|---|---|\n{views}"
    )


def test_the_key_reference_is_current() -> None:
    assert text_of(KEYS) == page_of_keys(), "run: python -m tests.test_documents"


if __name__ == "__main__":
    KEYS.write_text(page_of_keys(), encoding="utf-8")
