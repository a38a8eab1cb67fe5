"""Untrusted names reach terminals escaped, and markup in them is never interpreted."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest

from cskd_pipeline.data.index import load_dataset
from cskd_pipeline.models.checkpoint import read_header
from tests.cache.factories import dataset, make, teacher
from tests.data.factories import make_cache
from tests.faults.commands import Stages
from tests.hostile.conftest import CONTROL
from tests.images import sample
from tests.pipeline import world

Capture = pytest.CaptureFixture[str]
Command = Callable[..., tuple[int, str]]
EVIL = "\x1b]0;owned\x07\x1b[2J[bold red]x[/bold red] <script>alert(1)</script> \u202egpj\r\x9b31m"
ESCAPED = (
    r"\x1b]0;owned\x07\x1b[2J[bold red]x[/bold red] <script>alert(1)</script> \u202egpj\r\x9b31m"
)


@pytest.fixture
def cli(capsys: Capture) -> Command:
    """Return a function that runs a command and returns its exit code and control-free output."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = world.cli(*arguments)
        output = "".join(capsys.readouterr())
        assert not CONTROL.search(output), output
        assert "Traceback" not in output
        return code, output

    return run


def evil_shards(folder: Path, key: str = EVIL) -> Path:
    """Write a tar of one image whose key and class name are hostile."""
    folder.mkdir()
    with tarfile.open(folder / "t.tar", "w") as tar:
        for field, data in (("jpg", sample(0)[1]["jpg"]), ("cls", b"0")):
            member = tarfile.TarInfo(f"{key.replace('/', '|').replace('.', '')}.{field}")
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    (folder / "classes.json").write_text(json.dumps([EVIL, "<b>two</b>", "3", "4"]))
    return folder


def test_cache_info_escapes_all_free_text(tmp_path: Path, cli: Command) -> None:
    data = replace(dataset(), name=EVIL, class_names=(EVIL,) * dataset().num_classes)
    evil_teacher = teacher(name=EVIL, source=EVIL, kwargs={EVIL: EVIL})
    versions = {"torch": EVIL, EVIL: EVIL}
    text = {"license": EVIL, "notes": EVIL}
    make(tmp_path / "c", dataset=data, teacher=evil_teacher, versions=versions, **text)
    code, output = cli("cache", "info", tmp_path / "c")
    assert code == 0
    assert output.count(ESCAPED) >= 4  # data, teacher, license, notes
    code, output = cli("cache", "info", tmp_path / "c", "--json")
    assert code == 0
    assert json.loads(output)["notes"] == EVIL
    code, output = cli("cache", "convert", tmp_path / "c", tmp_path / "d", "--encoding", "dense")
    assert code == 0
    code, output = cli("cache", "info", tmp_path / "d")
    assert output.count(ESCAPED) >= 4


