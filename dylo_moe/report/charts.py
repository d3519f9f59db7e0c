"""Draw the charts of a page: those of `training.charts` as SVG inside the HTML, with each value in a hover title.

Colours become variables of the page's style sheet, so that one page is readable in light and in dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from dylo_moe.training.charts import (
    AXIS,
    COLOURS,
    DASHES,
    GRID,
    HEAT,
    TEXT,
    Series,
    colour,
    draw_lines,
    draw_shares,
    drawing,
    printable,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 440, 262
LEFT, RIGHT, TOP, BOTTOM = 60, 32, 30, 44
"""The size of a line chart and of its margins, in units of its viewBox, which are points of matplotlib; the left margin
grows with the labels of the axis."""

LETTER = 9.5
"""The width of a digit in these units, in the larger letters that a narrow screen shows."""

ROW_HEIGHT, LABEL_WIDTH, LABEL_LETTERS = 20, 130, 12
"""The height of a heatmap's row, the width of the names on its left, and how many letters of a name are shown."""

MAX_POINTS, MAX_COLUMNS = 120, 60
"""The most points of a line and columns of a heatmap; a longer log is drawn as means of neighbouring points."""

VARIABLES = {value: f"var(--c{index})" for index, value in enumerate(COLOURS)} | {
    TEXT: "var(--faint)",
    AXIS: "var(--axis)",
    GRID: "var(--grid)",
    HEAT: "var(--heat)",
    "#ffffff": "var(--surface)",
}
"""The variable of the style sheet that replaces each colour that matplotlib draws with."""

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


class Key(NamedTuple):
    """One entry of a legend."""

    name: str
    kind: str
    """The CSS classes for its colour, its line style, and whether it is drawn as a dot."""


class Chart(NamedTuple):
    """A chart of the page, with its title, caption and legend."""

    title: str
    svg: str
    """The chart as an SVG element; empty if nothing was logged."""
    caption: str = ""
    legend: Sequence[Key] = ()


def colour_class(index: int) -> str:
    """The CSS classes that give the index-th dataset or expert its colour and line style."""
    return f"s{index % len(COLOURS)} d{index // len(COLOURS) % len(DASHES)}"


def number(value: float, digits: int = 4) -> str:
    """Show a number in four digits, or as many as said, without zeros at the end; a large one as a whole number."""
    return f"{value:,.0f}" if 10 ** (digits - 1) <= abs(value) < 1e15 else f"{value:.{digits}g}"


def thinned(points: Sequence[tuple[float, float | None]], limit: int = MAX_POINTS) -> list[tuple[float, float | None]]:
    """Reduce points to at most `limit`, each the mean of equally many neighbours."""
    size = _group_size(len(points), limit)
    if size == 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(step for step, _ in group) / len(group), mean([value for _, value in group])) for group in groups]


def _group_size(count: int, limit: int) -> int:
    return max(math.ceil(count / limit), 1)


def _explained(caption: str, count: int, limit: int) -> str:
    size = _group_size(count, limit)
    return caption if size == 1 else f"{caption} Each step shown is the mean of {size} logs.".strip()


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the known values; None if none is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str,
    caption: str = "",
    floor: float | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> Chart:
    """Draw lines and dots over optimizer steps.

    Args:
        unit: what the vertical axis counts; it is written above the axis.
        floor: a value at or below which the vertical axis begins.
        marks: (value, label) of each horizontal line.
    """
    shown = [item._replace(points=thinned(item.points)) for item in series]
    caption = _explained(caption, max((len(item.points) for item in series), default=0), MAX_POINTS)
    if not any(item.known for item in shown):
        return Chart(title, "", caption)
    legend = [Key(item.name, f"{colour_class(item.colour)}{_sign(item)}") for item in shown if item.known]
    with drawing(salt=title):
        figure, axes = new_figure(HEIGHT)
        draw_lines(axes, shown, floor=floor, marks=marks)
        longest = max(len(label.get_text()) for label in axes.get_yticklabels())
        set_margins(axes, max(LEFT, 12 + LETTER * longest), TOP, HEIGHT)
        axes.text(4 / WIDTH, 1 - (TOP - 14) / HEIGHT, printable(unit), transform=figure.transFigure)
        hover = _draw_spots(axes, shown)
        return Chart(title, as_svg(figure, title, hover), caption, legend if len(series) > 1 else ())


def _sign(series: Series) -> str:
    """The CSS class of a legend's entry for a series that is drawn without a line."""
    return " point" if series.dots else "" if series.has_line else " lone"


def _draw_spots(axes: Axes, series: Sequence[Series]) -> dict[str, list[str]]:
    """Draw a spot on every point, which is invisible until the pointer is on it; returns their hover titles by gid."""
    hover = {}
    for place, item in enumerate(series):
        if item.known:
            gid, (steps, values) = f"points {place}", zip(*item.known, strict=True)
            axes.plot(steps, values, "o", color=colour(item.colour), markersize=10, clip_on=False, gid=gid)
            hover[gid] = [f"{item.name}, step {number(step)}: {number(value)}" for step, value in item.known]
    return hover


