"""A report read back: its elements as a browser's parser sees them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = ("meta", "img", "link", "base", "br")


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list["Element"] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    def all(self, tag: str, **attributes: str) -> Iterator["Element"]:
        for child in self.children:
            if child.tag == tag and all(
                child.attributes.get(name.rstrip("_").replace("_", "-")) == value for name, value in attributes.items()
            ):
                yield child
            yield from child.all(tag, **attributes)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def panel(self, title: str) -> "Element":
        return next(figure for figure in self.all("figure") if any(head.text == title for head in figure.all("h3")))


class Reader(HTMLParser):
    """Text counts for every element around it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open = [Element("", {})]
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, "every element is closed"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.pieces.append(data)


def read(html: str) -> Element:
    reader = Reader(html)
    assert len(reader.open) == 1
    return reader.open[0]
