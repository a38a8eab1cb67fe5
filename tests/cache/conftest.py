"""Fixtures of the cache's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def unsynced() -> Iterator[None]:
    """Syncing is slow and shows only after a power cut; one test watches that it is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
