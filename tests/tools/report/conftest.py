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
    driver = browser.start()
    yield driver
    driver.quit()
