"""Cut long texts into pieces at paragraph borders."""

from __future__ import annotations

import re
from collections.abc import Iterator

_BORDER = re.compile(r"\s*(#+|//+|\*+)?\s*")  # an empty line, or an empty line of a comment


def cut_pieces(text: str, size: int, *, minimum: int = 1) -> list[str]:
    """Cut a text at paragraph borders into pieces of `size` characters or less.

    A paragraph longer than `size` is cut at the end of a line, and a line longer than `size` within the line. So that
    no piece has fewer than `minimum` characters, a piece may exceed `size` by that much at either end; a text shorter
    than `minimum` gives no piece. Otherwise only white space at the ends of pieces is lost.
    """
    pieces: list[str] = []
    current = ""
    for paragraph in paragraphs(text):
        for part in [paragraph] if len(paragraph) <= size else _lines_within(paragraph, size):
            if len(current) + len(part) > size and len(current.strip()) >= minimum:
                pieces.append(current)
                current = ""
            current += part
    if pieces and len(current.strip()) < minimum:
        pieces[-1] += current
    elif len(current.strip()) >= minimum:
        pieces.append(current)
    return [stripped for piece in pieces if (stripped := piece.strip("\n").rstrip())]


def paragraphs(text: str) -> Iterator[str]:
    """Split a text into runs of lines, each up to and including an empty line; together they are the whole text."""
    paragraph: list[str] = []
    for line in [*text.split("\n"), ""]:
        paragraph.append(line)
        if _BORDER.fullmatch(line):
            yield "\n".join(paragraph) + "\n"
            paragraph = []


def _lines_within(paragraph: str, size: int) -> Iterator[str]:
    for line in paragraph.splitlines(keepends=True):
        yield from (line[start : start + size] for start in range(0, len(line), size))
