"""Plots of a finished run, written as PNG files."""

from __future__ import annotations

import json
from pathlib import Path

from dylo_moe.training.metrics import MeterReading


def write_plots(folder: Path, metrics: Path, readings: dict[str, MeterReading]) -> list[Path]:
    """losses.png (training and held-out loss per dataset over steps) and routing.png (experts x datasets)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for index, domain in enumerate(readings):
        label: str | None = domain
        for key, style in ((f"loss_{domain}", "-"), (f"eval_{domain}_loss", "o--")):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=f"C{index}", label=label)
                label = None  # a run may be too short to log a training loss
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title="training (lines) and held-out (dots) loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "losses.png", dpi=120)
    plt.close(figure)

    experts = list(next(iter(readings.values())).shares)
    shares = [[reading.shares[expert] for reading in readings.values()] for expert in experts]
    figure, axes = plt.subplots(figsize=(1.6 * len(readings) + 2.5, 0.6 * len(experts) + 2))
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(readings)), list(readings), rotation=20, ha="right")
    axes.set_yticks(range(len(experts)), experts)
    for row, cells in enumerate(shares):
        for column, share in enumerate(cells):
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.5 else "black")
    axes.set_title("share of held-out tokens")
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(folder / "routing.png", dpi=120)
    plt.close(figure)
    return [folder / "losses.png", folder / "routing.png"]
