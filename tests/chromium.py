"""A headless Chromium, which `scripts/browser.sh` installs."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

_CHROMIUM, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_SWITCHES = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
needs_chromium = pytest.mark.skipif(
    not (_CHROMIUM and _DRIVER), reason="chromium and chromedriver are not installed; see scripts/browser.sh"
)


@contextlib.contextmanager
def started_chromium(profile: Path) -> Iterator[Chrome]:
    """It notes what it fetches and what pages say on its console; `profile` is a folder of its own."""
    options = ChromeOptions()
    options.binary_location = str(_CHROMIUM)
    for switch in (*_SWITCHES, f"--user-data-dir={profile}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(str(_DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()
