"""Charts of a training log, drawn by matplotlib: lines over optimizer steps, and a tinted grid of shares.

A run writes them as PNG files into its `plots` folder, and `dylora report` puts them as SVG into its page. They are
here, not in `report`, because `report` is the higher layer: a training run may not import from it.
Matplotlib takes half a second to import, so that happens only when something is drawn.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.lines import Line2D

COLOURS = ("#0072b2", "#d55e00", "#00856a", "#b8569a", "#b07a00", "#4a4fb5", "#5f6b73")
"""Colours of series: Okabe and Ito's palette, which colour-blind people can distinguish, darkened for white paper."""

DASHES = ("solid", (0, (6, 3)), (0, (2, 3)), (0, (8, 3, 2, 3)))
"""Line styles: where there are more series than colours, the colours begin again with the next style."""

TEXT, AXIS, GRID, HEAT = "#5d6870", "#8a939b", "#e3e7ea", "#0b5fa5"
"""Colours of labels, of axes, of grid lines and empty cells, and of a cell whose share is 1."""

SETTINGS = {
    "font.size": 13,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.edgecolor": AXIS,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": False,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
    "grid.color": GRID,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "lines.scale_dashes": False,
    "legend.frameon": False,
    "path.simplify": False,  # every logged point stays on the line
    "text.parse_math": False,  # a dataset may be called "$x$"
    "svg.fonttype": "none",  # texts stay texts, which can be searched and copied
}
"""Matplotlib's settings for a chart, on top of its defaults."""


TINIEST, LARGEST = 1e-280, 1e300
"""An axis takes a number below the first for 0, as matplotlib does from about 1e-287 on, and ends at the second."""

SMALLEST_RANGE = 1e-5
"""The smallest range of an axis, relative to its largest number."""


class Series(NamedTuple):
    """One line, or with `dots` separate points."""

    name: str
    points: list[tuple[float, float | None]]
    """(step, value) of each log; None where the value is not finite, which is a gap in the line."""
    colour: int
    """The index of the dataset or expert that the series belongs to; it gives the colour and the line style."""
    dots: bool = False

    @property
    def known(self) -> list[tuple[float, float]]:
        """The points that have a value; one past the end of every axis is drawn at that end."""
        return [(step, min(max(value, -LARGEST), LARGEST)) for step, value in self.points if value is not None]

    @property
    def alone(self) -> list[tuple[float, float]]:
        """The points that have a value, but no neighbour with one; no line shows them."""
        values = [None, *(value for _, value in self.points), None]
        has_neighbour = [
            before is not None or after is not None
            for value, before, after in zip(values[1:], values, values[2:], strict=False)
            if value is not None
        ]
        return [point for point, beside in zip(self.known, has_neighbour, strict=True) if not beside]

    @property
    def has_line(self) -> bool:
        """Whether there is a line to draw: neighbours that both have a value, which are not to be dots."""
        return not self.dots and len(self.alone) < len(self.known)


