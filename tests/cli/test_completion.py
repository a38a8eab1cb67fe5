"""Completion as shells request it: by real bash, and with the variables of zsh and fish."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cskd_pipeline
from cskd_pipeline.config.reading import recipe_names
from cskd_pipeline.config.sections import DumpRecipe, TrainRecipe

VARIABLE = "_CSKD_PIPELINE_COMPLETE"
ROOT = Path(cskd_pipeline.__file__).parents[1]

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With the program on the path, as an installed one is."""
    home = tmp_path_factory.mktemp("home")
    program = home / "bin/cskd-pipeline"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom cskd_pipeline.cli import main\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(home)}


def run(
    environment: dict[str, str], *words: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=environment | variables, capture_output=True, text=True, check=False, timeout=60
    )


COMPLETE = """
source "$SCRIPT"
COMP_WORDS=({words})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
complete -p cskd-pipeline
_cskd_pipeline_completion cskd-pipeline
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def bash_offers(environment: dict[str, str], line: str) -> list[str]:
    """What bash offers for the last word of ``line``; a last blank begins a new word."""
    script = Path(environment["HOME"]) / "completion.bash"
    if not script.exists():
        made = run(environment, "cskd-pipeline", **{VARIABLE: "source_bash"})
        assert made.returncode == 0, made.stderr
        script.write_text(made.stdout)
    words = line if not line.endswith(" ") else f"{line}''"
    done = run(environment, "bash", "-c", COMPLETE.format(words=words), SCRIPT=str(script))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    registered, *offered = done.stdout.splitlines()
    assert registered == "complete -o default -F _cskd_pipeline_completion cskd-pipeline"
    return [word for word in offered if word]


@needs_bash
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("cskd-pipeline du", ["dump-teacher"]),
        ("cskd-pipeline cache me", ["merge"]),
        ("cskd-pipeline train --init", ["--init-from"]),
        ("cskd-pipeline train --method ", ["none", "deit", "cskd"]),
        ("cskd-pipeline train --method c", ["cskd"]),
        ("cskd-pipeline train --recipe ", recipe_names(TrainRecipe)),
        (
            "cskd-pipeline train --recipe paper_t",
            ["paper_tiny_cskd", "paper_tiny_deit", "paper_tiny_none"],
        ),
        ("cskd-pipeline plan train --recipe fine", ["finetune_cifar100"]),
        ("cskd-pipeline dump-teacher --recipe ", recipe_names(DumpRecipe)),
        ("cskd-pipeline plan dump --recipe paper", ["paper_regnety_160"]),
        ("cskd-pipeline dump-teacher --encoding dense", ["dense", "dense-q8"]),
        ("cskd-pipeline cache convert a b --encoding env", ["envelope"]),
        ("cskd-pipeline bench encodings x --recipe paper", ["paper_regnety_160"]),
        ("cskd-pipeline plan dump --encoding t", ["topk"]),
        ("cskd-pipeline bench encodings x --weights ", ["hub", "random"]),
        ("cskd-pipeline cache verify c --depth ", ["structure", "bytes"]),
        ("cskd-pipeline export runs/tiny --format ", ["timm", "onnx"]),
        ("cskd-pipeline train --device c", ["cpu", "cuda"]),
    ],
)
def test_bash_offers_commands_flags_recipes_and_choices(
    environment: dict[str, str], line: str, offered: list[str]
) -> None:
    assert bash_offers(environment, line) == offered


@needs_bash
@pytest.mark.parametrize(
    "line", ["train --recipe my/own.to", "train --shards ", "evaluate runs/t", "train --recipe ../"]
)
def test_the_shell_completes_file_names(environment: dict[str, str], line: str) -> None:
    """Nothing from the program: ``complete -o default`` then goes through the files."""
    assert bash_offers(environment, f"cskd-pipeline {line}") == []


SCRIPTS = {"bash": "COMPREPLY", "zsh": "#compdef cskd-pipeline", "fish": "complete --command"}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_every_shell_gets_its_script(environment: dict[str, str], shell: str) -> None:
    done = run(environment, "cskd-pipeline", **{VARIABLE: f"source_{shell}"})
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{VARIABLE}=complete_{shell}" in done.stdout
    assert SCRIPTS[shell] in done.stdout


def test_zsh_and_fish_get_completions(environment: dict[str, str]) -> None:
    line = {"_TYPER_COMPLETE_ARGS": "cskd-pipeline train --recipe demo_c"}
    zsh = run(environment, "cskd-pipeline", **{VARIABLE: "complete_zsh"}, **line)
    assert "demo_cskd" in zsh.stdout
    assert "demo_deit" not in zsh.stdout
    variables = {VARIABLE: "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    fish = run(environment, "cskd-pipeline", **variables, **line)
    assert fish.stdout.split() == ["demo_cskd"]


def test_an_unknown_shell_is_refused(environment: dict[str, str]) -> None:
    done = run(environment, "cskd-pipeline", **{VARIABLE: "source_tcsh"})
    assert done.returncode == 1
    assert "tcsh" in done.stderr
    assert "Traceback" not in done.stderr


@needs_bash
def test_installation_writes_to_the_users_files(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """Into a home of the test's own; bash then offers by what was installed."""
    home, environment = tmp_path, environment | {"HOME": str(tmp_path)}
    variables = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = run(environment, "cskd-pipeline", "--install-completion", "bash", **variables)
    assert done.returncode == 0, done.stderr
    [installed] = home.glob(".bash_completions/cskd-pipeline.sh")
    assert f"source '{installed}'" in (home / ".bashrc").read_text()
    shutil.copyfile(installed, home / "completion.bash")
    assert bash_offers(environment, "cskd-pipeline ev") == ["evaluate"]


def test_completion_imports_nothing_heavy(environment: dict[str, str]) -> None:
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'timm', 'zarr', 'numpy', 'PIL', 'webdataset', 'wandb', 'onnx'}\n"
        "atexit.register(lambda: print('heavy:', *sorted(heavy & set(sys.modules))))\n"
        "from cskd_pipeline.cli import main\nsys.exit(main([]))\n"
    )
    variables = {VARIABLE: "complete_bash", "COMP_WORDS": "cskd-pipeline train --recipe demo_c"}
    done = run(environment, sys.executable, "-c", code, **variables, COMP_CWORD="3")
    assert done.stdout.splitlines() == ["demo_cskd", "heavy:"], done.stderr


def test_without_a_completion_request_nothing_changes(environment: dict[str, str]) -> None:
    done = run(environment, "cskd-pipeline", "train", "--method", "both")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""
