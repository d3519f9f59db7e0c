"""Draw values with their intervals as charts of a page: one below the other, or as curves over what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dylo_moe.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    LETTER,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Key,
    as_svg,
    colour_class,
    new_figure,
    number,
    set_margins,
)
from dylo_moe.training.charts import AXIS, COLOURS, DASHES, colour, drawing, printable, tick_labels, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INTERVAL_HEIGHT = 42
"""The height of a row that shows an interval below its name."""

SHIFT = 0.012
"""How far apart the points of neighbouring curves stand that belong to one place, as a share of the axis."""


MIN_SPACE = 0.22
"""The least distance of two labels of a horizontal axis, as a share of it."""


class Measured(NamedTuple):
    """A value with the ends of its interval, as one row of a chart."""

    name: str
    value: float
    ends: tuple[float, float] | None
    """None where the interval is not known."""
    colour: int


def interval_chart(title: str, rows: Sequence[Measured], *, unit: str, mark: float | None = None) -> Chart:
    """Draw a row for each value: a dot, its interval as a line, and its name above them.

    Args:
        unit: what the horizontal axis counts.
        mark: where a vertical line stands, with which the values are compared.
    """
    shown = [row for row in rows if math.isfinite(row.value)]
    if not shown:
        return Chart(title, "")
    known = [end for row in shown for end in (row.value, *(row.ends or ()))] + ([] if mark is None else [mark])
    places = ticks(min(known), max(known), most=5)
    with drawing(salt=title):
        height = INTERVAL_HEIGHT * len(shown) + BOTTOM
        figure, axes = new_figure(height, unit)
        set_margins(axes, RIGHT, 0, height)
        axes.set(xlim=(places[0], places[-1]), ylim=(len(shown), 0), yticks=[])
        axes.set_xticks(places, tick_labels(places))
        axes.grid(axis="x", clip_on=False)
        if mark is not None:
            axes.axvline(mark, color=AXIS, linewidth=1, linestyle=(0, (3, 4)), clip_on=False)
        hover = {}
        for place, row in enumerate(shown):
            style: dict[str, Any] = {"color": colour(row.colour), "clip_on": False}
            if row.ends is not None:
                axes.plot(row.ends, [place + 0.7] * 2, linewidth=3, solid_capstyle="butt", **style)
            dot: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 1.5, "gid": f"dots {place}"}
            axes.plot([row.value], [place + 0.7], "o", markersize=10, **dot, **style)
            hover[f"dots {place}"] = [f"{row.name}: {_with_ends(row)}"]
            axes.text(0, place + 0.4, printable(row.name), transform=axes.get_yaxis_transform())
        return Chart(title, as_svg(figure, title, hover))


def curve_chart(
    title: str, curves: Sequence[Sequence[tuple[float, Measured]]], *, unit: str, xlabel: str, caption: str = ""
) -> Chart:
    """Draw a line for each curve through its values, each with its interval as an upright line.

    Values of several curves at one place stand a little beside each other, so that their intervals can be told apart.

    Args:
        curves: the (place, value) of each curve, in rising order.
        unit: what the vertical axis counts; it is written above the axis.
        xlabel: what the horizontal axis counts.
    """
    known = [[(place, row) for place, row in curve if math.isfinite(row.value)] for curve in curves]
    known = [curve for curve in known if curve]
    if not known:
        return Chart(title, "", caption)
    places = [place for curve in known for place, _ in curve]
    first, last = min(places), max(places)
    apart = SHIFT * ((last - first) or 1)
    moved = [
        [(place + (index - (len(known) - 1) / 2) * apart, row) for place, row in curve]
        for index, curve in enumerate(known)
    ]
    bounds = [bound for curve in known for _, row in curve for bound in (row.value, *(row.ends or ()))]
    rounded = ticks(min(bounds), max(bounds))
    with drawing(salt=title):
        figure, axes = new_figure(HEIGHT, xlabel)
        axes.grid(axis="y", clip_on=False)
        axes.set_ylim(rounded[0], rounded[-1])
        axes.set_yticks(rounded, tick_labels(rounded))
        margin = apart * len(known)
        axes.set_xlim(first - margin, last + margin)
        shown_places = _spaced(sorted(set(places)), least=MIN_SPACE * (last - first))
        axes.set_xticks(shown_places, [f"{place:,.0f}" for place in shown_places])
        longest = max(len(label.get_text()) for label in axes.get_yticklabels())
        set_margins(axes, max(LEFT, 12 + LETTER * longest), TOP, HEIGHT)
        axes.text(4 / WIDTH, 1 - (TOP - 14) / HEIGHT, printable(unit), transform=figure.transFigure)
        hover = {}
        for index, (curve, shown) in enumerate(zip(moved, known, strict=True)):
            _draw_intervals(axes, curve, gid=f"dots {index}")
            hover[f"dots {index}"] = [f"{row.name}, {place:,.0f}: {_with_ends(row)}" for place, row in shown]
        legend = [Key(curve[0][1].name, colour_class(curve[0][1].colour)) for curve in known]
        return Chart(title, as_svg(figure, title, hover), caption, legend)


def _draw_intervals(axes: Axes, curve: Sequence[tuple[float, Measured]], *, gid: str) -> None:
    """Draw a curve as a line, each of its values as a dot, and the value's interval as an upright line."""
    index = curve[0][1].colour
    style: dict[str, Any] = {"color": colour(index), "clip_on": False}
    places, values = [place for place, _ in curve], [row.value for _, row in curve]
    axes.plot(places, values, linewidth=2, linestyle=DASHES[index // len(COLOURS) % len(DASHES)], **style)
    for place, row in curve:
        if row.ends is not None:
            axes.plot([place] * 2, row.ends, linewidth=2, solid_capstyle="butt", **style)
    style |= {"markeredgecolor": "white", "markeredgewidth": 1.5, "gid": gid}
    axes.plot(places, values, "o", markersize=9, **style)


def _spaced(places: Sequence[float], *, least: float) -> list[float]:
    """Of rising places the last, and before it those that are far enough from the next one kept."""
    kept: list[float] = []
    for place in reversed(places):
        if not kept or kept[-1] - place >= least:
            kept.append(place)
    return kept[::-1]


def _with_ends(row: Measured) -> str:
    return number(row.value) + ("" if row.ends is None else f" [{', '.join(map(number, row.ends))}]")
