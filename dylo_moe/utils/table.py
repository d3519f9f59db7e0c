"""The one kind of table that commands print: it fits its terminal, and no number and no word in it is cut."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from dylo_moe.utils.harmless import harmless
from dylo_moe.utils.harmless_console import harmless_text
from dylo_moe.utils.words import counted

GAP = 3
"""The number of letters between two columns."""

SHORT, LONGEST = 10, 32
"""A name of `SHORT` letters is not folded, and one of more than `LONGEST` without a separator is cut there."""

MAX_TITLE_LINES, MAX_NAME_LINES = 3, 2
"""The most lines of a column's title, and of a name in the first column."""

PART = re.compile(rf"(?:[^\s_/-]|-(?![A-Za-z])){{1,{LONGEST}}}[\s_/-]*|[\s_/-]+")
"""A part of a name or a text that stays whole, with the separators behind it."""

Cell = str | Text | tuple[str | Text, ...]
"""The content of a cell. A tuple holds parts, such as a mean and its interval: in one line where there is room, and one
below the other where there is not."""


class _Row(NamedTuple):
    cells: list[tuple[Text, ...]]
    style: str
    begins_section: bool


class Table:
    """A table whose first column holds names and whose other columns hold numbers, or words where `words` says so.

    It is laid out when it is printed, for the width that there is: whole; else with long names and titles folded behind
    `_`, `-` and their like, and the parts of a cell below each other; else as several blocks of columns, each with the
    names before it. Where one column alone is too wide for the terminal, lines are longer than it, and nothing is cut.

    Args:
        title: the line above the table.
        columns: the titles of the columns.
        words: the titles of columns, besides the first, that hold words: they are aligned left, and may be folded.
    """

    def __init__(self, title: str, columns: Sequence[str | Text], *, words: Sequence[str] = ()) -> None:
        self.title = title
        self._heads = [_text(column) for column in columns]
        self._is_words = [place == 0 or head.plain in words for place, head in enumerate(self._heads)]
        self._rows: list[_Row] = []
        self._begins_section = False

    def add_row(self, *cells: Cell, style: str = "") -> None:
        """Append a row of as many cells as there are columns."""
        if len(cells) != len(self._heads):
            raise ValueError(
                f"the row has {counted(len(cells), 'cell')}; the table has {counted(len(self._heads), 'column')}"
            )
        parts = [tuple(map(_text, cell)) if isinstance(cell, tuple) else (_text(cell),) for cell in cells]
        self._rows.append(_Row(parts, style, self._begins_section))
        self._begins_section = False

    def add_section(self) -> None:
        """Draw a line between the rows so far and the next one."""
        self._begins_section = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the title and the blocks; rich calls this."""
        yield Text(harmless(self.title), style="italic")
        for block in self.blocks(options.max_width):
            width = max(options.max_width, _total(list(block.values())))
            yield from console.render(self._block(block), options.update(width=width))
            yield ""

    def blocks(self, width: int) -> list[dict[int, int]]:
        """Distribute the columns over blocks of a width; each block maps the number of a column to the column's
        width."""
        columns = list(range(len(self._heads)))
        first = {0: min(self._limits(0, width)[1], max(width // 3, self._limits(0, width)[0]))}
        if len(columns) == 1 or _total([self._limits(place, width)[0] for place in columns]) <= width:
            return [self._fit(columns, width)]
        blocks: list[list[int]] = []
        for place in columns[1:]:
            least = [*first.values(), *(self._limits(n, width)[0] for n in [*(blocks[-1] if blocks else []), place])]
            if not blocks or _total(least) > width:
                blocks.append([])
            blocks[-1].append(place)
        even = -(-(len(columns) - 1) // len(blocks))  # as many columns in each block, where they fit
        parts = [columns[start : start + even] for start in range(1, len(columns), even)]
        least = [_total([*first.values(), *(self._limits(place, width)[0] for place in part)]) for part in parts]
        return [self._fit([0, *part], width) for part in (parts if max(least) <= width else blocks)]

    def _fit(self, columns: Sequence[int], width: int) -> dict[int, int]:
        """The widths of columns that share a line: as they are where there is room, else between their limits."""
        whole = {place: self._whole(place) for place in columns}
        if _total(list(whole.values())) <= width:
            return whole
        limits = {place: self._limits(place, width) for place in columns}
        widths = {place: least for place, (least, _) in limits.items()}
        for kind in (True, False):  # the room that is left goes to words first, and to all of them alike
            waiting = [place for place in columns if self._is_words[place] == kind]
            while waiting and _total(list(widths.values())) < width:
                waiting = [place for place in waiting if widths[place] < limits[place][1]]
                for place in waiting[: width - _total(list(widths.values()))]:
                    widths[place] += 1
        return widths

    def _whole(self, place: int) -> int:
        """The width of a column with everything in one line."""
        return max(cell_len(text.plain) for text in (self._heads[place], *(_joined(cell) for cell in self._of(place))))

    def _limits(self, place: int, width: int) -> tuple[int, int]:
        """The least width of a column, in which all words and numbers are whole, and the most that is of use to it
        where the parts of a cell are below each other; `width` is that of the terminal."""
        parts = [part for cell in self._of(place) for part in cell]
        numbers = [] if self._is_words[place] else [cell_len(part.plain) for part in parts]
        words = [self._heads[place], *(parts if self._is_words[place] else [])]
        names = parts if place == 0 else []
        few_lines = [_width_of_lines(self._heads[place], MAX_TITLE_LINES)]
        few_lines += [_width_of_lines(name, MAX_NAME_LINES) for name in names]
        least = max([*map(_longest_part, words), *numbers, min(max(few_lines), width // 3)])
        return least, max([*(cell_len(text.plain) for text in words), *numbers])

    def _of(self, place: int) -> list[tuple[Text, ...]]:
        return [row.cells[place] for row in self._rows]

    def _block(self, block: dict[int, int]) -> RenderableType:
        table = RichTable(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        cells_of = [(row.cells[place], width) for row in self._rows for place, width in block.items()]
        is_stacked = any(len(cell) > 1 and cell_len(_joined(cell).plain) > width for cell, width in cells_of)
        for place, width in block.items():
            justify = "left" if self._is_words[place] else "right"
            table.add_column(folded(self._heads[place], width), width=width, justify=justify)  # type: ignore[arg-type]
        for row in self._rows:
            if row.begins_section:
                table.add_section()
            cells = [_filled(row.cells[place], width, stacked=is_stacked) for place, width in block.items()]
            table.add_row(*cells, style=row.style)
        return table


def _text(what: str | Text) -> Text:
    return Text(harmless(what)) if isinstance(what, str) else harmless_text(what)


def _joined(cell: tuple[Text, ...]) -> Text:
    return Text(" ").join(cell)


def _filled(cell: tuple[Text, ...], width: int, *, stacked: bool) -> Text:
    """A cell as it is printed: its parts behind each other, or below each other."""
    return Text("\n").join(folded(part, width) for part in (cell if stacked else (_joined(cell),)))


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _longest_part(text: Text) -> int:
    if cell_len(text.plain) <= SHORT:
        return cell_len(text.plain)
    return max(cell_len(part.rstrip()) for line in text.plain.split("\n") for part in PART.findall(line) or [""])


def _width_of_lines(text: Text, most: int) -> int:
    """The least width in which a text takes at most so many lines."""
    whole = cell_len(text.plain)
    return next(
        (width for width in range(-(-whole // most), whole) if folded(text, width).plain.count("\n") < most), whole
    )


def folded(text: Text, width: int) -> Text:
    """Break a text into lines of a width, only between words and behind the separators of a name."""
    lines = [Text()]
    ends = list(itertools.accumulate(len(part) for part in PART.findall(text.plain)))
    for part in text.divide(ends[:-1]):
        if lines[-1] and cell_len((lines[-1].plain + part.plain).rstrip()) > width:
            lines.append(Text())
        lines[-1].append_text(part)
    for line in lines:
        line.rstrip()
    return Text("\n").join(lines)
