"""Markdown in which every value is shown as the text that it is, whatever characters it holds."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from dylo_moe.utils.harmless import harmless


class Markdown(str):
    """Text that is Markdown already and is not escaped again."""


def plain(value: Any) -> Markdown:
    """A value as text in one line, for a table or a sentence."""
    if isinstance(value, Markdown):
        return value
    text = " ".join(harmless(str(value)).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore inside a word means nothing in Markdown, so that names such as expert_0 stay readable.
    return Markdown(re.sub(r"([\\|*`~\[\]]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text))


def code(value: Any) -> Markdown:
    """A value in the letters of code; a backtick in it becomes an apostrophe."""
    return Markdown("`" + " ".join(harmless(str(value)).replace("`", "'").split()) + "`")


def markdown_table(titles: Sequence[Any], rows: Sequence[Sequence[Any]], *, right: Collection[int] = ()) -> str:
    """A table, each of whose cells is escaped.

    Args:
        right: the columns that are aligned to the right.
    """
    rule = ["--:" if place in right else "---" for place in range(len(titles))]
    lines = [[_cell(title) for title in titles], rule, *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:
    """A bar inside code would end the cell too."""
    return value.replace("|", "\\|") if isinstance(value, Markdown) else plain(value)
