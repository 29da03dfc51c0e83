"""The report in headless Chromium: it renders without a word on the console or the network, and legend, tabs and pointer work.

Screenshots are left in `artefacts/report` for people to look at.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from specforge.cli.__main__ import main
from tests.chromium import needs_chromium, started_chromium
from tests.report.runs import HOSTILE, write_run

pytestmark = [pytest.mark.long, needs_chromium]
ARTEFACTS = Path(__file__).parents[2] / "artefacts" / "report"


class Browser:
    """One Chromium that shows one file."""

    def __init__(self, driver: Chrome, file: Path) -> None:
        self.driver, self.url = driver, file.as_uri()

    def show(self, width: int, *, dark: bool = False) -> None:
        """The page anew, at a width in CSS pixels; a narrow one is a phone's."""
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(self.url)

    def run(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def find(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def bring(self, thing: WebElement) -> None:
        """Into the middle of the window, past the bar at its top."""
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", thing)

    def background(self) -> int:
        """Brightness of the page's paper, 0 to 765."""
        colour = self.run("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])

    def screenshot(self, name: str) -> bytes:
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png", "clip": clip})
        data = base64.b64decode(shot["data"])
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        (ARTEFACTS / f"{name}.png").write_bytes(data)
        return data

    def requests(self) -> list[str]:
        """What was fetched; a Chromium shows a page of its own at its start."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if url.startswith(("http", "file", "ws"))]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    runs = [
        write_run(folder / "a", "first", [1.0, 1.4, 1.75]),
        write_run(folder / "b", HOSTILE, [1.0, 1.25, 1.3], method="dflash", domain=HOSTILE),
        write_run(folder / "c", "third", [1.0, 1.2, 1.125], method="domino", recorded=False),
    ]
    assert main(["report", *map(str, runs), "--out", str(folder / "report.html")]) == 0
    with started_chromium(folder / "profile") as driver:
        yield Browser(driver, folder / "report.html")


def test_it_renders_alone(browser: Browser) -> None:
    """Wide and narrow, bright and dark: nothing overflows, nothing is asked for, nothing is complained about, nothing of theirs runs."""
    browser.driver.get_log("performance")
    pictures = []
    for name, width, dark in (("light", 1280, False), ("dark", 1280, True), ("phone", 360, False), ("phone-dark", 360, True)):
        browser.show(width, dark=dark)
        assert browser.run("return [document.documentElement.scrollWidth, innerWidth]") in ([width, width], [width - 15, width]), name
        assert (browser.background() > 600) is not dark
        for chart in browser.find("main svg"):
            if chart.is_displayed():
                assert chart.size["width"] > 200 and chart.size["height"] > 100
        pictures.append(browser.screenshot(name))
    assert browser.run("return [document.images.length, document.querySelectorAll('b').length]") == [0, 0]
    assert browser.driver.title.startswith("specforge: first, ")
    assert set(browser.requests()) == {browser.url}
    assert browser.driver.get_log("browser") == []
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 20_000 for picture in pictures)


def test_the_legend_hides_and_shows_a_run(browser: Browser) -> None:
    browser.show(1280)
    button, line = browser.find("button[data-run='1']")[0], browser.find("#training svg path.r1")[0]
    assert line.is_displayed()
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert not any(thing.is_displayed() for thing in browser.find("main .r1"))
    assert browser.find("#training svg path.r0")[0].is_displayed()
    assert not browser.find("header .r1")[0].is_displayed()
    browser.screenshot("one-hidden")
    ngram = browser.find("#training svg path.ngram.line")[0]
    for other in browser.find("button[data-run='0'], button[data-run='2']"):
        assert ngram.is_displayed(), "it belongs to all runs on these rows"
        other.click()
    assert not ngram.is_displayed()
    button.click()
    assert ngram.is_displayed()
    assert line.is_displayed() and button.get_attribute("aria-pressed") == "true"


def test_tabs_by_click_and_arrow(browser: Browser) -> None:
    browser.show(360)
    first, second, third = browser.find("#confidence [role=tab]")
    panes = browser.find("#confidence [role=tabpanel]")
    assert [pane.is_displayed() for pane in panes] == [True, False, False]
    browser.bring(second)
    second.click()
    assert [pane.is_displayed() for pane in panes] == [False, True, False]
    assert (first.get_attribute("aria-selected"), second.get_attribute("aria-selected")) == ("false", "true")
    second.send_keys("\ue014")  # arrow to the right
    assert [pane.is_displayed() for pane in panes] == [False, False, True] and browser.run("return document.activeElement") == third


def test_the_pointer_says_values(browser: Browser) -> None:
    """At the end of the curves: the step, and the value of each run there."""
    browser.show(1280)
    chart, tip = browser.find("#training svg")[0], browser.find(".tip")[0]
    browser.bring(chart)
    ActionChains(browser.driver).move_to_element_with_offset(chart, int(chart.size["width"] * 0.44), 40).perform()
    assert tip.text.splitlines() == ["optimiser step 20", "n-gram: 1.375", "first: 1.750", f"{HOSTILE}: 1.300", "third: 1.125"]
    bar = browser.find("#acceptance rect.r0")[0]
    browser.bring(bar)
    ActionChains(browser.driver).move_to_element(bar).perform()
    assert tip.text == "first: 20 rounds accept 0, share 0.500"
    assert browser.driver.get_log("browser") == []


def test_the_keys_say_values(browser: Browser) -> None:
    """Two steps to the right along the loss, one back; escape and leaving end it."""
    browser.show(360)
    chart, tip = browser.find("#training svg")[1], browser.find(".tip")[0]
    browser.bring(chart)
    chart.send_keys("\ue014\ue014\ue014")
    assert tip.text.splitlines()[:3] == ["optimiser step 20", "first, training: 2.000", "first, held out: 2.500"]
    chart.send_keys("\ue012\ue012")
    assert tip.text.splitlines()[:2] == ["optimiser step 0", "first, training: 4.000 (at 10)"], "the nearest that it has"
    chart.send_keys("\ue00c")
    assert not tip.is_displayed()


def test_what_was_drafted_wrongly_can_be_seen(browser: Browser) -> None:
    browser.show(1280)
    button, own = browser.find("[data-refusals]")[0], browser.find("[data-refused]")[0]
    seen = "return getComputedStyle(arguments[0], '::before').content"
    assert browser.run(seen, own) == "none"
    browser.bring(button)
    button.click()
    assert browser.run(seen, own) not in ("none", "normal") and button.get_attribute("aria-pressed") == "true"
    browser.screenshot("drafted-wrongly")


CONTRAST = """
const part = (value) => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
const style = getComputedStyle(document.documentElement);
const luminance = (name) => {
  const [r, g, b] = style.getPropertyValue(name).match(/[0-9a-f]{2}/g).map((byte) => part(parseInt(byte, 16) / 255));
  return .2126 * r + .7152 * g + .0722 * b;
};
const ratio = (one, other) => {
  const [dark, bright] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (bright + .05) / (dark + .05);
};
const least = (names) => Math.min(...names.flatMap((name) => ["--paper", "--card"].map((ground) => ratio(name, ground))));
const runs = [...Array(8).keys()].map((run) => `--c${run}`);
return [least(["--ink", "--soft"]), ratio("--tip", "--tip-ink"), least(runs), least(["--ngram"])];
"""


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(browser: Browser, dark: bool) -> None:
    """Of the web's accessibility guidelines (WCAG 2.2): 4.5 for text, 3 for lines."""
    browser.show(1280, dark=dark)
    text, tip, runs, ngram = browser.run(CONTRAST)
    assert text >= 4.5 and tip >= 4.5 and runs >= 3 and ngram >= 3
