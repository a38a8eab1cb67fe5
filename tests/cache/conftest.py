"""Fixtures of the cache's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cache.factories import make


@pytest.fixture(autouse=True, scope="package")
def unsynced() -> Iterator[None]:
    """Skip syncs, which are slow and matter only after a power failure; test_writer covers them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="package")
def finished(unsynced: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache; tests that alter it must copy it."""
    path = tmp_path_factory.mktemp("finished") / "cache"
    make(path)
    return path
