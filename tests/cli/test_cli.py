"""The command line for people and scripts: help, exit codes, streams, messages.

Commands run in this process through ``main``; the functions they call are replaced by stand-ins,
whose calls are checked against the real signatures at the end.
"""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import typer.main

from cskd_pipeline import __version__
from cskd_pipeline.cli import app, main
from cskd_pipeline.config.sections import DumpRecipe, TrainRecipe
from cskd_pipeline.errors import CacheError, DataError
from cskd_pipeline.runtime.console import Terminal
from cskd_pipeline.runtime.progress import PACKAGE, listen, restore_reporting
from cskd_pipeline.runtime.signals import REQUEUE
from tests.processes import PATIENCE
from tests.runtime.test_console import current_listener

GROUP = typer.main.get_group(app)

Replace = Callable[..., "list[tuple[tuple[Any, ...], dict[str, Any]]]"]


def commands() -> dict[str, Any]:
    """Return every command by name: ``{"cache info": <command>, ...}``."""
    found: dict[str, Any] = {}
    for name, command in GROUP.commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {sub}": c for sub, c in inner.items()} if inner else {name: command}
    return found


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Replace:
    """Replace a function by a stand-in: ``calls = replace("cache.info.describe", outcome)``.

    The cache that ``cache info`` opens is just its location.
    """
    monkeypatch.setattr("cskd_pipeline.cache.reader.open_cache", lambda location: location)

    def put(target: str, outcome: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        path, _, name = f"cskd_pipeline.{target}".rpartition(".")
        parent, _, last = path.rpartition(".")
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome(*args, **kwargs) if callable(outcome) else outcome

        module = ModuleType(path)
        no_tables, as_given = (lambda report: iter(())), SimpleNamespace
        vars(module).update({name: stand_in, "printed": no_tables, "EvalOptions": as_given})
        monkeypatch.setitem(sys.modules, path, module)
        monkeypatch.setattr(sys.modules.get(parent) or importlib.import_module(parent), last,
                            module, raising=False)  # fmt: skip
        return calls

    return put


def run(*arguments: str) -> int:
    return main(list(arguments))


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    """Return the exit code and the one JSON object on stdout."""
    code = main([*arguments, "--json"])
    out = capsys.readouterr().out
    assert out.endswith("\n")
    assert out.count("\n") == 1
    return code, json.loads(out)


# --- help -----------------------------------------------------------------------------------------

PROMISED = {
    "make-shards": "IMAGE_FOLDER OUT --shard-size --json --quiet",
    "index": "SHARDS --out --json --quiet",
    "dump-teacher": "--shards --teacher --cache --weights --encoding --views --recipe --set "
    "--shard-range --view-range --accept-versions --workers --json --quiet",
    "train": "--shards --cache --student --method --epochs --val-shards --out --recipe --set "
    "--workers --init-from --fork-from --wandb --resume --json --quiet",
    "evaluate": "CHECKPOINT --shards --json --quiet",
    "export": "CHECKPOINT --out --format --heads --json --quiet",
    "cache info": "CACHE --json --quiet",
    "cache upgrade": "CACHE --json --quiet",
    "cache verify": "CACHE --depth --shards --teacher --weights --samples --partial --json --quiet",
    "cache publish": "CACHE --location --license --samples --seed --thumbnails --shards --split "
    "--json --quiet",
    "cache convert": "SRC DST --encoding --sampled-draws --sampled-temperature --views --shards "
    "--json --quiet",
    "cache merge": "CACHE... --out --accept-versions --json --quiet",
    "bench encodings": "CACHE_OR_TEACHER --shards --weights --views --plot --json --quiet",
    "bench loader": "--shards --size --batch-size --rounds --json --quiet",
    "bench step": "--student --teacher --size --rounds --batch-size --device --recipe --set "
    "--json --quiet",
    "bench dump": "--shards --teacher --weights --size --images --rounds --variants --compile "
    "--batch-size --workers --device --recipe --set --json --quiet",
    "bench join": "--shards --cache --rounds --simulate --recipe --set --json --quiet",
    "bench all": "--shards --cifar10 --seconds --device --out --json --quiet",
    "plan dump": "--shards --teacher --weights --encoding --views --devices --images --recipe "
    "--set --workers --json --quiet",
    "plan train": "--shards --cache --student --method --epochs --updates --recipe --set "
    "--workers --json --quiet",
    "show": "TARGET... --shards --out --images --samples --epochs --cache --export --split --json "
    "--quiet",
    "demo": "--out --seed --json --quiet",
    "study": "--shards --val-shards --out --recipes --seeds --jobs --device --json --quiet",
}


def test_the_commands_are_those_promised() -> None:
    assert set(commands()) == set(PROMISED)


@pytest.mark.parametrize("name", PROMISED)
def test_a_command_explains_itself_and_every_parameter(name: str) -> None:
    command = commands()[name]
    assert command.help
    paragraphs = [text for text in command.help.split("\n\n") if not text.startswith("\b")]
    assert not any("\n" in text for text in paragraphs)  # wrapped to the terminal instead
    words = set()
    for parameter in command.params:
        assert parameter.help, f"{name}: {parameter.name}"
        words |= {parameter.metavar, *parameter.opts, *parameter.secondary_opts}
    assert set(PROMISED[name].split()) <= words
    assert {"-q", "--quiet"} <= words


@pytest.mark.parametrize("name", PROMISED)
def test_a_commands_example_is_one_it_can_parse(name: str) -> None:
    example = commands()[name].epilog
    start = f"Example: cskd-pipeline {name} "
    assert example.startswith(start)
    commands()[name].make_context(name, shlex.split(example.removeprefix(start)))


@pytest.mark.parametrize("name", PROMISED)
def test_help_is_printed_for_every_command(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for flag in ("--help", "-h"):
        assert run(*name.split(), flag) == 0
        out, err = capsys.readouterr()
        assert f"cskd-pipeline {name}" in out
        assert "Example: cskd-pipeline" in out
        assert err == ""


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert "dump-teacher" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"cskd-pipeline {__version__}\n"


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from cskd_pipeline.cli import main\n"
        f"for name in ['', *{list(PROMISED)}]:\n"
        "    assert main([*name.split(), '--help']) == 0\n"
        "assert main(['--version']) == 0\n"
        "heavy = {'torch', 'timm', 'zarr', 'numpy', 'PIL', 'webdataset', 'jsonschema', 'sklearn'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- flags to recipes -----------------------------------------------------------------------------


def test_dump_teacher_puts_flags_into_the_recipe(replace: Replace) -> None:
    calls = replace("pipeline.dump.dump_teacher", {})
    line = (
        "dump-teacher --shards S --split train --teacher resnet18 --cache C --weights random "
        "--encoding dense --encoding envelope --views 3 --workers 2 --batch-size 7 --device cpu "
        "--shard-range 2:5 --view-range 0:3 --accept-versions "
        "--accept-classes --set cache.root_seed=9"
    )
    assert run(*line.split()) == 0
    [((recipe,), named)] = calls
    assert isinstance(recipe, DumpRecipe)
    assert (recipe.data.shards, recipe.data.split) == ("S", "train")
    assert (recipe.teacher.name, recipe.teacher.weights) == ("resnet18", "random")
    assert (recipe.cache.path, recipe.cache.views, recipe.cache.root_seed) == ("C", 3, 9)
    assert recipe.cache.encodings == ("dense", "envelope")
    assert (recipe.dump.workers, recipe.dump.batch_size, recipe.dump.device) == (2, 7, "cpu")
    assert named == {
        "shard_range": (2, 5),
        "view_range": (0, 3),
        "accept_versions": True,
        "accept_classes": True,
    }


def test_dump_teacher_stores_dense_by_default(replace: Replace) -> None:
    calls = replace("pipeline.dump.dump_teacher", {})
    assert run("dump-teacher", "--shards", "S", "--teacher", "t", "--cache", "C") == 0
    [((recipe,), named)] = calls
    assert recipe == DumpRecipe(
        data=recipe.data, teacher=recipe.teacher, cache=recipe.cache
    )  # everything else is the default
    assert recipe.cache.encodings == ("dense",)
    assert named == {
        "shard_range": None,
        "view_range": None,
        "accept_versions": False,
        "accept_classes": False,
    }


def test_train_puts_flags_into_the_recipe(replace: Replace) -> None:
    calls = replace("pipeline.train.train", {})
    line = (
        "train --recipe paper_tiny --shards S --cache C --student vit_tiny_patch16_224 "
        "--method deit --epochs 3 --val-shards V --out O --workers 0 --device cpu --batch-size 8 "
        "--split a --val-split b --set run.amp=bf16 --set optim.lr=2 --resume -q "
        "--init-from I --fork-from F --wandb W"
    )
    assert run(*line.split()) == 0
    [((recipe,), named)] = calls
    assert isinstance(recipe, TrainRecipe)
    assert (recipe.data.shards, recipe.data.cache, recipe.data.val_shards) == ("S", "C", "V")
    assert (recipe.data.split, recipe.data.val_split) == ("a", "b")
    assert (recipe.student.name, recipe.distill.method) == ("vit_tiny_patch16_224", "deit")
    assert (recipe.schedule.epochs, recipe.batch.batch_size, recipe.optim.lr) == (3, 8, 2.0)
    assert (recipe.run.out, recipe.run.workers, recipe.run.device) == ("O", 0, "cpu")
    assert (recipe.run.amp, recipe.run.ema) == ("bf16", 0.99996)
    assert (recipe.student.init_from, recipe.run.fork_from, recipe.run.wandb) == ("I", "F", "W")
    assert named == {"resume": True}


def test_a_complete_recipe_needs_no_flags(replace: Replace, tmp_path: Path) -> None:
    calls = replace("pipeline.train.train", {})
    path = tmp_path / "r.toml"
    path.write_text('[data]\nshards = "S"\n[distill]\nmethod = "none"\n[run]\nout = "O"\n')
    assert run("train", "--recipe", str(path)) == 0
    [((recipe,), named)] = calls
    assert recipe.data.shards == "S"
    assert named == {"resume": False}


def test_evaluate_passes_its_flags_on(replace: Replace) -> None:
    calls = replace("pipeline.evaluate.evaluate", {})
    assert run("evaluate", "run", "--shards", "S") == 0
    line = "evaluate run --shards S --split b --batch-size 4 --workers 0 --device cpu"
    line += " --crop-pct 0.5 --accept-classes"
    assert run(*line.split()) == 0
    [((path, shards, first), _), ((_, _, second), _)] = calls
    assert (path, shards) == (Path("run"), "S")
    assert vars(first) == {"accept_classes": False}  # the rest is EvalOptions' own
    given = {"split": "b", "batch_size": 4, "workers": 0, "device": "cpu"}
    assert vars(second) == given | {"crop_pct": 0.5, "accept_classes": True}


# --- outcomes -------------------------------------------------------------------------------------

LINES = {
    "make-shards": ("tools.make_shards.make_shards", "make-shards a b"),
    "dump-teacher": ("pipeline.dump.dump_teacher", "dump-teacher --shards S --teacher t --cache C"),
    "train": ("pipeline.train.train", "train --shards S --cache C --out O"),
    "evaluate": ("pipeline.evaluate.evaluate", "evaluate e --shards S"),
    "export": ("tools.export_student.export_student", "export e --out o"),
    "cache info": ("cache.info.describe", "cache info c"),
    "cache merge": ("cache.merge.merge", "cache merge a b --out c"),
    "cache upgrade": ("cache.upgrade.upgrade", "cache upgrade c"),
    "demo": ("tools.demo.run_demo", "demo"),
}


@pytest.mark.parametrize("name", LINES)
def test_json_is_one_object_whatever_libraries_print(
    name: str, replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    target, line = LINES[name]

    def noisy(*args: Any, **kwargs: Any) -> dict[str, Any]:
        print("a library says hello")
        return {"top1": 71.5, "where": Path("x")}

    replace(target, noisy)
    code, found = run_json(capsys, *line.split())
    assert (code, found) == (0, {"top1": 71.5, "where": "x"})


@pytest.mark.parametrize("name", [n for n in LINES if n not in ("demo", "cache info")])
def test_without_json_results_are_lines(
    name: str, replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    target, line = LINES[name]
    replace(target, {"bytes": {"dense": 98_000}})
    assert run(*line.split()) == 0
    assert capsys.readouterr().out == "bytes.dense: 98000\n"


@pytest.mark.parametrize("name", LINES)
def test_refusals_are_a_message_exit_1_and_no_traceback(
    name: str, replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    target, line = LINES[name]
    replace(target, CacheError("views are missing", where="c", found=3, expected=5, action="dump"))
    assert run(*line.split()) == 1
    message = "views are missing\n  where:    c\n  found:    3\n  expected: 5\n  to do:    dump\n"
    assert capsys.readouterr() == ("", f"error: {message}")
    code, found = run_json(capsys, *line.split())
    assert (code, found["error"]["kind"], found["error"]["found"]) == (1, "CacheError", 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --nonsense", "No such option: --nonsense"),
        ("train --resum", "--resume"),
        ("nonsense", "No such command 'nonsense'"),
        ("cache", "Missing command"),
        ("index a", "Missing option '--out'"),
        ("evaluate a", "Missing option '--shards'"),
        ("export a --out b --format tflite", "'tflite' is not one of 'timm', 'onnx'"),
        ("export a --out b --heads", "add --format onnx"),
        ("make-shards a", "Missing argument 'OUT'"),
        ("train --method both", "'both'"),
        ("train --epochs 0", "--epochs"),
        ("train --epochs x", "--epochs"),
        ("dump-teacher --views 0", "--views"),
        ("dump-teacher", "--shards SHARDS, --teacher NAME, --cache DIR"),
        ("train --shards S", "--out DIR, --cache DIR"),
        ("train --shards S --method none", "expected: --out DIR\n"),
        ("train --set lr=3", "--set takes section.key=value"),
        ("train --epochs 3 --set schedule.epochs=4", "a flag and --set disagree"),
        ("dump-teacher --shards S --teacher t --cache C --shard-range 5:5", "FROM:TO"),
        ("dump-teacher --shards S --teacher t --cache C --shard-range 1", "FROM:TO"),
        ("dump-teacher --shards S --teacher t --cache C --shard-range a:b", "FROM:TO"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_wrong(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    code, found = run_json(capsys, *line.split())
    assert (code, found["error"]["kind"], found["error"]["exit_code"]) == (2, "UsageError", 2)


def test_wrong_recipes_exit_1_with_a_suggestion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[distill]\nmethd = 'none'\n[optim]\nlr = 'x'\n")
    code, found = run_json(capsys, "train", "--recipe", str(path))
    assert code == 1
    assert found["error"]["where"] == str(path)
    assert found["error"]["problems"] == [
        "distill.methd: found an unknown key, did you mean distill.method?",
        "optim.lr: found 'x', expected a number",
    ]
    assert run("train", "--recipe", "paper_tinny_cskd") == 1
    assert "--recipe paper_tiny_cskd" in capsys.readouterr().err


def test_an_unknown_encoding_is_refused_before_the_teacher_is_loaded(
    replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = replace("pipeline.dump.dump_teacher", {})
    line = "dump-teacher --shards S --teacher t --cache C --encoding dens --encoding envelope"
    assert run(*line.split()) == 1
    err = capsys.readouterr().err
    assert "unknown encoding" in err
    assert "--encoding dense" in err
    assert not calls


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "no space left on the device"),
        (OSError(errno.EDQUOT, "Quota exceeded"), "no space left on the device"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), "No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "Permission denied"),
    ],
)
def test_full_disks_and_missing_files_are_messages(
    error: OSError, message: str, replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    replace("cache.info.describe", error)
    assert run("cache", "info", "c") == 1
    err = capsys.readouterr().err
    assert message in err
    assert ("a/b" in err) == (error.filename is not None)


@pytest.mark.parametrize("bug", [ZeroDivisionError("x"), OSError(errno.EIO, "x"), KeyError("x")])
def test_bugs_show_their_traceback(bug: Exception, replace: Replace) -> None:
    replace("cache.info.describe", bug)
    with pytest.raises(type(bug)):
        run("cache", "info", "c")


def test_control_characters_in_errors_are_escaped(
    replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    replace("cache.info.describe", DataError("bad \x1b[31m", where="[red]a\x07\n"))
    assert run("cache", "info", "c") == 1
    assert capsys.readouterr().err == (
        "error: bad \\x1b[31m\n  where:    [red]a\\x07\\n\n"
    )  # fmt: skip


# --- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        (
            "dump-teacher",
            "finished units are kept, continue with: cskd-pipeline dump-teacher --shards",
        ),
        ("cache upgrade", "finished units are kept, continue with: cskd-pipeline cache upgrade c"),
        (
            "cache merge",
            "finished units are kept, continue with: cskd-pipeline cache merge a b --out",
        ),
        ("train", "continue with: cskd-pipeline train --shards S --cache C --out O --resume"),
        ("evaluate", "start again with: cskd-pipeline evaluate e --shards S"),
    ],
)
def test_an_interruption_exits_130_and_says_how_to_continue(
    name: str, hint: str, replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    target, line = LINES[name]
    replace(target, KeyboardInterrupt())
    assert run(*line.split()) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: interrupted\n")
    assert hint in err
    code, found = run_json(capsys, *line.split())
    assert (code, found["error"]["kind"]) == (130, "Interrupted")


def test_the_advice_has_resume_once(replace: Replace, capsys: pytest.CaptureFixture[str]) -> None:
    replace("pipeline.train.train", KeyboardInterrupt())
    assert run("train", "--shards", "a b", "--cache", "C", "--out", "O", "--resume") == 130
    err = capsys.readouterr().err
    assert "train --shards 'a b' --cache C --out O --resume\n" in err
    assert err.count("--resume") == 1


WAITS = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts without it
module = types.ModuleType("cskd_pipeline.cache.info")
def describe(path):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
module.describe = describe
sys.modules["cskd_pipeline.cache.info"] = module
from cskd_pipeline.cache import reader
reader.open_cache = str
from cskd_pipeline.cli import main
sys.exit(main(["cache", "info", "c", "--json"]))
"""


@pytest.mark.parametrize(
    ("number", "code", "kind", "problem"),
    [
        (signal.SIGINT, 130, "Interrupted", "interrupted"),
        (signal.SIGTERM, 75, "Preempted", "stopped by SIGTERM"),
        (signal.SIGHUP, 75, "Preempted", "stopped by SIGHUP"),
        (signal.SIGUSR1, 75, "Preempted", "stopped by SIGUSR1"),
    ],
)
def test_a_signal_ends_a_real_process_with_a_code_of_its_own(
    number: signal.Signals, code: int, kind: str, problem: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert json.loads(out)["error"]["kind"] == kind
    action = "start again with: cskd-pipeline cache info c --json"
    assert err == f"error: {problem}\n  to do:    {action}\n"


@pytest.mark.parametrize("number", REQUEUE)
def test_signals_are_as_they_were_after_a_command(replace: Replace, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    during: list[Any] = []
    replace("cache.info.describe", lambda *_: during.append(signal.getsignal(number)))
    assert run("cache", "info", "c", "--json") == 0
    assert during != [before]
    assert signal.getsignal(number) is before


def test_a_command_under_nohup_survives_a_closed_terminal(
    replace: Replace,
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    replace("cache.info.describe", lambda *_: os.kill(os.getpid(), signal.SIGHUP) or {})
    try:
        assert run("cache", "info", "c", "--json") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("error", [EOFError("Ran out of input"), BrokenPipeError(32, "a worker")])
def test_errors_that_typer_would_swallow_propagate(
    error: Exception, replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    """typer reports an EOFError as an interruption and exits silently on a broken pipe."""
    replace("pipeline.evaluate.evaluate", error)
    with pytest.raises(type(error)) as caught:
        run("evaluate", "c", "--shards", "s")
    assert caught.value is error
    assert "interrupted" not in capsys.readouterr().err


@pytest.mark.parametrize("outcome", [{}, CacheError("no cache"), KeyboardInterrupt()])
def test_progress_and_logging_are_restored_after_a_command(outcome: Any, replace: Replace) -> None:
    def shown_to() -> Any:
        return (
            current_listener(),
            logger.handlers,
            list(logger.handlers),
            logger.level,
            logger.propagate,
        )

    logger = logging.getLogger(PACKAGE)
    during: list[Any] = []

    def describe(*_: Any) -> Any:
        during.append(shown_to())
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    replace("cache.info.describe", describe)
    with restore_reporting():
        listen(Terminal())
        logger.handlers = [logging.NullHandler()]
        logger.setLevel(logging.ERROR)
        logger.propagate = True
        before = shown_to()
        assert run("cache", "info", "c", "--json") in (0, 1, 130)
        after = shown_to()
    assert after == before
    assert after[1] is before[1]
    [seen] = during
    assert all(one != other for one, other in zip(seen, before, strict=True))  # all were changed


# --- closed streams -------------------------------------------------------------------------------

TALKS = """
import sys, types
module = types.ModuleType("cskd_pipeline.pipeline.evaluate")
module.EvalOptions = dict
module.evaluate = lambda *args, **kwargs: {str(i): "x" * 100 for i in range(10_000)}
sys.modules["cskd_pipeline.pipeline.evaluate"] = module
from cskd_pipeline.cli import main
sys.exit(main(["evaluate", "c", "--shards", "s", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_closed_pipe_is_not_an_error(flags: list[str]) -> None:
    buffered = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", TALKS, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=buffered,
    )
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(timeout=PATIENCE) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that Linux has")
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_full_disk_behind_stdout_is_a_message(flags: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", TALKS, *flags],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: no space left on the device\n")
    assert "Traceback" not in done.stderr


def test_characters_that_a_terminal_lacks_are_escaped() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cskd_pipeline", "evaluate", "e", "--nö"],
        capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 2
    assert b"--n\\xf6" in done.stderr


# --- the demo's inner commands --------------------------------------------------------------------


def test_the_demo_runs_real_commands_and_gets_their_summaries(
    replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = replace("cache.info.describe", {"views": 3})
    replace(
        "tools.demo.run_demo",
        lambda out, command, seed: command(["cache", "info", "c", "--json"]),
    )
    assert run_json(capsys, "demo") == (0, {"views": 3})
    assert run("demo", "--quiet") == 0
    assert capsys.readouterr().out == ""  # what else the demo prints is its own report
    assert [args[0] for args, _ in inner] == ["c"] * 2


def test_the_demo_fails_and_stops_with_its_inner_command(
    replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    replace("tools.demo.run_demo", lambda out, command, seed: command(["cache", "info", "c"]))
    replace("cache.info.describe", CacheError("no cache"))
    assert run("demo") == 1
    assert "no cache" in capsys.readouterr().err
    replace("cache.info.describe", KeyboardInterrupt())
    assert run("demo") == 130


# --- the stand-ins' signatures --------------------------------------------------------------------


def test_commands_match_the_signatures_of_their_entry_points(
    replace: Replace, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {target: (replace(target, {}), line) for target, line in LINES.values()}
    manifest = SimpleNamespace(save=str, name="n", shards=(), samples=0, num_classes=1)
    index = "data.describe.index_shards"
    calls[index] = (replace(index, manifest), "index s --out m")
    for recorded, line in calls.values():
        assert run(*line.split(), "--json") == 0
        assert len(recorded) == 1
    monkeypatch.undo()  # the real functions again
    for target, ([(args, kwargs)], _) in calls.items():
        module, _, name = f"cskd_pipeline.{target}".rpartition(".")
        real = getattr(importlib.import_module(module), name)
        inspect.signature(real).bind(*args, **kwargs)
