"""The grid of learning rates and scales that a comparison searches for every arm, and what is chosen from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

RATE, SCALE = "learning_rates", "scales"
"""The flags of the two axes."""

AXES = {RATE: "learning rate", SCALE: "scale"}
"""What each axis is called in sentences."""


class Cell(NamedTuple):
    """One learning rate and one scale s of an adapter's delta s B A x; None: the ones of the flags."""

    learning_rate: float | None = None
    scale: float | None = None

    @property
    def folder(self) -> str:
        """The name of the folder of the cell's trainings; empty where both values are those of the flags."""
        values = {"rate": self.learning_rate, "scale": self.scale}
        return "-".join(f"{name}-{plain(value)}" for name, value in values.items() if value is not None)

    @property
    def title(self) -> str:
        """The cell in words; empty where both values are those of the flags."""
        values = {"learning rate": self.learning_rate, "scale": self.scale}
        return ", ".join(f"{name} {plain(value)}" for name, value in values.items() if value is not None)


OWN_CELL = Cell()
"""The cell of a comparison without a grid: the flags' own learning rate and scale."""


class OpenEnd(NamedTuple):
    """An end of a grid that an arm's best cell lies at, so that a better one may lie beyond."""

    axis: str
    """The flag that holds the values: `RATE` or `SCALE`."""
    value: float
    is_highest: bool
    beyond: float
    """The value to add: as far from the end as the end is from its neighbour, as a ratio."""


def plain(value: float) -> str:
    """A value as it is typed, without zeros at its end."""
    return f"{value:.12g}"


def grid_cells(rates: Sequence[float], scales: Sequence[float]) -> list[Cell]:
    """Every pair of a learning rate and a scale, in rising order; an empty axis has the value of the flags."""
    own: list[float | None] = [None]
    return [Cell(rate, scale) for scale in sorted(scales) or own for rate in sorted(rates) or own]


def best_cell(losses: Mapping[Cell, float]) -> Cell | None:
    """The cell with the lowest loss, of equal ones the first; None where no loss is finite."""
    finite = [cell for cell, loss in losses.items() if math.isfinite(loss)]
    return min(finite, key=losses.__getitem__, default=None)


def open_ends(best: Cell, rates: Sequence[float], scales: Sequence[float]) -> list[OpenEnd]:
    """The ends of the grid that the best cell lies at; an axis of one value was not searched, and has none."""
    found = []
    for axis, value, values in ((RATE, best.learning_rate, sorted(rates)), (SCALE, best.scale, sorted(scales))):
        if value is None or len(values) < 2:
            continue
        if value == values[-1]:
            found.append(OpenEnd(axis, value, True, value * value / values[-2]))
        if value == values[0]:
            found.append(OpenEnd(axis, value, False, value * value / values[1]))
    return found


def widening(found: Mapping[str, Sequence[OpenEnd]]) -> list[str]:
    """Say of each end of the grid whose best cells lie at it, and how to widen the grid there.

    Args:
        found: the open ends of each arm, by its title.
    """
    titles: dict[OpenEnd, list[str]] = {}
    for title, ends in found.items():
        for end in ends:
            titles.setdefault(end, []).append(title)
    return [
        f"The best {AXES[end.axis]} lies at the {'highest' if end.is_highest else 'lowest'} of the grid, "
        f"{plain(end.value)}, for {', '.join(names)}: a better one may lie beyond. Add {end.beyond:.3g} to "
        f"--{end.axis} and start again; what is trained is kept."
        for end, names in titles.items()
    ]
