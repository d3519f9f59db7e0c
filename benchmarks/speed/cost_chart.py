"""The table and the chart of what speed.py measured, from its JSON files.

    python benchmarks/speed/cost_chart.py PART.json [PART.json ...] [--out speed.png]

takes the parts of a run that was split and shows them as one. Of what two parts measured, the last one counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from peers import BASE, BUILD, ONE

matplotlib.use("agg")
import matplotlib.pyplot as plt

MEMORY = "peak memory of training"
RANDOM = "every token to an expert at random"
STYLES: dict[str, dict[str, Any]] = {
    "PEFT, N active": {"color": "#8c6d31", "marker": "s", "linestyle": "--"},
    "PEFT Arrow": {"color": "#7b4173", "marker": "^", "linestyle": "--"},
    "PEFT X-LoRA": {"color": "#b5442e", "marker": "v", "linestyle": "--"},
    "ours, dense": {"color": "#5a9bd4", "marker": "D", "linestyle": "-"},
    "ours, top-1": {"color": "#0b3d91", "marker": "o", "linestyle": "-"},
}

Cell = dict[str, Any]
"""variant, num_experts, work, remark, and `seconds` of each variant in the same rounds or, of memory, `bytes`."""


def ratios(cell: Cell, over: str) -> list[float]:
    """Of each round."""
    seconds = cell["seconds"]
    return [own / other for own, other in zip(seconds[cell["variant"]], seconds[over], strict=True)]


def merged(parts: Iterable[Sequence[Cell]]) -> list[Cell]:
    """The cells of several runs; the last one measured counts."""
    return list(
        {(cell["variant"], cell["num_experts"], cell["work"]): cell for part in parts for cell in part}.values()
    )


def peak(cell: Cell) -> int:
    """Bytes of the model's tensors and what a training step adds to them, those of frozen experts taken off."""
    parts = cell["bytes"]
    return parts["tensors"] + parts["step"] - parts["frozen"]


