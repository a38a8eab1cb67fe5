"""Results do not depend on the clock, the time zone, the locale or file dates."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.faults.commands import Arguments, Reference, Stages, output_of

# Run commands with a clock that runs backwards from 1970, a dotless i in the locale, no UTF-8.
ODD_CLOCK_AND_LOCALE = """
import contextlib, itertools, json, locale, sys, time
ticks = itertools.count()
time.time = lambda: 1e6 - 3600.0 * next(ticks)
time.time_ns = lambda: int(1e9 * time.time())
for name in ("tr_TR.UTF-8", "tr_TR", "C"):
    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_ALL, name)
        break
from cskd_pipeline import cli
from cskd_pipeline.cache import manifest
manifest.utc_now = lambda: "1970-01-01T00:00:00Z"
for arguments in json.loads(sys.argv[1]):
    code = cli.main(arguments)
    assert code == 0, (arguments, code)
"""
ENVIRONMENT = {
    "TZ": "Pacific/Kiritimati",
    "LC_ALL": "C",
    "LANG": "tr_TR.UTF-8",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "SOURCE_DATE_EPOCH": "1",
    "OMP_NUM_THREADS": "1",
}


def test_clock_locale_and_file_dates_do_not_change_results(
    stages: Stages, reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    shards = tmp_path / "other folder"
    shutil.copytree(stages.shards, shards)
    for number, path in enumerate(sorted(shards.iterdir())):
        os.utime(path, (number % 2 * 2**33, number % 2 * 2**33))  # 1970, and 2242
    moved = replace(stages, shards=shards)
    commands: list[Arguments] = [
        moved.dump(tmp_path / "cache"),
        moved.convert(tmp_path / "small"),
        moved.train(tmp_path / "run"),
    ]
    words = [[str(word) for word in command] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", ODD_CLOCK_AND_LOCALE, json.dumps(words)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert output_of("dump", tmp_path / "cache") == output_of("dump", stages.cache)
    assert output_of("convert", tmp_path / "small") == reference("convert").files
    assert output_of("train", tmp_path / "run") == reference("train").files


def test_a_run_with_file_dates_in_the_future_resumes(
    stages: Stages, reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = stages.server.start(*stages.train(out), log=stages.log)
    while not (out / "state.pt").exists():
        time.sleep(0.001)
    process.kill()
    for path in out.rglob("*"):
        os.utime(path, (2**33, 2**33))
    assert stages.server.run(*stages.train(out), log=stages.log).code == 0
    assert output_of("train", out) == reference("train").files
