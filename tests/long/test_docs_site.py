"""The site that `scripts/docs.sh` builds: without a warning, whole, and on its own; and what is wrong with a page stops the build."""

import dataclasses
import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from specforge.config import RankingConfig, RunConfig
from specforge.config.methods import METHODS
from tests.chromium import needs_chromium, started_chromium
from tests.doc_pages import ROOT

pytestmark = pytest.mark.long
LOADED = {
    "audio": ("src",), "embed": ("src",), "iframe": ("src",), "image": ("href", "xlink:href"), "img": ("src", "srcset"),
    "input": ("src",), "link": ("href",), "object": ("data",), "script": ("src",), "source": ("src", "srcset"), "track": ("src",),
    "use": ("href", "xlink:href"), "video": ("poster", "src"),
}  # fmt: skip
"""Attributes whose address a browser fetches by itself."""
ELSEWHERE = re.compile(r"(?:^|,)\s*(?:\w+:)?//")
IN_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?\s*(?:\w+:)?//[^\s\"')]*")


class Fetched(HTMLParser):
    """Collects what a page fetches from other places."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_style = tag == "style"
        for name, value in attrs:
            if name == "style":
                self.elsewhere += IN_STYLE.findall(value or "")
            elif (name in LOADED.get(tag, ()) or tag == "base") and ELSEWHERE.search(value or ""):
                self.elsewhere.append(f"<{tag} {name}={value}>")

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.elsewhere += IN_STYLE.findall(data)


def elsewhere(path: Path) -> list[str]:
    """What a page or a style sheet fetches from other places."""
    if path.suffix == ".css":
        return IN_STYLE.findall(path.read_text())
    page = Fetched()
    page.feed(path.read_text())
    return page.elsewhere


def build(checkout: Path, site: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SPECFORGE_DOCS_VENV": str(ROOT / ".venv-docs"), "SPECFORGE_PYTHON": sys.executable}
    words = [str(checkout / "scripts" / "docs.sh"), str(site)]
    return subprocess.run(words, env=environment, check=False, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{folder}/index.html\n"
    return folder


def test_it_loads_nothing_from_elsewhere(site: Path) -> None:
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css", ".svg")]
    assert len([path for path in files if path.suffix == ".html"]) > 25
    assert {str(path): found for path in files if (found := elsewhere(path))} == {}


@pytest.mark.parametrize(
    "fetches",
    [
        '<script src="https://x.org/a.js"></script>',
        "<script src=//x.org/a.js></script>",
        '<link rel="preconnect" href="https://x.org">',
        '<link rel="stylesheet" href="HTTPS://x.org/a.css">',
        '<img alt="a" src="http://x.org/a.png">',
        '<img src="a.png" srcset="a.png 1x, https://x.org/a.png 2x">',
        '<p style="background: url(https://x.org/a.png)">',
        "<style>@font-face { src: url( '//x.org/a.woff2') }</style>",
        '<style>@import "https://x.org/a.css";</style>',
        '<base href="https://x.org/">',
        '<svg><image href="https://x.org/a.png"/></svg>',
    ],
)
def test_what_a_page_fetches_is_seen(fetches: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(f'<html><body><a href="https://x.org">x</a>{fetches}</body></html>')
    assert len(elsewhere(tmp_path / "page.html")) == 1


def test_what_a_style_sheet_fetches_is_seen(tmp_path: Path) -> None:
    sheet = tmp_path / "a.css"
    sheet.write_text("a{b:url(data:image/png;base64,AA//AA)}@font-face{src:url(//x.org/a.woff2)}@import url('https://x.org/b.css')")
    assert elsewhere(sheet) == ["url(//x.org/a.woff2", "url('https://x.org/b.css"]


def test_every_key_of_a_configuration_is_in_the_reference(site: Path) -> None:
    sections = [
        field.default_factory()
        for kind in (RunConfig, RankingConfig)
        for field in dataclasses.fields(kind)
        if callable(field.default_factory)
    ]
    for page, kinds in {
        "configuration": {RunConfig, RankingConfig, *map(type, sections)},
        "methods": {base for entry in METHODS.values() for base in entry.options.__mro__ if dataclasses.is_dataclass(base)},
    }.items():
        shown = set(re.findall(r'id="(specforge[\w.]+)"', (site / "api" / f"{page}.html").read_text()))
        for kind in kinds:
            own = [f"{kind.__module__}.{kind.__name__}.{name}" for name in kind.__annotations__]
            assert [name for name in own if name not in shown] == [], page


def test_no_section_of_a_docstring_has_an_unknown_title(site: Path) -> None:
    """Of such a section a box is made that can be folded, without a warning."""
    assert [str(page) for page in (site / "api").glob("*.html") if "<details" in page.read_text()] == []


class Served(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Served, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Chrome]:
    with started_chromium(tmp_path / "profile") as driver:
        yield driver


def show(chromium: Chrome, url: str, width: int, scheme: str) -> None:
    """The page anew, as wide as a screen of so many CSS pixels, on a system with that colour scheme; waits for its paper."""
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    chromium.get(url)
    paper = {"light": "rgb(255, 255, 255)", "dark": "rgb(30, 33, 41)"}[scheme]
    colour = "return getComputedStyle(document.body).backgroundColor"
    WebDriverWait(chromium, 30).until(lambda shown: shown.execute_script(colour) == paper, f"{url}: its paper is not {scheme}")


@needs_chromium
def test_it_is_read_on_a_phone_in_the_dark_searched_and_asks_nobody_else(address: str, chromium: Chrome) -> None:
    for page in ("concepts", "troubleshooting", "api/configuration"):
        for width, scheme in ((1280, "light"), (1280, "dark"), (360, "dark")):
            show(chromium, f"{address}{page}.html", width, scheme)
            wide, inner = chromium.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
            assert wide <= inner, f"{page} is {wide} pixels wide on a screen of {width}"

    chromium.find_element(By.CSS_SELECTOR, "label.md-header__button[for=__search]").click()
    field = chromium.find_element(By.CSS_SELECTOR, "input.md-search__input")
    WebDriverWait(chromium, 30).until(lambda _: field.is_displayed())
    field.send_keys("fewer accepted tokens at a temperature")
    found = WebDriverWait(chromium, 60).until(lambda shown: shown.find_elements(By.CSS_SELECTOR, ".md-search-result__item"))
    assert "Troubleshooting" in found[0].text

    messages = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = {message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"}
    assert [url for url in asked if url.startswith(("http", "ws")) and not url.startswith(address)] == []
    assert f"{address}search/search_index.json" in asked
    assert chromium.get_log("browser") == []


FAULTY = '''"""A module."""


def halved(number: int) -> int:
    """Half of it.

    Args:
        nmber: an even one.
    """
    return number // 2
'''


def test_what_is_wrong_with_a_page_stops_the_build(tmp_path: Path) -> None:
    """By the project's own settings and script: a link, a heading, a picture, a parameter, a name and a page that is not in the list."""
    settings = re.sub(r"(?ms)^nav:\n.*?\n\n", "nav: [index.md]\n\n", (ROOT / "mkdocs.yml").read_text())
    (tmp_path / "mkdocs.yml").write_text(settings)
    for name in ("scripts/docs.sh", "docs/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "scripts" / "docs.sh").chmod(0o755)
    page = tmp_path / "docs" / "index.md"
    page.write_text("# Page\n\n[well](#page)\n")
    assert build(tmp_path, tmp_path / "site").returncode == 0

    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "docs" / "forgotten.md").write_text("# Forgotten\n")
    page.write_text("# Page\n\n[a](nowhere.md) [b](#no-heading) [c][faulty.doubled] ![d](picture.png)\n\n::: faulty\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for named in ("'nowhere.md'", "'#no-heading'", "'faulty.doubled'", "'picture.png'", "'nmber' does not appear", "- forgotten.md"):
        assert named in done.stderr, done.stderr