@contextmanager
def drawing(*, salt: str = "") -> Iterator[None]:
    """Within this context charts look the same on every machine, whatever its matplotlibrc says.

    Args:
        salt: what the identifiers inside an SVG are derived from, in place of a random number.
    """
    import matplotlib.style

    with matplotlib.style.context(["default", SETTINGS | {"svg.hashsalt": salt}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # such a letter is drawn as a box, or by the browser
        yield


def printable(text: str) -> str:
    """A text as it can be drawn: control characters become a replacement character."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def colour(index: int) -> str:
    """The colour of the index-th dataset or expert."""
    return COLOURS[index % len(COLOURS)]


def ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Round, evenly spaced numbers from at or below `low` to at or above `high`.

    A range of less than a hundred-thousandth of its numbers (more, where these have a long power of ten) is widened:
    its ticks would need too many digits, and a line that is flat to the eye belongs in the middle of the chart.

    Args:
        most: the largest number of ticks, at least 5.
    """
    from matplotlib.ticker import MaxNLocator

    size = max(abs(low), abs(high))
    if size < TINIEST:
        return [0.0, 0.5, 1.0]
    exponent = math.floor(math.log10(size))
    unit = 10.0**exponent
    low, high = low / unit, high / unit
    # A power of ten with more digits leaves fewer to the number before it.
    smallest = SMALLEST_RANGE * 10.0 ** (len(str(abs(exponent))) - 1)
    if high - low < smallest * size / unit:
        low, high = low - abs(low) * 0.1, high + abs(high) * 0.1
    found = MaxNLocator(nbins=most - 2, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1).tick_values(low, high)
    return [float(tick) * unit for tick in found]


def tick_labels(places: Sequence[float]) -> list[str]:
    """Write evenly spaced numbers so that each has a text of its own, very large and small ones with a power of ten."""
    largest = max(map(abs, places))
    step = places[1] - places[0] if len(places) > 1 else largest
    power = 0 if largest == 0 or 1e-3 <= largest < 1e6 else math.floor(math.log10(largest))
    end, unit = f"e{power}" if power else "", 10.0**power
    digits = 0
    while abs(round(step / unit, digits) - step / unit) > 1e-3 * step / unit:
        digits += 1
    return [f"{place / unit:,.{digits}f}{end}" if abs(place) > step / 2 else "0" for place in places]


def step_ticks(first: float, last: float) -> list[float]:
    """Whole optimizer steps, evenly spaced, from `first` to `last`; of a single step that one."""
    from matplotlib.ticker import MaxNLocator

    if first == last:
        return [first]
    return [
        float(tick) for tick in MaxNLocator(nbins=5, integer=True).tick_values(first, last) if first <= tick <= last
    ]


def draw_lines(
    axes: Axes, series: Sequence[Series], *, floor: float | None = None, marks: Sequence[tuple[float, str]] = ()
) -> list[Line2D]:
    """Draw each series over optimizer steps; returns for each that has a value the artist to show in a legend.

    A point of a line that has no neighbour is drawn as a diamond, because a line would not show it.

    Args:
        floor: the vertical axis begins at this value or lower.
        marks: dotted horizontal lines, each with its label.
    """
    values = [value for item in series for _, value in item.known]
    if not values:
        return []
    artists = [_draw_series(axes, item) for item in series if item.known]
    for value, label in marks:
        axes.axhline(value, color=AXIS, linewidth=1, linestyle=(0, (3, 4)), clip_on=False)
        axes.annotate(
            label, (1, value), (0, 3), xycoords=axes.get_yaxis_transform(), textcoords="offset points", ha="right"
        )
    values += [value for value, _ in marks] + ([] if floor is None else [floor])
    rounded = ticks(min(values), max(values))
    axes.set_ylim(rounded[0], rounded[-1])
    axes.set_yticks(rounded, tick_labels(rounded))
    axes.grid(axis="y", clip_on=False)
    steps = [step for item in series for step, _ in item.points]
    first, last = min(steps), max(steps)
    margin = 1 if first == last else 0  # a single step is drawn in the middle
    axes.set_xlim(first - margin, last + margin)
    axes.set_xticks(step_ticks(first, last), tick_labels(step_ticks(first, last)))
    return artists


def _draw_series(axes: Axes, series: Series) -> Line2D:
    style: dict[str, Any] = {"color": colour(series.colour), "clip_on": False}
    artists = []
    if series.has_line:
        steps, known = [step for step, _ in series.points], iter(series.known)
        drawn = [math.nan if value is None else next(known)[1] for _, value in series.points]
        dashes = DASHES[series.colour // len(COLOURS) % len(DASHES)]
        artists += axes.plot(steps, drawn, linewidth=2, linestyle=dashes, **style)
    markers = series.known if series.dots else series.alone
    if markers:
        style |= {"linestyle": "none", "markeredgecolor": "white", "markeredgewidth": 1.5, "gid": "dots"}
        style |= {"marker": "o", "markersize": 9} if series.dots else {"marker": "D", "markersize": 8}
        artists += axes.plot(*zip(*markers, strict=True), **style)
    return artists[0]


def draw_shares(axes: Axes, rows: Sequence[Sequence[float | None]]) -> QuadMesh:
    """Draw a grid of cells with the first row on top: empty where the share is 0 or not known, full where it is 1."""
    import numpy as np
    from matplotlib.colors import to_rgb

    cells = np.empty((len(rows), len(rows[0]), 4))
    cells[..., :3] = to_rgb(HEAT)
    cells[..., 3] = [[share or 0 for share in row] for row in rows]
    axes.set_facecolor(GRID)
    mesh = axes.pcolormesh(cells, clip_on=False)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    return mesh