def spread(values: Sequence[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.3f} ({min(values):.2f}–{max(values):.2f})"


def shown(cell: Cell | None, over: str, one_peak: int | None) -> str:
    """A cell's text."""
    if cell is None:
        return "not measured"
    if "bytes" in cell:
        ratio = f"{peak(cell) / one_peak:.3f}" if one_peak else "not measured"
        text = f"{ratio} ({peak(cell) / 1e6:,.0f} MB)"
    elif "seconds" in cell:
        text = spread(ratios(cell, over))
    else:
        return cell["remark"]
    return f"{text}; {cell['remark']}" if cell["remark"] else text


def columns_of(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """Each column's work, and what its ratio is over: the base, and of a training step one stock adapter too."""
    works = dict.fromkeys(cell["work"] for cell in cells if not cell["work"].startswith(RANDOM))
    columns = []
    for work in sorted(works, key=lambda work: (work == MEMORY, work.startswith("generate"))):
        columns.append((work, ONE if work == MEMORY else BASE))
        if work.startswith("training"):
            columns.append((work, ONE))
    return columns


def rows_of(cells: Sequence[Cell]) -> list[tuple[str, int]]:
    """Variants in their order, each with its N."""
    order = list(BUILD)
    found = {(cell["variant"], cell["num_experts"]) for cell in cells if not cell["work"].startswith(RANDOM)}
    return sorted(found - {(BASE, 1), (ONE, 1)}, key=lambda row: (order.index(row[0]), row[1]))


def table(cells: Sequence[Cell]) -> str:
    """Markdown: one row for each variant and N, one column for each work; then the worst case."""
    found = {(cell["variant"], cell["num_experts"], cell["work"]): cell for cell in cells}
    one_memory = found.get((ONE, 1, MEMORY))
    one_peak = peak(one_memory) if one_memory else None
    columns = columns_of(cells)
    heads = [f"{work}, over {'one PEFT adapter' if over == ONE else 'base'}" for work, over in columns]
    lines = ["| | N | " + " | ".join(heads) + " |", "|---" * (2 + len(columns)) + "|"]
    for variant in (BASE, ONE):
        texts = []
        for work, over in columns:
            if work == MEMORY:
                texts.append(shown(found.get((variant, 1, MEMORY)), over, one_peak))
            else:
                texts.append(beside(cells, variant, work, over))
        lines.append(f"| {variant} | | " + " | ".join(texts) + " |")
    for variant, count in rows_of(cells):
        texts = [shown(found.get((variant, count, work)), over, one_peak) for work, over in columns]
        lines.append(f"| {variant} | {count} | " + " | ".join(texts) + " |")
    worst = [cell for cell in cells if cell["work"].startswith(RANDOM)]
    if worst:
        lines += ["", f"| {RANDOM}, forward over base | " + " | ".join(c["work"].split()[-1] for c in worst) + " |"]
        lines.append("|---" * (1 + len(worst)) + "|")
        texts = [shown(cell, BASE, None) for cell in worst]
        lines.append(f"| ours, top-1 of {worst[0]['num_experts']} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def beside(cells: Sequence[Cell], variant: str, work: str, over: str) -> str:
    """The base or the one adapter, over all rounds that it was measured in beside the others."""
    timed = [cell["seconds"] for cell in cells if cell["work"] == work and "seconds" in cell]
    own = [value for seconds in timed for value in seconds[variant]]
    if not own:
        return "not measured"
    if variant == over:
        return f"1 ({statistics.median(own):.3f} s)"
    other = [value for seconds in timed for value in seconds[over]]
    return spread([left / right for left, right in zip(own, other, strict=True)])


def chart(cells: Sequence[Cell], path: Path, *, title: str) -> None:
    """One PNG: cost against N, a panel for each work that was timed; none where nothing was."""
    works = [work for work, over in columns_of(cells) if work != MEMORY and over == BASE]
    if not works:
        return
    across = min(len(works), 2)
    down = -(-len(works) // 2)
    figure, axes = plt.subplots(down, across, figsize=(6.2 * across, 4.1 * down + 0.9), squeeze=False)
    for work, ax in zip(works, axes.flat, strict=False):
        panel(ax, [cell for cell in cells if cell["work"] == work and "seconds" in cell], work)
    for ax in list(axes.flat)[len(works) :]:
        ax.set_visible(False)
    known = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known.keys(), loc="lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.75 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def panel(ax: Any, cells: Sequence[Cell], work: str) -> None:
    """One work: medians as a line, least and most as bars."""
    counts = sorted({cell["num_experts"] for cell in cells})
    for variant, style in STYLES.items():
        own = sorted((cell for cell in cells if cell["variant"] == variant), key=lambda cell: cell["num_experts"])
        if own:
            values = [ratios(cell, BASE) for cell in own]
            middle = [statistics.median(each) for each in values]
            below = [mid - min(each) for mid, each in zip(middle, values, strict=True)]
            above = [max(each) - mid for mid, each in zip(middle, values, strict=True)]
            xs = [cell["num_experts"] for cell in own]
            ax.errorbar(xs, middle, yerr=(below, above), label=variant, capsize=2, markersize=4.5, **style)
    one = [own / base for cell in cells for own, base in zip(cell["seconds"][ONE], cell["seconds"][BASE], strict=True)]
    if one:
        ax.axhline(statistics.median(one), color="#444444", linewidth=1, linestyle=":", label=ONE)
    ax.axhline(1, color="#444444", linewidth=1, label=BASE)
    ax.set_xscale("log", base=2)
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    marks = [mark for mark in (1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100, 200) if low <= mark <= high]
    if high > 4:
        marks = [mark for mark in marks if mark not in (1.1, 1.25)]
    ax.set_yticks(marks, [f"{mark:g}" for mark in marks])
    ax.set_yticks([], minor=True)
    ax.grid(alpha=0.25)
    ax.set_title(work, fontsize=10)
    ax.set_xlabel("N, number of experts")
    ax.set_ylabel("cost, the base is 1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("speed.png"))
    arguments = parser.parse_args()
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.parts]
    headers = dict.fromkeys(part["header"] for part in parts)
    cells = merged(part["cells"] for part in parts)
    print("\n".join([*headers, "", table(cells)]))
    chart(cells, arguments.out, title=parts[0]["title"])


if __name__ == "__main__":
    main()
