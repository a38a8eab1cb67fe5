"""Clock, time zone, locale and the dates of files decide nothing that is stored or learned."""

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

from tests.faults.commands import Stages, Whole, Words, left_by

# A clock that starts in 1970 and runs backwards, in a locale with its own i, without UTF-8.
ELSEWHERE = """
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


def test_another_clock_locale_and_dates_of_files_give_equal_results(
    stages: Stages, whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    shards = tmp_path / "somewhere else"
    shutil.copytree(stages.shards, shards)
    for number, path in enumerate(sorted(shards.iterdir())):
        os.utime(path, (number % 2 * 2**33, number % 2 * 2**33))  # 1970, and 2242
    there = replace(stages, shards=shards)
    commands: list[Words] = [
        there.dump(tmp_path / "cache"),
        there.convert(tmp_path / "small"),
        there.train(tmp_path / "run"),
    ]
    words = [[str(word) for word in command] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(words)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert left_by("dump", tmp_path / "cache") == left_by("dump", stages.cache)
    assert left_by("convert", tmp_path / "small") == whole("convert").left
    assert left_by("train", tmp_path / "run") == whole("train").left


def test_a_run_begun_yesterday_is_finished_before_it_began(
    stages: Stages, whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    """Files of the state and the cache from the future are no newer to anyone."""
    out = tmp_path / "run"
    process = stages.server.start(*stages.train(out), log=stages.log)
    while not (out / "state.pt").exists():
        time.sleep(0.001)
    process.kill()
    for path in out.rglob("*"):
        os.utime(path, (2**33, 2**33))
    assert stages.server.run(*stages.train(out), log=stages.log).code == 0
    assert left_by("train", out) == whole("train").left
