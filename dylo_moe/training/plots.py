"""Plots of a finished run, written as PNG files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dylo_moe.training.charts import Series, draw_lines, draw_shares, drawing, printable
from dylo_moe.training.metrics import MeterReading


def write_plots(folder: Path, metrics: Path, readings: dict[str, MeterReading]) -> list[Path]:
    """losses.png (training and held-out loss per dataset over steps) and routing.png (experts x datasets)."""
    folder.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    with drawing():
        _plot_losses(lines, list(readings)).savefig(folder / "losses.png", dpi=120)
        _plot_routing(readings).savefig(folder / "routing.png", dpi=120)
    return [folder / "losses.png", folder / "routing.png"]


def _plot_losses(lines: list[dict[str, Any]], domains: list[str]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    series = []
    for index, domain in enumerate(domains):
        for key, name, dots in (
            (f"loss_{domain}", domain, False),
            (f"eval_{domain}_loss", f"{domain}, held out", True),
        ):
            points = [
                (line["step"], line[key] if math.isfinite(line[key]) else None)
                for line in lines
                if line.get(key) is not None
            ]
            if points:  # a run may be too short to log a training loss
                series.append(Series(name, points, index, dots))
    draw_lines(axes, series)
    axes.set(
        xlabel="optimizer step", ylabel="loss, nats per token", title="training loss (lines) and held-out loss (dots)"
    )
    axes.legend()
    return figure


def _plot_routing(readings: dict[str, MeterReading]) -> Any:
    from matplotlib.figure import Figure

    experts = list(next(iter(readings.values())).shares)
    shares = [[reading.shares[expert] for reading in readings.values()] for expert in experts]
    figure = Figure(figsize=(1.6 * len(readings) + 2.5, 0.6 * len(experts) + 2), layout="constrained")
    axes = figure.add_subplot()
    draw_shares(axes, shares)
    names, columns = map(printable, readings), [column + 0.5 for column in range(len(readings))]
    axes.set_xticks(columns, list(names), rotation=20, ha="right")
    axes.set_yticks([row + 0.5 for row in range(len(experts))], [printable(name) for name in experts])
    for row, cells in enumerate(shares):
        for column, share in enumerate(cells):
            colour = "white" if share > 0.5 else "black"
            axes.text(column + 0.5, row + 0.5, f"{share:.2f}", ha="center", va="center", color=colour)
    axes.set_title("share of held-out tokens")
    return figure
