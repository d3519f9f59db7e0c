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
        """The points that have a value."""
        return [(step, value) for step, value in self.points if value is not None]


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


def ticks(low: float, high: float) -> list[float]:
    """Round, evenly spaced numbers from at or below `low` to at or above `high`."""
    from matplotlib.ticker import MaxNLocator

    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a flat line is drawn in the middle
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    return [float(tick) for tick in MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


def draw_lines(
    axes: Axes, series: Sequence[Series], *, floor: float | None = None, marks: Sequence[tuple[float, str]] = ()
) -> None:
    """Draw each series over optimizer steps.

    A point without a neighbour is drawn as a dot, because a line would not show it.

    Args:
        floor: the vertical axis begins at this value or lower.
        marks: dotted horizontal lines, each with its label.
    """
    from matplotlib.ticker import MaxNLocator

    values = [value for item in series for _, value in item.known]
    if not values:
        return
    for item in series:
        _draw_series(axes, item)
    for value, label in marks:
        axes.axhline(value, color=AXIS, linewidth=1, linestyle=(0, (3, 4)), clip_on=False)
        axes.annotate(
            label, (1, value), (0, 3), xycoords=axes.get_yaxis_transform(), textcoords="offset points", ha="right"
        )
    values += [value for value, _ in marks] + ([] if floor is None else [floor])
    rounded = ticks(min(values), max(values))
    axes.set_ylim(rounded[0], rounded[-1])
    axes.set_yticks(rounded)
    axes.grid(axis="y", clip_on=False)
    steps = [step for item in series for step, _ in item.points]
    axes.set_xlim(min(steps), max(max(steps), min(steps) + 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def _draw_series(axes: Axes, series: Series) -> None:
    style: dict[str, Any] = {"color": colour(series.colour), "clip_on": False}
    steps, values = [step for step, _ in series.points], [value for _, value in series.points]
    label = printable(series.name)
    if not series.dots:
        drawn = [math.nan if value is None else value for value in values]
        dashes = DASHES[series.colour // len(COLOURS) % len(DASHES)]
        axes.plot(steps, drawn, linewidth=2, linestyle=dashes, label=label, **style)
        label = ""
    around = [None, *values, None]
    is_dot = [
        here is not None and (series.dots or (before is None and after is None))
        for before, here, after in zip(around, values, around[2:], strict=False)
    ]
    dots = [point for point, is_shown in zip(series.points, is_dot, strict=True) if is_shown]
    if dots:
        marker: dict[str, Any] = {"markersize": 9, "markeredgecolor": "white", "markeredgewidth": 1.5}
        axes.plot(*zip(*dots, strict=True), "o", label=label, gid="dots", **marker, **style)


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
