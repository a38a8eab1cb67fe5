"""A headless browser without a network, for pages on disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

REQUIRED = os.environ.get("CSKD_BROWSER") == "required"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


def start() -> webdriver.Chrome:
    """Start Chromium; skip the test without it, unless CSKD_BROWSER=required."""
    if BROWSER is None or DRIVER is None:
        if REQUIRED:
            raise AssertionError("CSKD_BROWSER=required, but no chromium or chromedriver")
        pytest.skip("no chromium or chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    chrome.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    chrome.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    return chrome


def open_page(
    chrome: webdriver.Chrome,
    page: Path,
    *,
    width: int = 1280,
    height: int = 900,
    dark: bool = False,
) -> None:
    """Open a page in a window of ``width`` by ``height`` CSS pixels."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    chrome.get(page.as_uri())


def console_messages(chrome: webdriver.Chrome) -> list[str]:
    """Return the console's messages since the last call."""
    return [entry["message"] for entry in chrome.get_log("browser")]


def all_of(parent: Any, selector: str) -> list[Any]:
    return list(parent.find_elements(By.CSS_SELECTOR, selector))


def one(parent: Any, selector: str) -> Any:
    return parent.find_element(By.CSS_SELECTOR, selector)
