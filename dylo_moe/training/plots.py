"""Plots of a finished run, written as PNG files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dylo_moe.training.charts import Series, draw_lines, draw_shares, drawing, printable
from dylo_moe.training.metrics import MeterReading
from dylo_moe.utils.redact import short_name

LEGEND_LETTERS, COLUMN_LETTERS, ROW_LETTERS = 64, 13, 40
"""The most letters of a line of the legend, of the name of a column and of that of a row; longer names are wrapped."""

LETTER = 0.115
"""The width of a letter in inches, on average."""


def write_plots(folder: Path, metrics: Path, readings: dict[str, MeterReading]) -> list[Path]:
    """losses.png (training and held-out loss per dataset over steps) and routing.png (experts x datasets)."""
    folder.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    with drawing():
        _plot_losses(lines, list(readings)).savefig(folder / "losses.png", dpi=120)
        _plot_routing(readings).savefig(folder / "routing.png", dpi=120)
    return [folder / "losses.png", folder / "routing.png"]


def _plot_losses(lines: list[dict[str, Any]], domains: list[str]) -> Any:
    """Draw the losses of all datasets in one chart, with a legend below it that has a column for each few names."""
    from matplotlib.figure import Figure

    series = []
    for index, domain in enumerate(domains):
        for key, dots in ((f"loss_{domain}", False), (f"eval_{domain}_loss", True)):
            points = [
                (line["step"], line[key] if math.isfinite(line[key]) else None)
                for line in lines
                if line.get(key) is not None
            ]
            item = Series(domain, points, index, dots)
            series += [item] if item.known else []
    first = [place for place, item in enumerate(series) if item.colour not in {one.colour for one in series[:place]}]
    names = [_wrapped(short_name(series[place].name), LEGEND_LETTERS) for place in first]
    columns = max(LEGEND_LETTERS // (_longest_line(names) + 6), 1)
    height = 4.5 + 0.27 * math.ceil(sum(name.count("\n") + 1 for name in names) / columns)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.add_subplot()
    artists = draw_lines(axes, series)
    axes.set(
        xlabel="optimizer step", ylabel="loss, nats per token", title="lines and diamonds: training; dots: held out"
    )
    if not series:  # a run may be too short to log a loss
        axes.set(title="no loss was logged", xticks=[], yticks=[])
    figure.legend([artists[place] for place in first], names, loc="outside lower center", ncols=columns)
    return figure


def _plot_routing(readings: dict[str, MeterReading]) -> Any:
    """Draw the share of each dataset's held-out tokens that each expert gets; no name is cut."""
    from matplotlib.figure import Figure

    experts = list(next(iter(readings.values())).shares)
    shares = [[reading.shares[expert] for reading in readings.values()] for expert in experts]
    columns = [_wrapped(short_name(name), COLUMN_LETTERS) for name in readings]
    rows = [_wrapped(name, ROW_LETTERS) for name in experts]
    left, below = LETTER * _longest_line(rows) + 0.4, 0.25 * max(name.count("\n") + 1 for name in columns) + 1
    height = 0.3 + 0.3 * max(name.count("\n") + 1 for name in rows)
    size = (max(1.6 * len(columns) + left, 4.5), height * len(rows) + below)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    draw_shares(axes, shares)
    axes.set_xticks([column + 0.5 for column in range(len(columns))], columns)
    axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
    for row, cells in enumerate(shares):
        for column, share in enumerate(cells):
            colour = "white" if share > 0.5 else "black"
            axes.text(column + 0.5, row + 0.5, f"{share:.2f}", ha="center", va="center", color=colour)
    are_all = all(reading.num_routed == reading.num_tokens for reading in readings.values())
    axes.set_title("share of held-out tokens" if are_all else "share of the tokens of held-out answers")
    return figure


def _wrapped(name: str, width: int) -> str:
    """A name as it can be drawn, in lines of at most `width` letters, broken after a sign where it has one."""
    words = re.split(r"(?<=[/_. -])", printable(name))
    lines = [""]
    for part in [word[start : start + width] for word in words for start in range(0, len(word), width)]:
        if len(lines[-1]) + len(part) <= width:
            lines[-1] += part
        else:
            lines.append(part)
    return "\n".join(lines)


def _longest_line(names: Iterable[str]) -> int:
    return max((len(line) for name in names for line in name.split("\n")), default=0)
