"""A page taken apart, and a text that would run if it were written into one as it is."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from .browser import BROWSER, open_page

HOSTILE = "<script>document.title='ran'</script><img src='http://outside.invalid/x.png' onerror=\"alert('&amp;')\">"
KNOWN_TAGS = {
    *("html", "head", "meta", "title", "link", "style", "body", "main", "section", "h1", "h2", "p", "div", "span", "b"),
    *("i", "ul", "li", "table", "tr", "th", "td", "figure", "figcaption", "details", "summary", "pre"),
    *("svg", "g", "path", "text", "defs", "use", "a"),
}
"""All that a page of ours is made of."""


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


VOID = {"meta", "link"}
"""Elements without an end tag."""


class Reader(HTMLParser):
    """Tags, attributes, and the text that is directly inside each element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.opened: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.inside: list[int] = []
        """The elements that are open now, by their places in `opened`."""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.opened.append((tag, dict(attrs)))
        self.attributes += attrs
        self.texts.append("")
        if tag not in VOID:
            self.inside.append(len(self.opened) - 1)

    def handle_endtag(self, tag):
        while self.inside and self.opened[self.inside.pop()][0] != tag:
            pass

    def handle_data(self, data):
        if self.inside:
            self.texts[self.inside[-1]] += data

    def of(self, tag: str) -> list[tuple[dict[str, str], str]]:
        return [(attrs, text) for (name, attrs), text in zip(self.opened, self.texts, strict=True) if name == tag]


def shown_and_written(page: Path, folder: Path) -> tuple[Reader, Reader]:
    """What a real browser makes of a page, and what was written; it asked the network for nothing and ran nothing."""
    opened = open_page(BROWSER, page, folder)
    assert opened.requests == [] and opened.console == []
    shown = Reader(opened.dom)
    assert "script" not in shown.tags and "img" not in shown.tags
    return shown, Reader(read(page))
