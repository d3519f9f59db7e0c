"""Small charts as SVG inside a page: lines over steps, and a heatmap over steps. No script; values in hover titles.

Colours are CSS classes `s0`, `s1`, ... of `STYLE`, so that one page reads well in light and in dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

Scale = Callable[[float], float]
"""From a step or value to its place in the picture."""

WIDTH, HEIGHT = 440, 230

LEFT, RIGHT, TOP, BOTTOM = 60, 12, 8, 26

MAX_POINTS, MAX_COLUMNS = 120, 60
"""Of one line, of a heatmap; longer ones are drawn as means of neighbours."""

ROW_HEIGHT, LABEL_WIDTH, LABEL_LETTERS = 20, 108, 12

LIGHT = ("#0072b2", "#d55e00", "#00856a", "#b8569a", "#b07a00", "#4a4fb5", "#5f6b73")

DARK = ("#56b4e9", "#f0803c", "#2cc295", "#dd8fc0", "#e6b035", "#9aa0f5", "#a9b4bb")
"""After Okabe and Ito's palette, told apart by the colour-blind; made darker or lighter for their background."""

DASHES = ("none", "6 3", "2 3", "8 3 2 3")

BORDERS = ("solid", "dashed", "dotted", "double")
"""Beyond the last colour they begin again, with another kind of line."""


def _variables(colours: Sequence[str]) -> str:
    return "".join(f"--c{index}:{colour};" for index, colour in enumerate(colours))


STYLE = (
    f":root{{{_variables(LIGHT)}--heat:#0b5fa5;--axis:#8a939b;--grid:#e3e7ea}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_variables(DARK)}--heat:#6cb8f2;--axis:#7c868e;--grid:#2b3238}}}}"
    + "".join(f".s{index}{{--c:var(--c{index})}}" for index in range(len(LIGHT)))
    + "".join(f".d{index}{{--dash:{dash};--border:{BORDERS[index]}}}" for index, dash in enumerate(DASHES))
    + """
svg text{fill:var(--faint);font-size:13px}
svg .grid{stroke:var(--grid)} svg .axis{stroke:var(--axis)}
svg .line{fill:none;stroke:var(--c);stroke-width:2;stroke-dasharray:var(--dash);stroke-linejoin:round}
svg .dot{fill:var(--c);stroke:var(--surface);stroke-width:1.5}
svg .hover{fill:transparent} svg .hover:hover{fill:var(--c)}
svg .mark{stroke:var(--axis);stroke-dasharray:3 4}
svg .cell{fill:var(--heat)} svg .back{fill:var(--grid)} svg .swatch{fill:var(--c)}
"""
)


class Series(NamedTuple):
    """One line, or with `dots` separate points."""

    name: str
    points: list[tuple[float, float | None]]
    """(step, value); None: a value that is not finite, where the line breaks."""
    colour: int
    """The series' place among its kind."""
    dots: bool = False


def colour_class(index: int) -> str:
    """The classes that give the index-th dataset or expert its colour and kind of line."""
    return f"s{index % len(LIGHT)} d{index // len(LIGHT) % len(DASHES)}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` steps apart."""
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """Four digits, without a tail of zeros."""
    if 0 < abs(value) < 1e-3:
        exponent = math.floor(math.log10(abs(value)))
        return f"{value / 10.0**exponent:.4g}e{exponent}" if exponent > -300 else "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def thinned(points: Sequence[tuple[float, float | None]], limit: int = MAX_POINTS) -> list[tuple[float, float | None]]:
    """At most `limit` points: the means of as many neighbours as it takes."""
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
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    caption: str = "",
    floor: float | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """A figure of lines over optimizer steps, or a sentence where there is nothing to draw.

    Args:
        floor: the vertical axis begins here or lower.
        marks: horizontal lines with their labels.
    """
    drawn = [item._replace(points=thinned(item.points)) for item in series]
    caption = _explained(caption, max((len(item.points) for item in series), default=0), MAX_POINTS)
    values = [value for item in drawn for _, value in item.points if value is not None]
    if not values:
        return _figure(title, "<p class='none'>Nothing was logged for this yet.</p>", caption)
    values += [value for value, _ in marks] + ([] if floor is None else [floor])
    steps = [step for item in drawn for step, _ in item.points]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    y_ticks = ticks(min(values), max(values))

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        parts.append(f"<path class='grid' d='M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}'/>")
        parts.append(f"<text x='{LEFT - 6}' y='{y(tick) + 4:.1f}' text-anchor='end'>{number(tick)}</text>")
    parts += _step_axis(first, last, x, HEIGHT - BOTTOM)
    for value, label in marks:
        parts.append(f"<path class='mark' d='M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}'/>")
        parts.append(f"<text x='{WIDTH - RIGHT}' y='{y(value) - 4:.1f}' text-anchor='end'>{escape(label)}</text>")
    for item in drawn:
        parts.append(f"<g class='{colour_class(item.colour)}'>{_drawn(item, x, y)}</g>")
    body = f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(title)}'>{''.join(parts)}</svg>"
    shown = [(item.name, item.colour, item.dots) for item in series if item.points]
    return _figure(title, (legend(shown) if len(series) > 1 else "") + body, caption)


