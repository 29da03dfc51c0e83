"""The project's Markdown as a program sees it: blocks with their marks, commands, links and code in the running text."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("*.md")) + sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name != "experiments.md")
"""All but the log of experiments, which a program writes; `tests/bench/test_published.py` reads its commands."""
GPU = "gpu"
"""The mark of a block of commands that is not run; `run by FILE` and `smaller: WORD to WORDS; ...` are those of others."""

_FENCE = re.compile(r"^( *)```(\w*) *$")
_MARK = re.compile(r"^ *<!-- (.+) -->$")
_LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line, `mark` the comment right above it, without brackets."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def smaller(self) -> dict[str, str]:
        """Words of the block, and what a test puts in the place of each."""
        pairs = self.mark.removeprefix("smaller: ").split("; ") if self.mark.startswith("smaller: ") else []
        return {old: new for old, _, new in (pair.partition(" to ") for pair in pairs)}

    @property
    def run_by(self) -> str:
        return self.mark.removeprefix("run by ") if self.mark.startswith("run by ") else ""

    @property
    def is_run(self) -> bool:
        return self.language == "bash" and (not self.mark or bool(self.smaller))


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    mark, opened, indent, language = "", 0, "", ""
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        fence = _FENCE.match(line)
        if not opened and fence:
            opened, indent, language = number + 1, fence[1], fence[2]
            above = _MARK.match(lines[number - 2]) if number > 1 else None
            mark = above[1] if above else ""
        elif opened and fence and not fence[2]:
            text = "\n".join(each.removeprefix(indent) for each in lines[opened - 1 : number - 1])
            found.append(Block(page, opened, language, mark, text))
            opened = 0
    assert not opened, f"{page}:{opened - 1}: the block is not closed"
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks, as long in lines as the page."""
    kept, inside = [], False
    for line in page.read_text().splitlines():
        fence = _FENCE.match(line)
        kept.append("" if inside or fence else line)
        inside ^= fence is not None
    return "\n".join(kept)


def links(page: Path) -> list[str]:
    return _LINK.findall(_CODE.sub("", prose(page)))


def inline_code(page: Path) -> list[str]:
    return _CODE.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """The names of a page's headings in an address."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def commands(script: str) -> Iterator[list[str]]:
    """The words of each command of a block, with its variables of earlier lines written out and without settings before it."""
    variables: dict[str, str] = {}
    for line in script.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name} ", f"{value} ")
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.match(r"^\w+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if words:
            yield words[:-1] if words[-1] == "&" else words
