"""What the search of a grid found, and how the arms compare at the smaller budgets: tables, and sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dylo_moe.commands.compare.arguments import ARMS, CompareArguments
from dylo_moe.commands.compare.grid import AXES, Cell, open_ends, plain, widening
from dylo_moe.commands.compare.table import ArmLine
from dylo_moe.commands.compare.trainings import Chosen, trained_arms
from dylo_moe.report.comparison_record import LOSES, TIES, UNKNOWN, WINS
from dylo_moe.utils.markdown import markdown_table
from dylo_moe.utils.table import Table
from dylo_moe.utils.words import counted

TITLE = "loss on the rows of the search, nats per token; * is the best of its arm"


class Found(NamedTuple):
    """The result of a search."""

    losses: Mapping[tuple[str, int | None, Cell], float]
    """The loss of each arm at each budget and cell; infinity where it diverged."""
    chosen: Chosen
    rows: Mapping[str, int]
    """The number of rows of each dataset that the losses are of."""


def grid_sentences(options: CompareArguments, found: Found) -> list[str]:
    """Say what was searched, on which rows, and which arm's best lies at an end of the grid."""
    rows = ", ".join(f"{name} {count:,}" for name, count in found.rows.items())
    axes = [
        f"{AXES[name]} {', '.join(sorted(getattr(options, name), key=float))}"
        for name in AXES
        if getattr(options, name)
    ]
    where = f" at {', '.join(map(str, options.searched_steps))} optimizer steps" if options.budgets else ""
    said = [
        f"Each arm was trained at {counted(len(options.cells), 'cell')} of the same grid ({' x '.join(axes)}){where} "
        f"with seed {options.seeds[0]}, and is compared at its own best: the cell with the lowest mean loss on "
        f"{sum(found.rows.values()):,} rows ({rows}) that no seed trains or judges."
    ]
    return said + warnings(options, found)


def warnings(options: CompareArguments, found: Found) -> list[str]:
    """Say of each arm whose best cell lies at an end of the grid where to widen it."""
    rates, scales = ([float(value) for value in getattr(options, name)] for name in AXES)
    return widening(
        {
            _title(arm, steps, options): open_ends(found.chosen[arm, steps], rates, scales)
            for steps in options.searched_steps
            for arm in trained_arms(options)
        }
    )


def _title(arm: str, steps: int | None, options: CompareArguments) -> str:
    """The title of an arm, with the budget where several were searched."""
    several = len(options.searched_steps) > 1
    return ARMS[arm] + (f" at {counted(steps, 'step')}" if several and steps is not None else "")


def grid_rows(options: CompareArguments, found: Found) -> tuple[list[str], list[list[str]]]:
    """The titles and the rows of the table of all cells: a row for each arm and scale, a column for each rate."""
    rates = list(dict.fromkeys(cell.learning_rate for cell in options.cells))
    scales = list(dict.fromkeys(cell.scale for cell in options.cells))
    rows = []
    for steps in options.searched_steps:
        for arm in trained_arms(options):
            for scale in scales:
                figures = [
                    _shown(found.losses[arm, steps, cell], is_best=cell == found.chosen[arm, steps])
                    for cell in (Cell(rate, scale) for rate in rates)
                ]
                rows.append([_title(arm, steps, options), "" if scale is None else plain(scale), *figures])
    titles = ["its own" if rate is None else f"rate {plain(rate)}" for rate in rates]
    return ["arm", "scale", *titles], rows


def _shown(loss: float, *, is_best: bool) -> str:
    return (f"{loss:.4f}" if math.isfinite(loss) else "diverged") + ("*" if is_best else " ")


def grid_table(options: CompareArguments, found: Found) -> Table:
    """Make the table of all cells for a terminal."""
    titles, rows = grid_rows(options, found)
    table = Table(TITLE, titles)
    for number, row in enumerate(rows):
        is_first = number == 0 or rows[number - 1][0] != row[0]
        if is_first and number and len(options.scales) > 1:
            table.add_section()
        table.add_row(*row)
    return table


def grid_markdown(options: CompareArguments, found: Found) -> str:
    """Write the table of all cells as Markdown."""
    titles, rows = grid_rows(options, found)
    return f"## The search: {TITLE}\n\n" + markdown_table(titles, rows, right=range(1, len(titles))) + "\n"


def grid_json(options: CompareArguments, found: Found) -> dict[str, Any]:
    """Write the search as JSON values; a loss that is not finite is null."""
    return {
        "seed": int(options.seeds[0]),
        "rows": dict(found.rows),
        "cells": [
            {
                "arm": arm,
                "title": ARMS[arm],
                "steps": steps,
                **cell._asdict(),
                "loss": loss if math.isfinite(loss) else None,
                "best": cell == found.chosen[arm, steps],
            }
            for (arm, steps, cell), loss in found.losses.items()
        ],
        "warnings": warnings(options, found),
    }


def budget_sentences(lines: Mapping[int | None, Sequence[ArmLine]]) -> list[str]:
    """Say in a sentence for each of the smaller budgets against what ours wins there."""
    words = {WINS: "wins against", TIES: "ties with", LOSES: "loses to", UNKNOWN: "cannot be told from"}
    said = []
    for steps, found in lines.items():
        parts = []
        for verdict, verb in words.items():
            names = [
                f"{ARMS[line.arm]} ({line.difference.mean.value:+.4f})"
                for line in found
                if line.verdict == verdict and line.difference is not None
            ]
            if names:
                parts.append(f"{verb} {', '.join(names)}")
        said.append(f"At {steps:,} optimizer steps ours {'; '.join(parts)}. In brackets: the other's loss minus ours.")
    return said