def heatmap(title: str, rows: Sequence[tuple[str, list[tuple[float, float | None]]]]) -> Chart:
    """Draw a row for each expert and a column for each logged step, with shares from 0 (pale) to 1 (full colour).

    Args:
        rows: (name, [(step, share)]) of each expert, all with the same steps.
    """
    shown = [(name, thinned(points, MAX_COLUMNS)) for name, points in rows]
    if not shown or not shown[0][1]:
        return Chart(title, "")
    steps = [number(step) for step, _ in shown[0][1]]
    with drawing(salt=title):
        height = ROW_HEIGHT * len(shown) + BOTTOM
        figure, axes = new_figure(height)
        set_margins(axes, LABEL_WIDTH, 0, height)
        draw_shares(axes, [[share for _, share in points] for _, points in shown]).set_gid("cells")
        ends = (0, len(steps) - 1) if len(steps) > 1 else (0,)
        axes.set_xticks([place + 0.5 for place in ends], [steps[place] for place in ends])
        hover = {
            "cells": [
                f"{name}, step {step}: {'not logged' if share is None else f'{share:.1%}'}"
                for name, points in shown
                for step, (_, share) in zip(steps, points, strict=True)
            ]
        }
        hover |= _draw_names(axes, [name for name, _ in shown])
        return Chart(title, as_svg(figure, title, hover), _explained("", len(rows[0][1]), MAX_COLUMNS))


def _draw_names(axes: Axes, names: Sequence[str]) -> dict[str, list[str]]:
    """Write the names of a heatmap's rows beside it, each after a square of its colour; returns the whole names."""
    left, beside = axes.get_yaxis_transform(), -(LABEL_WIDTH - 6) / (WIDTH - LABEL_WIDTH - RIGHT)
    axes.set_yticks([])
    for row, name in enumerate(names):
        label = printable(name if len(name) <= LABEL_LETTERS else f"{name[:5]}…{name[-6:]}")
        axes.plot(beside, row + 0.5, "s", color=colour(row), markersize=9, transform=left, clip_on=False)
        place: dict[str, Any] = {"xycoords": left, "textcoords": "offset points", "va": "center"}
        axes.annotate(label, (0, row + 0.5), (16 - LABEL_WIDTH, 0), gid=f"name {row}", **place)
    return {f"name {row}": [name] for row, name in enumerate(names)}


def new_figure(height: float, xlabel: str = "optimizer step") -> tuple[Figure, Axes]:
    """Make a figure of the page's charts and its axes, which `set_margins` puts into their place."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlabel(printable(xlabel))
    return figure, axes


def set_margins(axes: Axes, left: float, top: float, height: float) -> None:
    """Give the axes of a figure of this height its margins; at the bottom is room for the horizontal axis' labels."""
    axes.set_position((left / WIDTH, BOTTOM / height, (WIDTH - left - RIGHT) / WIDTH, (height - top - BOTTOM) / height))


def as_svg(figure: Figure, title: str, hover: Mapping[str, list[str]]) -> str:
    """Turn a figure into an SVG element that can stand inside HTML.

    Args:
        hover: for the gid of an artist, the hover title of each of its shapes.
    """
    figure.patch.set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(file.getvalue())
    root.remove(root[0])  # this is matplotlib's style sheet, which would apply to the whole page
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    for group in root.iter(f"{SVG}g"):
        name = group.attrib.pop("id", "")  # all charts have the same ids, but an id may occur only once in a page
        if name:
            group.set("class", re.sub(r"[_ ]?\d*$", "", name))
        if name in hover:
            _add_titles(group, hover[name])
    for element in root.iter():
        _make_short(element)
    ElementTree.register_namespace("", SVG.strip("{}"))
    ElementTree.register_namespace("xlink", LINK.split("}")[0].strip("{"))
    return ElementTree.tostring(root, encoding="unicode")


def _add_titles(group: ElementTree.Element, titles: Sequence[str]) -> None:
    """Give the shapes of a group their hover titles, in the order in which they were drawn."""
    kinds = (group.findall(f".//{SVG}{kind}") for kind in ("use", "path", "text"))
    for shape, text in zip(next(filter(None, kinds)), titles, strict=True):
        if shape.tag == f"{SVG}use":
            group.set("style", shape.attrib.pop("style"))  # once for the group instead of at each point
        title = ElementTree.Element(f"{SVG}title")
        title.text = text
        shape.insert(0, title)


def _make_short(element: ElementTree.Element) -> None:
    """Remove what the page's style sheet already says, and let it choose the colours."""
    if "style" in element.attrib:
        style = re.sub(r"font[^;]*; |; stroke-linecap: square", "", element.attrib["style"])
        element.set("style", re.sub("#[0-9a-f]{6}", lambda found: VARIABLES[found[0]], style))
    if "d" in element.attrib:
        element.set("d", " ".join(element.attrib["d"].split()))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    if element.tag != f"{SVG}text" and element.tag != f"{SVG}title":
        element.text = None
    element.tail = None
