"""Fixtures of the cache's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cache.making import make


@pytest.fixture(autouse=True, scope="package")
def unsynced() -> Iterator[None]:
    """Syncing is slow and shows only after a power cut; one test watches that it is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="package")
def finished(unsynced: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache, to be copied by those who alter it."""
    path = tmp_path_factory.mktemp("finished") / "cache"
    make(path)
    return path
