"""Atomic writes survive a power failure: files and their folders are synced.

A power failure cannot be tested, so the system calls are recorded: ``fsync`` of a file or folder
before its ``os.replace``, and ``fsync`` of the parent folder after it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cskd_pipeline.runtime import atomic
from cskd_pipeline.runtime.atomic import atomic_folder, write_text

Event = tuple[str, Path]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Record ("sync", file or folder) and ("name", target) events in order."""
    found: list[Event] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        found.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        replace(source, target)
        found.append(("name", Path(target)))

    monkeypatch.setattr(atomic.os, "fsync", watched_fsync)
    monkeypatch.setattr(atomic.os, "replace", watched_replace)
    return found


def test_a_file_is_synced_before_its_rename_and_its_folder_after(
    tmp_path: Path, events: list[Event]
) -> None:
    write_text(tmp_path / "new" / "recipe.toml", "x")
    (first, partial), named, last = events
    assert first == "sync"
    assert partial.parent == tmp_path / "new"
    assert partial.name.endswith(".partial")
    assert named == ("name", tmp_path / "new" / "recipe.toml")
    assert last == ("sync", tmp_path / "new")


def test_a_folder_is_renamed_after_syncing_its_contents_and_its_parent_synced_after(
    tmp_path: Path, events: list[Event]
) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "model").write_text("x")
        (folder / "inner" / "config").write_text("y")
        assert events == []
    named = events.index(("name", tmp_path / "out"))
    before = {path for kind, path in events[:named] if kind == "sync"}
    inner = ("model", "inner", "inner/config")  # a folder's names are its own data
    assert before == {folder, *(folder / name for name in inner)}
    assert events[named + 1 :] == [("sync", tmp_path)]


def test_an_unfinished_folder_is_removed(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert list(tmp_path.iterdir()) == []