def test_merge_and_verify_escape_names(tmp_path: Path, cli: Command) -> None:
    data = replace(dataset(), name=EVIL)
    data = replace(data, shards=(replace(data.shards[0], name="[bold red]x[/bold red].tar"),))
    make(tmp_path / "a", dataset=data, versions={"torch": EVIL})
    make(tmp_path / "b", dataset=data, teacher=teacher(name=EVIL))
    code, output = cli("cache", "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / EVIL)
    assert code == 1
    assert r"teacher.name: resnet10t" in output
    assert r"\x1b]0;owned\x07" in output
    (tmp_path / "a/digest/c/0/0").unlink()
    code, output = cli("cache", "verify", tmp_path / "a")
    assert code == 1
    assert "shard 0 ([bold red]x[/bold red].tar)" in output
    code, output = cli("cache", "verify", tmp_path / "a", "--json")
    assert code == 1
    assert json.loads(output.splitlines()[0])["checks"]["units"]["problems"] == 1


def test_index_escapes_names_but_not_in_its_manifest(tmp_path: Path, cli: Command) -> None:
    shards = evil_shards(tmp_path / "shards")
    code, output = cli("index", shards, "--name", EVIL, "--out", tmp_path / "m.json")
    assert code == 0
    assert ESCAPED in output
    names = json.loads((tmp_path / "m.json").read_text())["class_names"]
    assert names == [EVIL, "<b>two</b>", "3", "4"]  # unchanged: escaped only when shown


def test_a_hostile_key_is_escaped_in_an_error(stages: Stages, tmp_path: Path, cli: Command) -> None:
    shards = evil_shards(tmp_path / "shards")
    cache = make_cache(tmp_path / "cache", load_dataset(shards))
    assert cache.keys(0)[0].startswith("\x1b]0;owned")
    words = ("--student", world.STUDENT, "--out", tmp_path / "run", "--epochs", 1)
    code, output = cli("train", "--shards", stages.shards, "--cache", cache.path, *words)
    assert code == 1
    assert r"\x1b]0;owned\x07" in output
    (shards / "t.tar").write_bytes(
        (shards / "t.tar").read_bytes().replace(b"\xff\xd8", b"\xff\xd9")
    )
    code, output = cli(*stages.dump(tmp_path / "c2"), "--shards", shards)
    assert code == 1
    assert r"\x1b]0;owned\x07" in output


@pytest.mark.parametrize(
    "source",
    [
        "recipe key",
        "recipe value",
        "recipe file",
        "shards",
        "cache",
        "verify",
        "merge",
        "encoding",
        "checkpoint",
    ],
)
def test_a_hostile_word_is_escaped_in_an_error(
    stages: Stages, tmp_path: Path, cli: Command, source: str
) -> None:
    (tmp_path / "r.toml").write_text(f"[{json.dumps(EVIL)}]\nx = {json.dumps(EVIL)}\n")
    (tmp_path / "v.toml").write_text(f"[distill]\nmethod = {json.dumps(EVIL)}\n")
    words: dict[str, tuple[object, ...]] = {
        "recipe key": ("train", "--recipe", tmp_path / "r.toml"),
        "recipe value": ("train", "--recipe", tmp_path / "v.toml"),
        "recipe file": ("train", "--recipe", f"{EVIL}.toml"),
        "shards": ("index", EVIL, "--out", tmp_path / "m.json"),
        "cache": ("cache", "info", EVIL),
        "verify": ("cache", "verify", EVIL),
        "merge": ("cache", "merge", stages.cache, EVIL, "--out", tmp_path / "y"),
        "encoding": ("cache", "convert", stages.cache, tmp_path / "x", "--encoding", EVIL),
        "checkpoint": ("evaluate", EVIL, "--shards", stages.shards),
    }
    code, output = cli(*words[source])
    assert code in (1, 2)
    assert r"\x1b]0;owned\x07" in output
    assert "[bold red]x[/bold red]" in output


def test_class_names_pass_through_a_run_unchanged_and_uninterpreted(
    stages: Stages, tmp_path: Path, cli: Command
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in stages.shards.glob("*.tar"):
        (shards / path.name).symlink_to(path)
    names = [EVIL, "[link=https://x]y[/link]", "<img src=x onerror=alert(1)>", ":smile:"]
    (shards / "classes.json").write_text(json.dumps(names))
    words = ("--student", world.STUDENT, "--method", "none", "--epochs", 1, "--batch-size", 32)
    sets = world.as_flags([*world.VIEWS, *world.train_sets()])
    run = ("--out", tmp_path / "run", "--workers", 0, "--device", "cpu", *sets)
    code, _ = cli("train", "--shards", shards, "--val-shards", shards, *words, *run)
    assert code == 0
    code, _ = cli("evaluate", tmp_path / "run", "--shards", shards, "--workers", 0)
    assert code == 0
    header = read_header(tmp_path / "run/last.safetensors")
    assert header.class_names is None or list(header.class_names) == names
    for path in (tmp_path / "run").rglob("*.csv"):
        assert not CONTROL.search(path.read_text())