def _drawn(series: Series, x: Scale, y: Scale) -> str:
    parts, path, pen = [], "", "M"
    for step, value in series.points:
        if value is None:
            pen = "M"
            continue
        path, pen = f"{path}{pen}{x(step):.1f} {y(value):.1f}", "L"
        is_dot = series.dots or len(series.points) == 1
        told = f"{series.name}, step {number(step)}: {number(value)}"
        parts.append(
            f"<circle class='{'dot' if is_dot else 'hover'}' cx='{x(step):.1f}' cy='{y(value):.1f}' "
            f"r='{4.5 if is_dot else 5}'><title>{escape(told)}</title></circle>"
        )
    return ("" if series.dots else f"<path class='line' d='{path}'/>") + "".join(parts)


def _step_axis(first: float, last: float, x: Scale, bottom: float) -> list[str]:
    inside = [tick for tick in ticks(first, last) if first <= tick <= last and float(tick).is_integer()]
    parts = [f"<path class='axis' d='M{x(first):.1f} {bottom}H{x(last):.1f}'/>"]
    for tick in inside:
        anchor = "end" if x(tick) > WIDTH - 30 else "middle"
        label = f"step {number(tick)}" if tick == inside[0] else number(tick)
        parts.append(f"<text x='{x(tick):.1f}' y='{bottom + 17}' text-anchor='{anchor}'>{label}</text>")
    return parts


def heatmap(title: str, rows: Sequence[tuple[str, list[tuple[float, float | None]]]], *, caption: str = "") -> str:
    """A figure with a row for each expert and a column for each logged step; shares from 0 (pale) to 1 (full).

    Args:
        rows: (name, [(step, share)]), all with the same steps.
    """
    drawn = [(name, thinned(points, MAX_COLUMNS)) for name, points in rows]
    if not drawn or not drawn[0][1]:
        return _figure(title, "<p class='none'>Nothing was logged for this yet.</p>", caption)
    caption = _explained(caption, len(rows[0][1]), MAX_COLUMNS)
    steps = [step for step, _ in drawn[0][1]]
    width = (WIDTH - LABEL_WIDTH - RIGHT) / len(steps)
    bottom = ROW_HEIGHT * len(drawn)
    parts = [f"<rect class='back' x='{LABEL_WIDTH}' y='0' width='{width * len(steps):.1f}' height='{bottom}'/>"]
    for row, (name, points) in enumerate(drawn):
        top = row * ROW_HEIGHT
        label = name if len(name) <= LABEL_LETTERS else f"{name[:5]}…{name[-6:]}"
        parts.append(
            f"<rect class='swatch {colour_class(row)}' x='0' y='{top + 5}' width='9' height='9' rx='2'/>"
            f"<text x='14' y='{top + 14}'>{escape(label)}<title>{escape(name)}</title></text>"
        )
        for column, (step, share) in enumerate(points):
            told = "not logged" if share is None else f"{share:.1%}"
            parts.append(
                f"<rect class='cell' x='{LABEL_WIDTH + column * width:.2f}' y='{top + 1}' width='{width + 0.3:.2f}' "
                f"height='{ROW_HEIGHT - 2}' fill-opacity='{share or 0:.3f}'>"
                f"<title>{escape(name)}, step {number(step)}: {told}</title></rect>"
            )
    ends = [(0, "start", f"step {number(steps[0])}"), (len(steps) - 1, "end", number(steps[-1]))]
    for column, anchor, label in ends if len(steps) > 1 else ends[:1]:
        at = LABEL_WIDTH + width * (column + (anchor == "end"))
        parts.append(f"<text x='{at:.1f}' y='{bottom + 16}' text-anchor='{anchor}'>{label}</text>")
    box = f"0 0 {WIDTH} {bottom + 22}"
    body = f"<svg viewBox='{box}' role='img' aria-label='{escape(title)}'>{''.join(parts)}</svg>"
    return _figure(title, body, caption)


def legend(names: Sequence[tuple[str, int, bool]]) -> str:
    """Which colour is whose: (name, its place, whether it is drawn as dots)."""
    items = "".join(
        f"<li><i class='{colour_class(index)}{' point' if is_dot else ''}'></i>{escape(name)}</li>"
        for name, index, is_dot in names
    )
    return f"<ul class='legend'>{items}</ul>"


def _figure(title: str, body: str, caption: str) -> str:
    below = f"<p class='caption'>{escape(caption)}</p>" if caption else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{body}{below}</figure>"
