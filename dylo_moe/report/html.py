"""The building blocks of a page: jinja2 templates that escape every text, tables, and numbers in words.

A page is one file. It needs no network and runs no script.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from dylo_moe.report.run_record import finite
from dylo_moe.training.charts import COLOURS
from dylo_moe.utils.harmless import harmless
from dylo_moe.utils.redact import open_settings

if TYPE_CHECKING:
    from jinja2 import Environment

REPORT = "report.html"
"""The name of the page in a folder."""

DARK_COLOURS = ("#56b4e9", "#f0803c", "#2cc295", "#dd8fc0", "#e6b035", "#9aa0f5", "#a9b4bb")
"""The hues of `charts.COLOURS` in lighter shades, which are readable on a dark page."""

BORDERS = ("solid", "dashed", "dotted", "double")
"""The line styles of `charts.DASHES`, as CSS names them for borders."""


class Cell(NamedTuple):
    """One cell of a table."""

    text: str
    kind: str = ""
    """The CSS classes; `n` is a number, which is aligned to the right."""
    percent: int | None = None
    """The strength of its tint in percent, for the classes that have one."""
    hover: str = ""
    key: str = ""
    """The CSS classes of a square of colour in front of the text."""
    link: str = ""


@dataclass
class HtmlTable:
    """A table: rows of cells, and the titles of its columns."""

    titles: Sequence[str]
    rows: list[list[Cell]]
    kind: str = ""
    """The CSS class; `map` is a table of small cells without text, whose titles stand upright."""

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def right(self) -> set[int]:
        """The indices of the columns that hold numbers."""
        numbers = {"n", "tint", "blank"}
        return {place for row in self.rows for place, cell in enumerate(row) if numbers & set(cell.kind.split())}


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dylo_moe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"light": COLOURS, "dark": DARK_COLOURS, "borders": BORDERS}
    return environment


def render(template: str, **values: Any) -> str:
    """Render a page with one of the templates of this package; no text in it can steer what shows the page."""
    return harmless(_environment().get_template(template).render(values))


def page_link(page: Path, home: Path) -> str:
    """The address of another page, relative to the folder `home` of the page that links to it."""
    return "./" + quote(Path(os.path.relpath(page, home.resolve())).as_posix())


def settings_table(settings: dict[str, Any]) -> HtmlTable:
    """The table of a run's flags, without those whose names say that they are secret."""
    rows = [[Cell(name), Cell(value, "long")] for name, value in open_settings(settings).items()]
    return HtmlTable(["flag", "value"], rows)


def tinted(value: float, scale: float, text: str, *, hover: str, kind: str = "") -> Cell:
    """Make a cell with a tint: bluer the further `value` is below 0 (better, for a loss), more orange above.

    Args:
        scale: the size of `value` from which on the tint is full.
        hover: the hover title of the cell.
    """
    percent = round(50 * min(abs(value) / scale, 1)) if math.isfinite(value) else 50
    kinds = filter(None, ("tint", "better" if value < 0 else "worse", kind))
    return Cell(text, " ".join(kinds), percent, hover)


def count(value: Any) -> str:
    """Show a number in full."""
    known = finite(value)
    return "not known" if known is None else f"{known:,.0f}"


def share(value: Any) -> str:
    """Show a share from 0 to 1 as a percentage; empty if it is not known."""
    known = finite(value)
    return "" if known is None else f"{known:.1%}"


def in_short(value: Any) -> str:
    """Show a large number in three digits and a letter."""
    known = finite(value)
    if known is None:
        return "not known"
    size, letter = next((pair for pair in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if abs(known) >= pair[0]), (1.0, ""))
    return f"{known:,.0f}" if size == 1 else f"{known / size:.3g} {letter}"
