"""A browser shared by all page tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from selenium import webdriver

from tests.pipeline.conftest import small
from tests.tools.report import browser

__all__ = ["chrome", "small"]


@pytest.fixture(scope="session")
def chrome() -> Iterator[webdriver.Chrome]:
    started = browser.start()
    yield started
    started.quit()
